"""What the documentation shows of results/growth.json: tables between two marks of a page, and plots beside the page.

The same numbers always give the same bytes. Only `draw` needs matplotlib.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results" / "growth.json"
PAGE: Final = Path(__file__).parents[1] / "docs" / "explanation" / "performance.md"
BEGIN: Final = "<!-- growth:begin -->\n"
END: Final = "<!-- growth:end -->"
_AXES: Final = {"sessions": "sessions of one user", "users": "users", "processes": "processes"}
_INK: Final = "#808080"
"""Legible on white and on black; so are the colours."""
_STYLES: Final = {
    "cached read": ("#3b82c4", "o"),
    "hot read": ("#3b82c4", "o"),
    "cold read": ("#d0662b", "s"),
    "its statement": ("#2a9d74", "^"),
    "its statement, a change waiting": ("#b5679b", "D"),
    "its statement, to be recounted": ("#b08a1e", "v"),
    "write": ("#5fa8d3", "P"),
    "fold": ("#c94f4f", "X"),
}
_FLAT: Final = 3.0
"""What never costs more than this many times the reference is drawn as a ratio, too."""


def draw() -> None:
    """Draw everything from the recorded numbers."""
    recorded = json.loads(RESULTS.read_text("utf-8"))
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{page_part(recorded)}{END}{after}", "utf-8")
    for name, section in recorded.items():
        _plot(name, section, plot_path(name))


def page_part(recorded: Mapping[str, Any]) -> str:
    """Give what stands between the marks."""
    return "".join(f"\n{_table(name, section)}\n" for name, section in recorded.items()) + "\n"


def plot_path(name: str) -> Path:
    """Give the file of a plot."""
    return PAGE.with_name(f"growth-{name}.svg")


def digest(section: Mapping[str, Any]) -> str:
    """Give what a plot carries of the numbers that it was drawn from."""
    return f"sha256:{hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()}"


def _table(name: str, section: Mapping[str, Any]) -> str:
    values, reference = section["values"], section["reference"]
    lines = [
        f"![{_AXES[name]}]({plot_path(name).name})",
        "",
        f"| {' | '.join((_AXES[name], *values))} |",
        f"|---{'|---' * len(values)}|",
        f"| {_size(section, reference)}, the reference | "
        + " | ".join(f"{_number(of[reference]['median'])} {section['unit']}" for of in values.values())
        + " |",
    ]
    for size in section["sizes"]:
        if size != reference:
            cells = (_spread(_ratios(of, size, reference)) for of in values.values())
            lines.append(f"| {_size(section, size)} | {' | '.join(cells)} |")
    machine, effort = section["machine"], section["effort"]
    lines += [
        "",
        f"{effort['rounds']} rounds on {machine['cores']} cores, {machine['python']}; "
        f"before them {machine['busy_percent_before']:.0f} % busy with other work. {section['note']}".rstrip(),
    ]
    return "\n".join(lines)


def _size(section: Mapping[str, Any], size: str) -> str:
    megabytes = section.get("mib", {}).get(size)
    return f"{section['sizes'][size]:,}" + ("" if megabytes is None else f" ({megabytes:,} MiB)")


def _ratios(of: Mapping[str, Any], size: str, reference: str) -> list[float]:
    """Give one ratio per round: both sides met the same moment."""
    return [one / other for one, other in zip(of[size]["values"], of[reference]["values"], strict=True)]


def _spread(ratios: Sequence[float]) -> str:
    middle, low, high = (f"{_number(each(ratios))}x" for each in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _plot(name: str, section: Mapping[str, Any], path: Path) -> None:
    """Draw medians with whiskers from the lowest to the highest: ratios on the left, absolute numbers on the right."""
    import matplotlib as mpl  # noqa: PLC0415 - only who draws has it
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    reference = section["reference"]
    sizes = sorted(section["sizes"], key=lambda size: (section["sizes"][size], size))
    compared = [size for size in sizes if size != reference]
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        ratio, absolute = figure.subplots(1, 2)
        for operation, of in section["values"].items():
            colour, marker = _STYLES[operation]
            look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "capsize": 3}
            drawn = {size: _ratios(of, size, reference) for size in compared}
            if max(statistics.median(ratios) for ratios in drawn.values()) <= _FLAT:
                _whiskers(ratio, section, drawn, look)
            everything = {size: of[size]["values"] for size in (sizes if reference == "1" else compared)}
            _whiskers(absolute, section, everything, {**look, "label": operation})
        ratio.axhline(1, color=_INK, linewidth=0.8, linestyle=":")
        ratio.set_ylabel("multiple of the reference")
        absolute.set_ylabel("microseconds" if section["unit"] == "µs" else "answers per second")
        for axes in (ratio, absolute):
            axes.set_xlabel(_AXES[name])
            if name == "processes":
                axes.set_xticks([section["sizes"][size] for size in sizes])
            else:
                axes.set_xscale("log")
        ratio.set_ylim(bottom=0)
        if section["unit"] == "µs":
            absolute.set_yscale("log")
        else:
            absolute.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=4)
        metadata = {"Title": _AXES[name], "Identifier": digest(section), "Date": None, "Creator": None}
        figure.savefig(path, transparent=True, metadata=metadata)


def _whiskers(axes: Any, section: Mapping[str, Any], values: Mapping[str, Sequence[float]], look: Any) -> None:  # noqa: ANN401 - matplotlib's
    middle = [statistics.median(each) for each in values.values()]
    low = [median - min(each) for median, each in zip(middle, values.values(), strict=True)]
    high = [max(each) - median for median, each in zip(middle, values.values(), strict=True)]
    axes.errorbar([section["sizes"][size] for size in values], middle, yerr=(low, high), **look)

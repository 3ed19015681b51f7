"""Measures the documented figures in one run, prints a table and writes the raw numbers as JSON."""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.allocations import allocations
from benchmarks.environment import Cores, describe, opened
from benchmarks.figures import FULL, QUICK, Figure
from benchmarks.figures import MEASUREMENTS as READS
from benchmarks.live import live
from benchmarks.overload import overload
from benchmarks.processor import processor
from benchmarks.resources import resources
from benchmarks.steady import load
from benchmarks.triggers import long_history, writes

MEASUREMENTS: Final = {
    **READS,
    "live": live,
    "writes": writes,
    "history": long_history,
    "load": load,
    "overload": overload,
    "resources": resources,
    "allocations": allocations,
    "processor": processor,
}
_RESULTS: Final = Path(__file__).parent / "results"
_NOISE: Final = 0.15
_VERDICTS: Final = {True: "met", False: "MISSED", None: ""}


def main() -> None:
    """Run what the command line asks for; exits with 1 when a figure is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rounds: shows that it works, not how fast it is")
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="leave out the rest"
    )
    parser.add_argument("--name", help="file of the raw results; by default made from the machine, none with --quick")
    parser.add_argument(
        "--check", action="store_true", help="compare the ratios with the recorded ones, and fail where they are worse"
    )
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    console = Console(width=None)
    figures: list[Figure] = []
    machine = describe(Cores.choose())
    with console.status("starting PostgreSQL and Valkey") as status, opened() as env:
        for number, name in enumerate(options.only, 1):
            status.update(f"measuring {name} ({number} of {len(options.only)})")
            figures += MEASUREMENTS[name](env, effort)
    console.print(_table(figures))
    console.print(f"Before the run the machine was {machine['busy_percent_before']:.0f} % busy with other work.")
    if options.check:
        worse = _worse(figures, options.name or _default_name(machine))
        console.print("\n".join(worse) or "No ratio is worse than recorded.")
        raise SystemExit(1 if worse else 0)
    name = options.name or (None if options.quick else _default_name(machine))
    if name is not None:
        _RESULTS.mkdir(exist_ok=True)
        content = {"machine": machine, "effort": asdict(effort), "figures": [_summary(figure) for figure in figures]}
        (_RESULTS / f"{name}.json").write_text(json.dumps(_rounded(content), indent=2) + "\n", "utf-8")
    raise SystemExit(1 if any(figure.met is False for figure in figures) else 0)


def _table(figures: list[Figure]) -> Table:
    table = Table("figure", "target", "median", "lowest", "highest", "verdict", title="Goodstanding, measured")
    for figure in figures:
        unit = f" {figure.unit}" if figure.unit not in {"", "x"} else figure.unit
        low, middle, high = (f"{each(figure.values):.2f}{unit}" for each in (min, statistics.median, max))
        table.add_row(figure.name, figure.target, middle, low, high, _VERDICTS[figure.met])
        if figure.note:
            table.add_row(f"  {figure.note}")
    return table


def _worse(figures: list[Figure], name: str) -> list[str]:
    """Name the ratios whose median is worse than the worst that was recorded, by more than machines differ."""
    path = _RESULTS / f"{name}.json"
    if not path.exists():
        return [f"nothing is recorded in {path.name}: run make bench first, or name a file with --name"]
    recorded = {figure["name"]: figure for figure in json.loads(path.read_text("utf-8"))["figures"]}
    worse = []
    for figure in figures:
        known = recorded.get(figure.name)
        if known is None or figure.unit != "x" or not figure.target:
            continue
        now = statistics.median(figure.values)
        if figure.target.startswith(">="):
            bound, is_worse = known["lowest"] * (1 - _NOISE), now < known["lowest"] * (1 - _NOISE)
        else:
            bound, is_worse = known["highest"] * (1 + _NOISE), now > known["highest"] * (1 + _NOISE)
        if is_worse:
            worse.append(f"{figure.name}: {now:.2f}x, recorded {known['median']:.2f}x, bound {bound:.2f}x")
    return worse


def _summary(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "target": figure.target,
        "met": figure.met,
        "median": statistics.median(figure.values),
        "lowest": min(figure.values),
        "highest": max(figure.values),
        "values": list(figure.values),
        "raw": figure.raw,
    }


def _default_name(machine: dict[str, Any]) -> str:
    words = (machine["system"], machine["machine"], machine["cores"], "cores", *machine["python"].split()[1:])
    return "-".join(str(word).lower() for word in words)


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {str(name): _rounded(one) for name, one in value.items()}
        case list() | tuple():
            return [_rounded(one) for one in value]
        case _:
            return value


if __name__ == "__main__":
    main()

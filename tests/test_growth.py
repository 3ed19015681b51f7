"""What the documentation shows of growth is what was measured: `python -m benchmarks.growth --draw` alters nothing."""

import json
from typing import Any, Final

import pytest
from benchmarks.drawing import BEGIN, END, PAGE, RESULTS, digest, page_part, plot_path

RECORDED: Final[dict[str, Any]] = json.loads(RESULTS.read_text("utf-8"))


def test_the_tables_are_those_of_the_raw_numbers() -> None:
    """What stands between the two marks of the page is made from the recorded numbers."""
    page = PAGE.read_text("utf-8")
    assert (1, 1) == (page.count(BEGIN), page.count(END))
    assert page_part(RECORDED) == page.partition(BEGIN)[2].partition(END)[0]


@pytest.mark.parametrize("name", RECORDED)
def test_a_plot_is_of_the_raw_numbers(name: str) -> None:
    """A plot carries the digest of the numbers that it was drawn from, and neither a date nor its maker."""
    plot = plot_path(name).read_text("utf-8")
    assert f"<dc:identifier>{digest(RECORDED[name])}</dc:identifier>" in plot
    assert "<dc:date>" not in plot
    assert "Matplotlib" not in plot


@pytest.mark.parametrize("name", RECORDED)
def test_summaries_are_those_of_their_rounds(name: str) -> None:
    """Every size of every operation has at least five rounds, and the summary that they give."""
    section = RECORDED[name]
    for sizes in section["values"].values():
        assert section["sizes"].keys() == sizes.keys()
        for summary in sizes.values():
            values = sorted(summary["values"])
            assert 5 <= section["effort"]["rounds"] == len(values)
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            assert (values[0], pytest.approx(middle), values[-1]) == (
                summary["lowest"],
                summary["median"],
                summary["highest"],
            )

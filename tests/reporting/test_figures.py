"""Static figures and what methods look like in all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from fedlora.figures.chart import Axis, format_value
from fedlora.figures.style import COLOURS, MARKERS, style_of
from fedlora.methods import methods
from fedlora.reporting.charts import charts
from fedlora.reporting.comparison import axis_label, compare
from fedlora.reporting.plotly_charts import plot
from fedlora.reporting.runs import read_runs
from tests.reporting.folders import make_run
from tests.reporting.packed import unpacked

METHODS = methods()

FIGURES = (
    *("score-epsilon", "score-bytes", "pareto", "score-rounds", "score-network"),
    *("bytes-rounds", "drift", "fairness", "partition"),
    *("front-bytes", "front-epsilon", "front-seconds"),
)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_there_as_png_and_svg(compared: tuple[Path, Path], name: str) -> None:
    folder = compared[1] / "report" / "figures"
    assert {path.stem for path in folder.iterdir()} == set(FIGURES)
    picture = matplotlib.image.imread(folder / f"{name}.png")
    assert picture.shape[1] >= 1200
    assert picture.std() > 0.01
    assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


def test_every_known_method_looks_different() -> None:
    styles = [style_of(name) for name in METHODS]
    assert len({(style.colour, style.marker) for style in styles}) == len(METHODS)
    for method, style in zip(METHODS.values(), styles, strict=True):
        assert style.colour in (COLOURS.get(method.color), method.color)
        assert style.marker is MARKERS[method.marker]


def test_colours_are_told_apart_by_colour_blind_eyes() -> None:
    first = [style_of(name).colour for name in ("fed-sb", "ffa-lora", "fedit", "flexmore")]
    for matrix in DEFICIENCIES:
        seen = [apply(matrix, linear(colour)) for colour in first]
        for a, b in itertools.combinations(seen, 2):
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 0.05


# How protanopes, deuteranopes and tritanopes see linear RGB: Machado, Oliveira, Fernandes 2009, severity 1.
DEFICIENCIES = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


def linear(colour: str) -> tuple[float, ...]:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)


def apply(matrix: tuple[tuple[float, ...], ...], colour: tuple[float, ...]) -> list[float]:
    return [sum(a * b for a, b in zip(row, colour, strict=True)) for row in matrix]


@given(st.text(max_size=10))
def test_an_unknown_method_always_looks_the_same(name: str) -> None:
    assert style_of(name) == style_of(name)


@given(st.floats(0, 1e13), st.sampled_from(["percent", "bytes", "seconds", "integer", "number"]))
def test_a_shown_number_is_the_number(value: float, form: str) -> None:
    text = format_value(value, form)
    digits, _, unit = text.partition(" ")
    scale = {"%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit, 1)
    least = {"percent": 0.0005, "integer": 0.5}.get(form, 0.5 if unit in ("B", "s") and value > 1 else 0)
    assert float(digits.replace(",", "")) * scale == pytest.approx(value, rel=0.0051, abs=least * 1.001 + 1e-300)


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=8), st.sampled_from(["bytes", "seconds", "number"]))
def test_ticks_of_a_logarithmic_axis_are_few_and_within_reach(values: list[float], form: str) -> None:
    axis = Axis.of(values, form, True, None)
    if axis.log:
        assert axis.ticks is not None
        assert 2 <= len(axis.ticks) <= 6
        assert all(min(values) * 0.79 <= tick <= max(values) * 1.26 for tick in axis.ticks)
        assert len(set(axis.ticks.values())) == len(axis.ticks)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.booleans())
def test_no_axis_of_shares_leaves_0_to_100_percent(values: list[float], from_zero: bool) -> None:
    low, high = Axis.of(values, "percent", False, None, from_zero).range or (-1, 2)
    assert 0 <= low <= high <= 1
    inside = [value for value in values if 0 <= value <= 1]
    assert all(low <= value <= high for value in inside)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_ticks_of_rounds_are_few_and_whole(low: int, more: int) -> None:
    ticks = Axis.of([float(low), float(low + more)], "integer", False, None).ticks or {}
    assert len(ticks) <= 7
    assert all(low <= tick <= low + more and tick.is_integer() for tick in ticks)


def test_many_configurations_are_small_multiples_with_the_same_axes(tmp_path: Path) -> None:
    shapes = itertools.product(("fed-sb", "fedit"), (2, 8, 32), (5, 20))
    for number, (method, rank, clients) in enumerate(shapes):
        changes = {"method.name": method, "method.rank": rank, "data.partition.clients": clients}
        make_run(tmp_path / str(number), number, changes)
    comparison = compare(read_runs([tmp_path]))
    assert [len(facet.groups) for facet in comparison.facets.values()] == [4, 4, 4]
    (chart,) = (chart for chart in charts(comparison) if chart.name == "pareto")
    assert [panel.title for panel in chart.panels] == ["rank 2", "rank 8", "rank 32"]
    for panel in chart.panels:
        labels = [series.label for series in panel.series]
        assert labels == ["front", *(f"{m} · {c} clients" for m in ("fed-sb", "fedit") for c in (5, 20))]
        # A point still tells which group it is.
        names = {name for series in panel.series for name in series.of}
        assert names == {g.name for g in comparison.groups if f"· {panel.title} ·" in g.name}
    assert len({panel.x_axis.range for panel in chart.panels}) == 1
    assert len({panel.y_axis.range for panel in chart.panels}) == 1


def test_few_configurations_stay_together(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 1, {"method.rank": 2})
    make_run(tmp_path / "b", 2, {"method.rank": 8})
    comparison = compare(read_runs([tmp_path]))
    assert comparison.facets == {"": comparison}


@pytest.mark.parametrize(
    ("axis", "value", "shown"),
    [
        ("data.partition.clients", None, "clients default"),
        ("data.partition.alpha", None, "alpha default"),
        ("model.name", "/cache/models--acme--small/snapshots/0a1b2c", "acme/small"),
        ("data.test", "/home/me/data/test.csv", "test test.csv"),
        ("method.target_modules", ["query", "/a/b"], "target modules query b"),
        ("data.name", "asset:reuters-r8", "asset:reuters-r8"),
    ],
)
def test_titles_show_neither_paths_nor_none(axis: str, value: object, shown: str) -> None:
    assert axis_label(axis, value) == shown


def test_scores_by_domain_are_a_table_of_the_means_over_seeds(tmp_path: Path) -> None:
    for seed, factor in ((0, 1), (1, 3)):
        path = make_run(tmp_path / str(seed), seed, {"run.seed": seed}, task="causal-lm")
        summary = json.loads((path / "summary.json").read_text())
        summary["final"]["by_domain"] = {
            "public": {"law": 10.0 * factor, "news": 40.0},
            "north": {"law": 5.0 * factor, "news": 80.0},
        }
        (path / "summary.json").write_text(json.dumps(summary))
    (chart,) = (chart for chart in charts(compare(read_runs([tmp_path]))) if chart.name == "domains")
    (trace,) = plot(chart.panels[0])["data"]
    assert (trace["x"], trace["y"]) == (["law", "news"], ["public", "north"])
    assert trace["text"] == [["20", "40"], ["10", "80"]]
    assert trace["z"] == [[0, 0], [pytest.approx(1), pytest.approx(-1)]]


def test_a_small_study_is_below_two_megabytes_and_plotly_is_whole(compared: tuple[Path, Path]) -> None:
    whole = compared[1] / "report.html"
    assert unpacked(whole.read_text(), "plotly") == get_plotlyjs()
    assert whole.stat().st_size < 2e6  # 36 runs

"""Static figures and what methods look like in all of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.figures.chart import Axis, format_value
from fedlora.figures.style import COLOURS, MARKERS, style_of
from fedlora.methods import methods

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

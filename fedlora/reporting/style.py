"""One colour and one marker for each method, the same in every figure.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can tell apart; the
two that are hard to see on white or on black are left out. Methods that share a colour differ in their markers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c8c8c",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)


@dataclass(frozen=True)
class Marker:
    """One shape in matplotlib's, plotly's and Unicode's terms."""

    matplotlib: str
    plotly: str
    glyph: str


CIRCLE, SQUARE, DIAMOND, UP, DOWN, PLUS, CROSS, LEFT, RIGHT, STAR = (
    Marker("o", "circle", "●"),
    Marker("s", "square", "■"),
    Marker("D", "diamond", "◆"),
    Marker("^", "triangle-up", "▲"),
    Marker("v", "triangle-down", "▼"),
    Marker("P", "cross", "✚"),
    Marker("X", "x", "✖"),
    Marker("<", "triangle-left", "◀"),
    Marker(">", "triangle-right", "▶"),
    Marker("*", "star", "★"),
)
MARKERS = (CIRCLE, SQUARE, DIAMOND, UP, DOWN, PLUS, CROSS, LEFT, RIGHT, STAR)


@dataclass(frozen=True)
class Style:
    """How a method looks."""

    colour: str
    marker: Marker


_KNOWN = {
    "fed-sb": Style(BLUE, CIRCLE),
    "ffa-lora": Style(VERMILION, SQUARE),
    "fedit": Style(GREEN, DIAMOND),
    "flexmore": Style(PURPLE, UP),
    "fedex-lora": Style(ORANGE, DOWN),
    "flora": Style(SKY, PLUS),
    "hetlora": Style(GREY, CROSS),
    "flexlora": Style(BLUE, LEFT),
    "rolora": Style(VERMILION, RIGHT),
    "fedsa-lora": Style(GREEN, STAR),
}

DASHES = (("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"))
"""Line styles of a method's variants in matplotlib's and plotly's terms."""


def style_of(method: str) -> Style:
    """Return a method's style; one that is not known here gets one by its name, so that it never changes."""
    number = zlib.crc32(method.encode())
    return _KNOWN.get(method, Style(COLOURS[number % len(COLOURS)], MARKERS[number // 7 % len(MARKERS)]))


LABEL_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, GREY)
"""Colours of classes, in partition pictures; they repeat beyond seven."""

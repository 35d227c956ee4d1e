"""One colour and one marker for each method, the same in every figure.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can tell apart; the
two that are hard to see on white or on black are left out. Methods that share a colour differ in their markers.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from fedlora.errors import InputError
from fedlora.methods import get_method

COLOURS = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "grey": "#8c8c8c",
}


@dataclass(frozen=True)
class Marker:
    """One shape in matplotlib's, plotly's and Unicode's terms."""

    matplotlib: str
    plotly: str
    glyph: str


MARKERS = {
    "circle": Marker("o", "circle", "●"),
    "square": Marker("s", "square", "■"),
    "diamond": Marker("D", "diamond", "◆"),
    "up": Marker("^", "triangle-up", "▲"),
    "down": Marker("v", "triangle-down", "▼"),
    "plus": Marker("P", "cross", "✚"),
    "cross": Marker("X", "x", "✖"),
    "left": Marker("<", "triangle-left", "◀"),
    "right": Marker(">", "triangle-right", "▶"),
    "star": Marker("*", "star", "★"),
}


@dataclass(frozen=True)
class Style:
    """Colour and marker of a method."""

    colour: str
    marker: Marker


DASHES = (("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"))
"""Line styles of a method's variants in matplotlib's and plotly's terms."""


def style_of(name: str) -> Style:
    """Return the style that a method declares, else one derived from its name, the same in every report.

    What belongs to no method ("") is grey.
    """
    if not name:
        return Style(COLOURS["grey"], MARKERS["circle"])
    number = zlib.crc32(name.encode())
    colour = list(COLOURS.values())[number % len(COLOURS)]
    marker = list(MARKERS.values())[number // 7 % len(MARKERS)]
    try:
        method = get_method(name)
    except InputError:  # of a package that is not installed here
        return Style(colour, marker)
    own = method.color if re.fullmatch("#[0-9a-fA-F]{6}", method.color) else COLOURS.get(method.color, colour)
    return Style(own, MARKERS.get(method.marker, marker))


LABEL_COLOURS = tuple(COLOURS[name] for name in ("blue", "orange", "green", "purple", "sky", "vermilion", "grey"))
"""Colours of classes, in partition pictures; they repeat beyond seven."""

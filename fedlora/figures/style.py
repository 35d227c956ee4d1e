"""How figures look: colours, markers, and matplotlib's settings; one colour and marker for each method.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can tell apart; the
two that are hard to see on white or on black are left out. Methods that share a colour differ in their markers.
"""

from __future__ import annotations

import colorsys
import re
import zlib
from dataclasses import dataclass
from typing import Any

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
FILLS = (("full", ""), ("none", "-open"), ("left", "-open-dot"), ("bottom", "-dot"))
"""How the markers of a method's variants are filled, in matplotlib's and plotly's terms."""


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


def class_colours(count: int) -> list[str]:
    """Return a colour for each class: of up to seven ours, of more hues around the circle, dark and light in turn."""
    if count <= len(CLASSES):
        return list(CLASSES[:count])
    parts = [colorsys.hls_to_rgb(i / count, (0.42, 0.68)[i % 2], 0.55) for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in parts]


CLASSES = tuple(COLOURS[name] for name in ("blue", "orange", "green", "purple", "sky", "vermilion", "grey"))

WORSE, SAME, BETTER = COLOURS["vermilion"], "#f4f4f4", COLOURS["blue"]
"""Ends and middle of the colours of a table of scores, beside a reference."""

PAPER, INK, SOFT, LINE, GRID = "#ffffff", "#1b1f24", "#5b6470", "#c4cad2", "#e8ebef"
"""Background, text, labels, axes and grid: those of the report's page on white, in its style sheet."""

MATPLOTLIB: Any = {
    "svg.hashsalt": "fedlora",  # with fixed ids and without a date, the same runs give the same bytes
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
"""Settings for ``matplotlib.rc_context``."""

"""The content of a figure, independent of the library that draws it (matplotlib for files, plotly for the page)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

_DODGE, _SPREAD = 1.03, 0.15
"""Between series side by side: a factor, and the most that they take of the axis together."""
_BANDS = 4
"""As many intervals can be told apart in one panel."""
_ROOM = 0.05
"""Of an axis' length, left free beside the outermost points."""


@dataclass(frozen=True)
class Series:
    """Points of one method in a panel.

    Attributes
    ----------
    method : str or None
        None if the points belong to no method, for example a class of examples.
    label : str
    x, y : list of float
    low, high : list of float, optional
        95 % interval of y, where there is one.
    hover : list of str
        Hover text of each point; may contain line breaks.
    of : list of str
        Names of the groups or runs that the points stand for.
    variant : int
        Index among the method's series, which sets dashes and open markers.
    line, markers, band : bool
        Whether to join the points, to mark them, and to draw the interval as a band instead of bars.
    strong : list of bool, optional
        Which points stand out; all by default.
    sizes : list of float, optional
        Marker sizes, in points.
    flat : bool
        Draw markers as horizontal strokes, for values of a formula.
    step : bool
        Join the points by steps: a value holds until the next point.
    colour : str, optional
        Instead of the method's.
    shades : list of float, optional
        In a table of scores, the colour of each: from -1, worse than the reference, to 1, better.
    """

    method: str | None
    label: str
    x: list[float]
    y: list[float]
    hover: list[str]
    of: list[str]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    variant: int = 0
    line: bool = False
    markers: bool = True
    band: bool = False
    strong: list[bool] | None = None
    sizes: list[float] | None = None
    flat: bool = False
    step: bool = False
    colour: str | None = None
    shades: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Two axes and their series.

    Attributes
    ----------
    x_form, y_form : str
        How numbers are shown: percent, bytes, seconds, integer or number.
    x_quantity, y_quantity : str
        Quantity on each axis: a name of :func:`~fedlora.reporting.comparison.quantities`, or round, share or client.
    x_ticks : dict of float to str, optional
    kind : str
        ``points``, joined or not; ``bars``, lying and stacked, where x is a client and y its examples of a class;
        ``areas``, stacked; ``table``, where a series is a row of scores and x the column.
    dodge : bool
        Draw series of equal x side by side, so that their intervals do not overlap.
    from_zero : bool
        Whether the y axis begins at 0.
    x_beside, y_beside : tuple of float
        Values that the axes also have room for: those of the panels beside it.
    """

    title: str
    x_title: str
    y_title: str
    series: list[Series]
    x_quantity: str
    y_quantity: str
    x_form: str = "number"
    y_form: str = "number"
    x_log: bool = False
    y_log: bool = False
    x_ticks: dict[float, str] | None = None
    kind: Literal["points", "bars", "areas", "table"] = "points"
    dodge: bool = False
    from_zero: bool = False
    x_beside: tuple[float, ...] = ()
    y_beside: tuple[float, ...] = ()

    def shifted(self, place: int) -> list[float]:
        """Return the x values at which to draw a series, shifted sideways if ``dodge`` is set."""
        series = self.series[place]
        if not self.dodge:
            return series.x
        known = [x for each in self.series for x in each.x]
        apart = min(_DODGE, (max(known) / min(known)) ** (_SPREAD / len(self.series)))
        return [x * apart ** (place - (len(self.series) - 1) / 2) for x in series.x]

    @property
    def x_axis(self) -> Axis:
        """Scale, ticks and range of the x axis."""
        values = [x for i in range(len(self.series)) for x in self.shifted(i)]
        return Axis.of([*values, *self.x_beside], self.x_form, self.x_log, self.x_ticks)

    @property
    def y_axis(self) -> Axis:
        """Scale, ticks and range of the y axis, which shows all intervals."""
        return Axis.of([*self.y_values, *self.y_beside], self.y_form, self.y_log, None, self.from_zero)

    @property
    def y_values(self) -> list[float]:
        """All values of y, with the ends of their intervals; of areas, those of the stack."""
        if self.kind == "areas":
            return [math.fsum(values) for values in zip(*(s.y for s in self.series), strict=True)]
        return [y for s in self.series for part in (s.y, s.low, s.high) for y in part or [] if y is not None]


@dataclass(frozen=True)
class Axis:
    """Scale, ticks and range of an axis; None leaves the choice to the drawing library.

    Attributes
    ----------
    log : bool
    ticks : dict of float to str, optional
    range : (float, float), optional
        Limits: room for all values, and no share below 0 or above 1.
    """

    log: bool
    ticks: dict[float, str] | None = None
    range: tuple[float, float] | None = None

    @classmethod
    def of(
        cls, values: Iterable[float], form: str, log: bool, ticks: dict[float, str] | None, from_zero: bool = False
    ) -> Axis:
        """Choose ticks for values of a form (see :class:`Panel`)."""
        known = sorted({value for value in values if math.isfinite(value)})
        if not known:
            return cls(False, ticks)
        low, high = known[0], known[-1]
        log = log and low > 0 and (ticks is not None or form != "percent")
        if log and ticks is None:
            ticks = _powers(low, high, form)
            log = ticks is not None  # else too narrow for powers of ten to help
        if log:
            room = max((high / low) ** _ROOM, 1.02)
            marks = [] if ticks is None else list(ticks)
            return cls(True, ticks, (min(low / room, *marks), max(high * room, *marks)))
        low = min(low, 0.0) if from_zero else low
        if form == "integer" and ticks is None and all(value.is_integer() for value in known):
            ticks = _whole(low, high)
        room = _ROOM * (high - low) or 0.02 * (1.0 if form == "percent" else abs(high) or 1.0)
        limits = (low if from_zero else low - room, high + room)
        if form == "percent":
            limits = (max(0.0, min(limits[0], 1.0)), min(1.0, max(limits[1], 0.0)))
        return cls(False, ticks, limits)


def _whole(low: float, high: float) -> dict[float, str]:
    """Return at most seven whole ticks: multiples of 1, 2 or 5 times a power of ten."""
    step = next(s * 10**power for power in range(19) for s in (1, 2, 5) if (high - low) / (s * 10**power) <= 6)
    first = math.ceil(low / step) * step
    return {float(mark): f"{mark:,}" for mark in range(first, math.floor(high) + 1, step)}


def _powers(low: float, high: float, form: str) -> dict[float, str] | None:
    """Return three to six ticks of a logarithmic axis, if the values span enough of it."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        marks = [step * 10.0**power for power in decades for step in steps]
        marks = [mark for mark in marks if low * 0.8 <= mark <= high * 1.25]
        if len(marks) >= 3:
            thin = -(-len(marks) // 6)
            return {mark: format_value(mark, form) for mark in marks[::thin]}
    return None


@dataclass(frozen=True)
class Chart:
    """One figure: file name, title, caption and panels.

    Attributes
    ----------
    keys : bool
        Whether every panel has a key of its own, instead of one below them all.
    columns : int, optional
        Panels in a row, where rows mean something.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)
    keys: bool = False
    columns: int | None = None


def aligned(panels: Sequence[Panel]) -> list[Panel]:
    """Let panels that show the same two quantities have the same axes, so that they compare at a glance."""
    found = []
    for panel in panels:
        others = [p for p in panels if (p.x_quantity, p.y_quantity) == (panel.x_quantity, panel.y_quantity)]
        x = tuple(x for other in others for i in range(len(other.series)) for x in other.shifted(i))
        y = tuple(y for other in others for y in other.y_values)
        found.append(replace(panel, x_beside=x, y_beside=y))
    return found


def untangled(chart: Chart) -> Chart:
    """Give each curve a panel of its own if a panel has too many intervals; what were panels are then its lines."""
    if all(sum(series.band for series in panel.series) <= _BANDS for panel in chart.panels):
        return chart
    by_label: dict[str, Panel] = {}
    for place, panel in enumerate(chart.panels):
        for series in panel.series:
            known = by_label.setdefault(series.label, replace(panel, title=series.label, series=[]))
            known.series.append(replace(series, label=panel.title or series.label, variant=place))
    return replace(chart, panels=aligned(list(by_label.values())), columns=None)


def format_value(value: float, form: str) -> str:
    """Show a number: percent, bytes, seconds, integer or number."""
    if not math.isfinite(value):
        return "–"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "bytes":
        for unit in ("B", "kB", "MB", "GB"):
            if abs(value) < 999.5 or unit == "GB":
                return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
            value /= 1000
    if form == "seconds":
        return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"
    if form == "integer":
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"

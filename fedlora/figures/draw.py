"""Draw charts with matplotlib, as PNG and SVG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from fedlora.figures.chart import Axis, Chart, Panel, Series, format_value
from fedlora.figures.style import (
    BETTER,
    DASHES,
    FILLS,
    INK,
    MATPLOTLIB,
    PAPER,
    SAME,
    SOFT,
    WORSE,
    class_colours,
    style_of,
)

_LETTER = 0.07
"""Width of a letter in inches, about."""


def draw(chart: Chart, dpi: int = 200, endings: Sequence[str] = ("png", "svg")) -> dict[str, bytes]:
    """Draw a chart; return the content of its files by their ending, png and svg."""
    figure = figure_of(chart)
    return {ending: saved(figure, ending, dpi) for ending in endings}


def saved(figure: Figure, ending: str = "png", dpi: int = 150) -> bytes:
    """Return the content of a figure's file."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if ending == "svg" else {"dpi": dpi}
    with rc_context(MATPLOTLIB):
        figure.savefig(stream, format=ending, **options)
    return stream.getvalue()


def draw_all(charts: Sequence[Chart]) -> dict[str, bytes]:
    """Draw charts; return file name to content."""
    return {f"{chart.name}.{ending}": content for chart in charts for ending, content in draw(chart).items()}


def figure_of(chart: Chart) -> Figure:
    """Return a chart as a figure of matplotlib, for a notebook or to change it."""
    with rc_context(MATPLOTLIB):
        count = len(chart.panels)
        columns = chart.columns or (3 if count in (3, 5, 6) or count > 8 else min(2, count))
        rows = -(-count // columns)
        width = {1: 6.4, 2: 8.0, 3: 10.5}.get(columns, 3.4 * columns)
        handles = [] if chart.keys else _key([panel for panel in chart.panels if not _alone(panel)])
        # The marker and the gaps take half an inch.
        widest = 0.5 + _LETTER * max((len(str(handle.get_label())) for handle in handles), default=0)
        ncols = max(1, min(4, len(handles), int(width / widest)))
        heights = [
            max(_height(panel, count) for panel in chart.panels[i * columns : (i + 1) * columns]) for i in range(rows)
        ]
        height = sum(heights) + 0.3 + 0.2 * -(-len(handles) // ncols)
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten().tolist()
        for axes, panel in zip(grid, chart.panels, strict=False):
            title = textwrap.fill(panel.title, int(width / columns / 0.1))
            _draw_panel(axes, replace(panel, title=title))
            if chart.keys and (own := _key([panel])):
                key = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0, "fontsize": 8}
                axes.legend(handles=own, ncols=len(own), columnspacing=1.2, handlelength=1.5, handletextpad=0.5, **key)
                axes.set_title(title, pad=20)
        for axes in grid[count:]:
            axes.set_axis_off()
        if chart.title:
            figure.suptitle(chart.title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=ncols)
        return figure


def table_figure(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Figure:
    """Return a table of texts as a figure: the first column to the left, the others to the right."""
    with rc_context(MATPLOTLIB):
        table = [heads, *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
        width = max(0.8 + 1.3 * _LETTER * sum(widths) + 0.3 * len(widths), 0.4 + 1.3 * _LETTER * len(title))
        figure = Figure(figsize=(width, 0.3 * (len(table) + 2)))
        axes = figure.add_axes((0.2 / width, 0, 1 - 0.4 / width, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(len(table) + 0.9, -1.1))
        axes.text(0, -0.4, title, fontweight="bold", fontsize=12, va="center")
        ends = [1 - sum(widths[i + 1 :]) / sum(widths) * 0.92 for i in range(len(widths))]
        for number, row in enumerate(table, 1):
            colour = INK if number > 1 else SOFT
            axes.text(0, number, row[0], va="center", color=SOFT)
            for text, end in zip(row[1:], ends[1:], strict=True):
                axes.text(end, number, text, ha="right", va="center", color=colour)
            axes.axhline(number + 0.5, color=MATPLOTLIB["grid.color"], linewidth=0.8)
        return figure


def _alone(panel: Panel) -> bool:
    """Whether a panel has a single series that belongs to no method, which its axes name."""
    return len(panel.series) == 1 and panel.series[0].method is None


def _height(panel: Panel, count: int) -> float:
    """Inches of a panel: a bar or a row of a table needs a line of text."""
    if panel.kind == "bars":
        return 1.1 + 0.2 * max((len(series.x) for series in panel.series), default=0)
    if panel.kind == "table":
        return 1.1 + 0.3 * len(panel.series)
    return 3.2 if count <= 4 else 2.7


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.x_title, ylabel=panel.y_title)
    if panel.kind == "table":
        _draw_scores(axes, panel)
        return
    if panel.kind == "bars":
        _draw_bars(axes, panel)
        return
    axes.set_xscale("log" if panel.x_axis.log else "linear")
    axes.set_yscale("log" if panel.y_axis.log else "linear")
    if panel.kind == "areas":
        colours = _colours(panel)
        axes.stackplot(panel.series[0].x, *(series.y for series in panel.series), colors=colours, linewidth=0)
    else:
        for place, series in enumerate(panel.series):
            _draw_series(axes, replace(series, x=panel.shifted(place)))
    _format(axes.xaxis, panel.x_form, panel.x_axis)
    _format(axes.yaxis, panel.y_form, panel.y_axis)
    for limit, look in ((axes.set_xlim, panel.x_axis), (axes.set_ylim, panel.y_axis)):
        if look.range is not None:
            limit(*look.range)


def _draw_bars(axes: Axes, panel: Panel) -> None:
    """Draw lying bars, the first on top, so that there is room for their names."""
    left = [0.0] * max(len(series.x) for series in panel.series)
    for series, colour in zip(panel.series, _colours(panel), strict=True):
        axes.barh(series.x, series.y, left=left, color=colour, height=0.82, edgecolor=PAPER, linewidth=0.5)
        left = [a + b for a, b in zip(left, series.y, strict=True)]
    axes.set(xlabel=panel.y_title, ylabel=panel.x_title, ylim=(len(left) - 0.4, -0.6))
    axes.set_yticks(list(panel.x_ticks or {}), list((panel.x_ticks or {}).values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    _format(axes.xaxis, panel.y_form, Axis(False))


def _draw_scores(axes: Axes, panel: Panel) -> None:
    """Draw a table of scores, coloured by how each compares with the reference."""
    colours = LinearSegmentedColormap.from_list("scores", [WORSE, SAME, BETTER])
    shades = [series.shades or [0.0] * len(series.x) for series in panel.series]
    axes.imshow(shades, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for row, series in enumerate(panel.series):
        for x, y, shade in zip(series.x, series.y, shades[row], strict=True):
            colour = PAPER if abs(shade) > 0.6 else INK
            axes.text(x, row, format_value(y, panel.y_form), ha="center", va="center", color=colour)
    axes.set_xticks(list(panel.x_ticks or {}), list((panel.x_ticks or {}).values()))
    axes.set_yticks(range(len(panel.series)), [series.label for series in panel.series])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    for row in range(1, len(panel.series)):
        axes.axhline(row - 0.5, color=PAPER, linewidth=2)
    for column in range(1, len(panel.x_ticks or {})):
        axes.axvline(column - 0.5, color=PAPER, linewidth=2)


def _draw_series(axes: Axes, series: Series) -> None:
    colour = series.colour or style_of(series.method or "").colour
    if series.line:
        shape = "steps-post" if series.step else "default"
        # A score of 100 % lies on the edge: a line or a marker there is whole.
        axes.plot(series.x, series.y, color=colour, linestyle=_dash(series), drawstyle=shape, clip_on=False)
    known = [
        (x, y, low, high)
        for x, y, low, high in zip(series.x, series.y, series.low or [], series.high or [], strict=False)
        if low is not None and high is not None
    ]
    if known:
        at, middle, low, high = ([float(row[i]) for row in known] for i in range(4))
        if series.band:
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            errors = [
                [m - b for m, b in zip(middle, low, strict=True)],
                [t - m for m, t in zip(middle, high, strict=True)],
            ]
            axes.errorbar(at, middle, errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, alpha=0.55)
    if series.markers:
        strong = series.strong or [True] * len(series.x)
        sizes = series.sizes or [6.0] * len(series.x)
        for x, y, size, stands_out in zip(series.x, series.y, sizes, strong, strict=True):
            look = _marker(series, colour, size) | {"alpha": 1.0 if stands_out else 0.35, "zorder": 3}
            axes.plot([x], [y], linestyle="none", clip_on=False, **look)
            if _numbered(series):
                axes.annotate(
                    str(series.variant + 1), (x, y), (4, 3), textcoords="offset points", fontsize=7, color=colour
                )


def _marker(series: Series, colour: str, size: float = 6.0) -> dict[str, Any]:
    """Return matplotlib's options of a series' markers."""
    if series.flat:
        return {"marker": "_", "markersize": 2 * size, "markeredgewidth": 1.6, "markeredgecolor": colour}
    fill = FILLS[series.variant % len(FILLS)][0]
    marker = style_of(series.method or "").marker.matplotlib
    return {
        "marker": marker,
        "markersize": 1.4 * size if marker == "*" else size,
        "fillstyle": fill,
        "markerfacecolor": PAPER if fill == "none" else colour,
        "markerfacecoloralt": PAPER,
        "markeredgecolor": PAPER if fill == "full" else colour,
        "markeredgewidth": 0.6 if fill == "full" else 1.4,
    }


def _dash(series: Series) -> Any:
    return DASHES[series.variant % len(DASHES)][0]


def _colours(panel: Panel) -> list[str]:
    """Colours of stacked series: their own, or those of so many classes."""
    classes = class_colours(len(panel.series))
    return [series.colour or colour for series, colour in zip(panel.series, classes, strict=True)]


def _numbered(series: Series) -> bool:
    """Whether a point needs a number, since its marker is filled as another variant's."""
    return series.variant >= len(FILLS) and not series.line and not series.flat


# Functions with names, so that a figure can be pickled.


def _percent(value: float, _: int) -> str:
    return f"{round(100 * value, 6):g} %"


def _whole(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _number(value: float, _: int) -> str:
    return f"{round(value, 12):.5g}"


def _format(axis: Any, form: str, look: Axis) -> None:
    if look.ticks is not None:
        axis.set_ticks(list(look.ticks), list(look.ticks.values()))
        axis.set_minor_formatter(NullFormatter())
        return
    if not look.log:
        most = 6 if axis.axis_name == "y" else 5
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=form == "integer"))
    if form == "percent":
        axis.set_major_formatter(FuncFormatter(_percent))
    elif form in ("bytes", "seconds"):
        axis.set_major_formatter(EngFormatter("B" if form == "bytes" else "s"))
    elif form == "integer":
        axis.set_major_formatter(FuncFormatter(_whole))
    elif not look.log:
        axis.set_major_formatter(FuncFormatter(_number))


def _key(panels: Sequence[Panel]) -> list[Line2D | Patch]:
    """One entry a label, in the order in which they are drawn; grey, without a marker, if it has several colours."""
    looks: dict[str, set[str]] = {}
    for series in (series for panel in panels for series in panel.series):
        looks.setdefault(series.label, set()).add(series.colour or style_of(series.method or "").colour)
    handles: dict[str, Line2D | Patch] = {}
    for panel in panels:
        if panel.kind == "table":
            continue
        if panel.kind in ("bars", "areas"):
            for series, colour in zip(panel.series, _colours(panel), strict=True):
                handles.setdefault(series.label, Patch(color=colour, label=series.label))
            continue
        for series in panel.series:
            colour = series.colour or style_of(series.method or "").colour
            label = f"{series.label} ({series.variant + 1})" if _numbered(series) else series.label
            line: Any = _dash(series) if series.line else "none"
            marker = _marker(series, colour) if series.markers else {}
            if len(looks[series.label]) > 1:
                colour, marker = SOFT, {}
            handles.setdefault(series.label, Line2D([], [], color=colour, label=label, linestyle=line, **marker))
    return list(handles.values())

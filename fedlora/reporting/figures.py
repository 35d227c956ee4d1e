"""Draw charts with matplotlib, as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from fedlora.reporting.charts import Axis, Chart, Panel, Series
from fedlora.reporting.style import DASHES, LABEL_COLOURS, style_of

# Without a date and with fixed ids, the same runs give the same bytes.
_RC: Any = {"svg.hashsalt": "fedlora", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(chart: Chart) -> dict[str, bytes]:
    """Draw a chart; return the content of its files by their ending, png and svg."""
    with rc_context(_RC):
        columns = 3 if len(chart.panels) in (3, 5, 6) else min(2, len(chart.panels))
        rows = -(-len(chart.panels) // columns)
        width = 6.4 if columns == 1 else 8.8 if columns == 2 else 11
        handles = _legend(chart)
        # A letter is about 0.07 inches wide; the marker and the gaps take half an inch.
        widest = 0.5 + 0.07 * max((len(str(handle.get_label())) for handle in handles), default=0)
        ncols = max(1, min(4, len(handles), int(width / widest)))
        height = 3.4 * rows + 0.8 + 0.2 * max(0, -(-len(handles) // ncols) - 4)
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for axes, panel in zip(grid, chart.panels, strict=False):
            _draw_panel(axes, panel)
        for axes in grid[len(chart.panels) :]:
            axes.set_axis_off()
        figure.suptitle(chart.title, fontweight="bold")
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
        files = {}
        for ending, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
            stream = io.BytesIO()
            figure.savefig(stream, format=ending, **options)
            files[ending] = stream.getvalue()
        return files


def _draw_panel(axes: Axes, panel: Panel) -> None:
    if panel.x_axis.log:
        axes.set_xscale("log")
    if panel.y_axis.log:
        axes.set_yscale("log")
    below = [0.0] * max((len(series.x) for series in panel.series), default=0)
    for place, series in enumerate(panel.series):
        if panel.bars:
            axes.bar(
                series.x, series.y, bottom=below, color=LABEL_COLOURS[series.variant % len(LABEL_COLOURS)], width=0.85
            )
            below = [a + b for a, b in zip(below, series.y, strict=True)]
        else:
            _draw_series(axes, replace(series, x=panel.shifted(place)))
    _format(axes.xaxis, panel.x_form, panel.x_axis)
    _format(axes.yaxis, panel.y_form, panel.y_axis)
    if panel.y_axis.range is not None:
        axes.set_ylim(*panel.y_axis.range)
    axes.set(title=panel.title, xlabel=panel.x_title, ylabel=panel.y_title)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _draw_series(axes: Axes, series: Series) -> None:
    style = style_of(series.method or "")
    dash = DASHES[series.variant % len(DASHES)][0]
    if series.line:
        shape = "steps-post" if series.step else "default"
        axes.plot(series.x, series.y, color=style.colour, linestyle=dash, linewidth=1.4, drawstyle=shape)
    known = [
        (x, y, low, high)
        for x, y, low, high in zip(series.x, series.y, series.low or [], series.high or [], strict=False)
        if low is not None and high is not None
    ]
    if known:
        at, middle, low, high = ([float(row[i]) for row in known] for i in range(4))
        if series.band:
            axes.fill_between(at, low, high, color=style.colour, alpha=0.15, linewidth=0)
        else:
            errors = [
                [m - b for m, b in zip(middle, low, strict=True)],
                [t - m for m, t in zip(middle, high, strict=True)],
            ]
            axes.errorbar(at, middle, errors, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2.5, alpha=0.7)
    if series.markers:
        strong = series.strong or [True] * len(series.x)
        sizes = series.sizes or [6.0] * len(series.x)
        for x, y, size, stands_out in zip(series.x, series.y, sizes, strong, strict=True):
            axes.plot(
                [x],
                [y],
                linestyle="none",
                marker="_" if series.flat else style.marker.matplotlib,
                markersize=12 if series.flat else size,
                markeredgecolor="white" if not series.flat and series.variant % 2 == 0 else style.colour,
                markeredgewidth=1.6 if series.flat else 0.6 if series.variant % 2 == 0 else 1.4,
                markerfacecolor="white" if series.variant % 2 else style.colour,
                alpha=1.0 if stands_out else 0.3,
            )
            if _numbered(series):
                axes.annotate(
                    str(series.variant + 1), (x, y), (4, 3), textcoords="offset points", fontsize=7, color=style.colour
                )


def _numbered(series: Series) -> bool:
    """Whether a point needs a number. Filled and open markers distinguish a method's first two variants."""
    return series.variant > 1 and not series.line and not series.flat


def _format(axis: Any, form: str, look: Axis) -> None:
    if look.ticks is not None:
        axis.set_ticks(list(look.ticks), list(look.ticks.values()))
        axis.set_minor_formatter(NullFormatter())
    elif form == "percent":
        axis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
    elif form in ("bytes", "seconds"):
        axis.set_major_formatter(EngFormatter("B" if form == "bytes" else "s"))
    elif form == "integer":
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend(chart: Chart) -> list[Line2D | Patch]:
    """One entry a label, in the order in which they are drawn."""
    handles: dict[str, Line2D | Patch] = {}
    for panel in chart.panels:
        for series in panel.series:
            if panel.bars:
                handles.setdefault(
                    series.label, Patch(color=LABEL_COLOURS[series.variant % len(LABEL_COLOURS)], label=series.label)
                )
                continue
            style = style_of(series.method or "")
            handles.setdefault(
                series.label,
                Line2D(
                    [],
                    [],
                    color=style.colour,
                    label=f"{series.label} ({series.variant + 1})" if _numbered(series) else series.label,
                    linestyle=DASHES[series.variant % len(DASHES)][0] if series.line else "none",  # type: ignore[arg-type]
                    marker="_" if series.flat else style.marker.matplotlib if series.markers else "none",
                    markerfacecolor="white" if series.variant % 2 else style.colour,
                ),
            )
    return list(handles.values())


def draw_all(charts: Sequence[Chart]) -> dict[str, bytes]:
    """Draw charts; return file name to content."""
    return {f"{chart.name}.{ending}": content for chart in charts for ending, content in draw(chart).items()}

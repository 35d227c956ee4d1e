"""Build the plotly JSON of charts."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from typing import Any

from fedlora.figures.chart import Axis, Panel, Series, format_value
from fedlora.figures.style import BETTER, DASHES, FILLS, SAME, WORSE, class_colours, style_of

_TICKS = {
    "percent": (".3~p", ""),
    "bytes": ("~s", "B"),
    "seconds": ("~s", "s"),
    "integer": (",d", ""),
    "number": ("~g", ""),
}


def plot(panel: Panel) -> dict[str, Any]:
    """Return a panel's plotly data and layout. The page sets the colours of text and grid.

    Every trace has a ``meta``: ``method``, by which the page filters, ``of``, the groups or runs that its points stand
    for, and ``role``: points, low, high or bars.
    """
    if panel.kind == "table":
        return _table(panel)
    if panel.kind == "points":
        shifted = [replace(series, x=panel.shifted(place)) for place, series in enumerate(panel.series)]
        data = [trace for series in shifted for trace in _traces(series)]
    else:
        colours = class_colours(len(panel.series))
        draw = _bars if panel.kind == "bars" else _area
        data = [draw(series, series.colour or colour) for series, colour in zip(panel.series, colours, strict=True)]
    layout: dict[str, Any] = {
        "xaxis": _axis(panel.x_title, panel.x_form, panel.x_axis),
        "yaxis": _axis(panel.y_title, panel.y_form, panel.y_axis),
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "barmode": "stack",
        "bargap": 0.15,
    }
    if panel.kind == "bars":
        # Bars lie, the first on top.
        layout["xaxis"] = _axis(panel.y_title, panel.y_form, Axis(False))
        layout["yaxis"] = _axis(panel.x_title, panel.x_form, Axis(False, panel.x_ticks)) | {"autorange": "reversed"}
    return _plot(panel, data, layout)


def _plot(panel: Panel, data: list[dict[str, Any]], layout: dict[str, Any]) -> dict[str, Any]:
    quantities = {"x": panel.x_quantity, "y": panel.y_quantity}
    return {"data": data, "layout": layout, "title": panel.title, "quantities": quantities}


def _traces(series: Series) -> list[dict[str, Any]]:
    style = style_of(series.method or "")
    colour = series.colour or style.colour
    size = 16 if series.flat else 9 if series.variant < 2 else 11  # a dot in a marker needs room
    mode = "+".join(name for name, on in (("lines", series.line), ("markers", series.markers)) if on)
    meta = {"method": series.method, "label": series.label}
    points: dict[str, Any] = {
        "type": "scatter",
        "mode": mode,
        "cliponaxis": False,  # a score of 100 % lies on the edge: its marker is whole
        "x": _finite(series.x),
        "y": _finite(series.y),
        "line": {
            "color": colour,
            "dash": DASHES[series.variant % len(DASHES)][1],
            "width": 2,
            **({"shape": "hv"} if series.step else {}),
        },
        "marker": {
            "color": colour,
            "symbol": "line-ew-open" if series.flat else style.marker.plotly + FILLS[series.variant % len(FILLS)][1],
            "size": [size * 1.4 for size in series.sizes] if series.sizes else size,
            "line": {"width": 2},
            "opacity": [0.9 if strong else 0.28 for strong in series.strong] if series.strong else 0.9,
        },
    } | _meta(series, "points")
    known = [
        i
        for i, (low, high) in enumerate(zip(series.low or [], series.high or [], strict=True))
        if low is not None and high is not None
    ]
    if not known or series.low is None or series.high is None:
        return [points]
    if not series.band:
        points["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": _finite([None if t is None else t - y for t, y in zip(series.high, series.y, strict=True)]),
            "arrayminus": _finite([None if b is None else y - b for b, y in zip(series.low, series.y, strict=True)]),
            "color": _rgba(colour, 0.65),
            "thickness": 1.2,
            "width": 4,
        }
        return [points]
    edge: dict[str, Any] = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    fill = {"fill": "tonexty", "fillcolor": _rgba(colour, 0.16)}
    at, of = [series.x[i] for i in known], [series.of[i] for i in known]
    low = {**edge, "x": at, "y": _finite([series.low[i] for i in known]), "meta": {**meta, "of": of, "role": "low"}}
    high = {**edge, "x": at, "y": _finite([series.high[i] for i in known]), "meta": {**meta, "of": of, "role": "high"}}
    return [low, high | fill, points]


def _bars(series: Series, colour: str) -> dict[str, Any]:
    bars = {"type": "bar", "orientation": "h", "x": series.y, "y": series.x, "marker": {"color": colour}}
    return bars | _meta(series, "bars")


def _area(series: Series, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 0}
    area = {"type": "scatter", "mode": "lines", "stackgroup": "one", "x": series.x, "y": series.y, "line": line}
    return area | {"fillcolor": colour} | _meta(series, "areas")


def _meta(series: Series, role: str) -> dict[str, Any]:
    return {
        "customdata": [html.escape(text, quote=False).replace("\n", "<br>") for text in series.hover],
        "hovertemplate": "%{customdata}<extra></extra>",
        "meta": {"method": series.method, "label": series.label, "of": series.of, "role": role},
    }


def _table(panel: Panel) -> dict[str, Any]:
    """Return a table of scores: one trace, its rows from the top."""
    hover = [[html.escape(text, quote=False).replace("\n", "<br>") for text in series.hover] for series in panel.series]
    scores = {
        "type": "heatmap",
        "x": [html.escape(name) for name in (panel.x_ticks or {}).values()],
        "y": [html.escape(series.label) for series in panel.series],
        "z": [series.shades for series in panel.series],
        "zmin": -1,
        "zmax": 1,
        "colorscale": [[0, WORSE], [0.5, SAME], [1, BETTER]],
        "showscale": False,
        "text": [[format_value(y, panel.y_form) for y in series.y] for series in panel.series],
        "texttemplate": "%{text}",
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
        "meta": {"method": panel.series[0].method, "label": "", "of": panel.series[0].of, "role": "table"},
    }
    axis = {"type": "category", "automargin": True, "showgrid": False, "zeroline": False}
    layout = {
        "xaxis": axis | {"side": "top"},
        "yaxis": axis | {"autorange": "reversed"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "hoverlabel": {"align": "left"},
    }
    return _plot(panel, [scores], layout)


def _axis(title: str, form: str, look: Axis) -> dict[str, Any]:
    shape, suffix = _TICKS[form]
    axis: dict[str, Any] = {
        "title": {"text": title, "standoff": 8},
        "type": "log" if look.log else "linear",
        "tickformat": shape,
        "ticksuffix": suffix,
        "automargin": True,
        "zeroline": False,
        "nticks": 6,
    }
    if look.ticks is not None:
        axis |= {"tickmode": "array", "tickvals": list(look.ticks), "ticktext": list(look.ticks.values())}
        axis["ticksuffix"] = ""
    if look.range is not None:
        axis["range"] = [math.log10(end) if look.log else end for end in look.range]
    return axis


def _finite(values: list[Any]) -> list[float | None]:
    return [value if value is not None and math.isfinite(value) else None for value in values]


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"

"""Build the plotly JSON of charts."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from typing import Any

from fedlora.reporting.charts import Axis, Panel, Series
from fedlora.reporting.style import DASHES, LABEL_COLOURS, style_of

_TICKS = {
    "percent": (".3~p", ""),
    "bytes": ("~s", "B"),
    "seconds": ("~s", "s"),
    "integer": (",d", ""),
    "number": ("", ""),
}


def plot(panel: Panel) -> dict[str, Any]:
    """Return a panel's plotly data and layout. The page sets the colours of text and grid.

    Every trace has a ``meta``: ``method``, by which the page filters, ``of``, the groups or runs that its points stand
    for, and ``role``: points, low, high or bars.
    """
    draw = _bars if panel.bars else _traces
    data = [t for place, series in enumerate(panel.series) for t in draw(replace(series, x=panel.shifted(place)))]
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
    return {
        "data": data,
        "layout": layout,
        "title": panel.title,
        "quantities": {"x": panel.x_quantity, "y": panel.y_quantity},
    }


def _traces(series: Series) -> list[dict[str, Any]]:
    style = style_of(series.method or "")
    mode = "+".join(name for name, on in (("lines", series.line), ("markers", series.markers)) if on)
    meta = {"method": series.method, "label": series.label, "of": series.of, "role": "points"}
    points: dict[str, Any] = {
        "type": "scatter",
        "mode": mode,
        "x": _finite(series.x),
        "y": _finite(series.y),
        "customdata": [html.escape(text, quote=False).replace("\n", "<br>") for text in series.hover],
        "hovertemplate": "%{customdata}<extra></extra>",
        "line": {
            "color": style.colour,
            "dash": DASHES[series.variant % len(DASHES)][1],
            "width": 2,
            **({"shape": "hv"} if series.step else {}),
        },
        "marker": {
            "color": style.colour,
            "symbol": "line-ew-open" if series.flat else style.marker.plotly + ("-open" if series.variant % 2 else ""),
            "size": [size * 1.4 for size in series.sizes] if series.sizes else 16 if series.flat else 9,
            "line": {"width": 2},
            "opacity": [0.9 if strong else 0.28 for strong in series.strong] if series.strong else 0.9,
        },
        "meta": meta,
    }
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
            "color": _rgba(style.colour, 0.65),
            "thickness": 1.2,
            "width": 4,
        }
        return [points]
    edge: dict[str, Any] = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    fill = {"fill": "tonexty", "fillcolor": _rgba(style.colour, 0.16)}
    at, of = [series.x[i] for i in known], [series.of[i] for i in known]
    low = {**edge, "x": at, "y": _finite([series.low[i] for i in known]), "meta": {**meta, "of": of, "role": "low"}}
    high = {**edge, "x": at, "y": _finite([series.high[i] for i in known]), "meta": {**meta, "of": of, "role": "high"}}
    return [low, high | fill, points]


def _bars(series: Series) -> list[dict[str, Any]]:
    bars = {
        "type": "bar",
        "x": series.x,
        "y": series.y,
        "customdata": [html.escape(text, quote=False).replace("\n", "<br>") for text in series.hover],
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": LABEL_COLOURS[series.variant % len(LABEL_COLOURS)]},
        "meta": {"method": None, "label": series.label, "of": series.of, "role": "bars"},
    }
    return [bars]


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
        axis["range"] = list(look.range)
    return axis


def _finite(values: list[Any]) -> list[float | None]:
    return [value if value is not None and math.isfinite(value) else None for value in values]


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"

"""Draw who holds which training example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora.figures.chart import Chart, Panel, Series

_MANY_CLIENTS = 60
_LONGEST_NAME = 28


def plot_partition(
    path: Path | str,
    counts: np.ndarray,
    label_names: Sequence[str] | None = None,
    client_names: Sequence[str] | None = None,
) -> None:
    """Draw how many examples of which class each client has, as a PNG.

    Up to 60 clients get a bar each, stacked by class. More are shown together: the clients' sizes in falling order, and
    how many clients have how many classes.

    Parameters
    ----------
    path : Path or str
        Where the picture goes.
    counts : np.ndarray
        Number of examples [clients, labels]; one column if there are no labels.
    label_names : sequence of str, optional
        The classes.
    client_names : sequence of str, optional
        The clients; by default their numbers.
    """
    from fedlora.figures.draw import draw

    counts = np.asarray(counts)
    panels = [partition_panel("", counts, label_names, client_names)]
    clients, labels = counts.shape
    if clients > _MANY_CLIENTS and labels > 1:
        panels.append(_classes_panel(counts))
    chart = Chart("partition", "Who holds which examples", "", panels)
    Path(path).write_bytes(draw(chart, dpi=150, endings=("png",))["png"])


def partition_panel(
    title: str,
    counts: np.ndarray,
    label_names: Sequence[str] | None = None,
    client_names: Sequence[str] | None = None,
    of: str = "",
) -> Panel:
    """Return the examples of each client: bars by class, or, of more than 60, an area, the largest client first.

    Parameters
    ----------
    title : str
    counts, label_names, client_names
        As :func:`plot_partition` takes them.
    of : str
        The run's name.
    """
    many = len(counts) > _MANY_CLIENTS
    if many:
        counts, label_names = counts.sum(axis=1, keepdims=True), None
    clients, labels = counts.shape
    names = list(client_names or map(str, range(clients)))
    order = np.argsort(-counts.sum(axis=1), kind="stable") if many else np.arange(clients)
    series = [
        Series(
            None,
            label_names[label] if label_names else "examples",
            [float(place) for place in range(clients)],
            counts[order, label].astype(float).tolist(),
            [_hover(names[i], counts[i, label], label_names[label] if label_names else "") for i in order],
            [of] * clients,
            variant=label,
        )
        for label in range(labels)
    ]
    x_title = f"{clients} clients, largest first" if many else "client"
    ticks = {float(place): _short(names[i]) for place, i in enumerate(order)}
    form = {"x_form": "integer", "y_form": "integer"}
    kind = {"kind": "areas", "from_zero": True} if many else {"kind": "bars", "x_ticks": ticks}
    return Panel(title, x_title, "examples", series, "client", "examples", **form, **kind)  # type: ignore[arg-type]


def _classes_panel(counts: np.ndarray) -> Panel:
    """Return how many clients have how many classes."""
    clients = np.bincount((counts > 0).sum(axis=1), minlength=counts.shape[1] + 1).astype(float).tolist()
    classes = [float(number) for number in range(len(clients))]
    hover = [f"{many:.0f} clients have {number:.0f} classes" for number, many in zip(classes, clients, strict=True)]
    series = Series(None, "clients by number of classes", classes, clients, hover, [""] * len(hover), line=True)
    titles = ("classes that a client has", "clients")
    return Panel("", *titles, [series], "classes", "clients", "integer", "integer", from_zero=True)


def _hover(name: str, examples: int, label: str) -> str:
    return f"client {name}\n{examples} {label or 'examples'}"


def _short(name: str) -> str:
    """Leave out the middle of a long name: similar names often differ at their ends."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"

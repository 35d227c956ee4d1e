"""Draw who holds which training example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_MANY_CLIENTS = 60


def plot_partition(path: Path | str, counts: np.ndarray, label_names: list[str] | None = None) -> None:
    """Draw how many examples of which class each client has, as a PNG.

    Up to 60 clients get a bar each, stacked by class. More are shown together: the clients' sizes in falling order, and
    how many clients have how many classes.

    Parameters
    ----------
    path : Path or str
        Where the picture goes.
    counts : np.ndarray
        Number of examples [clients, labels]; one column if there are no labels.
    label_names : list of str, optional
        The classes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = np.asarray(counts)
    clients, labels = counts.shape
    if clients <= _MANY_CLIENTS:
        legend = 0.19 * labels if label_names and labels <= 20 else 0.0
        figure = Figure(figsize=(8, max(1 + 0.25 * clients, 0.5 + legend)), layout="constrained")
        axes = figure.add_subplot()
        _bars(axes, counts, label_names)
    else:
        figure = Figure(figsize=(8, 6 if labels > 1 else 3.2), layout="constrained")
        axes = figure.add_subplot(2 if labels > 1 else 1, 1, 1)
        axes.step(np.arange(1, clients + 1), np.sort(counts.sum(axis=1))[::-1], where="mid")
        axes.set(
            xlabel=f"{clients} clients, largest first", ylabel="examples", ylim=(0, 1.05 * counts.sum(axis=1).max())
        )
        if labels > 1:
            below = figure.add_subplot(2, 1, 2)
            below.hist((counts > 0).sum(axis=1), bins=[*np.arange(0.5, labels + 1.5)], rwidth=0.9)
            below.set(xlabel="classes that a client has", ylabel="clients")
            below.xaxis.set_major_locator(MaxNLocator(integer=True))
    FigureCanvasAgg(figure).print_png(str(path))


def _bars(axes: Any, counts: np.ndarray, label_names: list[str] | None) -> None:
    from matplotlib import colormaps

    clients, labels = counts.shape
    colours = colormaps["tab10" if labels <= 10 else "tab20" if labels <= 20 else "nipy_spectral"]
    left = np.zeros(clients, np.int64)
    for label in range(labels):
        colour = colours(label) if labels <= 20 else colours((label + 0.5) / labels)
        name = label_names[label] if label_names else None
        axes.barh(np.arange(clients), counts[:, label], left=left, color=colour, label=name, height=0.85)
        left += counts[:, label]
    axes.set(xlabel="examples", ylabel="client", ylim=(clients - 0.4, -0.6))
    if clients <= 20:
        axes.set_yticks(np.arange(clients))
    if label_names and labels <= 20:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

"""Plot one run by round: score, losses, epsilon and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_rounds(path: Path, lines: list[dict[str, Any]], title: str, task: Task) -> None:
    """Write :func:`draw_rounds` as a PNG."""
    draw_rounds(lines, title, task).savefig(path, dpi=110)


def draw_rounds(lines: list[dict[str, Any]], title: str, task: Task) -> Figure:
    """Draw the lines of rounds.jsonl: score, training and test loss, epsilon (if any) and bytes so far."""
    from matplotlib.figure import Figure

    private = any(line["epsilon"] is not None for line in lines)
    figure = Figure(figsize=(12 if private else 9, 3.2), layout="constrained")
    axes = figure.subplots(1, 4 if private else 3)
    rounds = [line["round"] for line in lines]
    tested = [line for line in lines if line["metrics"]]
    at = [line["round"] for line in tested]
    axes[0].plot(at, [line["metrics"][task.primary] for line in tested], marker="o", color="#0072b2")
    if task.baseline is not None and tested:
        guess = tested[0]["metrics"][task.baseline.metric]
        axes[0].axhline(guess, color="#999999", linestyle="--", label=task.baseline.title)
        axes[0].legend(frameon=False)
    axes[0].set_title(f"test {task.primary.replace('_', ' ')}")
    axes[1].plot(at, [line["metrics"]["loss"] for line in tested], marker="o", color="#0072b2", label="test")
    axes[1].plot(rounds, [line["train_loss"] for line in lines], color="#d55e00", label="train")
    axes[1].legend(frameon=False)
    axes[1].set_title(f"loss ({task.loss_unit})")
    for name, color in (("initial_bytes", "#999999"), ("downlink_bytes", "#009e73"), ("uplink_bytes", "#cc79a7")):
        sent = [line["communication"][name] / 1e6 for line in lines]
        axes[2].plot(rounds, sent, color=color, label=name.removesuffix("_bytes"))
    axes[2].legend(frameon=False)
    axes[2].set_title("sent so far (MB)")
    if private:
        axes[3].plot(rounds, [line["epsilon"] for line in lines], color="#0072b2")
        axes[3].set_ylim(bottom=0)
        axes[3].set_title("epsilon (largest of the clients)")
    for axis in axes:
        axis.set_xlabel("round")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure

"""Draw the figure of experiments/benchmarks/README.md from the raw JSON::

python -m experiments.benchmarks.report
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"


def raw(name: str) -> Any:
    """Read a benchmark's raw figures."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Draw the four panels into figure.png."""
    figure, ((cohort, parts), (rounds, size)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    _cohorts(cohort)
    _time(parts)
    _rounds(rounds)
    _size(size)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "figure.png", dpi=140)


def _cohorts(axes: Any) -> None:
    results = raw("cohort_speed_h100")
    sizes = results["sizes"]
    ratios = [row["cohort"]["islands"]["ratio"] for row in sizes.values()]
    bars = axes.barh(list(sizes), ratios, color=BLUE)
    axes.bar_label(bars, fmt="%.1fx", padding=3)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlabel("client steps a second, as a multiple of PEFT + Opacus")
    axes.set_title(f"DP-SGD in cohorts, {_machine(results)}")
    axes.invert_yaxis()


def _time(axes: Any) -> None:
    results = raw("end_to_end")
    rows = results["ours"]["rounds"][1:]
    names = ("train", "communicate", "aggregate", "evaluate", "record")
    for row in rows:
        row["record"] = row["wall"] - sum(row[name] for name in names[:-1])
    seconds = [statistics.median(row[name] for row in rows) for name in names]
    bars = axes.barh(names, seconds, color=[BLUE, ORANGE, GREY, GREEN, GREY])
    axes.bar_label(bars, [f"{s:.2f} s, {s / sum(seconds):.0%}" for s in seconds], padding=3)
    axes.set_xlim(0, 1.3 * max(seconds))
    axes.set_xlabel("seconds a round, 100 clients under DP")
    axes.set_title(f"Where a round's time goes, {_machine(results)}")
    axes.invert_yaxis()


def _rounds(axes: Any) -> None:
    whole, plain = raw("end_to_end"), raw("pfl_training")

    def typical(rows: list[dict[str, float]]) -> float:
        return statistics.median(sum(row.values()) for row in rows[1:])

    bars = {
        "fedlora, DP": typical(whole["ours"]["rounds"]),
        "Flower's runtime, DP": typical(whole["flower"]["1.0"]["rounds"]),
        "fedlora, no privacy": statistics.median(plain["seconds_a_round"]["fedlora"]),
        "pfl, no privacy": statistics.median(plain["seconds_a_round"]["pfl"]),
    }
    drawn = axes.barh(list(bars), list(bars.values()), color=[BLUE, ORANGE, BLUE, ORANGE])
    axes.bar_label(drawn, fmt="%.2f s", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(0.1, 200)
    axes.set_xlabel("seconds a round, 100 clients (logarithmic)")
    axes.set_title(f"A whole federation, {_machine(whole)}")
    axes.invert_yaxis()


def _size(axes: Any) -> None:
    results = raw("federation_size")
    for row, colour in zip(results["sizes"], (BLUE, ORANGE), strict=True):
        label = f"{row['clients']:,} clients: {row['peak_bytes'] / 1e9:.2f} GB at the peak"
        axes.plot(range(1, len(row["seconds_a_round"]) + 1), row["seconds_a_round"], "o-", color=colour, label=label)
    axes.set_ylim(0)
    axes.set_xlabel("round")
    axes.set_ylabel("seconds, 100 clients train")
    axes.set_title(f"The federation's size, {results['machine']['cores']} cores")
    axes.legend(loc="lower left", frameon=False)


def _machine(results: dict[str, Any]) -> str:
    return str(results["machine"]["gpu"]).removeprefix("NVIDIA ").split(" ")[0]


if __name__ == "__main__":
    main()

"""Draw the figure of experiments/benchmarks/README.md from the raw JSON, and print where a GPU's time goes::

python -m fedlora.experiments.benchmarks.report
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

PARTS = ("train", "communicate", "aggregate", "evaluate")
"""Of a round's seconds."""

KERNELS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK"),
    "attention": ("flash", "fmha", "sdpa"),
    "GELU, SiLU": ("gelu", "silu"),
    "normalisation": ("layer_norm", "rsqrt", "rms"),
    "softmax, loss": ("SoftMax", "softmax", "nll"),
    "per-example norms and sums": ("NormOps", "reduce_kernel", "index_add", "indexFuncLarge", "segment"),
    "optimiser and noise": ("multi_tensor", "adam", "distribution", "normal"),
    "residual and gradient sums": ("CUDAFunctor_add", "fused_add"),
    "copies and casts": ("Memcpy", "Memset", "CatArray", "copy", "gpu_kernel_impl_nocast"),
}
"""Kinds of GPU kernels, in the order in which names are looked up, by what their names hold."""


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
    print_kernels(raw("cohort_speed_h100"))


def print_kernels(results: dict[str, Any]) -> None:
    """Print a Markdown table: milliseconds a step by kind of kernel, and the share of the card's own matrix rate."""
    sizes = {name: row["cohort"]["islands"] for name, row in results["sizes"].items()}
    tables = {name: _by_kind(row["kernels"]) for name, row in sizes.items()}
    print("| ms a step | " + " | ".join(sizes) + " |\n|---" + "|---" * len(sizes) + "|")
    for kind in (*KERNELS, "other", "all", "idle"):
        print(f"| {kind} | " + " | ".join(f"{table[kind]:.1f}" for table in tables.values()) + " |")
    shares = []
    for name, row in sizes.items():
        shape = results["settings"]["sizes"][name]
        tokens = row["client_steps_a_second"] * shape["batch"] * shape["tokens"]
        shares.append(4 * _frozen(shape) * tokens / results["matrix_flops"])
    print("| of the card's matrix rate | " + " | ".join(f"{share:.0%}" for share in shares) + " |")


def _by_kind(kernels: list[dict[str, Any]]) -> dict[str, float]:
    table = dict.fromkeys([*KERNELS, "other"], 0.0)
    table["all"], table["idle"] = kernels[0]["milliseconds"], kernels[1]["milliseconds"]
    for row in kernels[2:]:
        kind = next((kind for kind, words in KERNELS.items() if any(word in row["kernel"] for word in words)), "other")
        table[kind] += row["milliseconds"]
    # The raw figures name the forty longest.
    table["other"] += table["all"] - sum(row["milliseconds"] for row in kernels[2:])
    return table


def _frozen(shape: dict[str, Any]) -> int:
    """Parameters of the blocks' matrices: 4 FLOPs each a token, forward and backward, since they are frozen."""
    d, kv = shape["hidden_size"], shape.get("num_key_value_heads", shape["num_attention_heads"])
    attention = 2 * d * d + 2 * d * d * kv // shape["num_attention_heads"]
    matrices = 2 if shape["architecture"] == "bert" else 3
    return int(shape["num_hidden_layers"] * (attention + matrices * d * shape["intermediate_size"]))


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
    names = (*PARTS, "record")
    for row in rows:
        row["record"] = row["wall"] - sum(row[name] for name in PARTS)
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
        return statistics.median(sum(row[name] for name in PARTS) for row in rows[1:])

    dp, none = f"DP, {_machine(whole)}", f"no privacy, {_machine(plain)}"
    bars = {
        f"fedlora, {dp}": typical(whole["ours"]["rounds"]),
        f"Flower's runtime, {dp}": typical(whole["flower"]["1.0"]["rounds"]),
        f"fedlora, {none}": statistics.median(plain["seconds_a_round"]["fedlora"]),
        f"pfl, {none}": statistics.median(plain["seconds_a_round"]["pfl"]),
    }
    drawn = axes.barh(list(bars), list(bars.values()), color=[BLUE, ORANGE, BLUE, ORANGE])
    axes.bar_label(drawn, fmt="%.2f s", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(0.1, 100)
    axes.set_xlabel("seconds a round, 100 clients (logarithmic)")
    axes.set_title("A whole federation")
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

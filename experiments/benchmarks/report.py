"""Draw the figure of experiments/benchmarks/README.md from the raw JSON, and print where a GPU's time goes::

python -m fedlora.experiments.benchmarks.report
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedlora.figures.chart import Axis, format_value
from fedlora.figures.style import COLOURS, INK, LINE, MATPLOTLIB, PAPER

FOLDER = Path(__file__).parent
BLUE, ORANGE = COLOURS["blue"], COLOURS["orange"]

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

OWN = {
    "_forward": "attention",
    "_backward": "attention",
    "_activation_forward": "GELU, SiLU",
    "_activation_backward": "GELU, SiLU",
    "_gate_forward": "GELU, SiLU",
    "_gate_backward": "GELU, SiLU",
    "_norm_forward": "normalisation",
    "_norm_backward": "normalisation",
}
"""The kinds of fedlora's own kernels (:mod:`fedlora.kernels`), by their whole names."""


def raw(name: str) -> Any:
    """Read a benchmark's raw figures."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Draw the four panels into figure.png."""
    with rc_context(MATPLOTLIB):
        figure = Figure(figsize=(9, 6.2), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        (cohort, parts), (rounds, size) = figure.subplots(2, 2)
        _cohorts(cohort)
        _time(parts)
        _rounds(rounds)
        _size(size)
        figure.savefig(FOLDER / "figure.png", dpi=150)
    print_kernels(raw("cohort_speed_products"))


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
        name = row["kernel"]
        found = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")
        table[OWN.get(name, found)] += row["milliseconds"]
    # The raw figures name the forty longest.
    table["other"] += table["all"] - sum(row["milliseconds"] for row in kernels[2:])
    return table


def _frozen(shape: dict[str, Any]) -> int:
    """Parameters of the blocks' matrices: 4 FLOPs each a token, forward and backward, since they are frozen."""
    d, kv = shape["hidden_size"], shape.get("num_key_value_heads", shape["num_attention_heads"])
    attention = 2 * d * d + 2 * d * d * kv // shape["num_attention_heads"]
    matrices = 2 if shape["architecture"] == "bert" else 3
    return int(shape["num_hidden_layers"] * (attention + matrices * d * shape["intermediate_size"]))


def _dots(axes: Axes, values: dict[str, float], texts: list[str], form: str, colours: list[str] | None = None) -> None:
    """Draw a dot for each value on a logarithmic axis, where equal distances are equal factors, and write it beside."""
    look = Axis.of(values.values(), form, True, None)
    ends = look.range or (min(values.values()), max(values.values()))
    axes.set_xscale("log")
    axes.set_xlim(ends[0], ends[1] * (ends[1] / ends[0]) ** 0.45)  # room for what is written
    if look.ticks is not None:
        axes.set_xticks(list(look.ticks), list(look.ticks.values()))
    axes.xaxis.set_minor_formatter("")
    clear = {"facecolor": PAPER, "linewidth": 0, "pad": 1}
    for place, (value, text) in enumerate(zip(values.values(), texts, strict=True)):
        colour = colours[place] if colours else BLUE
        axes.plot([value], [place], "o", markersize=8, color=colour)
        axes.annotate(text, (value, place), (8, 0), textcoords="offset points", va="center", color=INK, bbox=clear)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _cohorts(axes: Axes) -> None:
    results = raw("cohort_speed_h100")
    ratios = {name: row["cohort"]["islands"]["ratio"] for name, row in results["sizes"].items()}
    _dots(axes, {"PEFT + Opacus": 1.0} | ratios, ["1"] + [f"{ratio:.1f} times" for ratio in ratios.values()], "number")
    axes.lines[0].set_color(ORANGE)
    axes.set_xlabel("client steps a second, times PEFT + Opacus")
    axes.set_title(f"DP-SGD in cohorts, {_machine(results)}")


def _time(axes: Axes) -> None:
    results = raw("end_to_end")
    rows = results["ours"]["rounds"][1:]
    names = (*PARTS, "record")
    for row in rows:
        row["record"] = row["wall"] - sum(row[name] for name in PARTS)
    seconds = {name: statistics.median(row[name] for row in rows) for name in names}
    total = sum(seconds.values())
    _dots(axes, seconds, [f"{format_value(s, 'seconds')}, {s / total:.0%}" for s in seconds.values()], "seconds")
    axes.set_xlabel("seconds a round, 100 clients under DP")
    axes.set_title(f"Where a round's time goes, {_machine(results)}")


def _rounds(axes: Axes) -> None:
    whole, plain = raw("end_to_end"), raw("pfl_training")

    def typical(rows: list[dict[str, float]]) -> float:
        return statistics.median(sum(row[name] for name in PARTS) for row in rows[1:])

    seconds = {
        "fedlora, DP": typical(whole["ours"]["rounds"]),
        "Flower's runtime, DP": typical(whole["flower"]["1.0"]["rounds"]),
        "fedlora, no privacy": statistics.median(plain["seconds_a_round"]["fedlora"]),
        "pfl, no privacy": statistics.median(plain["seconds_a_round"]["pfl"]),
    }
    texts = [format_value(value, "seconds") for value in seconds.values()]
    _dots(axes, seconds, texts, "seconds", [BLUE, ORANGE, BLUE, ORANGE])
    axes.axhline(1.5, color=LINE, linewidth=0.8)
    axes.set_xlabel("seconds a round, 100 clients")
    machines = dict.fromkeys([_machine(whole), _machine(plain)])
    axes.set_title(f"A whole federation, {' and '.join(machines)}")


def _size(axes: Axes) -> None:
    results = raw("federation_size")
    for row, colour in zip(results["sizes"], (BLUE, ORANGE), strict=True):
        label = f"{row['clients']:,} clients: {format_value(row['peak_bytes'], 'bytes')} at the peak"
        axes.plot(range(1, len(row["seconds_a_round"]) + 1), row["seconds_a_round"], "o-", color=colour, label=label)
    axes.set_ylim(0, 1.1 * max(max(row["seconds_a_round"]) for row in results["sizes"]))
    axes.set_xlabel("round")
    axes.set_ylabel("seconds, 100 clients train")
    axes.set_title(f"The federation's size, {results['machine']['cores']} cores")
    axes.legend(loc="lower left")


def _machine(results: dict[str, Any]) -> str:
    return str(results["machine"]["gpu"]).removeprefix("NVIDIA ").split(" ")[0]


if __name__ == "__main__":
    main()

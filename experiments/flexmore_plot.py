"""Tables and figures of the study of ranks: what ``python -m fedlora.experiments.flexmore_study plot`` writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.experts.expert import FULL
from fedlora.figures.style import COLOURS, MATPLOTLIB, class_colours
from fedlora.strategies.flexmore import FULL_RATE

RANKS = ["1", "4", "16", "64", "256", "full"]

KINDS = {
    "own expert": COLOURS["green"],
    "mixture": COLOURS["blue"],
    "mixture, router tuned": COLOURS["purple"],
    "mixture, tuned jointly": COLOURS["orange"],
}
"""What the figure shows of the table, and its colours."""


def join(parts: list[Path], output: Path) -> None:
    """Make one raw.json of runs over different ranks, as on several GPUs."""
    joined: dict[str, Any] = {"options": {}}
    for part in parts:
        raw = json.loads((part / "raw.json").read_text(encoding="utf-8"))
        joined["options"][part.name] = raw.pop("options") | {"commit": raw["machine"]["commit"]}
        for key, value in raw.items():
            several = key in ("sizes", "seconds") and key in joined
            joined[key] = joined[key] | value if several else joined.get(key, value)
    order = {f"{kind} {rank}": i for i, rank in enumerate(RANKS) for kind in ("rank", "reasoning")}
    joined = dict(sorted(joined.items(), key=lambda item: order.get(item[0], -1)))
    output.mkdir(parents=True, exist_ok=True)
    (output / "raw.json").write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")


def add_seeds(folders: list[Path], output: Path) -> None:
    """Copy other seeds' raw.json beside the first one's."""
    for folder in folders:
        text = (folder / "raw.json").read_text(encoding="utf-8")
        options = json.loads(text)["options"]
        seed = options["seed"] if "seed" in options else next(iter(options.values()))["seed"]
        (output / f"seed-{seed}.json").write_text(text, encoding="utf-8")


def plot(folder: Path) -> None:
    """Write table.md, ranks.png and reasoning.png from raw.json and, for more seeds, seed-*.json."""
    figures = Figures(folder)
    (folder / "table.md").write_text("\n".join(figures.table()) + "\n", encoding="utf-8")
    from matplotlib import rc_context

    with rc_context(MATPLOTLIB):
        if figures.own:
            figures.draw_ranks(folder / "ranks.png")
        if any(key.startswith("reasoning ") for key in figures.raw):
            figures.draw_reasoning(folder / "reasoning.png")


Row = tuple[str, dict[str, float], float | None]
"""What it is, loss by domain, and bytes that are sent for it."""


def _rows(raw: dict[str, Any]) -> list[Row]:
    """Read one seed's figures."""
    public, sizes = raw["public"], raw["sizes"]
    rows: list[Row] = [("public", public, None)]

    def add(found: dict[str, Any], ranks: list[str], suffix: str) -> None:
        total = sum(sizes[rank] for rank in ranks)
        rows.extend((name + suffix, found[name], total) for name in found if name.startswith("mixture"))

    for kind, label in (("rank", "rank"), ("extracted", "SVD rank")):
        names = [key for key in raw if key.startswith(f"{kind} ") and "," not in key]
        alone = {name.removeprefix(f"{kind} "): raw[name] for name in names}
        for rank, found in alone.items():
            own = {domain: found[domain][domain] for domain in public}
            rows.append((f"own expert, {label} {rank}", own, sizes[rank]))
        for rank, found in alone.items():
            add(found, [rank] * len(public), f", {label} {rank}")
        for found in (raw[key] for key in raw if key.startswith(f"mixed {kind}")):
            ranks = [str(found["ranks"][domain]) for domain in public]
            add(found, ranks, f", {label}s {'/'.join(ranks)}")
    for found in (raw[key] for key in raw if key.startswith("joint")):
        ranks = [str(found["ranks"][domain]) for domain in public]
        label = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {'/'.join(ranks)}"
        add(found, ranks, f", tuned jointly, {label}")
    return rows + [(key, raw[key]["test"], None) for key in raw if key.startswith("all-data")]


class Figures:
    """The figures of all seeds, and what is made of them.

    Parameters
    ----------
    folder : Path
        With raw.json, whose rows are shown, and seed-*.json, which join its means where they have the same row.

    Attributes
    ----------
    rows : list of (str, dict, float or None)
        Name, loss by domain in the mean over seeds, bytes.
    own : dict of str to dict
        By rank, ascending: loss of every owner's expert on its own domain.
    """

    def __init__(self, folder: Path) -> None:
        paths = [folder / "raw.json", *sorted(folder.glob("seed-*.json"))]
        seeds = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        self.raw = seeds[0]
        self.sizes: dict[str, float] = self.raw["sizes"]
        self.public: dict[str, float] = self.raw["public"]
        self.domains = list(self.public)
        by_seed = [{name: losses for name, losses, _ in _rows(raw)} for raw in seeds]
        first = _rows(self.raw)
        self.seeds = {name: [found[name] for found in by_seed if name in found] for name, *_ in first}
        self.rows: list[Row] = []
        for name, _, size in first:
            losses = {d: float(np.mean([found[d] for found in self.seeds[name]])) for d in self.domains}
            self.rows.append((name, losses, size))
        known = {name: losses for name, losses, _ in self.rows}
        self.ranks = [key.removeprefix("rank ") for key in self.raw if key.startswith("rank ") and "," not in key]
        self.ranks.sort(key=lambda rank: np.inf if rank == FULL else int(rank))
        self.own = {rank: known[f"own expert, rank {rank}"] for rank in self.ranks}

    def gains(self, name: str) -> list[float]:
        """Nats a token over the public model, mean over domains, by seed."""
        seeds = self.seeds[name]
        return [float(np.mean([self.public[d] - losses[d] for d in self.domains])) for losses in seeds]

    def table(self) -> list[str]:
        """Perplexities by domain; which higher ranks are worse; the chosen rates and scales."""
        heads = ["", *self.domains, "gain (nats)", "of full", "MB sent", "seeds"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, losses, size in self.rows:
            gains = self.gains(name)
            spread = f" ± {np.std(gains, ddof=1):.3f}" if len(gains) > 1 else ""
            full = f"{name.replace(', SVD rank', ', rank').rpartition(', rank')[0]}, rank {FULL}"
            shares = [a / b for a, b in zip(gains, self.gains(full), strict=False)] if full in self.seeds else []
            cells = [name, *(f"{np.exp(losses[domain]):.1f}" for domain in self.domains)]
            cells += [f"{np.mean(gains):.3f}{spread}", f"{np.mean(shares):.1%}" if shares else "-"]
            cells += ["-" if size is None else f"{size / 1e6:.1f}", str(len(gains))]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", self._compared(), ""]
        heads = ["learning rate, alpha", *self.domains, "tried"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for rank in self.ranks:
            found = self.raw[f"rank {rank}"]
            cells = [f"rank {rank}", *(_setting(rank, *found["best"][domain][1:]) for domain in self.domains)]
            lines.append(f"| {' | '.join([*cells, str(len(found['tried']))])} |")
        return lines

    def _compared(self) -> str:
        """Compare every rank with the next lower one, on its own domain, seed by seed."""
        worse, count = [], 0
        for (low, high), domain in itertools.product(itertools.pairwise(self.own), self.domains):
            pairs = zip(self.seeds[f"own expert, rank {low}"], self.seeds[f"own expert, rank {high}"], strict=True)
            for seed, (a, b) in enumerate(pairs):
                count += 1
                if b[domain] > a[domain]:
                    worse.append(f"{domain} at {high} against {low}, seed {seed}")
        return f"Own expert worse than the next lower rank's, of {count}: {', '.join(worse) or 0}."

    def draw_ranks(self, path: Path) -> None:
        """Draw loss against bytes, and own domain's perplexity against rank."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        mean = {name: float(np.mean(list(losses.values()))) for name, losses, _ in self.rows}
        for kind, colour in KINDS.items():
            for label, line, marker in (("rank", "-", "o"), ("SVD rank", ":", "x")):
                found = {rank: mean.get(f"{kind}, {label} {rank}") for rank in RANKS}
                points = [(self.sizes[rank] / 1e6, loss) for rank, loss in found.items() if loss is not None]
                if points:
                    title = kind if label == "rank" else f"{kind}, by SVD"
                    left.plot(*zip(*points, strict=True), linestyle=line, marker=marker, label=title, color=colour)
            mixed = [(size, mean[n]) for n, _, size in self.rows if size and n.startswith(f"{kind}, ranks ")]
            if mixed:
                points = [(size / 1e6 / len(self.domains), loss) for size, loss in mixed]
                left.plot(*zip(*points, strict=True), "*", markersize=12, label=f"{kind}, mixed ranks", color=colour)
        for name, value in mean.items():
            if name == "public" or name.startswith("all-data"):
                left.axhline(value, color=COLOURS["grey"], linestyle="--" if name == "public" else ":", label=name)
        left.set(xscale="log", xlabel="MB an owner sends, mean over owners", ylabel="test loss, nats a token")
        left.xaxis.set_major_formatter("{x:g}")
        left.set_title("Loss against bytes")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
        for domain, colour in zip(self.domains, class_colours(len(self.domains)), strict=True):
            values = [np.exp(found[domain]) for found in self.own.values()]
            right.plot(range(len(self.own)), values, marker="o", label=domain, color=colour)
        right.set(xticks=range(len(self.own)), xticklabels=list(self.own), xlabel="rank")
        right.set_ylabel("own domain's perplexity")
        right.set_title("Own expert against rank")
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=8)
        figure.savefig(path, dpi=150)

    def draw_reasoning(self, path: Path) -> None:
        """Draw which share of the highest rank's gain a rank keeps, on both kinds of text."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        public = self.raw["reasoning public"]["all"]
        solved = [rank for rank in RANKS if f"reasoning {rank}" in self.raw]
        reasoning = {rank: public - self.raw[f"reasoning {rank}"]["reasoning"]["all"] for rank in solved}
        knowledge = {r: float(np.mean(self.gains(f"own expert, rank {r}"))) for r in self.own if r in RANKS}
        for name, gains, colour in (
            ("reasoning", reasoning, COLOURS["vermilion"]),
            ("newsgroups", knowledge, COLOURS["blue"]),
        ):
            shares = [value / list(gains.values())[-1] for value in gains.values()]
            axes.plot(
                [RANKS.index(rank) for rank in gains], shares, marker="o", label=name, color=colour, clip_on=False
            )
        axes.set_ylim(top=1)
        axes.set(xticks=range(len(RANKS)), xticklabels=RANKS, xlabel="rank", ylabel="gain, of the highest rank's")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_title("Share of the gain that a rank keeps")
        axes.legend()
        figure.savefig(path, dpi=150)


def _setting(rank: str, rate: float, alpha: float) -> str:
    return f"{rate * FULL_RATE:.2g}" if rank == FULL else f"{rate:.2g}, {alpha:g}"

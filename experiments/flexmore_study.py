"""Ranks of experts against perplexity and bytes: five domains of 20newsgroups, and reasoning against knowledge.

    python -m fedlora.experiments.flexmore_study export --output DATA  # texts as JSONL, and the model as safetensors
    python -m fedlora.experiments.flexmore_study run --data DATA --output OUT  # on a GPU; raw.json grows
    python -m fedlora.experiments.flexmore_study plot --output OUT # table.md, ranks.png, reasoning.png

``run`` needs no network. It trains, for every rank, the five owners' experts in one pass each (see
:func:`fedlora.training.train_cohort`), merges them, and evaluates the public model, every expert with the public one,
the mixture, and one LoRA on all data, which is the upper line. Learning rate and scale are tuned for every rank at full
length, until the best in the mean over owners lies inside what was tried; then each owner keeps the expert that its own
validation text prefers. ``--settings`` of another run's raw.json takes what that run chose, for more seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdaptedModel, adapt
from fedlora.config import Config, load_config
from fedlora.data.tokens import FederatedData, TokenTable, prepare_data
from fedlora.experiments.benchmarks.machine import machine
from fedlora.experiments.flexmore_plot import RANKS, add_seeds, join, plot
from fedlora.experiments.reasoning_problems import problems
from fedlora.experts.expert import FULL, Rank, break_even_rank, numbers, truncate
from fedlora.experts.expert_model import ALPHA, adapt_experts
from fedlora.experts.expert_start import mean_states, router_row, start_expert
from fedlora.experts.merged import MergedModel
from fedlora.experts.mixture import Mixture
from fedlora.experts.router import tune_router
from fedlora.models import load_base, pretrained_source
from fedlora.results.folder import to_json
from fedlora.strategies.base import drawn_factors
from fedlora.strategies.flexmore import FULL_RATE
from fedlora.training import ClientJob, evaluate, evaluate_clients, train_cohort

TASKS = ("chain_sum", "basic_arithmetic", "gcd", "leg_counting", "number_sorting", "simple_equations", "syllogism")
"""Of reasoning-gym: the procedural side of the second study."""

MIXED: list[list[Rank]] = [[16, 4, 16, 64, 4]]
BUDGETS = [0.05, 0.1]
"""Shares of full experts' bytes: for each, validation chooses the owners' ranks (:func:`_affordable`)."""

PUBLIC, VALIDATION = 60, 100
"""Examples of each domain that are public, and that tuning looks at; no owner trains on them.

Posts quote one another: training posts hold a third of the sequences of others of their time, as ``export`` prints.
Validation posts come from the later time that test posts come from.
"""


# The data.


def export(output: Path, model: str, tests: int, reasoning: int) -> None:
    """Write train, validation, public and test as JSONL with text and domain, the two tasks' files, and the model."""
    import datasets

    from fedlora.data.sources import load_examples

    output.mkdir(parents=True)
    config = load_config(
        {
            "model": {"name": model, "task": "causal-lm"},
            "data": {"name": "asset:20newsgroups", "partition": {"kind": "natural", "column": "domain"}},
            "method": {"name": "flexmore"},
        }
    )
    examples = load_examples(config)
    assert examples.train is not None
    assert examples.test is not None
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "public": [], "test": []}
    rng = np.random.default_rng(0)
    for domain in sorted(set(examples.train["domain"][:])):

        def rows(table: datasets.Dataset, name: str = domain) -> list[dict[str, Any]]:
            found = [{"text": t, "domain": d} for t, d in zip(table["text"], table["domain"], strict=True) if d == name]
            return [found[i] for i in rng.permutation(len(found))]

        train = rows(examples.train)
        later = rows(examples.test)
        parts["public"] += train[:PUBLIC]
        parts["train"] += train[PUBLIC:]
        parts["test"] += later[:tests]
        parts["validation"] += later[tests : tests + VALIDATION]
    for name, lines in parts.items():
        _write(output / f"{name}.jsonl", lines)
    for name in ("public", "validation", "test"):
        shares = _shares_known(parts[name], parts["train"])
        print(f"{name}: sequences of eight words that training posts hold:", ", ".join(shares))
    for split, seed, count in (("train", 0, reasoning), ("validation", 10**7, tests * 2), ("test", 10**6, tests * 2)):
        found = problems(TASKS, count, seed)
        lines = [{"prompt": row["text"] + "\n", "answer": row["answer"]} for row in found]
        _write(output / f"reasoning-{split}.jsonl", lines)
    shutil.copytree(pretrained_source(config), output / "model")


def _shares_known(rows: list[dict[str, Any]], train: list[dict[str, Any]]) -> list[str]:
    """Say for each domain's posts which share of their sequences its training posts hold, on average."""

    def sequences(row: dict[str, Any], length: int = 8) -> set[tuple[str, ...]]:
        words = row["text"].split()[:200]
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    told = []
    for domain in sorted({row["domain"] for row in rows}):
        known = set().union(*(sequences(row) for row in train if row["domain"] == domain))
        found = [found for row in rows if row["domain"] == domain and (found := sequences(row))]
        told.append(f"{domain} {np.mean([len(each & known) / len(each) for each in found]):.0%}")
    return told


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Training and evaluating without a federation around it: the same parts that a run uses.


Experts = dict[str, dict[str, torch.Tensor]]
"""Arrays by owner."""


@dataclass
class Tuned:
    """What tuning a rank gave.

    Attributes
    ----------
    experts : dict
        Of every owner the one that its validation text prefers.
    best : dict of str to (float, float, float)
        Its validation loss, learning rate (before a full expert's is scaled by FULL_RATE) and alpha.
    tried : list of dict
        rate, alpha, and every owner's validation loss.
    """

    experts: Experts = field(default_factory=dict)
    best: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    def mean(self) -> tuple[float, float]:
        """Rate and alpha of the lowest mean over owners."""
        row = min(self.tried, key=lambda row: float(np.mean(list(row["validation"].values()))))
        return row["rate"], row["alpha"]


class Bench:
    """One public model, one data set, and what is made of them.

    Parameters
    ----------
    options : argparse.Namespace
    reasoning : bool
        The prompts and answers instead of the newsgroups.
    """

    def __init__(self, options: argparse.Namespace, reasoning: bool = False) -> None:
        folder = options.data
        data: dict[str, Any] = {
            "name": str(folder / "train.jsonl"),
            "partition": {"kind": "natural", "column": "domain"},
        }
        data |= {"test": str(folder / "test.jsonl"), "validation": str(folder / "validation.jsonl")}
        data |= {"public": str(folder / "public.jsonl")}
        if reasoning:
            data = {"name": str(folder / "reasoning-train.jsonl"), "partition": {"kind": "iid", "clients": 1}}
            data |= {"prompt": "prompt", "answer": "answer"}
            data |= {split: str(folder / f"reasoning-{split}.jsonl") for split in ("test", "validation")}
        model = {
            "name": str(folder / "model"),
            "task": "causal-lm",
            "max_length": options.length,
            "dtype": options.dtype,
        }
        if options.layers:
            model["num_hidden_layers"] = options.layers
        steps = options.reasoning_steps if reasoning else options.steps
        client = {"batch_size": options.batch, "physical_batch_size": options.physical, "local_steps": steps}
        if options.max_grad_norm:
            client["max_grad_norm"] = options.max_grad_norm
        self.content = {
            "run": {"seed": options.seed, "rounds": 1},
            "model": model,
            "data": data,
            "method": {"name": "flexmore"},
            "client": client,
            "server": {"batch_size": options.physical * 4},
        }
        self.device, self.options = options.device, options
        self.data: FederatedData = prepare_data(self.config())
        self.owners = self.data.client_names if not reasoning else ["reasoning"]
        self.public_rows: dict[str, torch.Tensor] = {}
        self.router_rows: dict[int, dict[str, torch.Tensor]] = {}  # of each client's documents, for all ranks alike
        if self.data.public is not None:
            merged = self.merged()
            self.public_rows = merged.mixture.public_rows()
            if options.public_row == "text":
                rows = np.arange(len(self.data.public))
                states = mean_states(merged, merged.mixture.blocks, self.data.public, rows, options.physical * 4)
                found = zip(self.public_rows, states, strict=True)
                self.public_rows = {name: router_row(row)[None] for name, row in found}

    def config(self, **overrides: Any) -> Config:
        """Return the config with ``section__key`` overridden."""
        return load_config(self.content, {key.replace("__", "."): value for key, value in overrides.items()})

    def merged(self) -> MergedModel:
        """Return a mixture without experts."""
        return MergedModel(Mixture.of(load_base(self.config(), None, self.device)).eval())

    def train(self, rank: Rank, rate: float, alpha: float, owners: Sequence[str] = ()) -> Experts:
        """Train the experts of all owners, or of some, at a rank, each alone, in one pass; return them by owner."""
        config = self.config(method__alpha=alpha)
        adapted = adapt_experts(load_base(config, None, self.device), config)
        adapted.prepare({"rank": str(rank)})
        adapted.set_shared(self.public_rows)
        jobs = []
        for client in (self.owners.index(owner) for owner in owners or self.owners):
            rows = np.asarray(self.data.partition[client])
            sequence = np.random.SeedSequence([config.run.seed, 0, client])
            known = self.router_rows.get(client)
            method = config.method.model_copy(update={"router_init": "documents" if known is None else "public"})
            adapted.config = config.model_copy(update={"method": method})
            start = start_expert(adapted, self.data.train, rows, None, sequence)
            start |= known or {}
            self.router_rows[client] = {name: array for name, array in start.items() if ".router" in name}
            jobs.append(ClientJob(client, 1, rows, start, rate * (FULL_RATE if rank == FULL else 1)))
        adapted.config = config
        results = train_cohort(adapted, self.data.train, jobs, config)
        return {self.owners[j.client]: adapted.finish(r.arrays) for j, r in zip(jobs, results, strict=True)}

    def losses(self, adapted: AdaptedModel, table: TokenTable | None = None) -> dict[str, float]:
        """Loss in nats a token by domain."""
        found = evaluate(adapted, table or self.data.test, self.options.physical * 4, self.data.domain_names)
        domains: dict[str, float] = found.get("by_domain") or {"all": found["perplexity"]}
        return {name: float(np.log(value)) for name, value in domains.items()}

    def validate(self, merged: MergedModel, experts: Experts) -> dict[str, float]:
        """Loss of every owner's expert on the validation text of its own domain."""
        table = self.data.validation
        assert table is not None
        self.merge(merged, experts)
        found = {}
        for owner in experts:
            merged.show([owner])
            rows = np.arange(len(table))
            if table.domain is not None:
                rows = rows[np.asarray(table.domain) == self.data.domain_names.index(owner)]
            found[owner] = evaluate_clients(merged, table, [rows], self.options.physical * 4)[0]["loss"]
        merged.show([])
        return found

    def tune(self, merged: MergedModel, rank: Rank) -> Tuned:
        """Train a rank's experts at several rates, then several scales."""
        tuned = Tuned()

        def attempt(rate: float, alpha: float) -> None:
            experts = self.train(rank, rate, alpha)
            losses = {o: loss if np.isfinite(loss) else np.inf for o, loss in self.validate(merged, experts).items()}
            tuned.tried.append({"rate": rate, "alpha": alpha, "validation": losses})
            for owner, loss in losses.items():
                if loss < tuned.best.get(owner, (np.inf,))[0]:
                    tuned.best[owner], tuned.experts[owner] = (loss, rate, alpha), experts[owner]

        first, *others = self.options.alphas
        _widen(self.options.rates, lambda rate: attempt(rate, first), lambda: tuned.mean()[0])
        if rank != FULL and others:
            rate = tuned.mean()[0]
            _widen(others, lambda alpha: attempt(rate, alpha), lambda: tuned.mean()[1], [first])
        return tuned

    def repeat(self, merged: MergedModel, rank: Rank, settings: dict[str, list[float]]) -> Tuned:
        """Train every owner's expert at the rate and alpha of another run's ``best``."""
        trained: Experts = {}
        for rate, alpha in sorted({(rate, alpha) for _, rate, alpha in settings.values()}):
            trained |= self.train(rank, rate, alpha, [o for o in self.owners if settings[o][1:] == [rate, alpha]])
        experts = {owner: trained[owner] for owner in self.owners}
        losses = self.validate(merged, experts)
        best = {owner: (losses[owner], rate, alpha) for owner, (_, rate, alpha) in settings.items()}
        return Tuned(experts, best)

    def truncate(self, experts: Experts, ranks: Sequence[int]) -> dict[Rank, Experts]:
        """Truncate full experts by SVD, as ``extraction = "svd"`` does; a lower rank is a part of the highest."""
        found: dict[Rank, Experts] = {rank: {} for rank in ranks}
        with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for owner, arrays in experts.items():
                deltas = {name: array for name, array in arrays.items() if name.endswith(".delta")}
                pairs = list(pool.map(lambda delta: truncate(delta, max(ranks)), deltas.values()))
                for rank in ranks:
                    kept = {name: array for name, array in arrays.items() if name not in deltas}
                    for name, (b, a) in zip(deltas, pairs, strict=True):
                        path = name.removesuffix(".delta")
                        kept |= {f"{path}.lora_A": a[:rank].clone(), f"{path}.lora_B": b[:, :rank].clone()}
                    found[rank][owner] = kept
        return found

    def merge(self, merged: MergedModel, experts: Experts) -> None:
        """Put experts, and the public expert's router rows, into a mixture."""
        merged.show([])
        arrays = {f"{owner}/{name}": array for owner, part in experts.items() for name, array in part.items()}
        merged.set_shared(self.public_rows | arrays)

    def judge(self, merged: MergedModel, experts: Experts, alone: bool = True) -> Any:
        """Evaluate each expert with the public one, the mixture, and the mixture with a tuned router."""
        self.merge(merged, experts)
        found: dict[str, dict[str, float]] = {}
        for owner in experts if alone else ():
            merged.show([owner])
            found[owner] = self.losses(merged)
        merged.show(list(experts))
        if len(experts) > 1:
            found["mixture"] = self.losses(merged)
            for block in merged.mixture.blocks:
                block.top_k = 2
            found["mixture, top 2"] = self.losses(merged)
            for block in merged.mixture.blocks:
                block.top_k = None
            if self.options.router_steps and self.data.public is not None:
                config = self.config(method__router_tuning_steps=self.options.router_steps)
                tune_router(merged, self.data.public, config)
                found["mixture, router tuned"] = self.losses(merged)
        merged.show([])
        return found

    def size(self, rank: Rank) -> int:
        """Bytes that an owner sends once."""
        merged = self.merged()
        layers = list(merged.mixture.projections().values())
        head = sum(merged.mixture.routers().values()) + len(merged.mixture.routers())
        return 4 * (numbers(layers, rank) + head)


# The study.


class Record:
    """The raw figures, written whenever a part is done."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.started = path, time.perf_counter()
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.content.setdefault("machine", machine())
        shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        self.content["options"] = shown
        self.limit: float = options.max_seconds

    def part(self, key: str, work: Callable[[], Any]) -> Any:
        """Do a part that is not there yet, unless the time is up."""
        if key in self.content:
            return self.content[key]
        if time.perf_counter() - self.started > self.limit:
            print(f"{key}: no time left; run again to go on")
            return None
        began = time.perf_counter()
        self.content[key] = work()
        self.content.setdefault("seconds", {})[key] = time.perf_counter() - began
        self.path.write_text(to_json(self.content, indent=1), encoding="utf-8")
        print(f"{key}: {self.content['seconds'][key]:.1f} s", flush=True)
        return self.content[key]


def run(options: argparse.Namespace) -> None:
    """Do the parts that are not in raw.json yet, in order of importance."""
    torch.set_float32_matmul_precision("high")
    options.output.mkdir(parents=True, exist_ok=True)
    record = Record(options.output / "raw.json", options)
    bench = Bench(options)
    ranks: list[Rank] = [FULL if rank == "full" else int(rank) for rank in options.ranks]
    known = json.loads(options.settings.read_text(encoding="utf-8")) if options.settings else {}
    merged = bench.merged()
    jointly = [[FULL if rank == "full" else int(rank) for rank in these] for these in options.joint]
    sizes = {str(rank): bench.size(rank) for rank in {*ranks, *options.extract, *itertools.chain(*jointly), FULL}}
    layers = list(merged.mixture.projections().values())
    record.content["sizes"] = record.content.get("sizes", {}) | {"break_even": break_even_rank(layers), **sizes}
    record.part("public", lambda: bench.losses(merged))
    kept: dict[str, dict[Rank, Experts]] = {"rank": {}, "extracted": {}}
    mixed = {
        kind: [list(known[key]["ranks"].values()) for key in known if key.startswith(f"mixed {kind}")] for kind in kept
    }
    largest = max(options.budgets, default=0) * len(bench.owners) * sizes[FULL]
    needed = {rank for rank in ranks if sizes[str(rank)] <= largest} | set(itertools.chain(*mixed["rank"], *MIXED))
    needed |= {FULL} if options.extract else set()
    for rank in ranks:
        path = options.output / f"experts-{rank}.pt"

        def work(r: Rank = rank, path: Path = path) -> Any:
            tuned = bench.repeat(merged, r, known[f"rank {r}"]["best"]) if known else bench.tune(merged, r)
            experts = {owner: tuned.experts[owner] for owner in bench.owners}
            if r in needed:
                torch.save(experts, path)
            return bench.judge(merged, experts) | _settings(tuned)

        record.part(f"rank {rank}", work)
        if f"rank {rank}" in record.content and path.is_file():
            kept["rank"][rank] = torch.load(path)
    if options.extract and FULL in kept["rank"]:
        kept["extracted"] = bench.truncate(kept["rank"].pop(FULL), options.extract)
    for r, experts in kept["extracted"].items():
        record.part(f"extracted {r}", partial(_extracted, bench, merged, experts))
    for kind, found in kept.items():
        choices: list[list[Rank]] = mixed[kind] or [*MIXED]
        ready = [rank for rank in found if f"{kind} {rank}" in record.content]
        if ready and not known:
            choices += [_affordable(record.content, kind, ready, bench.owners, share) for share in options.budgets]
        for these in choices:
            if all(rank in found for rank in these):
                record.part(f"mixed {kind} {these}", partial(_mix, bench, merged, found, these))
    kept.clear()
    for these in jointly:
        record.part(f"joint {these}", partial(_joint, bench, merged, these))
    for rank in options.lora:
        record.part(f"all-data LoRA {rank}", partial(_all_data, bench, rank))
    if not options.reasoning_ranks:
        return
    del merged
    reasoning = Bench(options, reasoning=True)
    merged = reasoning.merged()
    record.part("reasoning public", lambda: reasoning.losses(merged))
    for rank in (FULL if rank == "full" else int(rank) for rank in options.reasoning_ranks):

        def solve(r: Rank = rank) -> Any:
            tuned = reasoning.tune(merged, r)
            return reasoning.judge(merged, tuned.experts) | _settings(tuned)

        record.part(f"reasoning {rank}", solve)


def _extracted(bench: Bench, merged: MergedModel, experts: Experts) -> Any:
    losses = bench.validate(merged, experts)
    return bench.judge(merged, experts) | {"best": {owner: [loss] for owner, loss in losses.items()}}


def _affordable(raw: dict[str, Any], kind: str, ranks: list[Rank], owners: list[str], share: float) -> list[Rank]:
    """Choose the owners' ranks whose summed validation loss is lowest, within a share of full experts' bytes."""
    sizes, limit = raw["sizes"], share * len(owners) * raw["sizes"][FULL]

    def loss(these: Sequence[Rank]) -> float:
        return float(sum(raw[f"{kind} {rank}"]["best"][owner][0] for owner, rank in zip(owners, these, strict=True)))

    every = [list(these) for these in itertools.product(ranks, repeat=len(owners))]
    return min((these for these in every if sum(sizes[str(rank)] for rank in these) <= limit), key=loss)


def _mix(bench: Bench, merged: MergedModel, kept: dict[Rank, Experts], mixed: list[Rank]) -> dict[str, Any]:
    ranks = dict(zip(bench.owners, mixed, strict=True))
    return bench.judge(merged, {o: kept[rank][o] for o, rank in ranks.items()}, alone=False) | {"ranks": ranks}


def _joint(bench: Bench, merged: MergedModel, ranks: list[Rank]) -> dict[str, Any]:
    """Train all owners at one rate and one scale, which the mixture's validation loss chooses."""
    owned = dict(zip(bench.owners, ranks, strict=True))
    tried: list[dict[str, float]] = []
    best: Experts = {}
    scales = bench.options.alphas if any(rank != FULL for rank in ranks) else bench.options.alphas[:1]
    for rate, alpha in itertools.product(bench.options.rates, scales):
        experts: Experts = {}
        for rank in dict.fromkeys(ranks):
            experts |= bench.train(rank, rate, alpha, [owner for owner in bench.owners if owned[owner] == rank])
        bench.merge(merged, experts)
        merged.show(list(experts))
        loss = float(np.mean(list(bench.losses(merged, bench.data.validation).values())))
        loss = loss if np.isfinite(loss) else np.inf
        tried.append({"rate": rate, "alpha": alpha, "validation": loss})
        if loss == min(row["validation"] for row in tried):
            best = experts
    return bench.judge(merged, best, alone=False) | {"ranks": owned, "tried": tried}


def _settings(tuned: Tuned) -> dict[str, Any]:
    settings = {"settings": tuned.mean()} if tuned.tried else {}
    return settings | {"best": tuned.best, "tried": tuned.tried}


def _widen(
    values: list[float], attempt: Callable[[float], None], best: Callable[[], float], tried: Sequence[float] = ()
) -> None:
    """Attempt values, then twice the largest or half the smallest while that end is the best."""
    for value in values:
        attempt(value)
    known = sorted([*tried, *values])
    while best() in (known[0], known[-1]):
        value = known[-1] * 2 if best() == known[-1] else known[0] / 2
        attempt(value)
        known = sorted([*known, value])


def _all_data(bench: Bench, rank: int) -> dict[str, Any]:
    """One LoRA on all owners' text: as many examples in all as the owners' experts see together."""
    owners = len(bench.owners)
    rows = np.sort(np.concatenate([np.asarray(part) for part in bench.data.partition]))
    names = sorted({path.rpartition(".")[2] for path in bench.merged().mixture.projections()})
    found: dict[float, dict[str, Any]] = {}

    def attempt(rate: float) -> None:
        overrides: dict[str, Any] = {
            "method__rank": rank,
            "method__alpha": ALPHA * rank**0.5,
            "method__target_modules": names,
        }
        batch, physical = bench.options.batch * owners, bench.options.physical * owners
        config = bench.config(client__batch_size=batch, client__physical_batch_size=physical, **overrides)
        adapted = adapt(load_base(config, None, bench.device), config, "lora")
        start = drawn_factors(adapted, config.run.seed)
        result = train_cohort(adapted, bench.data.train, [ClientJob(0, 1, rows, start, rate)], config)[0]
        adapted.set_shared(result.arrays)
        assert bench.data.validation is not None
        chosen = np.mean(list(bench.losses(adapted, bench.data.validation).values()))
        found[rate] = {"rate": rate, "validation": float(chosen), "test": bench.losses(adapted)}

    def best() -> float:
        return min(found, key=lambda rate: float(found[rate]["validation"]))

    _widen(bench.options.rates, attempt, best)
    return found[best()] | {"tried": {rate: row["validation"] for rate, row in found.items()}}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("export")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--model", default="asset:smollm2-135m")
    one.add_argument("--tests", type=int, default=100, help="test texts of each domain")
    one.add_argument("--reasoning", type=int, default=7000, help="training problems")
    two = commands.add_parser("run")
    two.add_argument("--data", type=Path, required=True, help="the folder that export wrote")
    two.add_argument("--output", type=Path, required=True)
    two.add_argument("--ranks", nargs="*", default=RANKS)
    two.add_argument(
        "--extract", nargs="*", type=int, default=[4, 16, 64, 256], help="ranks to truncate full experts to"
    )
    two.add_argument("--settings", type=Path, help="raw.json of another run, whose rates, scales and mixes are taken")
    two.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3], help="where the search begins")
    two.add_argument("--alphas", nargs="+", type=float, default=[2 * ALPHA, ALPHA], help="one: scales are not tuned")
    two.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, help="shares of full experts' bytes")
    two.add_argument(
        "--joint", nargs="+", action="append", default=[], help="the owners' ranks, all to train at one rate and scale"
    )
    two.add_argument("--lora", nargs="*", type=int, default=[16])
    two.add_argument("--public-row", choices=["zero", "text"], default="zero", help="the public expert's router row")
    two.add_argument("--steps", type=int, default=120)
    two.add_argument("--router-steps", type=int, default=60)
    two.add_argument("--reasoning-ranks", nargs="*", default=RANKS, help="none: newsgroups alone")
    two.add_argument("--reasoning-steps", type=int, default=60)
    two.add_argument("--batch", type=int, default=16)
    two.add_argument("--physical", type=int, default=16, help="rows of an owner in one pass over the model")
    two.add_argument("--max-grad-norm", type=float, default=1.0, help="of an owner's gradient; 0: not clipped")
    two.add_argument("--length", type=int, default=256)
    two.add_argument("--layers", type=int, default=0)
    two.add_argument("--dtype", default="bfloat16")
    two.add_argument("--device", default="cuda")
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--max-seconds", type=float, default=460.0, help="begin no further part after that")
    three = commands.add_parser("plot")
    three.add_argument("--output", type=Path, required=True)
    three.add_argument(
        "--parts", nargs="*", type=Path, default=[], help="outputs of runs with other ranks, to be joined"
    )
    three.add_argument("--seeds", nargs="*", type=Path, default=[], help="outputs of runs with other seeds")
    options = parser.parse_args()
    if options.command == "export":
        export(options.output, options.model, options.tests, options.reasoning)
    elif options.command == "run":
        run(options)
        plot(options.output)
    else:
        if options.parts:
            join(options.parts, options.output)
        add_seeds(options.seeds, options.output)
        plot(options.output)


if __name__ == "__main__":
    main()

"""Black-box canaries: mislabelled texts that a whole run trains on, or not, and the loss of its final model on them.

A canary is one unit of what is protected: an example, a person or a client, with all its examples. Its labels are
changed, and a coin decides whether it takes part. Two attacks then look at the final model alone. The first takes the
canaries with the smallest loss for members. The second, after LiRA (Carlini et al. 2022, arXiv 2112.03570), asks of
each canary how loud its loss is among models that saw it and models that did not: shadow adapters, each trained on a
half of the canaries that was drawn for it, all in one pass of a cohort.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.audit.bounds import Evidence, OneRun
from fedlora.clients.half import ClientHalf
from fedlora.clients.resources import client_data
from fedlora.config import Config, load_config
from fedlora.data.partition import partition_rows
from fedlora.data.sources import UNIT_COLUMN, Examples, load_examples
from fedlora.data.tokens import TokenTable
from fedlora.data.units import rows_by_unit
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.privacy.calibration import run_steps
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.results.load import load
from fedlora.simulator import simulate
from fedlora.strategies.base import get_strategy
from fedlora.tasks import get_task
from fedlora.training import ClientJob

SHARES = (0.1, 0.5)
"""Of how many of the canaries the auditor guesses: the ones that it is surest of."""
SHADOWS = 8
_SHADOW_BATCH = 32
"""Fewest examples of a shadow's step: many clients' small batches would take as many steps."""
_OWNER, _PERSON = "owner", "person"


@dataclass(frozen=True)
class Canaries:
    """Units of which a coin decides.

    Attributes
    ----------
    rows : list of ndarray
        Training examples of each canary.
    held : ndarray of bool
        Which take part.
    """

    rows: list[np.ndarray]
    held: np.ndarray

    @property
    def left_out(self) -> np.ndarray:
        """Examples of those that do not take part."""
        absent = [rows for rows, held in zip(self.rows, self.held, strict=True) if not held]
        return np.concatenate([np.empty(0, np.int64), *absent])


def attack_inputs(config: Config, most: int, shadows: int = SHADOWS) -> tuple[dict[str, Evidence], int]:
    """Train a run with canaries, and attack its final model.

    Parameters
    ----------
    config : Config
        Resolved; the task must have one class an example.
    most : int
        How many canaries there are, at most; a half of the units are left as they are.
    shadows : int
        Adapters by which the second attack knows what losses are like; 0 leaves it out.

    Returns
    -------
    (dict of str to Evidence, int)
        What the guesses prove, by attack, and the number of canaries.

    Raises
    ------
    InputError
        If the task has no classes, or clients keep models of their own.
    """
    task, method = get_task(config.model.task), get_method(config.method.name)
    if not task.one_class or task.words:
        remedy = "has no examples that can be mislabelled; leave the input canaries out (--no-inputs)"
        raise InputError("model.task", config.model.task, remedy)
    if method.personalised(config):
        remedy = "leaves no model of all clients to attack; leave the input canaries out (--no-inputs)"
        raise InputError("method.name", config.method.name, remedy)
    examples = load_examples(config)
    assert examples.train is not None
    assert examples.label_names is not None
    clients = partition_rows(config, examples.train, examples.label_names)
    canaries = _draw(config, clients, most, _persons(config, examples))
    with tempfile.TemporaryDirectory(prefix="fedlora-audit-") as place:
        folder = Path(place)
        chosen = _with_canaries(config, examples, clients, canaries, folder)
        simulate(chosen.to_toml(), output=folder / "run")
        table = client_data(_tested(chosen, folder)).test
        order = np.concatenate(canaries.rows)
        owner = np.repeat(np.arange(len(canaries.rows)), [len(rows) for rows in canaries.rows])
        losses = _losses(config, folder / "run", table, order)
        found: dict[str, Evidence] = {
            f"loss, {share:.0%}": _guess(-_mean(losses, owner), canaries.held, share) for share in SHARES
        }
        if shadows:
            seen, coins = _shadow_losses(_tested(chosen, folder), table, clients, canaries, shadows)
            scores = likelihood_ratios(_mean(losses, owner), _mean(seen, owner), coins)
            found |= {f"membership, {share:.0%}": _guess(scores, canaries.held, share) for share in SHARES}
    return found, len(canaries.rows)


def _persons(config: Config, examples: Examples) -> np.ndarray | None:
    """Return whose each training example is, where the config names persons."""
    assert examples.train is not None
    return None if config.privacy.unit is None else np.array(examples.train[UNIT_COLUMN][:])


def _draw(config: Config, clients: Sequence[np.ndarray], most: int, persons: np.ndarray | None = None) -> Canaries:
    """Draw the canaries among the units of privacy, and their coins; a person is another unit at each client."""
    if mechanism_of(config).noise_by == "server":
        units = list(clients)
    elif config.privacy.protects_units and persons is not None:
        units = [own for rows in clients for own in rows_by_unit(rows, persons[rows])]
    else:
        units = list(np.concatenate(list(clients))[:, None])
    rng = np.random.default_rng([config.run.seed, 0xCA])
    count = min(most, len(units) // 2)
    if count < 2:
        raise InputError(
            "--canaries", most, f"leaves {count} canaries of {len(units)} units; ask for more, or add data"
        )
    chosen = np.sort(rng.choice(len(units), count, replace=False))
    return Canaries([np.asarray(units[unit]) for unit in chosen], rng.random(count) < 0.5)


def _with_canaries(
    config: Config, examples: Examples, clients: Sequence[np.ndarray], canaries: Canaries, folder: Path
) -> Config:
    """Write the examples with mislabelled canaries, and return the config of a run on those that take part."""
    train, test, names = examples.train, examples.test, examples.label_names
    assert train is not None
    assert test is not None
    assert names is not None
    keys = [key for key in get_task(config.model.task).columns(config.data) if key in train.column_names]
    labels = np.array(train["label"][:])
    wrong = np.concatenate(canaries.rows)
    labels[wrong] = (labels[wrong] + 1) % len(names)
    owners = np.full(len(train), -1)
    for client, rows in enumerate(clients):
        owners[rows] = client
    out = np.zeros(len(train), bool)
    out[canaries.left_out] = True
    texts = {key: train[key][:] for key in keys}
    persons = _persons(config, examples)
    whose = [{} if persons is None else {_PERSON: f"{persons[row]:09d}"} for row in range(len(train))]
    lines = [
        {key: texts[key][row] for key in keys}
        | {"label": names[labels[row]], _OWNER: f"{owners[row]:06d}"}
        | whose[row]
        for row in range(len(train))
    ]
    _write(folder / "all.jsonl", lines)
    _write(folder / "train.jsonl", [line for row, line in enumerate(lines) if owners[row] >= 0 and not out[row]])
    tests = zip(*(test[key][:] for key in (*keys, "label")), strict=True)
    _write(folder / "test.jsonl", [{**dict(zip(keys, row, strict=False)), "label": names[row[-1]]} for row in tests])
    data: dict[str, Any] = {
        "name": str(folder / "train.jsonl"),
        "test": str(folder / "test.jsonl"),
        "label_names": names,
    }
    data |= {key: key for key in keys} | {"label": "label", "partition": {"kind": "natural", "column": _OWNER}}
    content = config.model_dump(mode="json", exclude_none=True, exclude={"data", "tracking"})
    if persons is not None:
        content["privacy"]["unit"] = _PERSON
    return load_config(content | {"data": data})


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _tested(config: Config, folder: Path) -> Config:
    """Return the config with all examples as its test set, those of canaries that stayed away too."""
    return config.model_copy(update={"data": config.data.model_copy(update={"test": str(folder / "all.jsonl")})})


@torch.no_grad()
def _losses(config: Config, run: Path, table: TokenTable, rows: np.ndarray) -> np.ndarray:
    """Return the loss of a run's final model on each row."""
    model, _ = load(run)
    device = "cuda" if config.simulation.gpus_per_worker > 0 else "cpu"
    model, size, found = model.to(device), config.server.batch_size, []
    for first in range(0, len(rows), size):
        batch = table.batch(rows[first : first + size], device)
        labels = batch.pop("labels")
        found.append(table.task.loss(model(**batch).logits, labels).double().cpu().numpy())
    return np.concatenate(found)


def _shadow_losses(
    config: Config, table: TokenTable, clients: Sequence[np.ndarray], canaries: Canaries, shadows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train shadow adapters in one pass, without noise and on all clients' examples together, as many as the run sees.

    Returns
    -------
    (ndarray [shadows, rows], ndarray of bool [shadows, canaries])
        Each one's loss on the canaries' rows, and the canaries that it saw.
    """
    strategy = get_strategy(config.method.name)(config)
    adapted = strategy.server_model(client_data(config))
    start = strategy.start_arrays(adapted, client_data(config)) | adapted.arrays(adapted.head_names)
    adapted.set_shared(start)
    half = (get_method(config.method.name).client_half() or ClientHalf)(adapted, config)
    arrays = half.begin({name: start[name] for name in strategy.trained_names(adapted)})
    coins = np.random.default_rng([config.run.seed, 0x5D]).random((shadows, len(canaries.rows))) < 0.5
    order = np.concatenate(canaries.rows)
    rest = np.setdiff1d(np.concatenate(list(clients)), order)
    at_once = max(1, round(len(clients) * float(config.server.fraction_train)))
    steps, size = run_steps(config, max(1, len(rest) // len(clients))), config.client.batch_size
    large = max(size, _SHADOW_BATCH)
    steps = -(-at_once * steps * size // large)
    update = {"local_steps": steps, "local_epochs": None, "batch_size": large}
    client = config.client.model_copy(update=update)
    rate, jobs = float(strategy.learning_rate(1)), []
    for shadow, seen in enumerate(coins):
        own = [rows for rows, there in zip(canaries.rows, seen, strict=True) if there]
        jobs.append(ClientJob(shadow, 1, np.concatenate([rest, *own]), arrays, rate))
    results = half.train(table, jobs, config.model_copy(update={"client": client}))
    adapted.set_clients([result.arrays for result in results])
    part = max(1, config.server.batch_size // shadows)
    parts = [_cohort_losses(adapted, table, order[i : i + part], shadows) for i in range(0, len(order), part)]
    return np.concatenate(parts, 1), coins


@torch.no_grad()
def _cohort_losses(adapted: AdaptedModel, table: TokenTable, rows: np.ndarray, clients: int) -> np.ndarray:
    """Return the loss of each client's model on the same rows, [clients, rows]."""
    adapted.model.eval()
    batch = table.batch(np.tile(rows, clients), adapted.device)
    adapted.layout.set_rows([len(rows)] * clients)
    losses = table.task.loss(adapted.outputs(batch, table.task), batch["labels"])
    return losses.double().cpu().numpy().reshape(clients, len(rows))


def likelihood_ratios(losses: np.ndarray, shadows: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """Return how much likelier each loss is among shadows that saw the canary, in logarithms.

    Parameters
    ----------
    losses : ndarray [canaries]
        Of the model under attack.
    shadows : ndarray [shadows, canaries]
    coins : ndarray of bool [shadows, canaries]
        Which shadow saw which canary.

    Notes
    -----
    The logit of the right class' probability is close to normal (LiRA). Shadows are few: means are each canary's own,
    the variance is that of all together.
    """
    mine, theirs = _logit(losses), _logit(shadows)
    means = {}
    for seen in (True, False):
        weight = (coins == seen).astype(float)
        overall = (weight * theirs).sum() / max(1.0, weight.sum())
        counts = weight.sum(0)
        means[seen] = np.where(counts > 0, (weight * theirs).sum(0) / np.maximum(1.0, counts), overall)
    spread = np.square(theirs - np.where(coins, means[True], means[False])).mean() + 1e-12
    ratios: np.ndarray = (np.square(mine - means[False]) - np.square(mine - means[True])) / (2 * spread)
    return ratios


def _logit(losses: np.ndarray) -> np.ndarray:
    """Turn losses -log p into log p / (1 - p)."""
    losses = np.clip(losses, 1e-9, 700)
    logits: np.ndarray = -losses - np.log(-np.expm1(-losses))
    return logits


def _mean(losses: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Average the losses [..., rows] of each canary's rows."""
    sums = np.apply_along_axis(lambda row: np.bincount(owner, row), -1, losses)
    means: np.ndarray = sums / np.bincount(owner)
    return means


def _guess(scores: np.ndarray, held: np.ndarray, share: float) -> OneRun:
    """Guess that the canaries of the highest scores took part, and as many of the lowest did not."""
    each = max(1, round(share * len(scores) / 2))
    order = np.argsort(scores, kind="stable")
    right = int(held[order[-each:]].sum() + (~held[order[:each]]).sum())
    return OneRun(len(scores), 2 * each, right)

"""A run's epsilon, step by step: what was noised, what another library makes of it, and what it leaves out."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binom

from fedlora.config import Config, read_config
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.privacy.accountants import Steps, get_accountant, group_of, steps_of
from fedlora.privacy.calibration import spent_epsilon
from fedlora.privacy.mechanisms import mechanism_of

AGREES = 0.02
"""By how much two accountants of one kind may differ, as a share of epsilon."""


@dataclass(frozen=True)
class Spent:
    """The epsilon of a run, or of one of its clients, explained.

    Attributes
    ----------
    run, mode, unit, neighbours, mechanism : str
        What is protected, from the view of whom, and by what noise.
    client : str
        Whose epsilon this is; ``all`` where one holds for all.
    clients : int
        How many have an epsilon of their own.
    history : list of tuple
        Noise multiplier, sample rate and number of the noisy steps that were released, those of the start first; and
        where a unit has several examples in a step at most how many.
    start : list of tuple
        Those of the start, before the first round; empty where it read no examples.
    delta : float
    accountant : str
    recorded, epsilon : float
        As the run wrote it, and as the run's accountant computes it now.
    others : dict of str to float
        Epsilon by dp-accounting's accountants.
    compared : str
        Which of them computes as the run's accountant does.
    explanation : str
        Why they differ by more than 2 %; "" where they do not.
    not_covered : list of str
        What was read or shown that epsilon does not count.
    """

    run: str
    mode: str
    unit: str
    neighbours: str
    mechanism: str
    client: str
    clients: int
    history: list[Steps]
    start: list[Steps]
    delta: float
    accountant: str
    recorded: float
    epsilon: float
    others: dict[str, float]
    compared: str
    explanation: str
    not_covered: list[str]

    @property
    def difference(self) -> float:
        """How far the other library's epsilon lies from the run's, as a share of that."""
        other = self.others[self.compared]
        return 0.0 if other == self.epsilon else (other - self.epsilon) / self.epsilon if self.epsilon else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        names = "noise_multiplier", "sample_rate", "steps", "examples_per_unit"
        steps = {
            key: [dict(zip(names, each, strict=False)) for each in history]
            for key, history in (("history", self.history), ("start", self.start))
        }
        return asdict(self) | {**steps, "difference": self.difference}


def explain_privacy(folder: Path, client: str | None = None) -> Spent:
    """Explain the epsilon of a run, and compute it again.

    Parameters
    ----------
    folder : Path
        A run folder; the run need not have ended.
    client : str, optional
        By default the one with the largest epsilon.

    Raises
    ------
    InputError
        If the folder holds no run under privacy, it has no such client, or dp-accounting is not installed.
    """
    config, rows = read_config(folder / "config.toml"), _rows(folder)
    if not rows:
        remedy = "holds no run under privacy: privacy.csv has no lines; give the folder of another"
        raise InputError("RUN", str(folder), remedy)
    last = {row["client"]: row for row in rows}
    chosen = max(last, key=lambda name: float(last[name]["epsilon"])) if client is None else client
    if chosen not in last:
        names = list(last)
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise InputError("--client", client, f"has no line in privacy.csv; choose one of {shown}")
    start, history = _history(config, [row for row in rows if row["client"] == chosen], folder)
    privacy, mechanism = config.privacy, mechanism_of(config)
    epsilon = spent_epsilon(privacy.accountant, privacy.target_delta, tuple(history))
    others = second_opinion(privacy.target_delta, tuple(history))
    kind = get_accountant(privacy.accountant).kind
    compared = kind if kind in others else "pld"
    return Spent(
        run=str(folder),
        mode=privacy.mode,
        unit=mechanism.protects(config),
        neighbours=mechanism.neighbours(config),
        mechanism=mechanism.describe(config),
        client=chosen,
        clients=len(last),
        history=history,
        start=start,
        delta=privacy.target_delta,
        accountant=privacy.accountant,
        recorded=float(last[chosen]["epsilon"]),
        epsilon=epsilon,
        others=others,
        compared=compared,
        explanation=_explanation(privacy.accountant, epsilon, others[compared]),
        not_covered=_not_covered(config, folder),
    )


def second_opinion(delta: float, history: tuple[Steps, ...]) -> dict[str, float]:
    """Compute epsilon by Google's dp-accounting: by Renyi divergences, and by privacy loss distributions.

    Of units with several examples in a step, mixtures of Gaussians, it has privacy loss distributions alone.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        from dp_accounting import dp_event
        from dp_accounting.pld import PLDAccountant
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        remedy = "is needed for a second opinion; install it: pip install 'fedlora[accounting]'"
        raise InputError("dp-accounting", None, remedy) from None
    grouped = any(group_of(entry) > 1 for entry in history)
    # Mixtures of Gaussians take long on its own grid of 1e-4. This one changes an epsilon of 4 after 500 steps by 2e-4.
    accountants = (
        {"pld": PLDAccountant(value_discretization_interval=1e-3)}
        if grouped
        else {"rdp": RdpAccountant(), "pld": PLDAccountant()}
    )
    if any(entry[0] == 0 for entry in history):
        return dict.fromkeys(accountants, math.inf)
    for entry in history:
        sigma, rate, steps, group = *entry[:3], group_of(entry)
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(sigma)
        if group > 1:
            j = range(group + 1)
            event = dp_event.MixtureOfGaussiansDpEvent(sigma, list(j), list(binom.pmf(j, group, rate)))
        elif rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        for accountant in accountants.values():
            accountant.compose(event, steps)
    return {name: float(accountant.get_epsilon(delta)) for name, accountant in accountants.items()}


def _rows(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / "privacy.csv").open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        remedy = f"has no privacy.csv that can be read ({error.strerror}); give the folder of a run"
        raise InputError("RUN", str(folder), remedy) from None


def _history(config: Config, rows: list[dict[str, str]], folder: Path) -> tuple[list[Steps], list[Steps]]:
    """Add up a client's steps of one noise and one rate; return those of a start that read its examples, and all."""
    group = config.privacy.group
    before = _steps((row for row in rows if row["round"] == "0"), group)
    rounds = _steps((row for row in rows if row["round"] != "0"), group)
    method = get_method(config.method.name)
    if method.start_examples(config) and not method.start_exchanges(config):
        # The start was charged with the client's first steps, in one line.
        plan = mechanism_of(config).plan(config, _examples(config, rows[0], folder))
        before = list(plan.start) if plan is not None else []
    return before, [*before, *rounds]


def _steps(rows: Iterable[dict[str, str]], group: int) -> list[Steps]:
    steps: dict[tuple[float, float], int] = {}
    for row in rows:
        key = float(row["noise_multiplier"]), float(row["sample_rate"])
        steps[key] = steps.get(key, 0) + int(row["steps"])
    return [steps_of(sigma, rate, count, group) for (sigma, rate), count in steps.items()]


def _examples(config: Config, row: dict[str, str], folder: Path) -> int:
    """Return a client's number of examples: by the run's partition, or by its sample rate."""
    path, rate = folder / "partition.csv", float(row["sample_rate"])
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            return sum(int(line["examples"]) for line in csv.DictReader(stream) if line["client"] == row["client"])
    if rate == 1:
        remedy = f"does not say how many examples {config.method.name}'s start drew from; explain another client"
        raise InputError("RUN", str(folder), remedy)
    return round(config.client.batch_size / rate)


def _explanation(accountant: str, ours: float, theirs: float) -> str:
    if ours == theirs or (ours and abs(theirs - ours) <= AGREES * ours):
        return ""
    if not get_accountant(accountant).is_bound:
        return f"{accountant} is an approximation, and may give too small an epsilon"
    if math.isinf(ours) or math.isinf(theirs):
        return "one of the two has no finite bound for this noise"
    if ours > theirs:
        return f"{accountant} is an upper bound, and looser here; the smaller value holds too"
    return "dp-accounting's orders, or its grid, are coarser here; both are upper bounds, so the run's holds"


def _not_covered(config: Config, folder: Path) -> list[str]:
    """Say what the run showed or read of the examples without noise."""
    found = []
    if not config.server.secure_aggregation:
        found.append("the clients' training losses, which a simulation shows (train_loss in rounds.jsonl)")
    if get_method(config.method.name).start_reads(config) == "private":
        found.append(f"the start: method.init = {getattr(config.method, 'init', '')} reads the clients' examples")
    if config.server.evaluate_clients or config.server.fraction_evaluate:
        found.append("the scores on the clients' own examples (clients.csv)")
    if (folder / "partition.csv").exists():
        found.append("partition.csv and the partition's picture, which count the clients' examples by class")
    if config.privacy.protects_units:
        found.append("updates of other clients that have examples of the same person")
    try:
        study = json.loads((folder.resolve().parents[1] / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError):
        study = {}
    if isinstance(study, dict) and study.get("tuning"):
        found.append("the study's tuning runs, whose validation scores chose a value")
    if not get_accountant(config.privacy.accountant).is_bound:
        found.append(f"{config.privacy.accountant} is no upper bound")
    return found

"""The best score within a budget, and the cost of reaching a score."""

from __future__ import annotations

import bisect
import math
import operator
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from fedlora.communication.links import PROFILES
from fedlora.errors import InputError
from fedlora.reporting.comparison import Comparison, Group, Mean, network_by_round
from fedlora.reporting.runs import FinishedRun


@dataclass(frozen=True)
class Cost:
    """What a run spends, as it adds up from round to round.

    Attributes
    ----------
    name : str
        In ``[report] budgets``.
    title : str
    form : str
        How it is shown: bytes, seconds, integer or number.
    """

    name: str
    title: str
    form: str


COSTS = {
    cost.name: cost
    for cost in (
        Cost("bytes", "bytes of all messages", "bytes"),
        Cost("uplink_bytes", "bytes from the clients", "bytes"),
        Cost("downlink_bytes", "bytes to the clients, initial broadcast included", "bytes"),
        Cost("epsilon", "epsilon (largest of the clients)", "number"),
        Cost("seconds", "seconds without evaluation", "seconds"),
        Cost("rounds", "rounds", "integer"),
        *(Cost(f"seconds_{name}", f"seconds on the network ({name}, simulated)", "seconds") for name in PROFILES),
    )
}
"""Every cost that a budget can limit."""

_OF_TARGETS = ("bytes", "uplink_bytes", "epsilon", "seconds", "rounds")
_WAYS = {
    "bytes": ("initial", "down", "up"),
    "uplink_bytes": ("up",),
    "downlink_bytes": ("initial", "down"),
}


@dataclass(frozen=True)
class Questions:
    """Budgets and targets to answer for.

    Attributes
    ----------
    budgets : mapping of str to sequence of float
        By the name of a cost.
    targets : sequence of float
        Values of the task's primary metric.
    """

    budgets: Mapping[str, Sequence[float]] = field(default_factory=dict)
    targets: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_questions(self.budgets, self.targets, "report")

    def __or__(self, other: Questions) -> Questions:
        names = [name for name in COSTS if name in self.budgets or name in other.budgets]
        both = {name: {*self.budgets.get(name, ()), *other.budgets.get(name, ())} for name in names}
        return Questions(
            {name: sorted(values) for name, values in both.items()}, sorted({*self.targets, *other.targets})
        )


def check_questions(budgets: Mapping[str, Sequence[float]], targets: Sequence[float], field: str) -> None:
    """Check names of costs and values.

    Raises
    ------
    InputError
        Naming ``field`` and what is wrong below it.
    """
    for name, values in budgets.items():
        if name not in COSTS:
            raise InputError(f"{field}.budgets", name, f"is no cost; choose among {', '.join(COSTS)}")
        for value in values:
            if not 0 < value < math.inf:
                raise InputError(f"{field}.budgets.{name}", value, "is no budget; give a number above 0")
    for value in targets:
        if not math.isfinite(value):
            raise InputError(f"{field}.targets", value, "is no score; give a number")


@dataclass(frozen=True)
class Step:
    """A run's best model after one of its evaluations, and the cost so far.

    Attributes
    ----------
    round : int
        Of the evaluation.
    cost : float
        Spent by then.
    chosen : int
        Round of the best model so far.
    score : float
        Test score of that model.
    """

    round: int
    cost: float
    chosen: int
    score: float


def spent(run: FinishedRun, cost: str) -> dict[int, float]:
    """Return what a run had spent after each of its rounds; infinite epsilon without privacy.

    The dict is empty if the run's files lack the cost.
    """
    rounds = [line.round for line in run.rounds]
    if cost == "rounds":
        return {number: float(number) for number in rounds}
    if cost == "epsilon":
        return _epsilon(run, rounds)
    by_round: dict[int, float] = defaultdict(float)
    if cost in _WAYS:
        for row in run.messages:
            if row.direction in _WAYS[cost]:
                by_round[row.round] += row.message_bytes
    elif cost == "seconds":
        for line in run.rounds:
            if not line.seconds:
                return {}
            by_round[line.round] = math.fsum(line.seconds.get(n, 0.0) for n in ("train", "communicate", "aggregate"))
    else:
        by_round |= network_by_round(run, cost.removeprefix("seconds_"))
    return _so_far(by_round.items(), rounds, operator.add)


def _so_far(
    by_round: Iterable[tuple[int, float]], rounds: Sequence[int], combine: Callable[[float, float], float]
) -> dict[int, float]:
    """Combine what each round has into what there is after each of ``rounds``, which rise."""
    waiting, value, found = sorted(by_round), 0.0, {}
    place = 0
    for number in rounds:
        while place < len(waiting) and waiting[place][0] <= number:
            value = combine(value, waiting[place][1])
            place += 1
        found[number] = value
    return found


def _epsilon(run: FinishedRun, rounds: Sequence[int]) -> dict[int, float]:
    if run.summary.epsilon is None:
        return dict.fromkeys(rounds, math.inf)
    if not run.privacy:  # only the final epsilon is known, and no round had spent more
        return dict.fromkeys(rounds, run.summary.epsilon.max)
    return _so_far(((line.round, line.epsilon) for line in run.privacy), rounds, max)


def has_validation(run: FinishedRun) -> bool:
    """Whether every evaluation of a run has validation metrics, so that its best round can be told without testing."""
    return all(isinstance(line.metrics.get("validation"), dict) for line in run.rounds if line.metrics)


def steps(run: FinishedRun, cost: str) -> list[Step]:
    """Return a run's best model so far after each evaluation: the best by validation, else by its test score.

    Costs never fall from step to step, so that the last step within a budget is the answer for it.
    """
    costs, task, validated = spent(run, cost), run.task, has_validation(run)
    found: list[Step] = []
    best = -math.inf
    for line in run.rounds:
        if not line.metrics or line.round not in costs:
            continue
        rank = task.score(line.metrics["validation"] if validated else line.metrics)
        score = line.score(task.primary)
        if found and not rank > best:
            found.append(Step(line.round, costs[line.round], found[-1].chosen, found[-1].score))
            continue
        best = rank
        found.append(Step(line.round, costs[line.round], line.round, math.nan if score is None else score))
    return found


def within(found: Sequence[Step], budget: float) -> Step | None:
    """Return the last step whose cost is within a budget; None if the first evaluation cost more."""
    place = bisect.bisect_right([step.cost for step in found], budget)
    return found[place - 1] if place else None


def cost_to(run: FinishedRun, costs: Mapping[int, float], target: float) -> float:
    """Return the cost at a run's first evaluation whose test score reached a target; infinite if none did.

    Parameters
    ----------
    run : FinishedRun
    costs : mapping of int to float
        Spent after each round, as :func:`spent` returns it.
    target : float
        Value of the task's primary metric.
    """
    task = run.task
    for line in run.rounds:
        score = line.score(task.primary)
        if score is not None and line.round in costs and (score >= target if task.maximize else score <= target):
            return costs[line.round]
    return math.inf


@dataclass(frozen=True)
class BudgetRow:
    """A group's answer to a budget.

    Attributes
    ----------
    group : Group
    cost : Cost
    budget : float
    found : list of Step or None
        Of each seed.
    """

    group: Group
    cost: Cost
    budget: float
    found: list[Step | None]

    @property
    def within(self) -> int:
        """Number of seeds with an evaluation within the budget."""
        return sum(step is not None for step in self.found)

    @property
    def score(self) -> Mean | None:
        """Mean score; None unless every seed has one, since a mean over the cheap seeds alone would mislead."""
        scores = [step.score for step in self.found if step is not None]
        finite = all(map(math.isfinite, scores))
        return Mean.of(scores) if len(scores) == len(self.found) and finite else None

    @property
    def chosen_by(self) -> str:
        """Examples by which each seed's best round was chosen: validation, or test."""
        return "validation" if all(map(has_validation, self.group.runs)) else "test"


@dataclass(frozen=True)
class TargetRow:
    """What reaching a target cost a group.

    Attributes
    ----------
    group : Group
    cost : Cost
    target : float
    costs : list of float
        Of each seed; infinite where the target was not reached.
    """

    group: Group
    cost: Cost
    target: float
    costs: list[float]

    @property
    def reached(self) -> int:
        """Number of seeds that reached the target."""
        return sum(map(math.isfinite, self.costs))

    @property
    def mean(self) -> Mean | None:
        """Mean cost; None unless every seed reached the target."""
        return Mean.of(self.costs) if self.reached == len(self.costs) else None

    @property
    def median(self) -> float:
        """Median cost; the cost of a seed that did not reach the target is infinite."""
        return statistics.median(self.costs)

    @property
    def by_seed(self) -> str:
        """The cost of each seed in words."""
        shown = ("not reached" if math.isinf(cost) else f"{cost:.6g}" for cost in self.costs)
        return "; ".join(f"{run.config.run.seed}: {c}" for run, c in zip(self.group.runs, shown, strict=True))


def budget_rows(groups: Sequence[Group], questions: Questions) -> list[BudgetRow]:
    """Answer every budget for every group, the best first."""
    rows = []
    for name, budgets in questions.budgets.items():
        found = [(group, [steps(run, name) for run in group.runs]) for group in groups]
        for budget in budgets:
            answers = [
                BudgetRow(group, COSTS[name], budget, [within(of_run, budget) for of_run in of_group])
                for group, of_group in found
                if all(of_group)
            ]
            rows += sorted(answers, key=_budget_order)
    return rows


def _budget_order(row: BudgetRow) -> float:
    if row.score is None:
        return math.inf
    return -row.score.mean if row.group.task.maximize else row.score.mean


def target_rows(groups: Sequence[Group], questions: Questions) -> list[TargetRow]:
    """Answer every target for every group, the cheapest first: in the usual costs, and those that have budgets.

    Epsilon is left out of groups without privacy.
    """
    if not questions.targets:
        return []
    names = dict.fromkeys((*_OF_TARGETS, *questions.budgets))
    # Simulated times on a network take long, so that no target computes them again.
    costs = {name: [(group, [spent(run, name) for run in group.runs]) for group in groups] for name in names}
    rows = []
    for target in questions.targets:
        for name, by_group in costs.items():
            answers = [
                TargetRow(
                    group,
                    COSTS[name],
                    target,
                    [cost_to(run, c, target) for run, c in zip(group.runs, of_runs, strict=True)],
                )
                for group, of_runs in by_group
                if all(of_run and all(map(math.isfinite, of_run.values())) for of_run in of_runs)
            ]
            rows += sorted(answers, key=lambda row: (-row.reached / len(row.costs), row.median))
    return rows


@dataclass(frozen=True)
class Answers:
    """The answers for the runs of a comparison.

    Attributes
    ----------
    budgets : sequence of BudgetRow
    targets : sequence of TargetRow
    """

    budgets: Sequence[BudgetRow] = ()
    targets: Sequence[TargetRow] = ()


def answer_questions(comparison: Comparison, questions: Questions) -> Answers:
    """Answer budgets and targets; without rows where none are asked for."""
    return Answers(budget_rows(comparison.groups, questions), target_rows(comparison.groups, questions))


def budgets_table(rows: Sequence[BudgetRow]) -> pd.DataFrame:
    """Return a row for each budget and group; the score is empty where a seed has no evaluation within the budget."""
    table = []
    for row in rows:
        mean, name = row.score, row.group.task.primary
        table.append(
            {
                "cost": row.cost.name,
                "budget": row.budget,
                "group": row.group.name,
                "method": row.group.method,
                "privacy": row.group.privacy,
                "chosen_by": row.chosen_by,
                "n": len(row.found),
                "n_within": row.within,
                name: mean.mean if mean else None,
                f"{name}_low": mean.low if mean else None,
                f"{name}_high": mean.high if mean else None,
                "rounds": " ".join("none" if step is None else str(step.chosen) for step in row.found),
            }
        )
    return pd.DataFrame(table)


def targets_table(rows: Sequence[TargetRow]) -> pd.DataFrame:
    """Return a row for each target, cost and group; the mean is empty where a seed did not reach the target."""
    return pd.DataFrame(
        {
            "target": row.target,
            "cost": row.cost.name,
            "group": row.group.name,
            "method": row.group.method,
            "privacy": row.group.privacy,
            "n": len(row.costs),
            "n_reached": row.reached,
            "mean": row.mean.mean if row.mean else None,
            "mean_low": row.mean.low if row.mean else None,
            "mean_high": row.mean.high if row.mean else None,
            "median": row.median if math.isfinite(row.median) else None,
            "by_seed": row.by_seed,
        }
        for row in rows
    )


def front(points: Sequence[tuple[float, float]], maximize: bool) -> list[int]:
    """Return the indices of the points (cost, score) that none dominates, by rising cost; of equal points the first.

    A point dominates another if it costs no more and scores no worse, and is better in one of the two.
    """
    sign = -1.0 if maximize else 1.0
    found: list[int] = []
    best = math.inf
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[place][1] < best:
            best = sign * points[place][1]
            found.append(place)
    return found


@dataclass(frozen=True)
class MeanStep:
    """Mean cost and score of a group's best models after an evaluation, over its seeds."""

    group: Group
    round: int
    cost: float
    score: Mean


def mean_steps(group: Group, cost: str) -> list[MeanStep]:
    """Return the means after every evaluation that all runs of a group have, where cost and score are finite."""
    of_runs = [{step.round: step for step in steps(run, cost)} for run in group.runs]
    means = []
    for number in of_runs[0]:
        if not all(number in of_run for of_run in of_runs):
            continue
        at = [of_run[number] for of_run in of_runs]
        if all(math.isfinite(step.cost) and math.isfinite(step.score) for step in at):
            cost_mean = math.fsum(step.cost for step in at) / len(at)
            means.append(MeanStep(group, number, cost_mean, Mean.of([step.score for step in at])))
    return means

"""Quality under a budget and cost to a target, against brute force over small run folders."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.reporting.budgets import (
    COSTS,
    Questions,
    answer_questions,
    budgets_table,
    cost_to,
    front,
    mean_steps,
    spent,
    steps,
    targets_table,
    within,
)
from fedlora.reporting.comparison import Comparison, compare
from fedlora.reporting.runs import FinishedRun, read_runs
from fedlora.study.config import load_study
from tests.command import fedlora
from tests.reporting.folders import make_run, write_csv
from tests.reporting.packed import unpacked
from tests.study.studies import planned

few = st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(0, 9, allow_nan=False)
clouds = st.lists(st.tuples(few, few), max_size=20)


@given(clouds, st.booleans())
def test_the_front_has_every_point_that_none_dominates_and_no_other(
    points: list[tuple[float, float]], maximize: bool
) -> None:
    found = [points[i] for i in front(points, maximize)]
    sign = 1 if maximize else -1

    def dominated(point: tuple[float, float]) -> bool:
        return any(o != point and o[0] <= point[0] and sign * o[1] >= sign * point[1] for o in points)

    assert set(found) == {point for point in points if not dominated(point)}
    for (cost, score), (next_cost, next_score) in itertools.pairwise(found):
        assert cost < next_cost
        assert sign * score < sign * next_score


ROUNDS = 5
WAYS = ("initial", "down", "up")


def write(path: Path, seed: int, scores: list[float | None], **more: Any) -> Path:
    """A run of given scores by round (None: not evaluated), with drawn costs; ``validation`` likewise."""
    rng = np.random.default_rng(seed)
    overrides = {"run.seed": seed, "run.rounds": ROUNDS, **more.pop("config", {})}
    private = overrides.get("privacy.mode") == "example"
    name = more.pop("metric", "accuracy")
    make_run(path, seed, overrides, task=more.pop("task", "sequence-classification"))
    lines = []
    for number, score in enumerate(scores, 1):
        metrics: dict[str, Any] = {} if score is None else {"loss": 0.5, name: score}
        if score is not None and "validation" in more:
            metrics["validation"] = {"loss": 0.5, name: more["validation"][number - 1]}
        seconds = {"train": float(rng.integers(1, 9)), "communicate": 1.0, "aggregate": 0.5, "evaluate": 100.0}
        lines.append({"round": number, "metrics": metrics, "seconds": seconds})
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Not every client takes part in every round.
    part = [(r, c) for r in range(1, ROUNDS + 1) for c in range(3) if rng.random() < 0.8 or c == r % 3]
    sent = [(r, c, way, 1, int(rng.integers(1, 99)), 1) for r, c in part for way in WAYS if way != "initial" or r < 3]
    sent += [(r, 0, "evaluate_down", 1, 10**6, 1) for r in range(1, ROUNDS + 1)]
    columns = ("round", "client", "direction", "payload_bytes", "message_bytes", "formula_bytes")
    write_csv(path / "communication.csv", columns, sent)
    charged = [(r, c, 1, 0.1, 1.0, float(r - 0.1 * c), 1e-5) for r, c in part] if private else []
    columns = ("round", "client", "steps", "sample_rate", "noise_multiplier", "epsilon", "delta")
    write_csv(path / "privacy.csv", columns, charged)
    if more.get("personalised"):
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | {"personalised": True}))
    return path


def brute(path: Path, cost: str, number: int) -> float:
    """What a run had spent after a round, read from its files."""
    with (path / "communication.csv").open() as stream:
        sent = [row for row in csv.DictReader(stream) if int(row["round"]) <= number]
    if cost in ("bytes", "uplink_bytes", "downlink_bytes"):
        ways = {"bytes": WAYS, "uplink_bytes": ("up",), "downlink_bytes": ("initial", "down")}[cost]
        return float(sum(int(row["message_bytes"]) for row in sent if row["direction"] in ways))
    if cost == "rounds":
        return float(number)
    if cost == "epsilon":
        with (path / "privacy.csv").open() as stream:
            rows = [float(row["epsilon"]) for row in csv.DictReader(stream) if int(row["round"]) <= number]
        return max(rows, default=math.inf)
    of = [json.loads(line)["seconds"] for line in (path / "rounds.jsonl").read_text().splitlines()[:number]]
    return sum(s["train"] + s["communicate"] + s["aggregate"] for s in of)


BRUTE = ("bytes", "uplink_bytes", "downlink_bytes", "epsilon", "seconds", "rounds")
PRIVATE = {"privacy.mode": "example", "privacy.target_epsilon": 8.0}
A = [None, 0.6, 0.8, 0.7, 0.9]
B = [0.5, 0.7, 0.6, None, 0.75]
C = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of two seeds: fed-sb with validation and privacy, fedit with neither."""
    runs = tmp_path_factory.mktemp("budgets")
    validation = [0.0, 0.9, 0.1, 0.95, 0.5]
    write(runs / "sb0", 0, A, config=PRIVATE, validation=validation)
    write(runs / "sb1", 1, B, config=PRIVATE, validation=validation)
    write(runs / "it0", 0, B, config={"method.name": "fedit"})
    write(runs / "it1", 1, C, config={"method.name": "fedit"})
    return runs


def by_name(folder: Path) -> dict[str, FinishedRun]:
    return {run.name: run for run in read_runs([folder]).runs}


@pytest.mark.parametrize("cost", BRUTE)
def test_what_was_spent_is_what_the_files_say(folder: Path, cost: str) -> None:
    for name, run in by_name(folder).items():
        expected = {number: brute(folder / name, cost, number) for number in range(1, ROUNDS + 1)}
        assert spent(run, cost) == pytest.approx(expected)


def test_time_on_a_network_adds_up_to_that_of_the_run(folder: Path) -> None:
    for group in compare(read_runs([folder])).groups:
        for run in group.runs:
            values = list(spent(run, "seconds_lte").values())
            assert values == sorted(values)
        last = [list(spent(run, "seconds_lte").values())[-1] for run in group.runs]
        assert np.mean(last) == pytest.approx(group.means["seconds_lte"].mean)


@pytest.mark.parametrize("cost", BRUTE)
def test_the_best_within_a_budget_is_that_of_brute_force(folder: Path, cost: str) -> None:
    tables = {"sb0": A, "sb1": B, "it0": B, "it1": C}
    validation = [0.0, 0.9, 0.1, 0.95, 0.5]
    for name, run in by_name(folder).items():
        limits = [brute(folder / name, cost, number) for number in range(1, ROUNDS + 1)]
        limits = [limit for limit in limits if math.isfinite(limit)]
        found = steps(run, cost)
        for budget in sorted({0.5, *limits, *(limit - 1e-6 for limit in limits), 1e9}):
            scores = dict(enumerate(tables[name], 1))
            fits = [n for n in scores if scores[n] is not None and brute(folder / name, cost, n) <= budget]
            # By validation for fed-sb, though another round may score higher on the test set.
            rank = {n: validation[n - 1] if name.startswith("sb") else scores[n] for n in fits}
            step = within(found, budget)
            if not fits:
                assert step is None
                continue
            assert step is not None
            best = max(fits, key=lambda n: rank[n])
            assert (step.chosen, step.score) == (best, scores[best])


@pytest.mark.parametrize("target", [0.05, 0.5, 0.65, 0.75, 0.8, 0.95])
def test_the_cost_of_a_target_is_that_of_its_first_round(folder: Path, target: float) -> None:
    tables = {"sb0": A, "sb1": B, "it0": B, "it1": C}
    for name, run in by_name(folder).items():
        first = next((n for n, score in enumerate(tables[name], 1) if score is not None and score >= target), None)
        for cost in BRUTE:
            expected = math.inf if first is None else brute(folder / name, cost, first)
            assert cost_to(run, spent(run, cost), target) == pytest.approx(expected)


def comparison(folder: Path) -> Comparison:
    return compare(read_runs([folder]))


def test_the_tables_count_every_seed(folder: Path) -> None:
    questions = Questions({"rounds": [1.0, 3.0], "epsilon": [3.0]}, [0.7])
    answers = answer_questions(comparison(folder), questions)
    table = budgets_table(answers.budgets).set_index(["cost", "budget", "method"])
    # One seed of fed-sb is first evaluated after round 2: a mean over the other would be another thing.
    row = table.loc["rounds", 1.0, "fed-sb"]
    assert (row["n"], row["n_within"], row["rounds"]) == (2, 1, "none 1")
    assert math.isnan(row["accuracy"])
    row = table.loc["rounds", 3.0, "fed-sb"]
    assert (row["chosen_by"], row["rounds"], row["n_within"]) == ("validation", "2 2", 2)
    assert row["accuracy"] == pytest.approx((0.6 + 0.7) / 2)
    half = 12.7062 * 0.05  # t with one degree of freedom, times the standard error
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((0.65 - half, 0.65 + half), rel=1e-4)
    row = table.loc["rounds", 3.0, "fedit"]
    assert (row["chosen_by"], row["rounds"]) == ("test", "2 3")
    assert row["accuracy"] == pytest.approx((0.7 + 0.3) / 2)
    # Runs without privacy are within no budget of epsilon.
    assert table.loc["epsilon", 3.0, "fedit"]["n_within"] == 0
    assert table.loc["epsilon", 3.0, "fed-sb"]["n_within"] == 2
    # The best of a budget comes first.
    assert [row.group.method for row in answers.budgets if row.budget == 3.0][:2] == ["fed-sb", "fedit"]

    table = targets_table(answers.targets).set_index(["cost", "method"])
    row = table.loc["rounds", "fedit"]
    assert (row["n"], row["n_reached"], row["by_seed"]) == (2, 1, "0: 2; 1: not reached")
    assert row[["mean", "mean_low", "median"]].isna().all()
    row = table.loc["rounds", "fed-sb"]
    assert (row["n_reached"], row["mean"], row["median"]) == (2, 2.5, 2.5)
    assert ("epsilon", "fed-sb") in table.index
    assert ("epsilon", "fedit") not in table.index


def test_lower_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    options = {"task": "causal-lm", "metric": "perplexity"}
    write(tmp_path / "a", 0, [30.0, 20.0, 25.0, 15.0, 40.0], **options)
    (run,) = read_runs([tmp_path]).runs
    assert [step.score for step in steps(run, "rounds")] == [30.0, 20.0, 20.0, 15.0, 15.0]
    assert cost_to(run, spent(run, "rounds"), 22.0) == 2
    assert cost_to(run, spent(run, "rounds"), 10.0) == math.inf
    (group,) = comparison(tmp_path).groups
    means = mean_steps(group, "rounds")
    assert front([(step.cost, step.score.mean) for step in means], maximize=False) == [0, 1, 3]


def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, [0.5, 0.6, math.nan, 0.55, 0.4])
    text = (tmp_path / "a" / "rounds.jsonl").read_text().replace("NaN", "null")
    (tmp_path / "a" / "rounds.jsonl").write_text(text)
    (run,) = read_runs([tmp_path]).runs
    assert [step.score for step in steps(run, "rounds")] == [0.5, 0.6, 0.6, 0.6, 0.6]


@pytest.mark.usefixtures("quick")
def test_a_report_answers_and_keeps_personalised_scores_apart(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write(runs / f"sb{seed}", seed, A, config=PRIVATE)
        write(runs / f"own{seed}", seed, C, config=PRIVATE | {"method.name": "fedit"}, personalised=True)
    done = fedlora("report", runs, "--budget", "rounds=3", "--budget", "epsilon=2.5", "--target", "0.75")
    assert (done.code, done.err) == (0, "")
    for page, folder, method in (("report", "report", "fed-sb"), ("personalised", "report/personalised", "fedit")):
        for name in ("budgets", "targets"):
            assert set(pd.read_csv(runs / folder / f"{name}.csv")["method"]) == {method}
            assert (runs / folder / f"{name}.md").is_file()
        text = (runs / f"{page}.html").read_text()
        assert 'data-q="budget.rounds.3.mean"' in text
        # Nor do they share a front.
        plots = json.loads(unpacked(text, "plots"))
        fronts = [plot for name, plot in plots.items() if name.startswith("front-")]
        assert fronts
        for plot in fronts:
            assert {trace["meta"]["method"] for trace in plot["data"]} - {None} == {method}


@pytest.mark.usefixtures("quick")
def test_a_study_asks_in_its_file(tmp_path: Path) -> None:
    study = load_study(planned(report={"budgets": {"bytes": [1e6, 2e6]}, "targets": [0.7]}))
    assert study.report.budgets == {"bytes": [1e6, 2e6]}
    write(tmp_path / "runs" / "a", 0, A)
    (tmp_path / "study.toml").write_text("")
    state = {"name": "s", "points": [], "report": study.report.model_dump()}
    (tmp_path / "study.json").write_text(json.dumps(state))
    assert fedlora("report", tmp_path, "--budget", "bytes=2e6", "--budget", "rounds=2").code == 0
    table = pd.read_csv(tmp_path / "report" / "budgets.csv")
    assert list(zip(table["cost"], table["budget"], strict=True)) == [("bytes", 1e6), ("bytes", 2e6), ("rounds", 2)]
    assert set(pd.read_csv(tmp_path / "report" / "targets.csv")["target"]) == {0.7}


@pytest.mark.parametrize(
    ("report", "field", "said"),
    [
        ({"budgets": {"byte": [1.0]}}, "report.budgets", "bytes"),
        ({"budgets": {"bytes": [0.0]}}, "report.budgets.bytes", "above 0"),
        ({"targets": [math.inf]}, "report.targets", "finite number"),
    ],
)
def test_what_cannot_be_asked_is_told(report: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_study(planned(report=report))
    assert caught.value.field == field
    assert set(BRUTE) <= set(COSTS)


def test_what_the_command_cannot_ask_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0, {})
    for pair, said in (("bytes", "COST=LIMIT"), ("bits=3", "is no cost"), ("bytes=-1", "above 0")):
        done = fedlora("report", tmp_path / "a", "--budget", pair)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err

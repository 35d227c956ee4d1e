"""``server.evaluate_start = false`` leaves the evaluation before the first round out, and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.reporting import write_reports
from fedlora.strategies.base import FederatedStrategy
from tests.llama_runs import LlamaRuns, adapter, lines

OFF = {"evaluate_start": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds after which the server's model is evaluated."""
    rounds: list[int] = []
    evaluate = FederatedStrategy.evaluate

    def noted(self: FederatedStrategy, adapted: Any, data: Any, server_round: int) -> dict[str, Any]:
        rounds.append(server_round)
        return evaluate(self, adapted, data, server_round)

    monkeypatch.setattr(FederatedStrategy, "evaluate", noted)
    return rounds


@pytest.mark.parametrize("method", ["ffa-lora", "flexmore"])
def test_the_rounds_are_the_same(runs: LlamaRuns, evaluated: list[int], method: str) -> None:
    with_start = runs.run(method={"name": method})
    assert evaluated == [0, 1, 2, 3]
    assert "loss" in with_start.summary["start"]
    evaluated.clear()
    without = runs.run(method={"name": method}, server=OFF)
    assert evaluated == [1, 2, 3]
    assert without.summary["start"] == {}
    assert without.summary["final"] == with_start.summary["final"]
    kept = [[line["metrics"] for line in lines(result)] for result in (with_start, without)]
    assert kept[0] == kept[1]
    if method == "ffa-lora":
        first, second = adapter(with_start), adapter(without)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_has_none_either(runs: LlamaRuns, evaluated: list[int]) -> None:
    result = runs.run(stop=1, server=OFF)
    assert evaluated == [1, 2, 3]
    assert result.summary["start"] == {}


def test_a_report_and_its_progress_do_without(runs: LlamaRuns, tmp_path: Path) -> None:
    result = runs.run(server=OFF | {"evaluate_every": 2})
    assert [bool(line["metrics"]) for line in lines(result)] == [False, True, True]
    other = runs.run(server={"evaluate_every": 2}, run={"seed": 4})
    ((page, comparison),) = write_reports([result.folder, other.folder], tmp_path / "report", "fedlora report")
    assert page.is_file()
    # One configuration with two seeds: whether the start was scored is no difference of the results.
    assert [len(group.runs) for group in comparison.groups] == [2]


def test_a_forecast_counts_one_evaluation_less(runs: LlamaRuns) -> None:
    with_start, without = runs.forecast(), runs.forecast(server=OFF)
    assert with_start.evaluated_examples - without.evaluated_examples == 4

"""A run's epsilon explained: the recorded value comes out again, and another library agrees."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fedlora.errors import InputError
from fedlora.results.privacy_spent import AGREES, explain_privacy, second_opinion
from tests.command import fedlora
from tests.llama_runs import OWNERS, LlamaRuns, table

EXAMPLE: dict[str, Any] = {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3}
WHOLE: dict[str, Any] = {"mode": "client", "noise_multiplier": 1.2, "target_delta": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("privacy", "method", "client", "accountant"),
    [
        (EXAMPLE, {"name": "ffa-lora", "rank": 2}, None, "prv"),
        (EXAMPLE, {"name": "ffa-lora", "rank": 2}, "1", "rdp"),
        (EXAMPLE, {"name": "flexmore"}, None, "rdp"),  # its start is charged too
        (EXAMPLE, {"name": "fed-sb", "rank": 2, "init": "federated"}, None, "prv"),
        (WHOLE, {"name": "fed-sb", "rank": 2, "init": "federated"}, None, "rdp"),
        (WHOLE, {"name": "fedit", "rank": 2}, None, "rdp"),
    ],
)
def test_the_recorded_epsilon_comes_out_again_and_dp_accounting_agrees(
    runs: LlamaRuns, privacy: dict[str, Any], method: dict[str, Any], client: str | None, accountant: str
) -> None:
    result = runs.run(privacy={**privacy, "accountant": accountant}, method=method)
    spent = explain_privacy(result.folder, client)
    assert spent.epsilon == pytest.approx(spent.recorded, rel=1e-9)
    assert abs(spent.difference) <= AGREES
    assert spent.explanation == ""
    rows = table(result, "privacy.csv")
    if privacy is WHOLE:
        assert (spent.client, spent.clients) == ("all", 1)
    else:
        assert client in (None, spent.client)
        assert spent.clients == OWNERS
    own = [row for row in rows if row["client"] == spent.client]
    start = method["name"] == "flexmore"
    assert sum(steps for _, _, steps in spent.history) == sum(int(row["steps"]) for row in own) + start
    if client is None:
        assert spent.recorded == result.summary["epsilon"]["max"]


def test_another_libraries_answer_follows_the_history() -> None:
    one, two = (second_opinion(1e-5, ((1.1, 0.1, steps),)) for steps in (10, 20))
    assert all(one[name] < two[name] for name in one)
    assert second_opinion(1e-5, ((0.0, 0.1, 3),)) == {"rdp": math.inf, "pld": math.inf}


def test_an_approximation_is_explained(runs: LlamaRuns) -> None:
    result = runs.run(privacy={**EXAMPLE, "accountant": "gdp"})
    spent = explain_privacy(result.folder)
    assert abs(spent.difference) > AGREES
    assert "approximation" in spent.explanation
    assert "gdp is no upper bound" in spent.not_covered


def test_the_command_prints_it(runs: LlamaRuns) -> None:
    folder = runs.run(privacy=EXAMPLE).folder
    shown = fedlora("privacy", folder)
    assert (shown.code, shown.err) == (0, "")
    for text in ("one example of one client", "noise multiplier", "by rdp", "by pld", "partition.csv"):
        assert text in shown.out
    said = json.loads(fedlora("privacy", folder, "--client", 0, "--json").out)
    assert said["client"] == "0"
    assert said["history"][0]["steps"] == 3
    assert said["others"].keys() == {"rdp", "pld"}


@pytest.mark.parametrize(
    ("privacy", "arguments", "message"),
    [
        ({"mode": "none"}, (), "holds no run under privacy"),
        (EXAMPLE, ("99",), r"--client = '99': has no line in privacy\.csv; choose one of 0, 1, 2, 3"),
    ],
)
def test_what_cannot_be_explained_is_said(
    runs: LlamaRuns, privacy: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    folder = runs.run(privacy=privacy).folder
    with pytest.raises(InputError, match=message):
        explain_privacy(folder, *arguments)


def test_another_folder_is_refused(runs: LlamaRuns) -> None:
    done = fedlora("privacy", runs.folder / "nothing")
    assert done.code == 2
    assert "nothing" in done.err

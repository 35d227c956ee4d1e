"""A round that fails is repeated, a bounded number of times; what its attempts spent stays spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import simulate
from fedlora.clients.participant import _turn
from fedlora.errors import BudgetError, RunError, StaleError
from fedlora.privacy.calibration import spent_epsilon
from fedlora.results.folder import RunResult
from fedlora.results.privacy_spent import explain_privacy
from tests.configs import override
from tests.drawn_methods import POINTS
from tests.faulty_grid import Faults, everybody, faulty, left_out
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, runs_of_methods, table
from tests.messages import settings, train_message

PRIVATE: dict[str, Any] = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
RETRIES: dict[str, Any] = {"max_round_retries": 2}
FAILED: Faults = everybody("2", OWNERS, "error")
"""The first attempt at round 2 fails."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuns]:
    with runs_of_methods(tmp_path_factory.mktemp("retries"), POINTS) as made:
        yield made


def same(a: RunResult, b: RunResult) -> bool:
    first, second = adapter(a), adapter(b)
    return all(torch.equal(first[name], second[name]) for name in first)


def stopped_and_resumed(runs: LlamaRuns, folder: Path, faults: Faults, **sections: dict[str, Any]) -> RunResult:
    """Stop a run amid the second attempt at round 2, and go on."""
    content = runs.config(**sections).model_dump(exclude_none=True)
    with runs._cache():
        with faulty({**faults, ("2/1/1", 1): "stop"}), pytest.raises(KeyboardInterrupt):
            simulate(content, output=folder)
        with faulty(faults) as asked:
            result = simulate(content, output=folder, resume=True)
    assert next(iter(asked)) == "2/1/1"
    return result


def test_a_round_that_fails_is_repeated(runs: LlamaRuns) -> None:
    with faulty(FAILED) as asked:
        result = runs.run(server=RETRIES)
    assert list(asked) == ["1", "2", "2/1/1", "3"]
    first, second, third = lines(result)
    assert first["retries"] == third["retries"] == []
    (attempt,) = second["retries"]
    assert attempt["why"].startswith("every client of the round failed; the first said: no room")
    assert [failure["client"] for failure in attempt["failed"]] == [0, 1, 2, 3]
    assert second["counted"]
    assert second["failed"] == []
    assert left_out(table(result, "left_out.csv")) == {(2, 0): dict.fromkeys(range(OWNERS), "failed")}


@pytest.mark.parametrize("fault", ["nan", "lost"])
def test_too_few_replies_are_a_failure(runs: LlamaRuns, fault: str) -> None:
    server = {**RETRIES, "min_replies": 4}
    with faulty({("2", 1): fault, ("2/1/1", 2): fault}) as asked:
        result = runs.run(server=server)
    assert list(asked) == ["1", "2", "2/1/1", "2/1/2", "3"]
    why = "3 replies are fewer than server.min_replies = 4"
    assert [attempt["why"] for attempt in lines(result)[1]["retries"]] == [why, why]
    # By default the run goes on.
    with faulty({("2", 1): fault}):
        assert [line["counted"] for line in lines(runs.run(server={"min_replies": 4}))] == [True, False, True]


def test_after_the_last_attempt_the_run_stops_and_goes_on_from_there(runs: LlamaRuns, tmp_path: Path) -> None:
    content = runs.config(server=RETRIES).model_dump(exclude_none=True)
    faults: Faults = FAILED | everybody("2/1/1", OWNERS, "error") | everybody("2/1/2", OWNERS, "error")
    with runs._cache():
        with faulty(faults) as asked, pytest.raises(RunError, match=r"failed 3 times, .*; continue with --resume"):
            simulate(content, output=tmp_path / "run")
        assert list(asked) == ["1", "2", "2/1/1", "2/1/2"]
        assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 1
        with faulty({}) as asked:
            result = simulate(content, output=tmp_path / "run", resume=True)
    assert list(asked) == ["2/1/3", "3"]
    assert len(lines(result)[1]["retries"]) == 3


def test_the_first_round_too(runs: LlamaRuns, tmp_path: Path) -> None:
    content = runs.config(server={"max_round_retries": 0}, privacy=PRIVATE).model_dump(exclude_none=True)
    with runs._cache():
        with faulty({("1", 3): "nan", **everybody("1", 3, "error")}), pytest.raises(RunError, match="failed once"):
            simulate(content, output=tmp_path / "run")
        with faulty({}) as asked:
            result = simulate(content, output=tmp_path / "run", resume=True)
    assert list(asked) == ["1/1/1", "2", "3"]
    assert Counter(row["client"] for row in table(result, "privacy.csv")) == {"0": 3, "1": 3, "2": 3, "3": 4}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"privacy": PRIVATE},
        {"privacy": {**PRIVATE, "mode": "client"}, "server": {"sampling": "poisson", "fraction_train": 0.9}},
        {"client": {"correction": "scaffold", "local_steps": 2, "optimizer": "sgd"}},
        {"wire": {"uplink_codec": "topk"}, "client": {"keep_optimizer_state": True}},
        {"method": {"name": "fedsvd", "rank": 2}},
        {"server": {"optimizer": "fedadam"}},
        {"method": {"name": "twice", "rank": 2}},
    ],
    ids=["plain", "example", "client", "scaffold", "topk", "fedsvd", "fedadam", "twice"],
)
def test_a_run_that_is_stopped_amid_an_attempt_resumes_to_the_same_bits(
    runs: LlamaRuns, tmp_path: Path, sections: dict[str, Any]
) -> None:
    sections = {**sections, "server": {**sections.get("server", {}), **RETRIES}}
    with faulty(FAILED):
        whole = runs.run(**sections)
    resumed = stopped_and_resumed(runs, tmp_path / "run", FAILED, **sections)
    assert same(whole, resumed)
    for file in ("privacy.csv", "left_out.csv", "communication.csv"):
        assert table(whole, file) == table(resumed, file)
    kept = [{k: v for k, v in line.items() if k != "seconds"} for line in lines(whole)]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines(resumed)] == kept


def test_what_clients_released_in_an_attempt_is_charged(runs: LlamaRuns) -> None:
    with faulty({("2", 1): "error"}):
        result = runs.run(server={**RETRIES, "min_replies": 4}, privacy=PRIVATE)
    rows = table(result, "privacy.csv")
    assert Counter(row["client"] for row in rows) == {"0": 4, "1": 3, "2": 4, "3": 4}
    for client, releases in {"0": 4, "1": 3}.items():
        last = [row for row in rows if row["client"] == client][-1]
        spent = ((1.0, float(last["sample_rate"]), releases),)
        assert float(last["epsilon"]) == spent_epsilon("rdp", 1e-3, spent)
        assert explain_privacy(result.folder, client).difference < 0.02


def test_an_attempt_draws_clients_batches_and_noise_anew(runs: LlamaRuns) -> None:
    """What noise hides in two releases must not be what it hides in one."""
    server = {**RETRIES, "fraction_train": 0.5, "min_replies": 2}
    drawn = set()
    for attempt in range(3):
        faults: Faults = {}
        for a in range(attempt):
            faults |= everybody("2" if not a else f"2/1/{a}", OWNERS, "error")
        with faulty(faults) as asked:
            result = runs.run(server=server, privacy=PRIVATE)
        drawn.add((tuple(asked["2" if not attempt else f"2/1/{attempt}"]), adapter(result).popitem()[1].sum().item()))
    assert len({clients for clients, _ in drawn}) > 1
    assert len({total for _, total in drawn}) == 3
    # All are asked, from the same model: what comes of it differs by batches and noise alone.
    with faulty(FAILED):
        again = runs.run(server=RETRIES, privacy=PRIVATE, run={"rounds": 2})
    assert not same(again, runs.run(privacy=PRIVATE, run={"rounds": 2}))


def test_noise_that_was_released_is_counted_and_what_was_not_is_not(runs: LlamaRuns) -> None:
    privacy: dict[str, Any] = {"mode": "client", "noise_multiplier": 1.0, "target_delta": 1e-3}
    with faulty(FAILED):
        none = runs.run(server=RETRIES, privacy=privacy)
    whole = runs.run(privacy=privacy)
    assert table(none, "privacy.csv") == table(whole, "privacy.csv")


def test_a_failure_in_the_second_exchange_takes_the_first_one_back(runs: LlamaRuns) -> None:
    """Its release stays charged: a run of whole clients that repeats a round of two exchanges has one more."""
    sections: dict[str, Any] = {
        "method": {"name": "twice", "rank": 2},
        "privacy": {"mode": "client", "noise_multiplier": 1.0, "target_delta": 1e-3},
    }
    with faulty(everybody("2/2", OWNERS, "error")) as asked:
        result = runs.run(server=RETRIES, **sections)
    assert list(asked) == ["1", "1/2", "2", "2/2", "2/1/1", "2/2/1", "3", "3/2"]
    rows = table(result, "privacy.csv")
    assert [row["round"] for row in rows] == ["1", "1", "2", "2", "2", "3", "3"]
    rate = float(rows[0]["sample_rate"])
    assert result.summary["epsilon"]["max"] == spent_epsilon("rdp", 1e-3, ((1.0, rate, 7),))


def test_a_target_that_repeated_rounds_used_up_ends_the_run(
    runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedlora.strategies import base

    privacy = {"mode": "client", "target_epsilon": 8.0, "target_delta": 1e-3}
    content = runs.config(server=RETRIES, privacy=privacy).model_dump(exclude_none=True)
    finite, calls = base.is_finite, iter([True, True, False])  # twice a round: before the server's step and after it
    monkeypatch.setattr(base, "is_finite", lambda arrays: next(calls, True) and finite(arrays))
    with runs._cache(), pytest.raises(BudgetError, match=r"covers 3 releases, of which 3 are made"):
        simulate(content, output=tmp_path / "run")
    rows = (tmp_path / "run" / "privacy.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "2"]
    assert float(rows[-1].split(",")[5]) <= 8.0


# What real nodes make of it.


def turns(rounds: int, retries: int | None, method: str) -> list[int]:
    """Return the turns of a run in which every round is attempted as often as may be, in their order."""
    from fedlora.config import load_config
    from fedlora.methods import get_method

    server = {} if retries is None else {"max_round_retries": retries}
    content: dict[str, Any] = {**override("data", {"name": "x", "partition": {"clients": 2}}), "server": server}
    config = load_config({**content, "run": {"rounds": rounds}, "method": {"name": method}})
    found = []
    for server_round in range(1, rounds + 1):
        for attempt in range(1 + (retries or 0)):
            for exchange in range(1, len(get_method(method).exchanges(config, server_round)) + 1):
                said = settings(server_round=server_round, exchange=exchange, attempt=attempt)
                message = train_message(1, server_round=server_round)
                message.content["config"] = said
                found.append(_turn(config, message))
    return found


@pytest.mark.parametrize(("method", "exchanges"), [("ffa-lora", 1), ("twice", 2)])
def test_a_nodes_ledger_sees_attempts_in_their_order_and_none_twice(
    runs: LlamaRuns, method: str, exchanges: int
) -> None:
    found = turns(4, 3, method)
    assert found == sorted(set(found))
    assert len(found) == 16 * exchanges
    assert turns(4, None, method) == list(range(1, 4 * exchanges + 1))


def test_a_node_refuses_to_repeat_rounds_of_a_run_that_repeats_none() -> None:
    from fedlora.config import load_config

    config = load_config(override("data", {"name": "x", "partition": {"clients": 2}}))
    message = train_message(1)
    message.content["config"] = settings(server_round=1, attempt=1)
    with pytest.raises(StaleError, match="no attempt 1"):
        _turn(config, message)

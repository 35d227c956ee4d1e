"""Moments kept from round to round: training goes on as if it had never been cut, whoever shares the pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.arrays import Arrays
from fedlora.clients import client_app, memory
from fedlora.clients.client_app import app
from fedlora.clients.participant import NodeClient, open_node
from fedlora.communication.wire import COUNTED, decode
from fedlora.config import load_config, unused_keys
from fedlora.errors import ClientErrorCode, InputError
from fedlora.results.checkpoint import Checkpoint
from fedlora.training import train_cohort
from tests import tiny
from tests.configs import override
from tests.llama_runs import LlamaRuns, adapter, table
from tests.owner import Server, write_node

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
}
KEPT = {"keep_optimizer_state": True}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("physical", [None, 2])
def test_rounds_are_one_long_training(optimizer: str, physical: int | None) -> None:
    """Of a client alone, whose server takes what it sends; whole batches, since each round draws anew."""

    def steps(count: int, **more: Any) -> Any:
        client = {"batch_size": 8, "local_steps": count, "physical_batch_size": physical, **OPTIMIZERS[optimizer]}
        return tiny.settings("bert", client={k: v for k, v in (client | more).items() if v is not None})

    adapted = tiny.adapted_model("bert", steps(2), torch.float64)
    start = adapted.arrays(tiny.trained_names(adapted, steps(2)))
    examples = tiny.table("bert", 5)
    (job,) = tiny.jobs_of([start], tiny.split([5]), learning_rate=0.02)
    (whole,) = train_cohort(adapted, examples, [job], steps(6))
    for config, same in ((steps(2, **KEPT), True), (steps(2), False)):
        arrays, state = start, {}
        for server_round in (1, 2, 3):
            now = replace(job, arrays=arrays, state=state, server_round=server_round)
            (result,) = train_cohort(adapted, examples, [now], config)
            arrays, state = result.arrays, result.state
        assert bool(state) == same
        assert (tiny.difference(arrays, whole.arrays) < 1e-12) == same


def test_clients_that_took_other_steps_share_no_pass() -> None:
    config = tiny.settings("bert", client={"local_steps": 1, **KEPT})
    adapted = tiny.adapted_model("bert", config)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    jobs = tiny.jobs_of([start, start], tiny.split([4, 4]))
    (first,) = train_cohort(adapted, tiny.table("bert", 8), jobs[:1], config)
    with pytest.raises(ValueError, match="equally many steps"):
        train_cohort(adapted, tiny.table("bert", 8), [replace(jobs[0], state=first.state), jobs[1]], config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("kept"))


def sections(method: str, optimizer: str) -> dict[str, dict[str, Any]]:
    """Half of the clients a round, so that they take unlike numbers of steps."""
    return {
        "run": {"rounds": 4, "seed": 4},
        "model": {"dtype": "float64"},
        "method": {"name": method, "rank": 2},
        "client": {**OPTIMIZERS[optimizer], "local_steps": 2, **KEPT},
        "server": {"fraction_train": 0.5},
    }


NOISE = {"mode": "example", "noise_multiplier": 0.7, "target_delta": 1e-3}


@pytest.mark.parametrize(("method", "optimizer", "private"), [("rolora", "adamw", False), ("ffa-lora", "sgd", True)])
def test_a_cohort_is_its_clients_alone_and_a_resumed_run_has_the_same_bits(
    runs: LlamaRuns, method: str, optimizer: str, private: bool
) -> None:
    given = sections(method, optimizer) | ({"privacy": NOISE} if private else {})
    alone = runs.run(**given)
    resumed = runs.run(stop=2, **given)
    together = runs.run(**given, simulation={"workers": 0, "cohort_size": 4})
    assert all(torch.equal(array, adapter(resumed)[name]) for name, array in adapter(alone).items())
    assert tiny.difference(adapter(alone), adapter(together)) < 1e-5
    fresh = runs.run(**given | {"client": {**given["client"], "keep_optimizer_state": False}})
    assert tiny.difference(adapter(alone), adapter(fresh)) > 1e-4
    # Nothing of it is sent.
    assert table(alone, "communication.csv") == table(fresh, "communication.csv")
    size = {"adamw": 2, "sgd": 1}[optimizer] * alone.summary["trainable_parameters"] * 8
    said = f"each client keeps {size:,} bytes between rounds: its optimiser's moments"
    assert said in (alone.folder / "run.log").read_text()
    assert "optimiser's moments" not in (fresh.folder / "run.log").read_text()


def test_each_array_counts_its_own_steps(runs: LlamaRuns) -> None:
    """B is trained in the first and the third round, A in the second; a round of 3 steps each."""
    client = {**OPTIMIZERS["adamw"], "local_steps": 3, **KEPT}
    result = runs.run(method={"name": "rolora", "rank": 2}, client=client)
    with closing(Checkpoint(result.folder / "checkpoint" / "state.sqlite")) as checkpoint:
        state: Arrays = decode(checkpoint.states[0]["optimizer"])
    counts = {name.rpartition(".")[2]: float(array) for name, array in state.items() if name.startswith("step:")}
    assert counts == {"lora_A": 3.0, "lora_B": 6.0}
    shapes = {name.partition(":")[2]: array.shape for name, array in state.items() if name.startswith("exp_avg:")}
    assert len(shapes) == 2 * len({name.rpartition(".")[0] for name in shapes})


@pytest.mark.parametrize("method", ["fedsvd", "flexmore"])
def test_it_needs_coordinates_that_persist(method: str) -> None:
    task = {"task": "causal-lm"} if method == "flexmore" else {}
    given = override("client", KEPT) | {"method": {"name": method}, "model": {"name": "x", **task}}
    with pytest.raises(InputError, match=rf"client\.keep_optimizer_state = True: looks back .* {method} "):
        load_config(given)


def test_sgd_without_momentum_has_no_use_for_it() -> None:
    for momentum, noted in ((0.0, ["client.keep_optimizer_state"]), (0.9, [])):
        config = load_config(override("client", {"optimizer": "sgd", "momentum": momentum, **KEPT}))
        assert [note.split()[0] for note in unused_keys(config)] == noted


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    client_app.forget_data()


def test_a_node_keeps_it_within_what_its_owner_allows(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that may not keep it is not trained, and nothing is charged."""
    server = Server(tmp_path / "server", "ffa-lora", client__momentum=0.9, client__keep_optimizer_state=True)
    here = server.context(write_node(tmp_path / "clinic", cache))
    app(server.describe(), here)
    assert not app(server.train(1), here).has_error()
    (kept,) = (tmp_path / "clinic").rglob("*.optimizer.safetensors")
    before, steps = kept.read_bytes(), open_node(here).ledger.steps()
    monkeypatch.setattr(memory, "state_size", lambda client: 10**9)
    assert app(server.train(2), here).error.code == ClientErrorCode.INPUT
    assert "policy.max_cache_gb = 4.0: a run asks to keep" in caplog.text
    assert kept.read_bytes() == before
    assert open_node(here).ledger.steps() == steps == server.config.client.local_steps


def test_room_for_all_that_a_round_keeps_is_made_before_a_step_is_charged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an owner who allows too little on the disk is charged for rounds that fail."""
    events: list[int] = []
    make_room, step = NodeClient.make_room, NodeClient._step

    def asked(self: NodeClient, needed: int, *used: Path) -> None:
        events.append(needed)
        make_room(self, needed, *used)

    def stepped(self: NodeClient) -> None:
        events.append(-1)
        step(self)

    monkeypatch.setattr(NodeClient, "make_room", asked)
    monkeypatch.setattr(NodeClient, "_step", stepped)
    server = Server(
        tmp_path / "server",
        "fedsvd",
        client__momentum=0.9,
        client__keep_optimizer_state=True,
        wire__uplink_codec="onebit",
    )
    here = server.context(write_node(tmp_path / "clinic", cache))
    app(server.describe(), here)
    for server_round in (1, 2):
        events.clear()
        message = server.train(server_round)
        message.content["config"][COUNTED] = server_round - 1
        reply = app(message, here)
        assert not reply.has_error(), reply.error
        kept = [load_file(path) for path in (tmp_path / "clinic").rglob("own/*.safetensors")]
        assert len(kept) == 2
        size = sum(array.nbytes for arrays in kept for array in arrays.values())
        assert max(events[: events.index(-1)]) >= size
    assert max(events[: events.index(-1)]) == size

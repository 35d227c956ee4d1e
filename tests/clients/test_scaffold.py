"""SCAFFOLD is the published algorithm: on quadratics, and in whole runs of any method, whatever happens to a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.arrays import Arrays
from fedlora.clients import client_app, half
from fedlora.clients.client_app import app
from fedlora.clients.memory import CORRECTION
from fedlora.clients.participant import SimulatedClient, open_node
from fedlora.communication.codecs import get_codec
from fedlora.communication.wire import decode, encode
from fedlora.config import load_config
from fedlora.corrections import VARIATES
from fedlora.corrections.scaffold import Scaffold
from fedlora.errors import ClientErrorCode, InputError
from fedlora.methods import get_method
from fedlora.privacy.mechanisms import get_mechanism
from fedlora.strategies.replies import ReplyError, read_beside, read_update
from fedlora.strategies.variates import Variates
from fedlora.training import ClientJob, ClientResult
from tests import tiny
from tests.configs import override
from tests.drawn_methods import POINTS
from tests.llama_runs import OWNERS, LlamaRuns, adapter, lines, payload, runs_of_methods, table
from tests.messages import records, train_message
from tests.owner import Server, write_node

SCAFFOLD = {"correction": "scaffold", "optimizer": "sgd"}
EXPERTS = {"method": {"name": "flexmore"}, "model": {"name": "x", "task": "causal-lm"}}

# Quadratics: f_i(w) = h_i/2 (w - b_i)^2, number by number.


class Quadratics:
    """Clients of unlike optima, which our parts train; ``weights`` are their examples."""

    def __init__(self, clients: int, seed: int, weights: Sequence[float], steps: int, rate: float) -> None:
        rng = np.random.default_rng(seed)
        self.h, self.b = rng.uniform(0.2, 2, (clients, 3)), rng.normal(size=(clients, 3))
        self.weights, self.steps, self.rate = np.array(weights, float), steps, rate
        config = load_config(override("client", SCAFFOLD) | {"model": {"name": "x", "dtype": "float64"}})
        self.variates, self.own = Variates(config), [np.zeros(3)] * clients
        self.x = np.zeros(3)

    @property
    def optimum(self) -> np.ndarray:
        """Of sum p_i f_i."""
        h = self.weights[:, None] * self.h
        found: np.ndarray = (h * self.b).sum(0) / h.sum(0)
        return found

    def local(self, i: int, shift: np.ndarray) -> np.ndarray:
        y = self.x.copy()
        for _ in range(self.steps):
            y -= self.rate * (self.h[i] * (y - self.b[i]) + shift)
        return y

    def round(self, number: int, chosen: Sequence[int]) -> None:
        """One round by the parts under test."""
        shapes, scaffold = {"w": (3,)}, Scaffold()
        sent = self.variates.record(shapes, float(self.weights.sum()))
        c = decode(sent[VARIATES])
        moved = []
        for i in chosen:
            own = {"w": torch.tensor(self.own[i])}
            y = self.local(i, scaffold.shift(own, c)["w"].numpy())
            gradient = {"w": torch.tensor((self.x - y) / (self.steps * self.rate))}
            new = scaffold.after(own, c, gradient)["w"]
            self.variates.add(i, float(self.weights[i]), new - own["w"])
            self.own[i] = new.numpy()
            moved.append(y)
        self.variates.count(str(number), shapes)
        self.x = np.average(moved, axis=0, weights=self.weights[list(chosen)])

    @property
    def mean(self) -> np.ndarray:
        found: np.ndarray = self.variates.sums["w"].numpy() / self.weights.sum()
        return found


@settings(max_examples=20)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_with_equal_weights_it_is_as_published(clients: int, steps: int, seed: int, data: st.DataObject) -> None:
    """Its algorithm 1 with option II and a global step of 1, some of the clients a round."""
    ours = Quadratics(clients, seed, [4.0] * clients, steps, 0.1)
    x, c, own = np.zeros(3), np.zeros(3), np.zeros((clients, 3))
    for number in range(1, 5):
        chosen = sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1)))
        ours.round(number, chosen)
        moves, changes = [], []
        for i in chosen:
            y = x.copy()
            for _ in range(steps):
                y = y - 0.1 * (ours.h[i] * (y - ours.b[i]) - own[i] + c)
            new = own[i] - c + (x - y) / (steps * 0.1)
            moves.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = x + np.mean(moves, 0)
        c = c + len(chosen) / clients * np.mean(changes, 0)
        np.testing.assert_allclose(ours.x, x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours.mean, c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [[3, 3, 3, 3], [1, 9, 2, 5]])
def test_it_finds_the_optimum_that_averaging_after_many_steps_misses(weights: list[float]) -> None:
    """Of the clients' weighted loss, also with half of them a round."""
    ours = Quadratics(4, 1, weights, 20, 0.1)
    plain = Quadratics(4, 1, weights, 20, 0.1)
    for number in range(1, 401):
        ours.round(number, [number % 4, (number + 1) % 4])
        y = [plain.local(i, np.zeros(3)) for i in range(4)]
        plain.x = np.average(y, axis=0, weights=weights)
    assert np.abs(ours.x - ours.optimum).max() < 1e-6
    assert np.abs(plain.x - plain.optimum).max() > 0.02


# Whole runs. What each client began and ended with is noted, and everything else computed anew.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRuns]:
    with runs_of_methods(tmp_path_factory.mktemp("scaffold"), POINTS) as made:
        yield made


def sections(method: str, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Half of the clients a round; their numbers of examples are unlike."""
    given: dict[str, dict[str, Any]] = {
        "run": {"rounds": 3, "seed": 3},
        "model": {"dtype": "float64"},
        "method": {"name": method, "rank": 2, "alpha": 3.0},
        "client": {**SCAFFOLD, "local_steps": 3, "learning_rate": 0.3, "batch_size": 3},
        "server": {"fraction_train": 0.5},
    }
    return {section: {**given.get(section, {}), **more.get(section, {})} for section in given | more}


@dataclass
class Noted:
    """Jobs with their results, in the order of the rounds."""

    pairs: list[tuple[ClientJob, ClientResult]] = field(default_factory=list)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    found, train = Noted(), half.train_cohort

    def noting(adapted: Any, examples: Any, jobs: Sequence[ClientJob], *rest: Any) -> list[ClientResult]:
        results = train(adapted, examples, jobs, *rest)
        found.pairs += zip(jobs, results, strict=True)
        return results

    monkeypatch.setattr(half, "train_cohort", noting)
    return found


def check(
    noted: Noted,
    counts: Callable[[int, int], bool] = lambda server_round, exchange: True,
    tolerance: float = 1e-10,
    steps: Callable[[str, ClientResult], int] = lambda name, result: result.steps,
) -> float:
    """Check that each gradient was shifted by c - c_i, computed anew; return the largest shift."""
    weights = {job.client: len(job.rows) for job, _ in noted.pairs}
    whole = 30  # all examples, also of clients that were never drawn
    own: dict[int, Arrays] = {client: {} for client in weights}
    largest = 0.0
    for server_round, of_round in groupby(noted.pairs, key=lambda pair: pair[0].server_round):
        before = {client: dict(arrays) for client, arrays in own.items()}
        for exchange, pairs in groupby(of_round, key=lambda pair: pair[0].exchange):
            made = {}
            for job, result in pairs:
                assert job.shift
                changed = dict(own[job.client])
                for name, shift in job.shift.items():
                    zero = torch.zeros_like(shift)
                    c = sum((weights[i] / whole * own[i].get(name, zero) for i in own), zero)
                    mine = own[job.client].get(name, zero)
                    torch.testing.assert_close(shift, c - mine, rtol=0, atol=tolerance)
                    largest = max(largest, float(shift.abs().max()))
                    x, y = job.arrays[name], result.arrays[name]
                    changed[name] = mine - c + (x - y) / (steps(name, result) * job.learning_rate)
                made[job.client] = changed
            if counts(server_round, exchange):
                own |= made
            else:
                own = before
    return largest


@pytest.mark.parametrize("method", ["fedit", "rolora", "fed-sb", "fedex-lora", "home-b", "twice"])
def test_a_run_corrects_by_the_mean_and_the_clients_own(runs: LlamaRuns, noted: Noted, method: str) -> None:
    result = runs.run(**sections(method))
    assert all(line["counted"] and not line["failed"] for line in lines(result))
    assert check(noted) > 1e-3
    names = {name.rpartition(".")[2] for job, _ in noted.pairs for name in job.shift}
    # What stays with a client is drawn to no mean.
    assert ("lora_B" in names) == (method not in ("home-b", "fed-sb"))


def test_an_array_counts_the_steps_that_trained_it(runs: LlamaRuns, noted: Noted) -> None:
    """LA-LoRA's first and third step train B, and its second A."""
    runs.run(**sections("la-lora"))
    taken = {"lora_A": 1, "lora_B": 2}
    assert check(noted, steps=lambda name, result: taken.get(name.rpartition(".")[2], result.steps)) > 1e-3


def test_an_array_that_no_step_trains_has_no_variate_yet(runs: LlamaRuns, noted: Noted) -> None:
    runs.run(**sections("la-lora", client={"local_steps": 1}))
    shifts = {n: s for job, _ in noted.pairs for n, s in job.shift.items()}
    assert all(bool(shift.any()) != name.endswith("lora_A") for name, shift in shifts.items())


@pytest.mark.parametrize(("method", "lost"), [("fedit", (2, 1)), ("twice", (2, 2)), ("twice", (3, 1))])
def test_a_round_that_does_not_count_moves_neither(
    runs: LlamaRuns, noted: Noted, method: str, lost: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first of its exchanges was taken up by the clients already; a resumed run has the same bits."""
    kind: Any = get_method(method)
    aggregate = kind.aggregate

    def losing(self: Any, updates: Any) -> Arrays | None:
        found: Arrays | None = aggregate(self, updates)
        number = noted.pairs[-1][0].server_round if noted.pairs else 0
        return None if (number, self.exchange) == lost else found

    monkeypatch.setattr(kind, "aggregate", losing)
    given = sections(method, run={"rounds": 4}, server={"fraction_train": 1.0})
    whole = runs.run(**given)
    assert [line["counted"] for line in lines(whole)] == [r != lost[0] for r in range(1, 5)]
    assert check(noted, lambda r, e: (r, e) != lost) > 1e-3
    if lost != (2, 2):
        return
    noted.pairs.clear()
    resumed = runs.run(stop=lost[0], **given)
    assert all(torch.equal(array, adapter(resumed)[name]) for name, array in adapter(whole).items())
    assert table(whole, "communication.csv") == table(resumed, "communication.csv")


def test_a_client_whose_reply_is_lost_goes_on_from_what_the_server_counts(
    runs: LlamaRuns, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = get_method("fedit")
    check_reply = kind.check_reply

    def refusing(self: Any, client: int, message: Any) -> None:
        if client == 1 and noted.pairs[-1][0].server_round == 2:
            raise ReplyError("lost")
        check_reply(self, client, message)

    monkeypatch.setattr(kind, "check_reply", refusing)
    result = runs.run(**sections("fedit", server={"fraction_train": 1.0}))
    assert [len(line["failed"]) for line in lines(result)] == [0, 1, 0]
    # As if it had not been asked in the second round.
    noted.pairs[:] = [pair for pair in noted.pairs if (pair[0].client, pair[0].server_round) != (1, 2)]
    assert check(noted) > 1e-3


def test_a_client_that_lost_its_own_begins_anew_from_the_mean(
    runs: LlamaRuns, noted: Noted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = SimulatedClient.own

    def losing(self: SimulatedClient, sort: str = "own") -> Arrays:
        return {} if sort == CORRECTION and self.client == 2 else own(self, sort)

    monkeypatch.setattr(SimulatedClient, "own", losing)
    result = runs.run(**sections("fedit", server={"fraction_train": 1.0}))
    assert not any(line["failed"] for line in lines(result))
    for job, _ in noted.pairs:
        assert any(bool(shift.any()) for shift in job.shift.values()) == (job.client != 2 and job.server_round > 1)
    assert caplog.text.count("is lost; it begins anew") == 2


def test_clients_trained_together_are_clients_trained_alone(runs: LlamaRuns) -> None:
    alone = runs.run(**sections("fedit"))
    together = runs.run(**sections("fedit", simulation={"workers": 0, "cohort_size": OWNERS}))
    assert tiny.difference(adapter(alone), adapter(together)) < 1e-5
    plain = runs.run(**sections("fedit", client={"correction": "none"}))
    assert tiny.difference(adapter(alone), adapter(plain)) > 1e-4


def test_as_many_numbers_again_travel_each_way_never_rounded(runs: LlamaRuns) -> None:
    short: dict[str, dict[str, Any]] = {"model": {"dtype": "float32"}, "run": {"rounds": 2}}
    plain = runs.run(**sections("fedit", **short, client={"correction": "none"}))
    for codec in ("float32", "int8"):
        given = sections("fedit", **short, wire={"codec": codec})
        result, expected = runs.run(**given), runs.forecast(**given)
        for direction, said in (("down", expected.downlink_bytes), ("up", expected.uplink_bytes)):
            sent, lossless = payload(result, direction), payload(plain, direction)
            assert sent == said
            assert sent == 2 * lossless if codec == "float32" else 1.25 * lossless < sent < 1.5 * lossless
    kept = f"up to {2 * 4 * plain.summary['trainable_parameters']:,} bytes between rounds: variates of scaffold"
    assert kept in (result.folder / "run.log").read_text()
    assert kept not in (plain.folder / "run.log").read_text()


def test_under_dp_nothing_leaves_that_the_update_does_not_tell(
    runs: LlamaRuns, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change of a variate is (x - y) / (K eta) - c, of the released y; epsilon is that of a run without it.

    So it is with the proximal term.
    """
    privacy = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
    short: dict[str, dict[str, Any]] = {"run": {"rounds": 2}, "privacy": privacy}
    plain = runs.run(**sections("fedit", **short, client={"correction": "none"}))
    noted.pairs.clear()
    sent: list[tuple[int, Arrays, Arrays]] = []
    read, record = Variates.read, Variates.record
    mean: Arrays = {}

    def seen(self: Variates, message: Any, shapes: Any) -> Any:
        sent.append((message.metadata.src_node_id, dict(mean), decode(message.content[VARIATES])))
        return read(self, message, shapes)

    def told(self: Variates, *args: Any) -> dict[str, ArrayRecord]:
        found = record(self, *args)
        mean.clear()
        mean.update(decode(found[VARIATES]))
        return found

    monkeypatch.setattr(Variates, "read", seen)
    monkeypatch.setattr(Variates, "record", told)
    private = runs.run(**sections("fedit", **short, client={"proximal_mu": 0.5}))
    assert check(noted) > 1e-3
    assert len(sent) == len(noted.pairs)
    for (job, result), (_, c, change) in zip(noted.pairs, sent, strict=True):
        for name, array in change.items():
            released = (job.arrays[name] - result.arrays[name]) / (result.steps * job.learning_rate)
            torch.testing.assert_close(array, released - c[name], rtol=0, atol=1e-9)
    assert table(private, "privacy.csv") == table(plain, "privacy.csv")


def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Context]:
    """A server whose run a node knows, and the node's context."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    server = Server(tmp_path / "server", "ffa-lora", client__correction="scaffold")
    here = server.context(write_node(tmp_path / "clinic", tmp_path / "cache"))
    app(server.describe(), here)
    return server, here


def test_a_node_keeps_its_variate_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: Noted
) -> None:
    """It goes on from the version that the server names, through restarts; a server that names none begins at 0."""
    server, here = described(tmp_path, monkeypatch)
    owns: list[Arrays] = []
    changes: list[Arrays] = []
    for server_round, counted in ((1, ""), (2, "1"), (3, "1"), (4, "")):
        message = server.train(server_round)
        message.content["config"][VARIATES] = counted
        message.content[VARIATES] = encode({name: torch.zeros_like(a) for name, a in decode(server.arrays).items()})
        reply = app(message, here)
        assert not reply.has_error()
        job, result = noted.pairs[-1]
        owns.append({name: -shift for name, shift in job.shift.items()})
        changes.append(decode(reply.content[VARIATES]))
        for name, array in changes[-1].items():
            gradient = (job.arrays[name] - result.arrays[name]) / (result.steps * job.learning_rate)
            torch.testing.assert_close(array, gradient, rtol=1e-4, atol=1e-4)
    assert all(not a.any() for own in (owns[0], owns[3]) for a in own.values())
    for name, array in changes[0].items():
        assert torch.equal(owns[1][name], array)
        assert torch.equal(owns[2][name], array)
    files = sorted((tmp_path / "clinic").rglob("*.correction.safetensors"))
    assert len(files) == 1
    client_app.forget_data()


@pytest.mark.parametrize("wrong", ["float64", "long", "short", "names"])
def test_a_mean_unlike_what_is_trained_is_refused_before_a_step_is_charged(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of another shape could be spread to arrays of any size, and be kept."""
    server, here = described(tmp_path, monkeypatch)
    message = server.train(1)
    mean = {name: torch.zeros_like(array) for name, array in decode(server.arrays).items()}
    name = next(iter(mean))
    if wrong == "float64":
        mean[name] = mean[name].double()
    elif wrong == "names":
        mean["other"] = mean.pop(name)
    else:
        mean[name] = torch.zeros(9, 1, 1) if wrong == "long" else torch.zeros(1)
    message.content[VARIATES] = encode(mean, torch.float64 if wrong == "float64" else torch.float32)
    reply = app(message, here)
    assert reply.error.code == (ClientErrorCode.INPUT if wrong == "names" else ClientErrorCode.STALE)
    assert open_node(here).ledger.steps() == 0
    client_app.forget_data()


def test_what_a_server_calls_a_variate_forges_no_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, here = described(tmp_path, monkeypatch)
    message = server.train(2)
    message.content["config"][VARIATES] = "1/\n2026-01-01 all is well" + "." * 10_000
    message.content[VARIATES] = encode({n: torch.zeros_like(a) for n, a in decode(server.arrays).items()})
    assert not app(message, here).has_error()
    (said,) = [record.getMessage() for record in caplog.records if "is lost; it begins anew" in record.getMessage()]
    assert "\n" not in said
    assert len(said) < 300
    client_app.forget_data()


# What is refused.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"client": {**SCAFFOLD, "optimizer": "adamw"}}, r"client\.optimizer = 'adamw': .* use sgd"),
        ({"client": {**SCAFFOLD, "momentum": 0.5}}, r"client\.momentum = 0\.5: .* use 0"),
        (
            {"client": SCAFFOLD, **EXPERTS},
            r"client\.correction = 'scaffold': looks back .* flexmore .*; use none",
        ),
        (
            {"client": SCAFFOLD, "method": {"name": "ffa-lora", "device_profile": {"4": 0.5, "8": 0.5}}},
            r"client\.correction = 'scaffold': needs arrays of one shape; leave .*device_profile",
        ),
        (
            {"client": SCAFFOLD, "method": {"name": "ffa-lora", "ranks": [4] * 10}},
            r"client\.correction = 'scaffold': needs arrays of one shape; leave method\.ranks",
        ),
        ({"client": {"correction": "scafold"}}, r"client\.correction = 'scafold': should be 'none' or 'scaffold'"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_config(override("run.seed", 1) | values)
    assert "\n" not in str(error.value)


def test_variates_are_refused_where_the_server_adds_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_mechanism("example")), "noise_by", "server")
    private = {"privacy": {"mode": "example", "noise_multiplier": 1.0}}
    with pytest.raises(InputError, match=r"client\.correction = 'scaffold': sends variates, to which .* adds no noise"):
        load_config(override("client", SCAFFOLD) | private)


def test_clients_of_unlike_shapes_have_no_mean(runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = get_method("fedit")
    monkeypatch.setattr(kind, "client_arrays", lambda self, client: (client, dict(self.arrays)))
    with pytest.raises(InputError, match=r"client\.correction = 'scaffold': needs arrays of one shape"):
        runs.run(**sections("fedit"))


def test_a_users_own_strategy_keeps_no_variates(runs: LlamaRuns) -> None:
    with pytest.raises(InputError, match=r"client\.correction = 'scaffold': needs a server .* FedAvg does not"):
        runs.run(**sections("fedit"), strategy=lambda: FedAvg(fraction_evaluate=0.0))


SHAPES = {"x.lora_A": (2, 3)}
VALUES = {"x.lora_A": torch.ones(2, 3)}


@pytest.mark.parametrize(
    "beside",
    [{}, {"x.lora_B": torch.ones(2, 3)}, {"x.lora_A": torch.ones(3)}, {"x.lora_A": torch.full((2, 3), math.nan)}],
)
def test_a_reply_needs_the_variates_that_were_asked_for(beside: Arrays) -> None:
    content = records(VALUES, num_examples=3)
    if beside:
        content[VARIATES] = encode(beside)
    reply, codec = train_message(1, RecordDict(content)), get_codec("float32")
    read_update(reply, SHAPES, codec, mechanism=get_mechanism("none"), beside=(VARIATES,))
    with pytest.raises(ReplyError):
        read_beside(reply, VARIATES, SHAPES, codec)


def test_a_reply_with_variates_that_nobody_asked_for_is_refused() -> None:
    content = records(VALUES, num_examples=3)
    content[VARIATES] = encode(VALUES)
    with pytest.raises(ReplyError, match="one record of arrays"):
        read_update(train_message(1, content), SHAPES, get_codec("float32"), mechanism=get_mechanism("none"))

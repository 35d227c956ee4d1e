"""Secure sums: the server learns the weighted sum, exact to rounding, and of one client only uniform residues."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlora.clients import client_app
from fedlora.clients.secure import answer
from fedlora.communication import masks
from fedlora.communication.secure_sums import (
    KEYS,
    MASKED,
    SECURE,
    SHARES,
    SUM,
    UNMASK,
    FixedPoint,
    Thresholds,
    neighbourhoods,
    read_raw,
)
from fedlora.errors import InputError, StaleError
from fedlora.methods import get_method, methods
from tests.llama_runs import LlamaRuns, adapter, lines, payload, table
from tests.messages import FIRST_NODE
from tests.secure_clients import STAGES, Crowd, secure_config

TEN: dict[str, Any] = {"partition": {"kind": "iid", "clients": 10}}
SECURE_RUN: dict[str, Any] = {"secure_aggregation": True}


def vectors(clients: int, size: int, scale: float = 1.0, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {client: scale * rng.uniform(-1, 1, size) for client in range(clients)}


def mean_of(sent: dict[int, np.ndarray], weights: dict[int, float], clients: set[int]) -> np.ndarray:
    total = math.fsum(weights[client] for client in clients)
    found: np.ndarray = sum(weights[client] / total * sent[client] for client in clients)  # type: ignore[assignment]
    return found


@given(
    clients=st.integers(2, 7),
    weights=st.lists(st.integers(0, 10**6), min_size=7, max_size=7),
    bound=st.sampled_from([1e-3, 1.0, 8.0, 1e4]),
    extreme=st.booleans(),
)
def test_the_sum_is_the_plain_one_to_rounding_and_never_overflows(
    clients: int, weights: list[int], bound: float, extreme: bool
) -> None:
    sent = vectors(clients, 9, bound)
    if extreme:  # all at the bound, of one sign
        sent = {client: np.full(9, bound) for client in sent}
    weighed = {client: float(weights[client]) + (client == 0) for client in sent}
    found = Crowd(secure_config(clipping_range=bound), sent).sum(weighed)
    assert found is not None
    rounding = clients / 2 / FixedPoint.weighted(bound, clients).scale
    assert rounding < clients * bound / 2**31
    assert np.abs(found.numpy() - mean_of(sent, weighed, set(sent))).max() <= rounding * (1 + 1e-6) + 1e-15 * bound


@given(clients=st.integers(1, 10**6), bound=st.floats(1e-6, 1e6), shares=st.lists(st.floats(0, 1), max_size=30))
def test_no_weighted_sum_reaches_the_modulus(clients: int, bound: float, shares: list[float]) -> None:
    point = FixedPoint.weighted(bound, clients)
    shares = [*shares[:clients], 1.0] if clients > len(shares) else [1.0]
    total = sum(shares)
    whole = sum(float(np.rint(share / total * bound * point.scale)) for share in shares)
    # Those that are not listed here have no weight: each may still add 1 by rounding.
    assert whole + (clients - len(shares)) < 2**31
    residues = point.encode(np.array([-bound, bound]))
    assert np.allclose(point.decode(residues), [-bound, bound], rtol=1e-6)


@pytest.mark.parametrize("shares", [33, 5])
@pytest.mark.parametrize(
    "gone",
    [
        {KEYS: [1, 2]},
        {SHARES: [1, 2]},
        {SUM: [1, 2]},
        {UNMASK: [1, 2]},
        {KEYS: [0], SHARES: [9]},
        {SHARES: [0], SUM: [4]},
        {SUM: [3], UNMASK: [7]},
    ],
)
def test_two_of_ten_may_drop_out_of_any_exchange(gone: dict[str, list[int]], shares: int) -> None:
    sent = vectors(10, 50)
    weights = {client: 1.0 + client for client in sent}
    # Of five shares four may be needed, where two neighbours on the ring are gone.
    crowd = Crowd(secure_config(num_shares=shares), sent, gone)
    found = crowd.sum(weights)
    assert found is not None, crowd.sums.failure
    counted = {client for client in sent if not crowd.is_gone(client, SUM)}
    assert np.abs(found.numpy() - mean_of(sent, weights, counted)).max() < 1e-7
    early = {client for stage in (KEYS, SHARES) for client in gone.get(stage, [])}
    assert set(crowd.failed) == early


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_there_is_no_sum(stage: str) -> None:
    sent = vectors(10, 5)
    crowd = Crowd(secure_config(reconstruction_threshold=0.7), sent, {stage: [0, 1, 2, 3]})
    assert crowd.sum(dict.fromkeys(sent, 1.0)) is None
    assert crowd.sums.failure
    assert not (stage in (KEYS, SHARES) and crowd.seen[SUM])
    assert (stage == UNMASK) == bool(crowd.seen[UNMASK])
    # The next round begins anew.
    crowd.gone = {}
    assert crowd.sum(dict.fromkeys(sent, 1.0), "2") is not None


def residues_of(crowd: Crowd, place: int) -> np.ndarray:
    size = len(next(iter(crowd.vectors.values())))
    return read_raw(crowd.seen[SUM][place].content, "arrays", MASKED, (size,), np.uint32)


def uniform(residues: np.ndarray) -> float:
    """Return the smallest p-value of tests of uniformity: of all residues, of their bytes, and of neighbours."""
    found = [stats.kstest(residues / 2.0**32, "uniform").pvalue]
    found += [stats.chisquare(np.bincount(residues >> shift & 255, minlength=256)).pvalue for shift in (0, 8, 16, 24)]
    pairs = (residues[:-1] >> 28) * 16 + (residues[1:] >> 28)
    return float(min(*found, stats.chisquare(np.bincount(pairs, minlength=256)).pvalue))


def test_what_the_server_sees_of_one_client_is_uniform() -> None:
    size = 60_000
    sent = {0: np.zeros(size), 1: np.full(size, 0.5), 2: np.linspace(-8, 8, size)}
    crowd = Crowd(secure_config(), sent)
    assert crowd.sum(dict.fromkeys(sent, 1.0)) is not None
    for client in sent:
        assert uniform(residues_of(crowd, client)) > 1e-4
        assert uniform(FixedPoint.weighted(8.0, 3).encode(sent[client] / 3)) < 1e-6  # the test can fail
    # Another round has other masks.
    first = residues_of(crowd, 0)
    crowd.sum(dict.fromkeys(sent, 1.0), "2")
    assert uniform(first - residues_of(crowd, 3)) > 1e-4


def test_a_reply_that_comes_too_late_stays_masked() -> None:
    size = 60_000
    sent = {client: np.zeros(size) for client in range(4)}
    crowd = Crowd(secure_config(), sent, {SUM: [1]})
    assert crowd.sum(dict.fromkeys(sent, 1.0)) is not None
    late, sums = residues_of(crowd, 1), crowd.sums
    named = [0, 2, 3, 1]  # each client's own first, then those of its neighbours that answered, then the others
    shares = []
    for reply in crowd.seen[UNMASK]:
        rows = read_raw(reply.content, "secure-bytes", SHARES, (4, masks.SHARE), np.uint8)
        shares.append(rows[named.index(1)].tobytes())
    private = masks.join(shares)
    assert masks.public_key(private) == sums._keys[1][: masks.PUBLIC_KEY]
    for other in (0, 2, 3):
        late = late - masks.pair_mask(masks.agree(private, sums._keys[other][: masks.PUBLIC_KEY]), 1, other, size)
    # All that the server learned of the client is taken off, and its own mask still covers it.
    assert uniform(late) > 1e-4


def query(crowd: Crowd, client: int, group: str = "1", **about: Any) -> Message:
    content = RecordDict({SECURE: ConfigRecord(about)})
    return answer(Message(content, FIRST_NODE + client, f"query.{SECURE}", group_id=group), crowd.contexts[client])


def test_a_client_answers_no_exchange_twice_or_out_of_turn() -> None:
    sent = vectors(3, 5)
    crowd = Crowd(secure_config(), sent)
    nodes = {client: FIRST_NODE + client for client in sent}
    crowd.sums.share_keys(dict.fromkeys(sent, 1.0), nodes, "1", 5, lambda *_: None)
    with pytest.raises(StaleError, match="unmask"):
        query(crowd, 0, stage=UNMASK, active=[0, 1, 2], dropped=[])
    with pytest.raises(StaleError, match="sum"):
        crowd.masked(0, "2")
    crowd.masked(0, "1")
    with pytest.raises(StaleError, match="sum"):
        crowd.masked(0, "1")
    for active, dropped in (([0, 1], [1, 2]), ([0], [1, 2]), ([1, 2], [0]), ([0, 1, 7], [])):
        with pytest.raises(StaleError):
            query(crowd, 0, stage=UNMASK, active=active, dropped=dropped)
    query(crowd, 0, stage=UNMASK, active=[0, 1], dropped=[2])
    with pytest.raises(StaleError):
        query(crowd, 0, stage=UNMASK, active=[0, 2], dropped=[1])
    assert SECURE not in crowd.contexts[0].state
    plain = Crowd(secure_config(secure_aggregation=False), sent)
    with pytest.raises(StaleError, match="was not described with secure sums"):
        query(plain, 0, stage=KEYS)


def test_a_number_beyond_the_range_is_refused() -> None:
    for value in (8.1, math.nan, math.inf):
        sent = vectors(3, 5) | {1: np.full(5, value)}
        with pytest.raises(InputError, match=r"server\.clipping_range = 8\.0: is passed by a number of the update"):
            Crowd(secure_config(), sent).sum(dict.fromkeys(sent, 1.0))


@given(clients=st.integers(1, 60), shares=st.integers(3, 40))
def test_neighbours_hold_shares_of_each_other(clients: int, shares: int) -> None:
    found = neighbourhoods(range(clients), shares | 1)
    assert all(client in held and len(held) == min(clients, shares | 1) for client, held in found.items())
    assert all(client in found[other] for client, held in found.items() for other in held)


@pytest.mark.parametrize(("asked", "expected"), [(10, (10, 6, 6)), (3, (3, 2, 2)), (100, (33, 20, 60)), (2, (2, 2, 2))])
def test_thresholds(asked: int, expected: tuple[int, int, int]) -> None:
    found = Thresholds.of(secure_config().server, asked)
    assert (found.shares, found.needed, found.clients) == expected


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"server": {"aggregator": "median"}}, r"server\.aggregator = 'median': needs single clients' updates"),
        ({"server": {"aggregator": "krum"}}, r"server\.aggregator = 'krum'"),
        ({"server": {"max_update_norm": 1.0}}, r"server\.max_update_norm = 1\.0: needs single"),
        ({"wire": {"codec": "int8"}}, r"wire\.codec = 'int8': needs single .* wire\.downlink_codec"),
        ({"wire": {"uplink_codec": "topk"}}, r"wire\.uplink_codec = 'topk'"),
        ({"wire": {"uplink_codec": "onebit", "error_feedback": True}}, r"wire\.uplink_codec = 'onebit'"),
        ({"client": {"correction": "scaffold"}}, r"client\.correction = 'scaffold'"),
        ({"privacy": {"mode": "client", "noise_multiplier": 1.0, "target_delta": 1e-3}}, r"privacy\.mode = 'client'"),
        ({"method": {"rank": 4, "ranks": [2, 4, 4, 4]}}, r"server\.secure_aggregation = True: sums updates of one"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(runs: LlamaRuns, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs.config(**{**sections, "server": {**SECURE_RUN, **sections.get("server", {})}})


def test_one_client_is_no_sum(runs: LlamaRuns) -> None:
    with pytest.raises(InputError, match=r"server\.secure_aggregation = True: needs 2 clients in a round, and 1"):
        runs.run(server={**SECURE_RUN, "fraction_train": 0.25})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    return LlamaRuns(tmp_path_factory.mktemp("runs"))


SGD = {"optimizer": "sgd", "learning_rate": 0.5}


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_gives_its_plain_result_or_says_why_not(runs: LlamaRuns, name: str) -> None:
    sections: dict[str, Any] = {"method": {"name": name, "rank": 2}, "run": {"rounds": 2}, "client": SGD}
    if name == "peft":
        sections["method"] = {"name": name, "peft_type": "LORA"}
    if get_method(name).reads_single_updates:
        with pytest.raises(InputError, match=r"server\.secure_aggregation = True: hides single clients' updates"):
            runs.config(**sections, server=SECURE_RUN)
        return
    plain, secure = runs.run(**sections), runs.run(**sections, server=SECURE_RUN)
    a, b = adapter(plain), adapter(secure)
    largest = max(float(array.abs().max()) for array in a.values())
    assert max(float((a[n] - b[n]).abs().max()) for n in a) <= 1e-5 * max(1.0, largest)
    planned = runs.forecast(**sections, server=SECURE_RUN)
    assert (payload(secure, "up"), payload(secure, "down")) == (planned.uplink_bytes, planned.downlink_bytes)
    assert all(line["train_loss"] is None and line["drift"] is None for line in lines(secure))


def drop(patch: pytest.MonkeyPatch, gone: dict[str, list[int]], rounds: set[str]) -> None:
    """Let clients fail in exchanges of some rounds."""

    def fails(stage: str, client: int, message: Message) -> None:
        before = STAGES[: STAGES.index(stage) + 1]
        if message.metadata.group_id in rounds and any(client in gone.get(early, []) for early in before):
            raise MemoryError(f"client {client} is gone")

    answers, sends = client_app.answer, client_app.masked

    def answering(message: Message, context: Any) -> Message:
        fails(str(message.content[SECURE]["stage"]), context.node_config["partition-id"], message)
        return answers(message, context)

    def sending(client: Any, message: Message, moves: Any) -> Any:
        fails(SUM, client.client, message)
        return sends(client, message, moves)

    patch.setattr(client_app, "answer", answering)
    patch.setattr(client_app, "masked", sending)


def test_a_run_in_which_two_of_ten_drop_out_and_later_five(runs: LlamaRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {SHARES: [2], SUM: [7]}
    drop(monkeypatch, gone, {"2"})
    few = runs.run(data=TEN, server=SECURE_RUN, run={"rounds": 2}, client=SGD)
    second = lines(few)[1]
    assert second["counted"]
    assert sorted(failure["client"] for failure in second["failed"]) == [2, 7]
    rows = [row for row in table(few, "communication.csv") if row["round"] == "2"]
    assert all(row["payload_bytes"] == row["formula_bytes"] for row in rows)
    assert Counter(row["client"] for row in rows)["2"] < Counter(row["client"] for row in rows)["0"]
    monkeypatch.undo()
    # The same round without secure sums, in which the two fail as well.
    monkeypatch.setattr(client_app, "_reply", failing(client_app._reply, {2, 7}, "2"))
    plain = runs.run(data=TEN, run={"rounds": 2}, client=SGD)
    a, b = adapter(plain), adapter(few)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6
    monkeypatch.undo()
    drop(monkeypatch, {SUM: [0, 1, 2, 3, 4]}, {"2"})
    many = runs.run(data=TEN, server=SECURE_RUN, run={"rounds": 3}, client=SGD, stop=2)
    first, second, third = lines(many)
    assert (first["counted"], second["counted"], third["counted"]) == (True, False, True)
    assert second["uncounted"] == "a secure sum needs 6 clients, and 5 answered"
    assert second["metrics"] == first["metrics"]


def failing(reply: Any, clients: set[int], group: str) -> Any:
    def replying(message: Message, work: Any) -> Message:
        if work.client.client in clients and message.metadata.group_id == group:
            raise MemoryError("gone")
        answered: Message = reply(message, work)
        return answered

    return replying


def test_a_resumed_run_has_the_same_bits(runs: LlamaRuns) -> None:
    sections: dict[str, Any] = {"method": {"name": "fedsvd"}, "server": {**SECURE_RUN, "optimizer": "fedavgm"}}
    sections["server"]["learning_rate"] = 0.5
    whole, resumed = runs.run(**sections), runs.run(stop=2, **sections)
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert table(whole, "communication.csv") == table(resumed, "communication.csv")


def test_under_example_level_privacy_the_clients_say_what_they_spent(runs: LlamaRuns) -> None:
    privacy = {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
    plain, secure = runs.run(privacy=privacy), runs.run(privacy=privacy, server=SECURE_RUN)
    assert table(plain, "privacy.csv") == table(secure, "privacy.csv")


def test_a_client_whose_update_is_too_large_drops_out_and_says_so(runs: LlamaRuns) -> None:
    server = {**SECURE_RUN, "clipping_range": 1e-6}
    with pytest.raises(Exception, match=r"every client of the round failed.*server\.clipping_range = 1e-06"):
        runs.run(server=server, client=SGD)


def test_ray_gives_the_same_bits(runs: LlamaRuns, tmp_path: Path) -> None:
    here = runs.run(server=SECURE_RUN)
    there = runs.run(server=SECURE_RUN, simulation={"workers": 1})
    a, b = adapter(here), adapter(there)
    assert all(torch.equal(a[name], b[name]) for name in a)

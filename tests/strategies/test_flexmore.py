"""The server's half of FlexMoRE with mock replies: what is merged, what is refused, what travels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlora.communication.meter import MeteredGrid
from fedlora.communication.parts import Parts
from fedlora.communication.wire import decode, encode, payload_bytes
from fedlora.errors import InputError, RunError
from fedlora.experts import FULL, Mixture
from fedlora.experts.expert import array_shapes, dense
from fedlora.experts.expert_model import ExpertModel, adapt_experts
from fedlora.experts.expert_start import start_expert
from fedlora.experts.merged import MergedModel, expert_of, split_owners
from fedlora.experts.router import tune_router
from fedlora.strategies.flexmore import FlexMoRE, client_owners
from fedlora.tasks import get_task
from fedlora.training import train_cohort
from tests import tiny
from tests.messages import FIRST_NODE, FakeGrid

OWNERS, RANKS = ["comp", "rec", "comp", "sci"], [3, FULL, 2, 1]


def strategy_of(ranks=RANKS, owners=OWNERS, kind="llama", rounds=3, **sections: Any) -> FlexMoRE:
    method = {"name": "flexmore", **sections.pop("method", {})}
    strategy = FlexMoRE(tiny.settings(kind, method=method, run={"rounds": rounds}, **sections))
    strategy.register(Mixture.of(tiny.base_model(kind)), ranks, owners)
    strategy.nodes = {client: FIRST_NODE + client for client in range(len(ranks))}
    return strategy


def arrays_of(strategy: FlexMoRE, rank: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = array_shapes(strategy.projections, strategy.routers, rank)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def answer(strategy: FlexMoRE, message: Message, **changes: Any) -> Message:
    client = message.metadata.dst_node_id - FIRST_NODE
    rank = changes.get("arrays_rank", strategy.ranks[client])
    arrays = changes.get("arrays") or arrays_of(strategy, rank, client)
    facts = {"rank": str(changes.get("rank", strategy.ranks[client]))}
    facts["public-digest"] = changes.get("digest", strategy.public_digest)
    metrics = MetricRecord({"num-examples": changes.get("examples", 10 * (client + 1)), "loss": 1.0})
    content = RecordDict({"arrays": encode(arrays), "metrics": metrics, "expert": ConfigRecord(facts)})
    return Message(content, reply_to=message)


def one_round(strategy: FlexMoRE, arrays: Any = None, server_round: int = 1, **changes: dict[str, Any]) -> Any:
    """Run a round; ``clientN={...}`` changes that client's reply."""
    messages = list(strategy.configure_train(server_round, encode(arrays or {}), ConfigRecord(), FakeGrid(None)))
    replies = [answer(strategy, m, **changes.get(f"client{i}", {})) for i, m in enumerate(messages)]
    record, metrics = strategy.aggregate_train(server_round, replies)
    return messages, None if record is None else decode(record), metrics


def test_experts_are_concatenated_and_a_domains_are_combined_in_their_updates():
    strategy = strategy_of()
    _, merged, _ = one_round(strategy)
    owners = split_owners(merged)
    assert list(owners) == ["comp", "rec", "sci"]
    # One client: its expert, bit for bit.
    for client, owner in ((1, "rec"), (3, "sci")):
        assert tiny.difference(owners[owner], arrays_of(strategy, RANKS[client], client)) == 0
    # Two clients of ranks 3 and 2, with 10 and 30 examples: at rank 3, the best approximation of the mean update.
    comp = expert_of("comp", owners["comp"])
    assert comp.rank == 3
    parts = [expert_of("comp", arrays_of(strategy, RANKS[c], c)) for c in (0, 2)]
    for path in strategy.projections:
        ideal = sum(w * dense(e.update(path)).double() for w, e in zip((0.25, 0.75), parts, strict=True))
        error = float((dense(comp.update(path)).double() - ideal).square().sum())
        tail = float(torch.linalg.svdvals(ideal)[3:].square().sum())
        assert error == pytest.approx(tail, rel=1e-4)
    for path in strategy.routers:
        rows = [e.arrays[f"{path}.router"] for e in parts]
        torch.testing.assert_close(comp.arrays[f"{path}.router"], 0.25 * rows[0] + 0.75 * rows[1])


def test_messages_hold_each_clients_own_rank_and_rate():
    strategy = strategy_of(client={"learning_rate": 0.02})
    messages, merged, _ = one_round(strategy)
    assert all(len(message.content["arrays"]) == 0 for message in messages)
    messages, again, _ = one_round(strategy, merged, 2)
    assert again is not None
    for message, rank in zip(messages, RANKS, strict=True):
        settings: Any = message.content["config"]
        assert settings["rank"] == str(rank)
        # A full expert's rate is four tenths of an adapter's.
        assert settings["learning-rate"] == pytest.approx(0.008 if rank == FULL else 0.02)
        shapes = {name: tuple(array.shape) for name, array in decode(message.content["arrays"]).items()}
        assert shapes == array_shapes(strategy.projections, strategy.routers, rank)
    # Its domain's expert has rank 3; client 2 gets the best approximation of rank 2.
    comp = expert_of("comp", split_owners(merged)["comp"])
    sent = expert_of("comp", decode(messages[2].content["arrays"]))
    for path in strategy.projections:
        whole = dense(comp.update(path)).double()
        error = float((dense(sent.update(path)).double() - whole).square().sum())
        assert error == pytest.approx(float(torch.linalg.svdvals(whole)[2:].square().sum()), rel=1e-3)


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arrays_rank": 2}, "has shape"),
        ({"arrays_rank": FULL}, "has shape"),
        ({"rank": 2, "arrays_rank": 2}, "its rank is '2', but it declared 3"),
        ({"rank": FULL}, "its rank is 'full', but it declared 3"),
        ({"digest": "0" * 64}, "other public weights"),
        ({"digest": ""}, "other public weights"),
        ({"examples": -1}, "num-examples"),
        ({"nan": NAN}, "is not finite"),
        ({"nan": float("inf")}, "is not finite"),
        ({"drop": True}, "has shape None"),
    ],
)
def test_a_client_that_sends_something_else_is_refused_by_name_and_the_merge_goes_on(change, words):
    strategy = strategy_of()
    arrays = arrays_of(strategy, 3)
    if "nan" in change:
        next(iter(arrays.values()))[0, 0] = change.pop("nan")
        change["arrays"] = arrays
    if change.pop("drop", False):
        arrays.pop(next(iter(arrays)))
        change["arrays"] = arrays
    _, merged, metrics = one_round(strategy, client0=change)
    (failure,) = strategy.report.failed
    assert failure["client"] == 0
    assert "the reply is refused" in failure["error"]
    assert words in failure["error"]
    assert sorted(strategy.report.metrics) == [1, 2, 3]
    owners = split_owners(merged)
    assert sorted(owners) == ["comp", "rec", "sci"]
    # The domain's other client stands for it, at the domain's rank.
    comp = expert_of("comp", owners["comp"])
    other = expert_of("comp", arrays_of(strategy, 2, 2))
    for path in strategy.projections:
        torch.testing.assert_close(dense(comp.update(path)), dense(other.update(path)), rtol=0, atol=1e-5)
    assert metrics["num-examples"] == 20 + 30 + 40


def test_an_owner_that_does_not_answer_keeps_its_last_expert():
    strategy = strategy_of()
    _, first, _ = one_round(strategy)
    messages = list(strategy.configure_train(2, encode(first), ConfigRecord(), FakeGrid(None)))
    changed = {n: a + 1 for n, a in arrays_of(strategy, FULL).items()}
    record, _ = strategy.aggregate_train(2, [answer(strategy, messages[1], arrays=changed)])
    second = split_owners(decode(record))
    assert [f["client"] for f in strategy.report.failed] == [0, 2, 3]
    assert tiny.difference(second["rec"], changed) == 0
    for owner in ("comp", "sci"):
        assert tiny.difference(second[owner], split_owners(first)[owner]) == 0


def test_too_few_replies_merge_nothing():
    strategy = strategy_of(server={"min_replies": 4}, data={"name": "tiny", "partition": {"clients": 4}})
    _, merged, _ = one_round(strategy, client0={"rank": 9})
    assert merged is None
    strategy = strategy_of()
    with pytest.raises(RunError, match=r"every client of the round failed.*other public weights"):
        one_round(strategy, **{f"client{i}": {"digest": "?"} for i in range(4)})
    assert len(strategy.report.failed) == 4
    messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), FakeGrid(None)))
    with pytest.raises(RunError, match="every client of the round failed"):
        strategy.aggregate_train(1, [])
    assert len(messages) == 4


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_formulas_equal_what_is_encoded(kind, dtype):
    """By client and rank, both ways, by measurement."""
    strategy = strategy_of(kind=kind, model={"dtype": dtype})
    wire = getattr(torch, dtype)
    formula = strategy.client_formula(MergedModel(Mixture.of(tiny.base_model(kind))), Parts("run"))
    grid = MeteredGrid(FakeGrid(lambda m: answer_in(m)), formula, {n: c for c, n in strategy.nodes.items()})

    def answer_in(message):
        reply = answer(strategy, message)
        client = message.metadata.dst_node_id - FIRST_NODE
        reply.content["arrays"] = encode(arrays_of(strategy, strategy.ranks[client], client), wire)
        return reply

    arrays: Any = {}
    for server_round in (1, 2):
        messages = strategy.configure_train(server_round, encode(arrays, wire), ConfigRecord(), grid)
        record, _ = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        arrays = decode(record)
    rows = grid.take_rows()
    assert len(rows) == 16
    size = 8 if dtype == "float64" else 4
    m_n = {"llama": (3 * (48 + 32), 3 * 48 * 32), "gpt2": (2 * (48 + 32), 2 * 48 * 32)}[kind]
    for row in rows:
        rank = RANKS[row.client]
        numbers = 2 * (m_n[1] if rank == FULL else rank * m_n[0]) + 2 * (32 + 1)
        expected = 0 if (row.round, row.direction) == (1, "down") else size * numbers
        assert (row.payload_bytes, row.formula_bytes) == (expected, expected)
    assert payload_bytes(record) == size * sum(array.numel() for array in arrays.values())


def test_ranks_are_checked_and_an_expensive_one_warns(caplog):
    with caplog.at_level("WARNING", "fedlora"):
        strategy_of(ranks=[19, 20, FULL, 1])
    # 48 x 32: break-even at 19.2.
    (record,) = caplog.records
    assert "client 1 (rec): rank 20 is above the break-even rank 19" in record.getMessage()
    with pytest.raises(InputError, match=r"method\.rank.*33"):
        strategy_of(ranks=[33, 1, 1, 1])
    for name in ("public", "mixture"):
        with pytest.raises(InputError, match="rename that owner"):
            strategy_of(ranks=[1], owners=[name])


def test_whose_expert_a_client_grows():
    table = tiny.table("llama", 9)
    table.domain = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0])
    parts = [np.array([0, 1]), np.array([3, 4]), np.array([2, 7]), np.array([5])]
    data: Any = SimpleNamespace(train=table, domain_names=["a", "b"], partition=parts, client_names=list("0123"))
    assert client_owners(data) == ["a", "b", "a", "b"]
    data.partition = [np.array([0, 3]), np.array([1])]
    data.client_names = ["0", "ward 7"]
    assert client_owners(data) == ["client-0", "ward 7"]
    table.domain = None
    assert client_owners(data) == ["client-0", "ward 7"]


# Two rounds of real training on a small model.


def federation(kind: str, data: Any, strategy: FlexMoRE, rounds: int) -> tuple[MergedModel, list[dict[str, Any]]]:
    """Do as server and clients do, without messages between processes."""
    config = strategy.config
    merged = MergedModel(Mixture.of(tiny.base_model(kind)))
    adapted = adapt_experts(tiny.base_model(kind), config)
    assert isinstance(adapted, ExpertModel)
    arrays: Any = {}
    metrics = [strategy.evaluate(merged, data, 0)]
    for server_round in range(1, rounds + 1):
        messages = list(strategy.configure_train(server_round, encode(arrays), ConfigRecord(), FakeGrid(None)))
        replies = []
        for client, message in enumerate(messages):
            settings: Any = message.content["config"]
            adapted.prepare(settings)
            received = decode(message.content["arrays"])
            rows = data.partition[client]
            sequence = np.random.SeedSequence(client)
            start = adapted.begin(received) if received else start_expert(adapted, data.train, rows, None, sequence)
            job = tiny.jobs_of([start], [rows], None, server_round, settings["learning-rate"])
            result = train_cohort(adapted, data.train, job, config)[0]
            replies.append(
                answer(strategy, message, arrays=adapted.finish(result.arrays), digest=adapted.public_digest)
            )
        record, _ = strategy.aggregate_train(server_round, replies)
        arrays = decode(record)
        merged.set_shared(arrays)
        metrics.append(strategy.evaluate(merged, data, server_round))
    return merged, metrics


def domain_data(kind: str) -> Any:
    """Two domains, each of its own few words."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(3, 12, 200), rng.integers(30, 39, 200)]).astype(np.int32)
    domain = np.repeat([0, 1], 20)
    task = get_task("causal-lm")
    table = tiny.TokenTable(tokens, np.arange(0, 401, 10), None, np.zeros(40, np.int64), domain, 0, task)
    parts = [np.arange(0, 8), np.arange(8, 20), np.arange(20, 40)]
    return SimpleNamespace(
        train=table, test=table, validation=None, public=table, domain_names=["a", "b"], partition=parts,
        client_names=["0", "1", "2"], label_names=None,
    )  # fmt: skip


@pytest.mark.parametrize("extraction", ["direct", "svd"])
@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_two_rounds(kind, extraction):
    data = domain_data(kind)
    strategy = strategy_of(
        [2, 3, FULL], client_owners(data), kind, rounds=2, method={"extraction": extraction},
        client={"local_steps": 15, "batch_size": 8, "learning_rate": 0.02}, server={"batch_size": 16},
    )  # fmt: skip
    public = tiny.base_model(kind)
    before = {name: value.clone() for name, value in public.named_parameters()}
    merged, metrics = federation(kind, data, strategy, 2)
    start, middle, final = (m["by_domain"] for m in metrics)
    assert (set(start), set(middle), set(final)) == ({"public"}, {"mixture"}, {"public", "mixture", "a", "b"})
    assert final["public"] == start["public"]
    for domain in ("a", "b"):
        # The owner's expert fits its domain; the mixture beats the public model on both, and gets better by rounds.
        assert final[domain][domain] < 0.8 * final["public"][domain]
        assert final["mixture"][domain] < final["public"][domain]

    def mean(table):
        return np.mean([np.log(table[domain]) for domain in ("a", "b")])

    assert mean(final["mixture"]) < mean(middle["mixture"])
    assert mean(final["mixture"]) < min(mean(final["a"]), mean(final["b"]))
    assert merged.mixture.config.ranks == [3, FULL]
    assert not [n for n, v in tiny.base_model(kind).named_parameters() if not torch.equal(v, before[n])]
    # Tuning the router on public text changes rows and biases alone, and helps.
    experts = {name: array for name, array in merged.arrays().items() if ".router" not in name}
    tuned = strategy.config.model_copy(
        update={
            "method": strategy.config.method.model_copy(
                update={"router_tuning_steps": 30, "router_tuning_learning_rate": 0.02}
            )
        }
    )
    strategy.config = tuned
    untuned = dict(metrics[-1]["by_domain"]["mixture"])
    refined = strategy.refine(merged, data, 3)
    assert refined is None  # only after the last round
    refined = strategy.refine(merged, data, 2)
    assert refined is not None
    assert tiny.difference({name: refined[name] for name in experts}, experts) == 0
    merged.set_shared(refined)
    assert mean(strategy.evaluate(merged, data, 1)["by_domain"]["mixture"]) < mean(untuned)
    assert all(float(block.router_bias[0]) == 0 and (block.router_bias <= 0).all() for block in merged.mixture.blocks)
    tune_router(merged, data.public, tuned)


def test_an_owners_larger_client_uses_its_whole_rank_after_a_smaller_one_began():
    """Client 0 has rank 4 but does not answer in round 1; the expert that it gets in round 2 has one direction."""
    strategy = strategy_of([4, 1], ["a", "a"], client={"local_steps": 8})
    messages = list(strategy.configure_train(1, encode({}), ConfigRecord(), FakeGrid(None)))
    arrays, _ = strategy.aggregate_train(1, [answer(strategy, messages[1])])
    assert arrays is not None
    messages = list(strategy.configure_train(2, arrays, ConfigRecord(), FakeGrid(None)))
    adapted: Any = adapt_experts(tiny.base_model("llama"), strategy.config)
    adapted.prepare(messages[0].content["config"])
    received = decode(messages[0].content["arrays"])
    start = adapted.begin(received)
    path = next(iter(strategy.projections))
    before = dense(expert_of("a", received).update(path))
    assert int(torch.linalg.matrix_rank(before)) == 1
    torch.testing.assert_close(dense(expert_of("a", adapted.finish(start)).update(path)), before, rtol=0, atol=1e-6)
    rows = np.arange(12)
    result = train_cohort(adapted, tiny.table("llama", 12), tiny.jobs_of([start], [rows]), strategy.config)[0]
    for path in strategy.projections:
        update = dense(expert_of("a", adapted.finish(result.arrays)).update(path))
        assert int(torch.linalg.matrix_rank(update)) == 4


def test_half_precision_loses_no_small_step_of_router_tuning():
    method = {"name": "flexmore", "router_tuning_steps": 60, "router_tuning_learning_rate": 1e-4}
    config = tiny.settings("llama", method=method, data={"public": "text.csv"})
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        mixture = Mixture.of(tiny.base_model("llama", dtype))
        shapes = array_shapes(mixture.projections(), mixture.routers(), 3)
        generator = torch.Generator().manual_seed(0)
        arrays = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        mixture.add_expert(expert_of("a", arrays))
        before = [block.router.detach().double() for block in mixture.blocks]
        tune_router(MergedModel(mixture), tiny.table("llama", 12), config)
        assert all(block.router.dtype == block.router_bias.dtype == dtype for block in mixture.blocks)
        after = [block.router.detach().double() for block in mixture.blocks]
        moved.append(float(sum((a - b).abs().sum() for a, b in zip(after, before, strict=True))))
    assert moved[1] == pytest.approx(moved[0], rel=0.2)

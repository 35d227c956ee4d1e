"""An owner's expert while it trains: the block equals a mixture of two, and every trainable has its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.errors import InputError
from fedlora.experts import FULL, Expert, Mixture
from fedlora.experts.expert_model import ALPHA, ExpertModel, adapt_experts
from fedlora.experts.feed_forward import public_digest
from fedlora.tasks import get_task
from fedlora.training import train_cohort
from fedlora.training.dp import per_example_gradients
from tests import tiny


def model(kind, dtype=torch.float64, rank=3, **method):
    config = tiny.settings(kind, method={"name": "flexmore", "rank": rank, "alpha": 4.0, **method})
    found = adapt_experts(tiny.base_model(kind, dtype), config)
    assert isinstance(found, ExpertModel)
    return found


def drawn(adapted, seed=0, clients=1):
    generator = torch.Generator().manual_seed(seed)
    names = [n for n in adapted.arrays() if not n.endswith("public_router")]
    shape = {name: adapted.parameter(name).shape[1:] for name in names}
    found = [
        {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shape.items()}
        for _ in range(clients)
    ]
    for client in found:
        for name in client:
            if name.endswith("router_bias"):
                client[name] = -client[name].abs()
    return found


@pytest.mark.parametrize(("rank", "method"), [(3, {}), (FULL, {}), (3, {"extraction": "svd"})])
@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_training_sees_what_the_mixture_computes(kind, rank, method):
    adapted = model(kind, **method)
    adapted.prepare({"rank": str(rank)})
    (arrays,) = drawn(adapted)
    table = tiny.table(kind, 5)
    batch = table.batch(np.arange(5))
    adapted.set_clients([arrays])
    adapted.layout.set_rows([5])
    sent = adapted.finish(arrays)
    with torch.no_grad():
        trained = adapted.logits(batch)
    stock = tiny.base_model(kind, torch.float64)
    mixture = Mixture.of(stock)
    mixture.add_expert(Expert("o", rank, sent, adapted.public_digest))
    with torch.no_grad():
        merged = mixture(input_ids=batch["input_ids"]).logits
    exact = not method
    assert (float((trained - merged).abs().max()) < 1e-10) == exact
    # A further round starts from what was sent.
    again = adapted.finish(adapted.begin(sent))
    products = [e.update(next(iter(adapted.projections()))) for e in (Expert("o", rank, s) for s in (sent, again))]
    first, second = [p if isinstance(p, torch.Tensor) else p[0] @ p[1] for p in products]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_it_starts_at_the_public_model(kind):
    adapted = model(kind)
    batch = tiny.table(kind, 5).batch(np.arange(5))
    (arrays,) = drawn(adapted)
    arrays |= {name: torch.zeros_like(value) for name, value in arrays.items() if name.endswith("lora_B")}
    adapted.set_clients([arrays])
    adapted.layout.set_rows([5])
    stock = tiny.base_model(kind, torch.float64)
    with torch.no_grad():
        assert torch.equal(adapted.logits(batch), stock(input_ids=batch["input_ids"]).logits)
    # There the router's gradient is exactly 0: AdamW would make a full step of a rounding error.
    get_task("causal-lm").loss(adapted.logits(batch), batch["labels"]).sum().backward()
    for name in adapted.trained:
        gradient = adapted.parameter(name).grad
        assert bool(gradient.any()) == name.endswith("lora_B"), name


@pytest.mark.parametrize("rank", [2, FULL])
@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_every_trainable_has_per_example_gradients(kind, rank):
    """Factors, router row and bias, of two clients in one pass, equal to autograd on one example at a time."""
    adapted = model(kind)
    adapted.prepare({"rank": str(rank)})
    clients = drawn(adapted, clients=2)
    table = tiny.table(kind, 5)
    counts = [3, 2]
    adapted.set_clients(clients)
    adapted.model.train()
    adapted.layout.set_rows(counts, [9, 9])
    with per_example_gradients(adapted):
        batch = table.batch(np.arange(5))
        get_task("causal-lm").loss(adapted.logits(batch), batch["labels"]).sum().backward()
        samples = {name: adapted.parameter(name).grad_sample.clone() for name in adapted.trained}
    suffixes = {name.rpartition(".")[2] for name in samples}
    assert suffixes == {"router", "router_bias"} | ({"delta"} if rank == FULL else {"lora_A", "lora_B"})
    for row in range(5):
        adapted.set_clients([clients[0 if row < 3 else 1]])
        adapted.layout.set_rows([1])
        batch = table.batch([row])
        get_task("causal-lm").loss(adapted.logits(batch), batch["labels"]).sum().backward()
        for name in adapted.trained:
            expected = adapted.parameter(name).grad[0]
            torch.testing.assert_close(samples[name][row], expected, rtol=0, atol=1e-10)
            assert samples[name].shape[0] == 5


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("rank", ["3", "full"])
def test_only_the_expert_moves(rank, private):
    adapted = model("llama", torch.float32)
    adapted.prepare({"rank": rank})
    table = tiny.table("llama", 12)
    digest = adapted.public_digest
    starts = [{name: value.float() for name, value in client.items()} for client in drawn(adapted, clients=2)]
    plans = [tiny.plan(0.5, 1.0)] * 2 if private else None
    jobs = tiny.jobs_of(starts, tiny.split([7, 5]), plans, learning_rate=1e-2)
    config = tiny.settings("llama", method={"name": "flexmore"}, client={"local_steps": 4})
    results = train_cohort(adapted, table, jobs, config)
    for start, result in zip(starts, results, strict=True):
        for name in start:
            assert not torch.equal(start[name], result.arrays[name]), name
    assert public_digest(adapted.model, adapted.forms) == digest


def test_the_scale_falls_with_the_root_of_the_rank():
    config = tiny.settings("llama", method={"name": "flexmore"})
    adapted = adapt_experts(tiny.base_model("llama"), config)
    for rank, scale in ((1, ALPHA), (4, ALPHA / 2), (16, ALPHA / 4)):
        adapted.prepare({"rank": str(rank)})
        assert {a.scaling for a in adapted.adapters.values()} == {4.5 / rank**0.5}
        assert scale == ALPHA / rank**0.5


def test_a_rank_above_a_layers_size_is_refused():
    with pytest.raises(InputError, match="break-even rank is 19"):
        model("llama", rank=33)
    adapted = model("llama")
    with pytest.raises(InputError, match=r"is above the size of model.layers.0.mlp.gate_proj"):
        adapted.prepare({"rank": "40"})

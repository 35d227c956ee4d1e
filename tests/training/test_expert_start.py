"""Where an owner's expert starts: its router rows, and what privacy makes of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.experts import FULL
from fedlora.experts.expert_model import ExpertModel, adapt_experts
from fedlora.experts.expert_start import LARGEST_LOGIT, document_states, mean_states, start_expert
from tests import tiny


def model(kind="llama", **method):
    config = tiny.settings(kind, method={"name": "flexmore", "rank": 2, **method}, server={"batch_size": 4})
    adapted = adapt_experts(tiny.base_model(kind), config)
    assert isinstance(adapted, ExpertModel)
    return adapted


def seed(number=0):
    return np.random.SeedSequence(number)


def by_hand(kind, table, rows):
    """Hidden states that enter the feed-forward block, by hooks on the stock model, one document at a time."""
    stock = tiny.base_model(kind)
    layers = stock.model.layers if kind == "llama" else stock.transformer.h
    seen = []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].mean(0)))
    found = []
    for row in rows:
        seen.clear()
        with torch.no_grad():
            stock(input_ids=table.batch([row])["input_ids"])
        found.append(torch.stack(seen))
    return torch.stack(found)


@pytest.mark.parametrize("rank", ["2", "full"])
@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_rows_start_from_the_documents_mean_hidden_state(kind, rank):
    adapted = model(kind)
    adapted.prepare({"rank": rank})
    table = tiny.table(kind, 9)
    rows = np.arange(1, 8)
    # Whatever was trained before: the states are those of the public model.
    before = {n: torch.ones(adapted.parameter(n).shape[1:]) for n in adapted.arrays() if "public" not in n}
    adapted.set_clients([before])
    arrays = start_expert(adapted, table, rows, None, seed())
    expected = by_hand(kind, table, rows).mean(0)
    for path, row in zip(adapted.routers(), expected, strict=True):
        short = row * min(1.0, LARGEST_LOGIT / float(row.square().sum()))
        torch.testing.assert_close(arrays[f"{path}.router"][0], short, rtol=0, atol=1e-5)
        assert float(short.square().sum()) <= LARGEST_LOGIT + 1e-5
        assert not arrays[f"{path}.router_bias"].any()
    # dW = 0, and A is the same draw for every owner.
    again = start_expert(adapted, table, rows[:2], None, seed(1))
    for path in adapted.projections():
        if adapted.rank == FULL:
            assert not arrays[f"{path}.delta"].any()
        else:
            assert not arrays[f"{path}.lora_B"].any()
            assert arrays[f"{path}.lora_A"].any()
            assert torch.equal(arrays[f"{path}.lora_A"], again[f"{path}.lora_A"])


def test_padding_and_batches_change_no_state():
    adapted = model()
    table = tiny.table("llama", 9)
    one = torch.cat(list(document_states(adapted, adapted.blocks, table, np.arange(9), 1)))
    many = torch.cat(list(document_states(adapted, adapted.blocks, table, np.arange(9), 100)))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-5)
    assert one.shape == (9, 2, 32)
    mean = mean_states(adapted, adapted.blocks, table, np.arange(9), 4)
    torch.testing.assert_close(mean, one.mean(0), rtol=0, atol=1e-5)


def test_at_most_so_many_documents_are_read():
    adapted = model(router_documents=3)
    table = tiny.table("llama", 30)
    first = start_expert(adapted, table, np.arange(30), None, seed(0))
    again = start_expert(adapted, table, np.arange(30), None, seed(0))
    other = start_expert(adapted, table, np.arange(30), None, seed(1))
    assert tiny.difference(first, again) == 0
    assert tiny.difference(first, other) > 1e-3
    chosen = np.sort(np.random.default_rng(seed(0)).permutation(30)[:3])
    expected = by_hand("llama", table, chosen).mean(0)[0]
    row = first["model.layers.0.mlp.router"][0]
    torch.testing.assert_close(row / row.norm(), expected / expected.norm(), rtol=0, atol=1e-5)


def test_a_public_start_reads_no_document():
    adapted = model()
    method = adapted.config.method.model_copy(update={"router_init": "public"})
    adapted.config = adapted.config.model_copy(update={"method": method})
    rows = {f"{path}.public_router": torch.full((1, 32), 0.25) for path in adapted.routers()}
    adapted.set_shared(rows)
    arrays = start_expert(adapted, None, None, None, seed())  # type: ignore[arg-type]
    for path in adapted.routers():
        assert torch.equal(arrays[f"{path}.router"], rows[f"{path}.public_router"])


def test_under_privacy_each_document_counts_with_norm_one_and_the_noise_is_that_of_the_plan():
    """One document more or less moves the sum by 1; the rest is Gaussian noise of sigma 1."""
    adapted = model()
    table = tiny.table("llama", 9)
    plan = dataclasses.replace(tiny.plan(), start_noise_multiplier=0.0, start_sample_rate=1.0)

    def rows(documents, plan, number=0):
        arrays = start_expert(adapted, table, documents, plan, seed(number))
        return torch.stack([arrays[f"{path}.router"][0] for path in adapted.routers()])

    # Undo the mean and the scale by the number of routers: what is left is the clipped sum.
    whole, less = (rows(np.arange(n), plan) * n / 2**0.5 for n in (9, 8))
    assert float((whole - less).norm()) == pytest.approx(1, abs=1e-4)
    noisy = dataclasses.replace(plan, start_noise_multiplier=0.05)
    noise = torch.stack([rows(np.arange(9), noisy, k) - rows(np.arange(9), plan, k) for k in range(60)])
    assert float((noise * 9 / 2**0.5).std()) == pytest.approx(0.05, rel=0.05)
    # A Poisson sample: a document enters with the plan's probability.
    half = dataclasses.replace(plan, start_sample_rate=0.5)
    sums = [float((rows(np.array([3]), half, k) * 0.5 / 2**0.5).norm()) for k in range(60)]
    assert 0.3 < np.mean(np.array(sums) > 0.5) < 0.7
    with pytest.raises(ValueError, match="needs a noise multiplier"):
        rows(np.arange(9), tiny.plan(), 0)


def test_under_privacy_a_document_whose_state_overflows_does_not_show():
    """A public model can be made so that a word of its choice gives NaN, which no noise would cover."""
    adapted = model()
    table = tiny.table("llama", 9)
    # The last document alone holds its first token: the others avoid it.
    marked = int(table.tokens[table.offsets[8]])
    others = np.array([row for row in range(8) if marked not in table.batch([row])["input_ids"]])
    assert len(others) > 2
    with torch.no_grad():
        adapted.model.get_input_embeddings().weight[marked] = torch.nan
    plan = dataclasses.replace(tiny.plan(), start_noise_multiplier=0.0, start_sample_rate=1.0)
    with_it, without = (start_expert(adapted, table, rows, plan, seed()) for rows in (np.append(others, 8), others))
    for path in adapted.routers():
        row = with_it[f"{path}.router"]
        assert torch.isfinite(row).all()
        scale = len(others) / (len(others) + 1)
        torch.testing.assert_close(row, without[f"{path}.router"] * scale, rtol=0, atol=1e-5)


def test_a_nodes_start_has_noise_and_sample_of_entropy():
    """The noise of two starts differs, and its standard deviation is the plan's (off by 15 %: below 1e-9)."""
    adapted = model()
    table = tiny.table("llama", 9)
    exact = dataclasses.replace(tiny.plan(), start_noise_multiplier=0.0, start_sample_rate=1.0)
    noisy = dataclasses.replace(exact, start_noise_multiplier=0.05)

    def rows(plan):
        arrays = start_expert(adapted, table, np.arange(9), plan, None)
        return torch.stack([arrays[f"{path}.router"][0] for path in adapted.routers()])

    noise = torch.stack([rows(noisy) - rows(exact) for _ in range(20)])
    draws = noise.flatten(0, 1)  # by start and layer
    assert len(draws.unique(dim=0)) == len(draws)
    assert len(noise.unique()) > 0.99 * noise.numel()  # two of the numbers in float32 may be equal by chance
    assert float((noise * 9 / 2**0.5).std()) == pytest.approx(0.05, rel=0.15)
    half = dataclasses.replace(exact, start_sample_rate=0.5)
    assert len({float(rows(half).sum()) for _ in range(12)}) > 1

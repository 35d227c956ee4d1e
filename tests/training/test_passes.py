"""The rule of what is worth a pass: on shapes and lengths alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedlora.adapters import adapt
from fedlora.training.passes import BUSY, COHORT, SMALLEST, choose_passes, mean_product
from tests import tiny

FLOPS = st.floats(1e3, 1e10)
TOKENS = st.floats(1, 1e5)
BATCH = st.integers(1, 4096)


@given(FLOPS, TOKENS, BATCH)
def test_a_part_keeps_the_gpu_busy_and_a_smaller_one_would_not(flops: float, tokens: float, batch: int) -> None:
    found, work = choose_passes(flops, tokens, batch), flops * tokens
    rows = found.rows or batch
    assert 1 <= found.smallest <= rows <= batch
    parts = -(-batch // rows)
    assert found.busy == (rows * work >= BUSY)
    if found.rows is not None:
        assert found.busy
        assert rows < batch
    if rows > 1:  # one part more, of equal ones, would not be busy
        assert batch * work / (parts + 1) < BUSY * (1 + 1e-9) or -(-batch // (parts + 1)) == rows
    if found.smallest > 1 and found.smallest < batch:
        assert found.smallest * work >= BUSY / SMALLEST


@given(FLOPS, TOKENS, BATCH, st.none() | st.integers(1, 5000))
def test_clients_share_a_pass_only_where_one_does_not_keep_it_busy(
    flops: float, tokens: float, batch: int, given: int | None
) -> None:
    found = choose_passes(flops, tokens, batch, given)
    alone = min(found.rows or batch, batch) * flops * tokens
    assert found.clients >= 1
    assert (found.clients == 1) == (alone >= BUSY)
    assert found.clients == 1 or found.clients * alone <= COHORT * BUSY
    assert given is None or found.rows == given


@given(FLOPS, TOKENS, BATCH, st.floats(1, 100))
def test_larger_models_and_longer_texts_never_take_more_examples(
    flops: float, tokens: float, batch: int, factor: float
) -> None:
    small, large = choose_passes(flops, tokens, batch), choose_passes(flops * factor, tokens, batch)
    assert (large.rows or batch) <= (small.rows or batch)
    assert large.smallest <= small.smallest
    assert large.clients <= small.clients


def test_a_model_without_matrices_is_no_reason_to_split() -> None:
    assert choose_passes(0.0, 5.0, 8).rows is None


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
BERT_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}


def product_of(shape: dict[str, int]) -> float:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8} if shape in (LLAMA_8B, LLAMA_1B) else {}
    with torch.device("meta"):
        model: nn.Module
        if heads:
            model = LlamaForCausalLM(LlamaConfig(**shape, **heads, vocab_size=128256))
        else:
            model = BertForSequenceClassification(
                BertConfig(**shape, num_attention_heads=16 if shape is BERT_LARGE else 12)
            )
        model.requires_grad_(False)
    kind = "llama" if heads else "bert"
    return mean_product(adapt(model, tiny.settings(kind), "lora"))


@pytest.mark.parametrize(
    ("shape", "batch", "tokens", "rows", "least", "most"),
    [
        (LLAMA_8B, 16, 512, 8, 1, 1),
        (LLAMA_8B, 4, 2048, 2, 1, 1),
        (LLAMA_1B, 16, 512, None, 2, 2),
        (LLAMA_1B, 16, 2048, 8, 1, 1),
        (LLAMA_1B, 4, 256, None, 20, 30),
        (MINILM, 16, 64, None, 384, 1000),
        (BERT_LARGE, 16, 64, None, 80, 120),
    ],
)
def test_models_that_people_train(
    shape: dict[str, int], batch: int, tokens: int, rows: int | None, least: int, most: int
) -> None:
    """Clients of a small model share a pass; a large one's batch is split."""
    found = choose_passes(product_of(shape), tokens, batch)
    assert found.rows == rows
    assert least <= found.clients <= most


def test_a_quantised_base_takes_half_as_many_examples() -> None:
    flops = product_of(LLAMA_8B)
    assert (choose_passes(flops, 512, 16).rows, choose_passes(flops, 512, 16, quantized=True).rows) == (8, 4)


def test_the_mean_product_is_of_the_frozen_layers_alone() -> None:
    """Llama's 32 to 48 wide layers, of 2 heads of which one has keys and values; not the output layer's 50 words."""
    adapted = tiny.adapted_model("llama", tiny.settings("llama"))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert mean_product(adapted) == pytest.approx(2 * layer / 7)

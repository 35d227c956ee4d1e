"""Transformers of a few thousand random weights, and tokens for them: no network, no files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedlora.adapters import AdaptedModel, adapt
from fedlora.adapters.model import dense_weight
from fedlora.adapters.parameterisations import sb
from fedlora.arrays import Arrays
from fedlora.config import Config, load_config
from fedlora.data.tokens import TokenTable
from fedlora.models import MeanPoolingClassifier, MeanPoolingConfig
from fedlora.privacy import PrivacyPlan
from fedlora.roles import HEAD
from fedlora.tasks import get_task
from fedlora.training import ClientJob

VOCABULARY, LABELS = 50, 3
CAUSAL = ("llama", "gpt2")
KINDS = ("bert", "mean", *CAUSAL)
"""BERT with its own head, BERT with mean pooling, and two causal language models; GPT-2's layers are Conv1D."""

FACTORS = {
    "fedit": ("lora", ("lora_A", "lora_B", HEAD)),
    "ffa-lora": ("lora", ("lora_B", HEAD)),
    "fed-sb": ("sb", ("sb_R", HEAD)),
}
"""Parameterisation and trained kinds of arrays by method."""

_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32}


def bert_config(**options: Any) -> BertConfig:
    """Shape of the tiny BERT: 32 wide, 48 inside its feed-forward layers."""
    sizes = {**_SIZES, "hidden_size": 32, "intermediate_size": 48, "num_labels": LABELS}
    return BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)


def llama_config(**options: Any) -> LlamaConfig:
    """Shape of the tiny Llama: keys and values are narrower than queries."""
    sizes = {**_SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 1, **options}
    return LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def gpt2_config(**options: Any) -> GPT2Config:
    """Shape of the tiny GPT-2."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**sizes, **drop, bos_token_id=1, eos_token_id=2, **options)


def base_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Make a frozen base model; its weights are wide enough for gradients of some size."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    if kind == "bert":
        model: Any = BertForSequenceClassification(bert_config())
    elif kind == "mean":
        shape = bert_config()
        encoder = BertModel(shape, add_pooling_layer=False)
        model = MeanPoolingClassifier(MeanPoolingConfig(shape.to_dict(), num_labels=LABELS), encoder)
    elif kind == "llama":
        model = LlamaForCausalLM(llama_config())
    else:
        model = GPT2LMHeadModel(gpt2_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    torch.set_rng_state(state)
    if kind == "llama" and dtype == torch.float64:
        # Llama's own norm computes in float32, where a difference of 1e-16 may become one of 1e-7.
        for path, module in list(model.named_modules()):
            if path.endswith("norm"):
                model.set_submodule(path, nn.RMSNorm(module.weight.shape, eps=1e-6))
    return model.to(dtype).requires_grad_(False)


def settings(kind: str = "bert", **sections: dict[str, Any]) -> Config:
    """Make a config; ``method={...}`` and the like add to the sections."""
    content: dict[str, dict[str, Any]] = {
        "run": {"seed": 5, "rounds": 3},
        "model": {
            "name": "tiny",
            "max_length": 16,
            "task": "causal-lm" if kind in CAUSAL else "sequence-classification",
        },
        "data": {"name": "tiny", "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 3, "alpha": 4.5},
        "client": {"batch_size": 4},
    }
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}
    return load_config(content)


def table(kind: str, rows: int, seed: int = 0, length: int = 9) -> TokenTable:
    """Draw examples of 3 to ``length`` tokens; causal ones have a prompt without loss."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(3, VOCABULARY, offsets[-1]).astype(np.int32)
    if kind in CAUSAL:
        return TokenTable(tokens, offsets, None, rng.integers(0, 2, rows), None, 0, get_task("causal-lm"))
    task, names = get_task("sequence-classification"), [str(label) for label in range(LABELS)]
    return TokenTable(tokens, offsets, rng.integers(0, LABELS, rows), None, None, 0, task, names)


def split(sizes: Sequence[int]) -> list[np.ndarray]:
    """Give the first rows to the first client, and so on."""
    return [r.astype(np.int64) for r in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])]


def start(adapted: AdaptedModel, seed: int = 0, scale: float = 0.3) -> None:
    """Set all factors to drawn values (Fed-SB's B and A to singular vectors): no gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {}
    for path, adapter in adapted.adapters.items():
        drawn = {
            f: torch.randn(adapted.parameter(f"{path}.{f}").shape[1:], generator=generator) for f in adapter.factors
        }
        if adapted.kind == "sb":
            vectors = sb.factors_from_pairs(sb.leading_pairs(dense_weight(adapter.base), len(drawn["sb_R"])))
            drawn |= {"sb_A": vectors["sb_A"], "sb_B": vectors["sb_B"]}
        arrays |= {f"{path}.{factor}": scale * v if factor[:2] == "lo" else v for factor, v in drawn.items()}
    adapted.set_shared(arrays)


def adapted_model(kind: str, config: Config, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """Make a tiny base model with the adapters of ``config.method.name`` in it, none of them zero."""
    adapted = adapt(base_model(kind, dtype), config, FACTORS[config.method.name][0])
    start(adapted)
    return adapted


def trained_names(adapted: AdaptedModel, config: Config) -> tuple[str, ...]:
    """Names of what the method's clients train."""
    return adapted.names(FACTORS[config.method.name][1])


def plan(sigma: float = 0.0, clip: float = 0.1, rate: float = 0.5, batch: float = 2.0) -> PrivacyPlan:
    """Make a plan with the given noise, clipping norm, sampling rate and expected batch size."""
    return PrivacyPlan(rate, sigma, clip, batch, 1, 1e-5, "rdp", None)


def jobs_of(
    starts: Iterable[Arrays],
    rows: Sequence[np.ndarray],
    plans: Sequence[PrivacyPlan | None] | None = None,
    server_round: int = 1,
    learning_rate: float = 0.1,
) -> list[ClientJob]:
    """One job a client, in order."""
    return [
        ClientJob(k, server_round, rows[k], arrays, learning_rate, plans[k] if plans else None)
        for k, arrays in enumerate(starts)
    ]


def difference(first: Arrays, second: Arrays) -> float:
    """Largest difference between arrays of the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def same_loss(expected: float, tolerance: float = 1e-6) -> Any:
    """Compare with a cross-entropy to rounding: it is a difference of float32 logits, however small it is itself."""
    return pytest.approx(expected, rel=tolerance, abs=tolerance)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Compare results of like sums in float32, up to a share of the largest number: rounding grows with what is added.

    Models that others load lie at other addresses than fedlora's, so that some processors round them otherwise.
    """
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def save_llama(folder: Path) -> Path:
    """Save a tiny Llama and a tokenizer of the words w4, w5, ... as a model folder."""
    base_model("llama").save_pretrained(folder)  # type: ignore[operator]
    save_tokenizer(folder)
    return folder


KNOWN = "w4 w5 w6 w7 w8 w9"
"""Words that the tokenizer of :func:`save_tokenizer` knows."""


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of the words w4, w5, ..."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)

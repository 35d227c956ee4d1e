"""Tiny models of transformers' families, with random weights and two layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size")
_INNER = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "d_inner")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "state_size": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "initializer_range": 0.3,
}

QUERY_VALUE: dict[str, tuple[set[str], int]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie"), ({"query", "value"}, 2)),
    **dict.fromkeys(("mobilebert", "rembert", "convbert", "roformer"), ({"query", "value"}, 2)),
    "albert": ({"query", "value"}, 1),  # its layers share their weights
    "distilbert": ({"q_lin", "v_lin"}, 2),
    "xlm": ({"q_lin", "v_lin"}, 2),
    "mpnet": ({"q", "v"}, 2),
    "modernbert": ({"Wqkv"}, 2),
    "deberta": ({"in_proj"}, 2),
    "deberta-v2": ({"query_proj", "value_proj"}, 2),
    "gpt2": ({"c_attn"}, 2),
    "gpt_bigcode": ({"c_attn"}, 2),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox", "persimmon"), ({"query_key_value"}, 2)),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ({"q_proj", "v_proj"}, 2)
    ),
    **dict.fromkeys(("smollm3", "olmo2", "granite", "cohere", "starcoder2", "phi", "opt"), ({"q_proj", "v_proj"}, 2)),
    **dict.fromkeys(("mixtral", "stablelm", "glm", "gptj", "xglm"), ({"q_proj", "v_proj"}, 2)),
    "phi3": ({"qkv_proj"}, 2),
    "codegen": ({"qkv_proj"}, 2),
    "ctrl": ({"Wq", "Wv"}, 2),
    "deepseek_v3": ({"q_b_proj", "kv_b_proj"}, 2),
    # Encoder, decoder and cross-attention.
    "t5": ({"q", "v"}, 6),
    "bart": ({"q_proj", "v_proj"}, 6),
    "mbart": ({"q_proj", "v_proj"}, 6),
}
"""Model type to the names of its attention's query and value, and how many attentions two layers have."""


def family_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """Return the config of a tiny model of a type."""
    kind: Any = type(AutoConfig.for_model(model_type))
    known = kind()
    sizes = {name: value for name, value in _SIZES.items() if hasattr(known, name)}
    if isinstance(getattr(kind, "head_dim", None), property):
        del sizes["head_dim"]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more: dict[str, Any] = {
        "xlm": {"pad_index": 0, "eos_index": 2},
        "t5": {"decoder_start_token_id": 0},
        "convbert": {"num_attention_heads": 4, "head_ratio": 2},
        "gptj": {"rotary_dim": 4},
        "codegen": {"rotary_dim": 4},
        "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
        "deepseek_v3": {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "head_dim": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    }
    config: PreTrainedConfig = kind(**{**sizes, **special, **more.get(model_type, {}), **options})
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def family_model(model_type: str, causal: bool | None = None, **options: Any) -> nn.Module:
    """Make a frozen tiny model of a type: a classifier of three classes, or a language model."""
    config = family_config(model_type, **options)
    if causal is None:
        causal = type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    found: Any = mapping[type(config)]
    if not causal:
        config.num_labels = 3
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model: nn.Module = (found[0] if isinstance(found, tuple | list) else found)(config)
    torch.set_rng_state(state)
    return model.requires_grad_(False)

"""Tiny random models of many architectures, built from transformers' configs: no network, no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from fedlora.adapters import AdaptedModel, adapt
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.models import MeanPoolingClassifier, MeanPoolingConfig, _without_pooler
from fedlora.training.soundness import dependence
from tests.tiny import settings

VOCABULARY, LABELS = 60, 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 48}
_DEBERTA = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
_V3 = {**_DEBERTA, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}

_NO_SIZE = {"funnel": ("num_hidden_layers",), "xlnet": ("max_position_embeddings",)}
"""What some configs refuse to be told."""

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"pad_token_id": 0}),
    "xlm-roberta": ("xlm-roberta", {}),
    "camembert": ("camembert", {}),
    "distilbert": ("distilbert", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}),
    "electra": ("electra", {"embedding_size": 16}),
    "albert": ("albert", {"embedding_size": 16}),
    "modernbert": ("modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "mpnet": ("mpnet", {}),
    "deberta-v3": ("deberta-v2", _V3),
    "deberta-v2 with keys of its own": ("deberta-v2", {**_V3, "share_att_key": False}),
    "deberta": ("deberta", _DEBERTA),
    "convbert": ("convbert", {"embedding_size": 32}),
    "roformer": ("roformer", {"embedding_size": 32}),
    "mobilebert": ("mobilebert", {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    "squeezebert": ("squeezebert", {"embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1}),
    "nystromformer": ("nystromformer", {"num_landmarks": 8, "segment_means_seq_len": 8, "conv_kernel_size": 5}),
    "funnel, mean": ("funnel", {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "block_sizes": [1, 1]}),
    "funnel": ("funnel", {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "block_sizes": [1, 1]}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}),
    "longformer": ("longformer", {"attention_window": 8}),
    "big_bird": ("big_bird", {"block_size": 2, "num_random_blocks": 1}),
    "fnet": ("fnet", {}),
    "rembert": ("rembert", {"input_embedding_size": 16, "output_embedding_size": 16}),
    "megatron-bert": ("megatron-bert", {}),
    "roberta-prelayernorm": ("roberta-prelayernorm", {}),
    "yoso": ("yoso", {"use_expectation": True}),
    "bart": (
        "bart",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "decoder_start_token_id": 2,
        },
    ),
    "xlm": ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 2}),
    "flaubert": ("flaubert", {"emb_dim": 32, "n_layers": 2, "n_heads": 2}),
    "eurobert": ("eurobert", {**_GROUPED}),
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "llama": ("llama", _GROUPED),
    "llama with dynamic positions": (
        "llama",
        {
            **_GROUPED,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 20,
        },
    ),
    "mistral": ("mistral", _GROUPED),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED),
    "gemma2": ("gemma2", {**_GROUPED, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**_GROUPED, "sliding_window": 8}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"num_key_value_heads": 1}),
    "phi3 with longrope": (
        "phi3",
        {"num_key_value_heads": 1, "rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 32},
    ),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt, all-linear": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}),
    "falcon": ("falcon", {"num_kv_heads": 1}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "ctrl": ("ctrl", {**_GPT, "dff": 48}),
    "openai-gpt": ("openai-gpt", _GPT),
    "smollm3": ("smollm3", {"num_key_value_heads": 1}),
    "olmo2": ("olmo2", {"num_key_value_heads": 1}),
    "granite": ("granite", {"num_key_value_heads": 1}),
    "cohere": ("cohere", {"num_key_value_heads": 1}),
    "stablelm": ("stablelm", {"num_key_value_heads": 1}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 1}),
    "persimmon": ("persimmon", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}),
    "xglm": ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_key_value_heads": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "olmoe": ("olmoe", {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}),
    "recurrent_gemma": ("recurrent_gemma", {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}),
}


REFUSED: dict[str | tuple[str, str], str] = {
    "convbert": "its convolution reads padding",
    "mobilebert": "a token's embedding reads its neighbours', padding too",
    "nystromformer": "landmarks are means over padding",
    "funnel, mean": "its decoder reads what pooling made of padding",
    "big_bird": "its attention changes for good with the first short batch",
    "fnet": "its Fourier transform reads padding",
    "yoso": "padding takes part in its hashed attention",
    ("longformer", "default"): "its global query is not used where every row is short",
    "xlnet": "its feed-forward layers see tokens before rows",
    "llama with dynamic positions": "positions follow the longest row",
}
"""Whose examples depend on their batch, and why (by name, or name and task); all others are accepted."""


def cases() -> list[tuple[str, str, str]]:
    """Name, task and parameterisation: each architecture with LoRA and with SB, with one head and another."""
    found = []
    for name in ENCODERS:
        first, second = _TASKS.get(name, ("mean", "default"))
        found += [(name, first, "lora"), (name, second, "sb")]
    for name in DECODERS:
        found += [(name, "causal-lm", "lora"), (name, "mean", "sb")]
    return found + [(name, "default", "lora") for name in ("gpt2", "llama", "qwen3", "mistral")]


_TASKS = {
    **dict.fromkeys(("bart", "xlm", "flaubert", "funnel, mean"), ("mean", "mean")),
    **dict.fromkeys(("squeezebert", "funnel"), ("default", "default")),
}
"""BART's own head wants a mark in every text, which drawn tokens lack, and XLM's has a name of its own. SqueezeBERT's
one linear layer is in its pooler."""


def targets(name: str) -> str | list[str]:
    """Return the modules to adapt: all, unless the model is known to show some of them no rows, or not to use them."""
    own = {"opt": ["q_proj", "v_proj"], "big_bird": ["query", "value"], "qwen2_moe": ["q_proj", "v_proj", "o_proj"]}
    return own.get(name, "all-linear")


def build(kind: str, options: dict[str, Any], task: str, seed: int = 0) -> nn.Module:
    """Make a frozen model for a task: ``default`` or ``mean`` pooling, or ``causal-lm``; no weight is near 0."""
    sizes = {name: value for name, value in _SIZES.items() if name not in _NO_SIZE.get(kind, ())}
    config = AutoConfig.for_model(kind, **{**sizes, **options})
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.num_labels = LABELS
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task == "mean":
            model_class: Any = transformers.MODEL_MAPPING[type(config)]
            model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
            base = model_class(config, **_without_pooler(model_class))
            model: Any = MeanPoolingClassifier(MeanPoolingConfig(config.to_dict(), num_labels=LABELS), base)
        elif task == "default":
            model = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
        else:
            model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
    for module in model.modules():
        if "dropout" in type(module).__name__.lower() and isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model.requires_grad_(False)


def save(name: str, folder: Path) -> Path:
    """Save an encoder and a tokenizer of words as a model folder."""
    build(*ENCODERS[name], "mean").encoder.save_pretrained(folder)  # type: ignore[operator, union-attr]
    words = [f"[{mark}]" for mark in ("PAD", "BOS", "EOS", "UNK")]
    words += ["the", "film", "was", "good", "bad", "and", "dull"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def adapted_case(name: str, task: str, kind: str) -> tuple[AdaptedModel, Config]:
    """Make an architecture with adapters and head in it, and the config that they come from."""
    model_type, options = (ENCODERS | DECODERS)[name]
    method = {"rank": 3, "alpha": 4.5, "target_modules": targets(name)}
    config = settings("llama" if task == "causal-lm" else "bert", method=method, model={"max_length": 32})
    return adapt(build(model_type, options, task), config, kind), config


def main() -> None:
    """Print which architectures are accepted, and why others are not."""
    for name, task, kind in cases():
        try:
            found = dependence(*adapted_case(name, task, kind), 0)
        except InputError as error:
            found = str(error)
        print(f"| {name} | {task} | {kind} | {found or 'accepted'} |", flush=True)


if __name__ == "__main__":
    main()

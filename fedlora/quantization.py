"""Frozen layers of 4 or 8 bits a weight, through bitsandbytes: how a base model is loaded so, and what its weights are.

Only the linear layers of the transformer blocks are quantised. Embeddings, the output layer, poolers and classification
heads stay as they are. Adapters lie beside the quantised layers, in full precision.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlora.errors import InputError

# A config is checked without torch.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedlora.config import Config

KEY = "model.quantization"
BLOCK = 64
"""Weights that share a scale in 4 bits."""

# PEFT imports bitsandbytes wherever it is installed, and that asks for a kernel which keep_layout leaves without a use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)


def check_quantization(config: Config) -> None:
    """Refuse a quantised base where bitsandbytes is missing or cannot compute.

    Raises
    ------
    InputError
    """
    kind = config.model.quantization
    if kind is None:
        return
    if config.model.dtype == "float64":
        raise InputError(KEY, kind, "computes in float32 or bfloat16; set model.dtype to one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(KEY, kind, 'needs the package bitsandbytes; install it: pip install "fedlora[quantized]"')


def quantized_loading(config: Config, skeleton: nn.Module) -> dict[str, Any]:
    """Return the options with which ``from_pretrained`` quantises a model, on its way to its device.

    Parameters
    ----------
    config : Config
        ``model.quantization`` is given: ``nf4`` (4-bit NormalFloat in blocks of 64, with a scale each; Dettmers et al.,
        arXiv 2305.14314; of layers whose inputs are a multiple of 64) or ``int8`` (a scale for each row of a weight and
        for each token; Dettmers et al., arXiv 2208.07339).
    skeleton : torch.nn.Module
        The model on the device ``meta``, for its layers' names.

    Notes
    -----
    LLM.int8() computes columns with outliers in 16 bits, and an outlier in one text puts its column there for the whole
    batch. A text's logits would then depend on the texts beside it, which DP-SGD must exclude. So that is off.

    Raises
    ------
    InputError
        If no layer would be quantised.
    """
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    blocks = [f"{path}." for path, module in skeleton.named_modules() if isinstance(module, nn.ModuleList)]
    linears = {path: module for path, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    kept = [path for path in linears if not path.startswith(tuple(blocks))]
    if config.model.quantization == "nf4":
        # bitsandbytes 0.50 quantises rows of other lengths wrongly on the CPU.
        kept += [path for path, linear in linears.items() if linear.in_features % BLOCK and path not in kept]
    if len(kept) == len(linears):
        remedy = f"finds no linear layer that it can quantise in the blocks of {type(skeleton).__name__}; leave it out"
        raise InputError(KEY, config.model.quantization, remedy)
    dtype = getattr(torch, config.model.dtype)
    # Without a name here transformers would leave out layers of its own choice.
    options: dict[str, Any] = {"llm_int8_skip_modules": kept or ["-"]}
    if config.model.quantization == "nf4":
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    else:
        options |= {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {"quantization_config": BitsAndBytesConfig(**options)}


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let layers of 4 bits compute in a precision, where they have one of their own.

    bitsandbytes then changes a bias to it for good: biases have to be copies.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, "compute_dtype", None) is not None]
    before = [layer.compute_dtype for layer in layers]
    for layer in layers:
        layer.compute_dtype = dtype
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.compute_dtype = own


def keep_layout(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are on the CPU.

    Where the processor has AVX512-BF16, it would pack them anew at the first evaluation, with scales rounded to
    bfloat16: evaluation would use other weights than training.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def unquantized(config: Config) -> Config:
    """Return the config with the base as its checkpoint has it: what is trained is merged into those weights."""
    return config.model_copy(update={"model": config.model.model_copy(update={"quantization": None})})


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in something else than floating-point numbers."""
    return not layer.weight.is_floating_point()  # type: ignore[operator]


def is_ours(layer: nn.Module) -> bool:
    """Whether a quantised layer is one of bitsandbytes', of the kinds that :func:`quantized_loading` makes."""
    weight = layer.weight
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def dequantized(layer: nn.Module) -> torch.Tensor:
    """Return the weight [outputs, inputs] that a quantised layer computes with, in floating-point numbers."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight: Any = layer.weight
    dense: torch.Tensor = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    return dense.detach()

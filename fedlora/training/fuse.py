"""Fewer passes over memory on a GPU: the frozen blocks' elementwise work is fused by torch.compile.

A frozen transformer block under eager PyTorch spends long in normalisation and residual kernels, which only move bytes.
torch.compile fuses those for which there is no kernel of our own (:mod:`fedlora.kernels`). Adapters stay eager: their
per-example gradients are taken there.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdaptedModel, AdapterLayer, StackedLayer
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.kernels.activations import Activation, GatedFeedForward
from fedlora.models import model_config
from fedlora.privacy.calibration import run_steps

log = logging.getLogger("fedlora")

RATE = 2e14
"""FLOP/s at which a data centre's GPU trains without fusing, about: a quarter of an H100's matrix rate."""

LONG = 150.0
"""Seconds of a run's training above which its frozen layers are fused: compiling should be a small part of them."""

APART = (AdapterLayer, StackedLayer, Activation, GatedFeedForward)
"""What is not compiled: adapters, and what has kernels of its own."""


def compiles(config: Config, data: FederatedData) -> bool:
    """Say whether a run's frozen layers are fused: as the config says, or where the run is long.

    Parameters
    ----------
    config : Config
        Of a whole run.
    data : FederatedData
    """
    chosen = config.simulation.compile
    if chosen != "auto":
        return chosen
    if config.simulation.gpus_per_worker == 0 or not len(data.train):
        return False
    # Four FLOPs for each frozen number and token: the forward pass, and the gradient of its inputs.
    work = 4 * _frozen_numbers(model_config(config)) * float(np.mean(data.train.lengths)) * config.client.batch_size
    steps = sum(run_steps(config, int(size)) for size in data.partition.sizes if size) * config.server.fraction_train
    return work * steps / RATE > LONG


def _frozen_numbers(pretrained: Any) -> int:
    """Return about how many numbers of a transformer take part in each token's products, by its config's shape."""
    text = pretrained.get_text_config()
    width = getattr(text, "hidden_size", 0)
    wide = getattr(text, "intermediate_size", None) or 4 * width
    layer = 4 * width**2 + (3 if getattr(text, "num_key_value_heads", None) else 2) * width * wide
    vocabulary = text.vocab_size if getattr(text, "num_key_value_heads", None) else 0
    return int(getattr(text, "num_hidden_layers", 0) * layer + vocabulary * width)


def fuse_blocks(adapted: AdaptedModel, granularity: str = "islands") -> int:
    """Compile the frozen work of a model on a GPU, in place.

    Parameters
    ----------
    adapted : AdaptedModel
    granularity : {"islands", "layers"}
        ``islands``: the largest modules without adapters in them, such as feed-forward blocks and normalisations.
        ``layers``: every transformer layer, broken at its adapters; measured to be slower, since the pieces that are
        left between two breaks are small and each costs its guards.

    Returns
    -------
    int
        Number of modules compiled; 0 on the CPU.

    Notes
    -----
    Batches of a Poisson-sampled cohort differ in their number of rows, so shapes are dynamic from the start. Where
    compilation fails, PyTorch falls back to eager by itself.
    """
    if adapted.device.type != "cuda":
        return 0
    torch._dynamo.config.suppress_errors = True
    # Layers share their code, but each has adapters of its own, on which Dynamo guards.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    modules = _layers(adapted.model) if granularity == "layers" else list(_islands(adapted.model))
    if not modules:  # a decoder whose norms and gates have kernels of their own
        return 0
    for adapter in (*adapted.adapters.values(), *adapted.head.values()):
        adapter.forward = torch.compiler.disable(adapter.forward)
    for module in modules:
        module.compile(dynamic=True)
    return len(modules)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Find the transformer layers: the members of the longest ModuleList."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _islands(module: nn.Module) -> list[nn.Module]:
    """Find the largest modules without adapters that are more than one kernel beside their matrix products."""
    if isinstance(module, (*APART, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
        return []
    if not any(isinstance(m, APART) for m in module.modules()):
        return [module] if any(True for _ in module.parameters()) else []
    return [island for child in module.children() for island in _islands(child)]

"""Where an owner's expert starts: equal to the public expert, with a router row made from the owner's documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora import entropy
from fedlora.adapters import AdaptedModel
from fedlora.adapters.parameterisations import lora
from fedlora.arrays import Arrays
from fedlora.data.tokens import TokenTable
from fedlora.experts.expert_model import ExpertModel
from fedlora.experts.options import expert_options
from fedlora.privacy import PrivacyPlan
from fedlora.timeline import phase

LARGEST_LOGIT = 4.0
"""A router row, public or an owner's, starts no longer than gives its own documents' mean this logit.

A saturated softmax has no gradient, and the last blocks' mean states are long."""


def router_row(mean: torch.Tensor) -> torch.Tensor:
    """Return the row [d] that documents' mean hidden state [d] starts."""
    return mean * min(1.0, LARGEST_LOGIT / max(float(mean.square().sum()), 1e-12))


def start_expert(
    adapted: ExpertModel,
    table: TokenTable,
    rows: np.ndarray,
    plan: PrivacyPlan | None,
    sequence: np.random.SeedSequence | None,
) -> Arrays:
    """Return the arrays that an owner's first round trains: A drawn, B = 0 (or dW = 0), its router rows, bias 0.

    Parameters
    ----------
    adapted : ExpertModel
        Of the owner's rank. A is drawn from the run's seed, equally for all owners.
    table : TokenTable
    rows : ndarray of int
        The owner's documents.
    plan : PrivacyPlan or None
        With a ``start_noise_multiplier`` the router rows are noisy ones, which the caller charges.
    sequence : SeedSequence or None
        Where the choice of documents and their noise come from; under privacy None for the operating system's entropy.
    """
    generator = torch.Generator().manual_seed(adapted.config.run.seed)
    arrays: Arrays = {}
    for path, (m, n) in adapted.projections().items():
        factors = adapted.adapters[path].factors
        if factors == ("delta",):
            arrays[f"{path}.delta"] = torch.zeros(m, n)
        else:
            rank = adapted.parameter(f"{path}.lora_A").shape[1]
            drawn = lora.initial_factors(m, n, rank, generator)
            arrays |= {f"{path}.{factor}": value for factor, value in drawn.items()}
    for path, row in _router_rows(adapted, table, rows, plan, sequence).items():
        arrays[f"{path}.router"] = router_row(row)[None]
        arrays[f"{path}.router_bias"] = torch.zeros(1, 1)
    return arrays


def _router_rows(
    adapted: ExpertModel,
    table: TokenTable,
    rows: np.ndarray,
    plan: PrivacyPlan | None,
    sequence: np.random.SeedSequence | None,
) -> dict[str, torch.Tensor]:
    paths = list(adapted.routers())
    if expert_options(adapted.config).router_init == "public":
        return {path: adapted.arrays([f"{path}.public_router"])[f"{path}.public_router"][0] for path in paths}
    adapted.set_public()
    size = adapted.config.server.batch_size
    if plan is None:
        chosen = np.sort(
            np.random.default_rng(sequence).permutation(rows)[: expert_options(adapted.config).router_documents]
        )
        return dict(zip(paths, mean_states(adapted, adapted.blocks, table, chosen, size), strict=True))
    if plan.start_noise_multiplier is None:
        raise ValueError("under privacy a start from the owner's documents needs a noise multiplier")
    # Every document counts with norm 1 over all layers together, so that Gaussian noise of known size covers it.
    rng = None if sequence is None else np.random.default_rng(sequence)
    chances = entropy.uniform(len(rows)) if rng is None else rng.random(len(rows))
    chosen = rows[chances < plan.start_sample_rate]
    total = torch.zeros(len(paths), next(iter(adapted.routers().values())))
    for states in document_states(adapted, adapted.blocks, table, chosen, size):
        unit = states / states.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        # A state that overflowed is left out: the NaN that it would make of the sum tells that its document is there.
        total += unit.nan_to_num(0.0, 0.0, 0.0).sum(0) / math.sqrt(len(paths))
    noise = entropy.normal(total.numel()) if rng is None else rng.standard_normal(total.numel())
    noisy = total + plan.start_noise_multiplier * torch.from_numpy(noise).to(total.dtype).reshape(total.shape)
    mean = noisy / (plan.start_sample_rate * len(rows))
    return dict(zip(paths, mean * math.sqrt(len(paths)), strict=True))


def mean_states(
    adapted: AdaptedModel, blocks: Sequence[nn.Module], table: TokenTable, rows: np.ndarray, batch_size: int
) -> torch.Tensor:
    """Mean over documents of their mean hidden states at the blocks' inputs, [blocks, d], on the CPU."""
    sums = [states.sum(0) for states in document_states(adapted, blocks, table, rows, batch_size)]
    return torch.stack(sums).sum(0) / len(rows)


@torch.no_grad()
def document_states(
    adapted: AdaptedModel, blocks: Sequence[nn.Module], table: TokenTable, rows: np.ndarray, batch_size: int
) -> Iterator[torch.Tensor]:
    """Yield documents' mean hidden states at the inputs of blocks, [documents, blocks, d], on the CPU."""
    adapted.model.eval()
    # Without the head, whose vocabulary costs as much as many layers.
    body: Any = adapted.model
    while getattr(body, "base_model", body) is not body:
        body = body.base_model
    inputs: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
    reading = ExitStack()
    here = reading.enter_context(phase("documents", "reading documents for the router", len(rows)))
    try:
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            batch = table.batch(chunk, adapted.device)
            adapted.layout.set_rows([len(chunk)])
            inputs.clear()
            # Padding is on the right, where no token of a causal model sees it.
            body(input_ids=batch["input_ids"])
            lengths = torch.from_numpy(np.asarray(table.lengths[chunk], np.int64)).to(adapted.device)
            mask = torch.arange(batch["input_ids"].shape[1], device=adapted.device) < lengths[:, None]
            weight = (mask / lengths[:, None])[:, None]
            yield torch.stack([torch.bmm(weight.to(x.dtype), x)[:, 0] for x in inputs], 1).float().cpu()
            here.advance(len(chunk))
    finally:
        reading.close()
        for hook in hooks:
            hook.remove()

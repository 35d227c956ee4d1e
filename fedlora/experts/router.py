"""Router tuning: the rows and biases of a mixture's routers, trained on public text alone."""

from __future__ import annotations

import numpy as np
import torch

from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.experts.merged import MergedModel
from fedlora.experts.options import expert_options
from fedlora.timeline import phase
from fedlora.training.batches import shuffled_batches

_TUNING = 8  # one stream of random numbers for each use of the run's seed


def tune_router(merged: MergedModel, table: TokenTable, config: Config) -> None:
    """Train every router of a mixture for ``method.router_tuning_steps`` steps; experts and public model stay frozen.

    Parameters
    ----------
    merged : MergedModel
        Its mixture's rows and biases (the public expert's row too, whose bias stays 0) are changed in place.
    table : TokenTable
        Public text.
    config : Config
    """
    blocks, options = merged.mixture.blocks, expert_options(config)
    dtype = blocks[0].router.dtype
    # Half precision would lose most of what a step adds to a row.
    wide = dtype if dtype == torch.float64 else torch.float32
    for block in blocks:
        block.set_router(block.router.to(wide), block.router_bias.to(wide))
    parameters = [p.requires_grad_(True) for block in blocks for p in (block.router, block.router_bias)]
    optimizer = torch.optim.AdamW(parameters, lr=options.router_tuning_learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([config.run.seed, _TUNING]).generate_state(1)[0])
    )
    rows = np.arange(len(table))
    merged.model.train()
    steps = options.router_tuning_steps
    with phase("router", "tuning the routers", steps) as here:
        for chosen in shuffled_batches(rows, config.client.batch_size, steps, generator):
            batch = table.batch(chosen, merged.device)
            merged.layout.set_rows([len(chosen)])
            table.task.loss(merged.outputs(batch, table.task), batch["labels"]).mean().backward()
            for block in blocks:
                assert block.router_bias.grad is not None
                block.router_bias.grad[0] = 0.0
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for block in blocks:
                    block.router_bias.clamp_(max=0)
            here.advance()
    for block in blocks:
        block.set_router(block.router.to(dtype), block.router_bias.to(dtype))

"""How many clients fit into one pass on this device, or on these GPUs."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.timeline import phase
from fedlora.training.cohort import ClientJob, train_cohort
from fedlora.training.soundness import dependence

SHARE = 0.8
"""Of the free memory; the rest is for Poisson batches above their expectation and for fragmentation."""


@phase("capacity", "measuring how many clients fit")
def cohort_capacity(adapted: AdaptedModel, table: TokenTable, job: ClientJob, config: Config) -> int:
    """Measure how many clients train in one pass: the memory of one and of two, then as many as fit.

    Parameters
    ----------
    adapted : AdaptedModel
        Its trained arrays are overwritten.
    table : TokenTable
    job : ClientJob
        A client of the run; the probe takes one step on as many of the table's longest rows as a batch expects.
    config : Config

    Returns
    -------
    int
        At least 1. On the CPU it is 1: one client keeps a worker's cores busy, and the choice must not depend on the
        machine, since the order of sums depends on it.
    """
    if adapted.device.type != "cuda":
        return 1
    if dependence(adapted, config, table.pad_token_id) is not None:
        return 1  # clients are trained one at a time
    each = 1
    if job.plan is not None and job.plan.samples_units and table.units is not None:
        each = min(-(-len(table) // len(np.unique(table.units))), job.plan.examples_per_unit or len(table))
    rows = np.sort(np.argsort(table.lengths, kind="stable")[-config.client.batch_size * each :])
    plan = job.plan and dataclasses.replace(job.plan, sample_rate=1.0)
    probe = dataclasses.replace(job, rows=rows, plan=plan)
    client = config.client.model_copy(update={"local_steps": 1, "local_epochs": None})
    one_step = config.model_copy(update={"client": client})

    cards = adapted.devices

    def peak(clients: int) -> np.ndarray:
        torch.cuda.empty_cache()
        for card in cards:
            torch.cuda.reset_peak_memory_stats(card)
        train_cohort(adapted, table, [probe] * clients, one_step)
        return np.array([torch.cuda.max_memory_allocated(card) for card in cards])

    # Where a client alone does not fit, its step lowers its own needs.
    peak(1)  # what the first pass allocates for good (kernels' workspaces, the token table) is not a client's
    one = peak(1)
    try:
        two = peak(2)
    except torch.cuda.OutOfMemoryError:
        return 1
    torch.cuda.empty_cache()
    free = np.array([torch.cuda.mem_get_info(card)[0] for card in cards])
    # The model itself is part of `one`, and no longer part of `free`.
    room = SHARE * free + [torch.cuda.memory_allocated(card) for card in cards] - one
    return max(1, 1 + int((room / np.maximum(1, two - one)).min()))

"""How many clients' examples go through a model in one pass on this device, or on these GPUs."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.capacity import Capacity
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.training import passes
from fedlora.training.cohort import ClientJob, expected_batch, train_cohort
from fedlora.training.soundness import dependence
from fedlora.training.step_memory import StepMemory, last_memory

SHARE = 0.8
"""Of the free memory; the rest is for Poisson batches above their expectation and for fragmentation."""


def cohort_capacity(adapted: AdaptedModel, table: TokenTable, job: ClientJob, config: Config, most: int) -> Capacity:
    """Choose the cohort, the physical batch and gradient checkpointing on a GPU: by time, as far as memory holds it.

    What is worth a pass follows from shapes (:func:`fedlora.training.passes.choose_passes`). A step of one client then
    lowers its own needs until it fits. Where several clients are worth a pass, the memory of one and of two says how
    many fit.

    Parameters
    ----------
    adapted : AdaptedModel
        Its trained arrays are overwritten.
    table : TokenTable
    job : ClientJob
        A client of the run; the probe takes one step on as many of the table's longest rows as a batch expects.
    config : Config
    most : int
        Clients that a worker has at a time.

    Returns
    -------
    Capacity
        On the CPU one client, and no other settings: a client keeps a worker's cores busy, and the choice must not
        depend on the machine, since the order of sums depends on it.
    """
    if not passes.in_force(adapted):
        return Capacity(1, {}, "")
    batch, tokens = expected_batch(table, job, config)
    rows = np.sort(np.argsort(table.lengths, kind="stable")[-batch:])
    plan = job.plan and dataclasses.replace(job.plan, sample_rate=1.0)
    probe = dataclasses.replace(job, rows=rows, plan=plan)
    client = config.client.model_copy(update={"local_steps": 1, "local_epochs": None})
    one_step = config.model_copy(update={"client": client})

    def peak(clients: int) -> np.ndarray:
        torch.cuda.empty_cache()
        for card in adapted.devices:
            torch.cuda.reset_peak_memory_stats(card)
        train_cohort(adapted, table, [probe] * clients, one_step)
        return np.array([torch.cuda.max_memory_allocated(card) for card in adapted.devices])

    peak(1)  # what the first pass allocates for good (kernels' workspaces, the token table) is not a client's
    one = peak(1)
    memory = last_memory(adapted)
    assert memory is not None
    clients, each, worth = 1, np.zeros_like(one), min(most, memory.passes.clients)
    if worth > 1 and dependence(adapted, config, table.pad_token_id) is None:  # else they are trained one at a time
        try:
            each = peak(2) - one
        except torch.cuda.OutOfMemoryError:
            worth = 1
        clients = min(worth, _fitting(adapted, one, each))
    note = describe(memory, clients, most, batch, tokens, int((one + (clients - 1) * each).max()))
    return Capacity(clients, memory.settings, note)


def _fitting(adapted: AdaptedModel, one: np.ndarray, each: np.ndarray) -> int:
    """Return how many clients fit, by the peak of one and what each further one adds, on every card."""
    torch.cuda.empty_cache()
    free = np.array([torch.cuda.mem_get_info(card)[0] for card in adapted.devices])
    # The model itself is part of `one`, and no longer part of `free`.
    room = SHARE * free + [torch.cuda.memory_allocated(card) for card in adapted.devices] - one
    return max(1, 1 + int((room / np.maximum(1, each)).min()))


def describe(memory: StepMemory, clients: int, most: int, batch: int, tokens: float, peak: int) -> str:
    """Say in a line what goes through the model at once, and why: of ``batch`` examples of ``tokens`` tokens each."""
    rows = min(batch, memory.physical_batch_size or batch)
    chosen = rows == min(batch, memory.passes.rows or batch)
    if chosen and (memory.passes.busy or clients == memory.passes.clients):
        why = "keep the GPU busy"
    else:
        why = "are all that a worker has" if clients == most else "fill the memory"
    checkpointing = "gradient checkpointing" if memory.checkpointing else "no checkpointing"
    size = f"physical batch {rows} of {batch}, cohort {clients}, {checkpointing}"
    return f"{size}: {round(clients * rows * tokens):,} tokens a pass {why}, {peak / 2**30:.0f} GiB"

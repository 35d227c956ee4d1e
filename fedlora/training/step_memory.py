"""How a step is kept within memory: by gradient checkpointing, and by smaller physical batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from fedlora.adapters import AdaptedModel
from fedlora.config import ClientSection
from fedlora.errors import InputError
from fedlora.training.checkpointing import layers_of, set_checkpointing

KEY = "client.gradient_checkpointing"


class StepMemory:
    """What this process does to keep steps of some settings within its memory. It remembers what it had to do.

    Parameters
    ----------
    adapted : AdaptedModel
    client : ClientSection

    Attributes
    ----------
    checkpointing : bool
        Whether gradient checkpointing is on.
    physical_batch_size : int or None
        Examples of a client in memory at once; None for whole batches.

    Raises
    ------
    InputError
        If checkpointing is asked for and the model has no layers for it.
    """

    def __init__(self, adapted: AdaptedModel, client: ClientSection) -> None:
        has_layers = bool(layers_of(adapted))
        if client.gradient_checkpointing is True and not has_layers:
            raise InputError(KEY, True, "this model has no layers that transformers can checkpoint; set it to false")
        self._may_checkpoint = has_layers and client.gradient_checkpointing == "auto"
        self.checkpointing = client.gradient_checkpointing is True
        self.physical_batch_size = client.physical_batch_size

    def lower(self, adapted: AdaptedModel, rows: int) -> str | None:
        """Use less memory, after a pass of so many rows of one client did not fit.

        Checkpointing comes first: it costs a third of a step's time, where small batches may cost more.

        Returns
        -------
        str or None
            What is done now; None where nothing is left to do.
        """
        if self._may_checkpoint and not self.checkpointing:
            self.checkpointing = True
            set_checkpointing(adapted, True)
            return "client.gradient_checkpointing is on"
        if rows > 1:
            self.physical_batch_size = (rows + 1) // 2
            return f"client.physical_batch_size is {self.physical_batch_size}"
        return None


_kept: WeakKeyDictionary[AdaptedModel, tuple[tuple[Any, ...], StepMemory]] = WeakKeyDictionary()
"""What the last steps of each model needed, with their settings."""


@contextmanager
def step_memory(adapted: AdaptedModel, client: ClientSection) -> Iterator[StepMemory]:
    """Keep a model's steps within memory as the last ones of these settings were kept.

    Raises
    ------
    InputError
        If checkpointing is asked for and the model has no layers for it.
    """
    settings = (client.batch_size, client.physical_batch_size, client.gradient_checkpointing)
    if adapted not in _kept or _kept[adapted][0] != settings:
        _kept[adapted] = settings, StepMemory(adapted, client)
    memory = _kept[adapted][1]
    set_checkpointing(adapted, memory.checkpointing)
    try:
        yield memory
    finally:
        set_checkpointing(adapted, False)

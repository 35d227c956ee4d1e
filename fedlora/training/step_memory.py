"""How a step is kept within memory: by smaller physical batches, and by gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from fedlora.adapters import AdaptedModel
from fedlora.config import ClientSection
from fedlora.errors import InputError
from fedlora.training import passes
from fedlora.training.checkpointing import layers_of, set_checkpointing

KEY = "client.gradient_checkpointing"


def check_checkpointing(adapted: AdaptedModel, client: ClientSection) -> bool:
    """Say whether a model has layers that can be checkpointed.

    Raises
    ------
    InputError
        If it has none, and checkpointing is asked for.
    """
    has_layers = bool(layers_of(adapted))
    if client.gradient_checkpointing is True and not has_layers:
        raise InputError(KEY, True, "this model has no layers that transformers can checkpoint; set it to false")
    return has_layers


class StepMemory:
    """What this process does to keep steps of some settings within its memory. It remembers what it had to do.

    Parameters
    ----------
    adapted : AdaptedModel
    client : ClientSection
    batch : int
        Examples that a client's step expects.
    tokens : float
        Mean tokens of an example.

    Attributes
    ----------
    passes : fedlora.training.passes.Passes
        What the rule chose by time.
    checkpointing : bool
        Whether gradient checkpointing is on.
    physical_batch_size : int or None
        Examples of a client in memory at once; None for whole batches.

    Raises
    ------
    InputError
        As :func:`check_checkpointing`.
    """

    def __init__(self, adapted: AdaptedModel, client: ClientSection, batch: int, tokens: float) -> None:
        has_layers = check_checkpointing(adapted, client)
        self._may_checkpoint = has_layers and client.gradient_checkpointing == "auto"
        self.checkpointing = client.gradient_checkpointing is True
        flops, quantized = passes.mean_product(adapted), passes.has_quantized_base(adapted)
        self.passes = passes.choose_passes(flops, tokens, batch, client.physical_batch_size, quantized)
        self.physical_batch_size = self.passes.rows if passes.in_force(adapted) else client.physical_batch_size

    def lower(self, adapted: AdaptedModel, rows: int) -> str | None:
        """Use less memory, after a pass of so many rows of one client did not fit.

        The batch is split first, as far as its parts keep the GPU busy enough. Then checkpointing costs less: a third
        of a step's time.

        Returns
        -------
        str or None
            What is done now; None where nothing is left to do.
        """
        smaller = (rows + 1) // 2
        if self._may_checkpoint and not self.checkpointing and (rows == 1 or smaller < self.passes.smallest):
            self.checkpointing = True
            set_checkpointing(adapted, True)
            return "client.gradient_checkpointing is on"
        if rows > 1:
            self.physical_batch_size = smaller
            return f"client.physical_batch_size is {self.physical_batch_size}"
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """What the config would have to say to begin so: keys that are not whole batches, or no checkpointing."""
        found = {"client.physical_batch_size": self.physical_batch_size, KEY: self.checkpointing}
        return {key: value for key, value in found.items() if value}


_kept: WeakKeyDictionary[AdaptedModel, tuple[tuple[Any, ...], StepMemory]] = WeakKeyDictionary()
"""What the last steps of each model needed, with their settings."""


@contextmanager
def step_memory(adapted: AdaptedModel, client: ClientSection, batch: int, tokens: float) -> Iterator[StepMemory]:
    """Keep a model's steps within memory as the last ones of these settings were kept; as :class:`StepMemory`.

    Raises
    ------
    InputError
        As :func:`check_checkpointing`.
    """
    settings = (client.physical_batch_size, client.gradient_checkpointing, batch, tokens)
    if adapted not in _kept or _kept[adapted][0] != settings:
        _kept[adapted] = settings, StepMemory(adapted, client, batch, tokens)
    memory = _kept[adapted][1]
    set_checkpointing(adapted, memory.checkpointing)
    try:
        yield memory
    finally:
        set_checkpointing(adapted, False)


def last_memory(adapted: AdaptedModel) -> StepMemory | None:
    """Return what a model's last steps needed; None before the first."""
    return _kept[adapted][1] if adapted in _kept else None

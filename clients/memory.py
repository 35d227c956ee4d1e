"""What a client remembers of its own training from round to round: the moments of its optimiser."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.arrays import Arrays
from fedlora.clients.participant import Participant
from fedlora.training import ClientJob, ClientResult
from fedlora.training.optimizer_state import array_of, is_count, state_size

_OPTIMIZER = "optimizer"
"""Sort of the arrays that hold the optimiser's state."""


class Memory:
    """One client's memory in one exchange of a round.

    Parameters
    ----------
    client : Participant
        Keeps it.

    Notes
    -----
    The optimiser's state is that of the client's last training, whether or not its round counted: it is a memory of
    gradients that the client has seen.
    """

    def __init__(self, client: Participant) -> None:
        self._client = client
        self._keeps = client.config.client.keep_optimizer_state
        self._state: Arrays = client.own(_OPTIMIZER) if self._keeps else {}

    def recall(self, job: ClientJob) -> ClientJob:
        """Return the job with what is remembered; refuse it where what it makes could not be kept.

        Raises
        ------
        InputError
            If a node's owner allows less on the disk. No example was read, and no step charged.
        """
        if self._keeps:
            size = sum(array.nbytes for array in job.arrays.values()) * state_size(self._client.config.client)
            self._client.make_room(size)
        return replace(job, state={name: a for name, a in self._state.items() if self._fits(name, a, job.arrays)})

    def _fits(self, name: str, array: torch.Tensor, trained: Arrays) -> bool:
        """Whether a state's array belongs to one that is trained now, and has its shape."""
        of = trained.get(array_of(name))
        return of is not None and (is_count(name) or of.shape == array.shape)

    def keep(self, result: ClientResult) -> None:
        """Keep what the training left to be remembered."""
        if result.state:
            self._client.keep(self._state | result.state, _OPTIMIZER)

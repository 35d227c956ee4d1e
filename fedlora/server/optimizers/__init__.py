"""Server optimisers, one file each: they make the next global arrays of the current ones and the clients' mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from fedlora.arrays import Arrays
from fedlora.config import Config, ServerSection
from fedlora.registry import SERVER_OPTIMIZERS


class ServerOptimizer(ABC):
    """Steps along the mean of a round's clients.

    Parameters
    ----------
    server : ServerSection
        ``learning_rate``, ``momentum``, ``beta_1``, ``beta_2`` and ``tau``, as far as :attr:`uses` names them.

    Attributes
    ----------
    name : str
        ``server.optimizer``, and the name of the file.
    uses : tuple of str
        Keys of ``[server]`` that it reads.
    stateful : bool
        Whether it uses moments, or the arrays before the round. Coordinates must then mean the same from round to
        round.
    linear : bool
        Whether its state consists of sums of updates, so that a linear map carries it into other coordinates. A second
        moment does not: the squares of transformed updates depend on products that are not stored.
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ()
    stateful: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def __init__(self, server: ServerSection) -> None:
        self.server = server

    @abstractmethod
    def step(self, current: Mapping[str, torch.Tensor], mean: Mapping[str, torch.Tensor]) -> Arrays:
        """Return the next global arrays.

        It is called once for each round that counts, with a mean that is finite.

        Parameters
        ----------
        current : mapping of str to Tensor
            The global arrays that the clients started from; it may hold others too.
        mean : mapping of str to Tensor
            Of the clients' arrays; which arrays these are may change from round to round.

        Returns
        -------
        dict of str to Tensor
            The arrays of ``mean``, in its order, of their shapes and dtypes.
        """

    def turn(self, carry: Callable[[Arrays], Arrays]) -> None:
        """Write what it looks back at in other coordinates; asked only of a :attr:`linear` one, before a step.

        Parameters
        ----------
        carry : callable (dict of str to Tensor) -> dict of str to Tensor
            Carries moves, by the names of their arrays, into the coordinates that the step is taken in.
        """
        raise NotImplementedError(f"{self.name} cannot be carried into other coordinates")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same bits: JSON values, and dicts of tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if state:
            raise ValueError(f"{self.name} keeps nothing, but the state has {sorted(state)}")


def server_optimizer(config: Config) -> ServerOptimizer:
    """Make the server optimiser of a run.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    kind: type[ServerOptimizer] = SERVER_OPTIMIZERS.get(config.server.optimizer)
    return kind(config.server)

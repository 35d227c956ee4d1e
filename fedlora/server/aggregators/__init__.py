"""What the server makes of clients' moves, one way per file: their mean, or what withstands some that are wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fedlora.config import Config, ServerSection
from fedlora.registry import AGGREGATORS

if TYPE_CHECKING:
    import torch  # configs are checked without it


class Aggregator(ABC):
    """Combines the updates of a round's clients.

    Parameters
    ----------
    server : ServerSection
        The keys that :attr:`uses` names.

    Attributes
    ----------
    name : str
        ``server.aggregator``, and the name of the file.
    uses : tuple of str
        Keys of ``[server]`` that it reads.
    robust : bool
        Whether it tolerates wrong updates of clients. It then holds all updates of a round in memory.
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]] = ()
    robust: ClassVar[bool] = True

    def __init__(self, server: ServerSection) -> None:
        self.server = server

    @property
    def fewest(self) -> int:
        """Fewest clients that it can combine."""
        return 1

    @abstractmethod
    def combine(self, moves: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Combine the moves of at least :attr:`fewest` clients.

        Parameters
        ----------
        moves : Tensor [K, n]
            In float64; finite.
        weights : Tensor [K]
            The clients' numbers of examples; not all 0.

        Returns
        -------
        Tensor [n]
        """


def aggregator_of(config: Config) -> Aggregator:
    """Make the aggregator of a run."""
    kind: type[Aggregator] = AGGREGATORS.get(config.server.aggregator)
    return kind(config.server)

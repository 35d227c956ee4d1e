"""Sampling of a round's clients, one scheme per file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

from fedlora.registry import CLIENT_SAMPLINGS


class ClientSampling(ABC):
    """Chooses the clients of a round. Stateless: what it draws depends on its arguments alone, never on node ids.

    Attributes
    ----------
    name : str
        ``server.sampling``, and the name of the file.
    independent : bool
        Whether each client is drawn by itself, as accountants of sampled clients assume.
    """

    name: ClassVar[str]
    independent: ClassVar[bool] = False

    @abstractmethod
    def sample(self, present: Collection[int], server_round: int, seed: int, fraction: float) -> list[int]:
        """Return the clients of a round, sorted.

        Parameters
        ----------
        present : collection of int
            Numbers of the clients that are there, in any order.
        server_round : int
        seed : int
            ``run.seed``.
        fraction : float
            ``server.fraction_train``.
        """

    @abstractmethod
    def most(self, clients: int, fraction: float) -> int:
        """Return how many of so many clients a round asks at most."""


def get_sampling(name: str) -> ClientSampling:
    """Return the sampling of a name; an InputError lists the names if there is none."""
    found: ClientSampling = CLIENT_SAMPLINGS.made(name)
    return found


def whose_turn(present: Collection[int], turn: int, groups: int) -> list[int]:
    """Return the clients whose turn it is, sorted.

    A client's group follows from its number alone, so that it is asked once in ``groups`` turns, whoever else is there.
    """
    return [client for client in sorted(present) if client % groups == turn % groups]

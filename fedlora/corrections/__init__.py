"""Corrections of local training, one file each: a vector that a client adds to each of its gradients.

Clients that take many steps drift to optima of their own. A correction draws on two things: a *variate* that each
client keeps, of the shape of what it trains, and the mean of the variates of all clients, weighted as their updates
are. The server keeps that mean and sends it with the arrays of a round; a client sends the change of its own with its
update. So a correction is told once what a gradient becomes and what a variate becomes. The rest holds for every method
that averages.

A variate is kept for each array that clients train and send; arrays that stay with a client are not drawn to any mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from fedlora.config import Config
from fedlora.registry import CORRECTIONS

if TYPE_CHECKING:
    from fedlora.arrays import Arrays  # checking a config must not wait for torch

VARIATES = "correction"
"""Key of the record of variates in a message and its reply, and of the version of its own that a client is at."""


class Correction(ABC):
    """Corrects the gradients of a client's local training. Stateless: its variates are kept for it.

    :meth:`shift` and :meth:`after` are sums of whole arrays with fixed factors, so that they mean the same in turned
    coordinates.

    Attributes
    ----------
    name : str
        ``client.correction``, and the name of the file.
    active : bool
        Whether there are variates, and they travel.
    """

    name: ClassVar[str]
    active: ClassVar[bool] = True

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what it cannot be combined with, before a run begins; nothing by default.

        Raises
        ------
        InputError
        """
        return

    @abstractmethod
    def shift(self, own: Arrays, mean: Arrays) -> Arrays:
        """Return what is added to each gradient of an exchange.

        It is added after a gradient was clipped and noised, so it must depend on no example but through what clients
        released.

        Parameters
        ----------
        own, mean : dict of str to Tensor
            The client's variate, and the mean of all clients' variates.
        """

    @abstractmethod
    def after(self, own: Arrays, mean: Arrays, gradient: Arrays) -> Arrays:
        """Return the client's variate after its training.

        Its change is sent. It must depend on no example but through ``gradient``, which the client's update tells.

        Parameters
        ----------
        own, mean : dict of str to Tensor
            As before the training.
        gradient : dict of str to Tensor
            (x - y) / (K eta) for the K steps at rate eta that trained an array, from x to y.
        """


def correction(config: Config) -> Correction:
    """Return the correction of a run.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    return _made(config.client.correction)


@lru_cache(maxsize=8)
def _made(name: str) -> Correction:
    found: Correction = CORRECTIONS.made(name)
    return found

"""SCAFFOLD: control variates against the drift of clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.config import Config
from fedlora.corrections import Correction
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.arrays import Arrays


class Scaffold(Correction):
    """Adds c - c_i to each gradient (Karimireddy et al., arXiv 1910.06378, option II).

    c_i estimates the client's own gradient and c that of all clients, so that every client steps along the common
    gradient, however many steps it takes. After K steps at rate eta from x to y_i,
    c_i becomes c_i - c + (x - y_i) / (K eta), which is the mean of the client's gradients along its way.

    Notes
    -----
    *Weights.* Where clients weigh by their examples, the optimum is that of the weighted mean, and so c = sum p_i c_i
    over all clients; with equal weights it moves by |S| / N of the mean change, as published. With the unweighted mean
    of the paper, clients of unlike weights would settle at the optimum of another loss.

    *Privacy.* Under DP-SGD the change of c_i is (x - y_i) / (K eta) - c: it is computed from the released y_i and from
    what the server knows, and from no example. So is c - c_i, which is added after the noise. Epsilon stays what it is.

    *Optimiser.* (x - y_i) / (K eta) is a mean gradient for plain SGD alone. AdamW's moves have the size of its rate
    whatever the gradient's, and momentum counts each gradient several times: both are refused. Weight decay and the
    proximal term are parts of a client's loss, and its gradient has them.
    """

    name = "scaffold"

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse optimisers whose moves are no sum of gradients."""
        if config.client.optimizer != "sgd":
            remedy = "makes moves that are no mean gradient, which client.correction = scaffold needs; use sgd"
            raise InputError("client.optimizer", config.client.optimizer, remedy)
        if config.client.momentum:
            remedy = "counts gradients several times, and client.correction = scaffold needs their mean; use 0"
            raise InputError("client.momentum", config.client.momentum, remedy)

    def shift(self, own: Arrays, mean: Arrays) -> Arrays:
        """c - c_i."""
        return {name: mean[name] - own[name] for name in mean}

    def after(self, own: Arrays, mean: Arrays, gradient: Arrays) -> Arrays:
        """c_i - c + (x - y_i) / (K eta)."""
        return {name: own[name] - mean[name] + gradient[name] for name in mean}

"""Flower's server optimisers, applied to a mean that is computed already.

Flower's classes average the replies themselves, in ``FedAvg.aggregate_train``, and step on what that returns. Here
:class:`OnMean` overrides that method to return the mean that it is given.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedlora.arrays import Arrays
from fedlora.config import ServerSection
from fedlora.server.optimizers import ServerOptimizer

Moments = dict[str, dict[str, np.ndarray]]


class OnMean(FedAvg):
    """Inherit this after one of Flower's optimisers, and it steps on the record that it is given."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Return the mean."""
        return replies, None


class FlowerOptimizer(ServerOptimizer):
    """One of Flower's optimisers. Every array has moments and a number of steps of its own.

    So a method may train other arrays in another round: those that it leaves out stay as they are.

    Attributes
    ----------
    moments : tuple of str
        Flower's attributes that hold moments, as dicts or lists of numpy arrays.
    """

    moments: tuple[str, ...]

    def __init__(self, server: ServerSection) -> None:
        super().__init__(server)
        self._moments: Moments = {moment: {} for moment in self.moments}
        self._steps: dict[str, int] = {}

    @abstractmethod
    def make(self) -> Any:
        """Return Flower's optimiser, of a class that also inherits :class:`OnMean`."""

    def step(self, current: Mapping[str, torch.Tensor], mean: Mapping[str, torch.Tensor]) -> Arrays:
        """Let Flower step arrays that have taken equally many steps together."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name in mean:
            groups[self._steps.get(name, 0)].append(name)
        stepped: Arrays = {}
        for steps, names in groups.items():
            strategy = self.make()
            self.restore(strategy, names, _numpy(current, names))
            record = ArrayRecord({name: Array(array) for name, array in _numpy(mean, names).items()})
            result, _ = strategy.aggregate_train(steps + 1, record)
            for name, array in result.items():
                stepped[name] = torch.from_numpy(array.numpy().copy()).to(mean[name].dtype)
            for moment in self.moments:
                kept = getattr(strategy, moment)
                found = kept if isinstance(kept, dict) else dict(zip(names, kept or (), strict=bool(kept)))
                self._moments[moment] |= found
            self._steps |= dict.fromkeys(names, steps + 1)
        return {name: stepped[name] for name in mean}

    def restore(self, strategy: Any, names: list[str], current: dict[str, np.ndarray]) -> None:
        """Give Flower's optimiser what these arrays are, and their moments if they have any."""
        strategy.current_arrays = current
        for moment in self.moments:
            kept = self._moments[moment]
            if names[0] in kept:
                setattr(strategy, moment, {name: kept[name] for name in names})

    def turn(self, carry: Callable[[Arrays], Arrays]) -> None:
        """Carry the moments."""
        for moment, kept in self._moments.items():
            turned = carry({name: torch.from_numpy(np.array(array)) for name, array in kept.items()})
            self._moments[moment] = {name: tensor.numpy() for name, tensor in turned.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the moments as tensors, and the numbers of steps."""
        moments = {k: {n: torch.from_numpy(np.array(a)) for n, a in kept.items()} for k, kept in self._moments.items()}
        return {"steps": dict(self._steps), **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._steps = {name: int(steps) for name, steps in state["steps"].items()}
        self._moments = {k: {n: tensor.numpy().copy() for n, tensor in state[k].items()} for k in self.moments}


class AdaptiveOptimizer(FlowerOptimizer):
    """One of the adaptive optimisers of Reddi et al. (arXiv 2003.00295), which step along the clients' mean move.

    Attributes
    ----------
    strategy : type
        Flower's class, which also inherits :class:`OnMean`. It takes the keys of :attr:`uses`.
    default_rate : float
        ``server.learning_rate`` where the config gives none; Flower's own default.
    """

    moments = ("m_t", "v_t")
    strategy: ClassVar[type[Any]]
    default_rate: ClassVar[float]

    def make(self) -> Any:
        """Pass on the keys of ``[server]``; Flower calls the learning rate eta."""
        options = {key: getattr(self.server, key) for key in self.uses if key != "learning_rate"}
        rate = self.server.learning_rate
        return self.strategy(eta=self.default_rate if rate is None else rate, **options)


def _numpy(arrays: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, np.ndarray]:
    return {name: arrays[name].detach().cpu().numpy() for name in names}

"""What both halves share of a method."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from torch import nn

from fedlora.adapters import AdaptedModel, adapt
from fedlora.config import Config
from fedlora.roles import Roles


class Method:
    """What both halves share of a method: its facts, and how its arrays travel.

    Attributes
    ----------
    name, title, paper : str
        ``method.name``, what it is in a line, and where it comes from.
    parameterisation : str
        What is trained: ``lora`` or ``sb``.
    learning_rates : dict of str to float
        Default learning rate by optimiser.
    persistent : bool
        Whether an array's coordinates mean the same from round to round, so that a server optimiser's moments, or an
        error memory, may be kept.
    client : str
        Where its client half is, as ``MODULE:CLASS``; "" for the common one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    parameterisation: ClassVar[str] = "lora"
    learning_rates: ClassVar[dict[str, float]]
    persistent: ClassVar[bool] = True
    client: ClassVar[str] = ""

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """Say how the arrays of each kind travel in a round.

        Parameters
        ----------
        config : Config
        server_round : int
            From 1.

        Returns
        -------
        mapping of str to Role
            By kind; see :mod:`fedlora.roles`.
        """
        raise NotImplementedError

    @classmethod
    def adapt(cls, model: nn.Module, config: Config) -> AdaptedModel:
        """Put what is trained into a frozen base model, in place."""
        return adapt(model, config, cls.parameterisation)

    @classmethod
    def client_half(cls) -> Any:
        """Return the class of its client half, or None for the common one."""
        if not cls.client:
            return None
        module, _, name = cls.client.partition(":")
        return getattr(importlib.import_module(module), name)


def get_method(name: str) -> type[Method]:
    from strategies import METHODS

    return METHODS[name]

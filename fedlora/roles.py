"""How the arrays of a method travel: one table that both halves, the meter, the forecast and the checkpoint read.

Arrays are grouped by kind: the name of an adapter's factor (``lora_A`` of ``encoder.layer.0.query.lora_A``), or
:data:`HEAD` for all arrays of the trained head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedlora.config import Config, Section

HEAD = "head"
"""The kind of all arrays of the trained head."""

HOME = "own"
"""The sort of a client's own arrays whose role says that they stay with it, in its Flower state."""


@dataclass(frozen=True)
class Role:
    """What happens to the arrays of one kind in one round.

    Attributes
    ----------
    trained : bool
        Whether clients train them.
    down : str
        ``round``: every client of the round gets them. ``stale``: a client that lacks their current version gets it,
        and keeps it. ``never``: they stay on the server, or with the client.
    up : str
        What clients send to the server: the ``value``, the ``update`` (value after minus value before), or ``never``.
        With a codec that encodes only updates, the server adds the values that it sent.
    home : bool
        Whether each client keeps its own trained copy from round to round. Such arrays are not sent up. The server
        sends the start of those that it makes once; the others start at 0. Each client then has its own model: see
        :meth:`fedlora.methods.Method.personalised`.
    made_by : str
        Who initialises them: the ``server``, or the ``client`` in the first round in which it does not receive them.
    increment : bool
        Whether clients add the server's result of a round to their copy, instead of replacing it. The sum is a residual
        of the frozen weights.

    Raises
    ------
    ValueError
        If these contradict each other.
    """

    trained: bool = False
    down: Literal["round", "stale", "never"] = "stale"
    up: Literal["value", "update", "never"] = "never"
    home: bool = False
    made_by: Literal["server", "client"] = "server"
    increment: bool = False

    def __post_init__(self) -> None:
        if self.home and self.up != "never":
            raise ValueError("arrays that stay with the client do not go up")
        if self.home and not self.trained:
            raise ValueError("arrays that stay with the client are trained there")
        if self.up != "never" and not self.trained:
            raise ValueError("only arrays that clients train go up")
        if self.increment and (self.trained or self.down != "stale"):
            raise ValueError("increments are made by the server, for the clients that lack them")


TRAINED = Role(trained=True, down="round", up="value")
"""Averaged in the usual way: down and up in every round."""

FROZEN = Role()
"""Sent to each client once, and never trained."""

INCREMENT = Role(increment=True)
"""A residual that the server adds to."""

Roles = Mapping[str, Role]
"""By kind. A kind that is not named is :data:`FROZEN`."""


@dataclass(frozen=True)
class Exchange:
    """One exchange of a round, or of those before the first: a message to each of its clients, and their replies.

    Attributes
    ----------
    roles : mapping of str to Role
        How arrays travel in it. One exchange of a round at most makes increments.
    local_steps : int or None
        Steps that a client takes in it, and is charged for; None for those of the config.
    sections : mapping of str to Section
        Sections that take the place of the config's in it.
    """

    roles: Roles
    local_steps: int | None = None
    sections: Mapping[str, Section] = field(default_factory=dict)

    def training(self, config: Config) -> Config:
        """Return the config by which clients train in it."""
        if self.local_steps is None and not self.sections:
            return config
        config = config.model_copy(update=dict(self.sections))
        if self.local_steps is None:
            return config
        client = config.client.model_copy(update={"local_steps": self.local_steps, "local_epochs": None})
        return config.model_copy(update={"client": client})


def kind_of(name: str, head_names: Collection[str]) -> str:
    """Return the kind of an array."""
    return HEAD if name in head_names else name.rpartition(".")[2]


def roles_of(names: Iterable[str], roles: Roles, head_names: Iterable[str]) -> dict[str, Role]:
    """Return the role of each array."""
    head = frozenset(head_names)
    return {name: roles.get(kind_of(name, head), FROZEN) for name in names}


def trained_kinds(roles: Roles) -> tuple[str, ...]:
    """Kinds that clients train."""
    return tuple(kind for kind, role in roles.items() if role.trained)


def changing_kinds(rounds: Iterable[Roles]) -> frozenset[str]:
    """Kinds whose global arrays some round may change: all but the frozen, increments, and those that stay at home."""
    return frozenset(
        kind
        for roles in rounds
        for kind, role in roles.items()
        if (role.trained or role.down == "round") and not role.home and not role.increment
    )

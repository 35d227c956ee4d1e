"""An owner's view of a node: the runs that it served, and the epsilon that is spent and left."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fedlora.errors import InputError
from fedlora.node.config import NodeConfig
from fedlora.node.node_ledger import NodeLedger, Served


@dataclass(frozen=True)
class NodeStatus:
    """What a node has spent.

    Attributes
    ----------
    name, data, ledger : str
        The node, the owner's file, and the ledger's.
    unit : str
        What every epsilon here protects.
    epsilon : float
        Of all runs together, at ``delta``, by ``accountant``.
    max_epsilon, left : float or None
        The owner's ceiling and what is left of it; None where the owner accepts runs without privacy.
    delta : float
    accountant : str
    steps : int
        Training steps ever begun.
    runs : list of Served
        By federation, in the order in which they were first described.
    """

    name: str
    data: str
    ledger: str
    unit: str
    epsilon: float
    max_epsilon: float | None
    left: float | None
    delta: float
    accountant: str
    steps: int
    runs: list[Served]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self)


def node_status(config: NodeConfig) -> NodeStatus:
    """Read a node's ledger, whether or not the node is running.

    Raises
    ------
    InputError
        If there is no ledger yet, it is damaged, or its steps protect another unit than the owner's file says.
    """
    policy, unit, ledger = config.policy, config.data.unit, open_ledger(config)
    ledger.check_unit()
    return NodeStatus(
        name=config.name,
        data=config.data.path,
        ledger=str(ledger.path),
        unit="one example" if unit is None else f"one person ({unit}) with all its rows",
        epsilon=ledger.epsilon(),
        max_epsilon=policy.max_epsilon,
        left=ledger.left(),
        delta=policy.delta,
        accountant=policy.accountant,
        steps=ledger.steps(),
        runs=ledger.served(),
    )


def open_ledger(config: NodeConfig) -> NodeLedger:
    """Open the ledger that a node has.

    Raises
    ------
    InputError
        If there is none yet, or it is damaged.
    """
    if not (config.directory / "ledger.sqlite").is_file():
        remedy = "holds no ledger: the node has not been asked by a run yet, or state.directory is another"
        raise InputError("state.directory", str(config.directory), remedy)
    return NodeLedger(config.directory, config.policy, config.data.unit)

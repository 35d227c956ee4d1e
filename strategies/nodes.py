"""Which clients are there: simulated ones by partition, real nodes by name, and who is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.communication.decorator import GridDecorator
from fedlora.config import NODES, Config
from fedlora.errors import ClientErrorCode, InputError, LabelError, RefusedError, RunError
from fedlora.node.names import NODE_RECORD, labels_digest
from strategies.base import UNAVAILABLE, RoundReport

log = logging.getLogger("fedlora")

_POLL_SECONDS = 3.0
_FOR_GOOD = (ClientErrorCode.BUDGET, ClientErrorCode.POLICY, ClientErrorCode.LABELS)
"""Codes of nodes that would refuse this run's next round as well."""

_CONFIG_KEYS = {
    "max_grad_norm": ("privacy.max_grad_norm",),
    "min_noise_multiplier": ("privacy.noise_multiplier", "privacy.target_epsilon"),
    "max_sample_rate": ("client.batch_size",),
    "allow_non_private": ("privacy.mode",),
}
"""The keys of a run's config, of which one is given, that a key of an owner's policy is about."""


class Roster:
    """The clients of a run.

    Parameters
    ----------
    grid : Grid
    config : Config
    label_names : list of str, optional
        The run's classes, which real nodes compare with their own; None for causal-lm.
    federation : str
        Names the run folder's run, over resumes.
    names : sequence of str
        Names of the nodes that the run knows already, by client number.
    refuses : callable (client, name), optional
        Why the run's method cannot have a new node as this client; None where it can.

    Attributes
    ----------
    nodes : dict of int to int
        Client number to node id, in order: of simulated clients the partition, of real nodes the place of their names.
    names : list of str
        Names of real nodes, by client number; empty in simulation.
    away : set of int
        Clients that are not asked until they are back.
    """

    def __init__(
        self,
        grid: Grid,
        config: Config,
        label_names: list[str] | None,
        federation: str,
        names: Sequence[str] = (),
        refuses: Callable[[int, str], RunError | InputError | None] = lambda client, name: None,
    ) -> None:
        self.grid, self.config, self.label_names, self.federation = grid, config, label_names, federation
        self.names, self.refuses = list(names), refuses
        self.nodes: dict[int, int] = {}
        self.away: set[int] = set()
        self._registered: dict[int, str] = {}  # node to the name under which the server let it in, or else its own
        self._refused: dict[int, RunError | InputError] = {}
        self._asked: dict[str, int] = {}  # queries under way: message id to node

    @property
    def real(self) -> bool:
        """Whether the clients are real nodes."""
        return bool(self.names)

    def discover(self) -> None:
        """Ask every node what it holds, and number the clients.

        Raises
        ------
        InputError, RefusedError
            If nodes refuse the run, so that fewer are left than ``server.min_replies``.
        RunError
            If too few answer.
        """
        deadline = time.monotonic() + self.config.server.timeout
        heard: dict[int, Message] = {}
        while True:
            left = max(1.0, deadline - time.monotonic())
            queries = [self._query(node) for node in self._wait_for_nodes(left) if node not in heard]
            for reply in AddressedGrid(self.grid).send_and_receive(queries, timeout=left):
                if not (reply.has_error() and reply.error.code in UNAVAILABLE):
                    heard[reply.metadata.src_node_id] = reply
            # A node that lost its connection counts as online for a while; it is asked again once it is back.
            if len(heard) >= self._wanted() or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        # All at once, so that numbers follow names.
        self._enrol(heard.values())
        if len(self.nodes) < (self.config.server.min_replies if self.real or self._refused else 1):
            self._raise_refusal()
            raise RunError(f"{len(self.nodes) or 'no'} clients answered; server.min_replies asks for more")
        if self._refused:
            log.warning("the run goes on with %d of %d nodes", len(self.nodes), len(self.nodes) + len(self._refused))

    def refresh(self) -> None:
        """See who left and who is back, without waiting; wait only while fewer than ``min_replies`` are there.

        Raises
        ------
        InputError, RefusedError
            If so many refuse that waiting would not help.
        RunError
            If too few are there after ``server.timeout`` seconds.
        """
        if not self.real:
            return
        deadline = time.monotonic() + self.config.server.timeout
        while True:
            self._refresh()
            if len(self.present()) >= self.config.server.min_replies:
                return
            for_good = [client for client, node in self.nodes.items() if node in self._refused]
            if len(self.names) - len(for_good) < self.config.server.min_replies:
                self._raise_refusal()
            if time.monotonic() > deadline:
                away = ", ".join(self.names[client] for client in sorted(self.away))
                raise RunError(f"{len(self.present())} nodes are there, too few for server.min_replies; away: {away}")
            time.sleep(_POLL_SECONDS)

    def present(self) -> dict[int, int]:
        """Return client number to node id of those that may be asked."""
        return {client: node for client, node in self.nodes.items() if client not in self.away}

    def clients(self) -> dict[int, int]:
        """Return node id to client number, of all that were ever there."""
        return {node: client for client, node in self.nodes.items()}

    def after_round(self, report: RoundReport) -> None:
        """Take note of who did not answer."""
        if not self.real:
            return
        for fail in report.failed:
            client = fail["client"]
            if fail["code"] in _FOR_GOOD and client in self.present():
                log.warning("node %s is not asked again in this run", self.names[client])
                self._refused[self.nodes[client]] = RefusedError(fail["error"])
                self.away.add(client)
        gone = {fail["client"] for fail in report.failed if fail["code"] in UNAVAILABLE}
        for client in sorted(gone & self.nodes.keys() - self.away):
            log.warning("node %s is away; it is not asked until it is back", self.names[client])
            self.away.add(client)

    def told(self, node: int, code: int, reason: str) -> str:
        """Say in the server's words what is behind the error of a node's reply."""
        if not self.real or code not in list(ClientErrorCode):
            return reason
        client = self.clients().get(node)
        return str(refusal(self.config, self._who(node) if client is None else self.names[client], code, reason))

    def _who(self, node: int) -> str:
        return self._registered.get(node) or f"node {node}"

    def _raise_refusal(self) -> None:
        """Raise the first refusal, by name, if there is one; it also says who else refuses."""
        if not self._refused:
            return
        first, *others = sorted(self._refused, key=self._who)
        error = self._refused[first]
        if others:
            error.args = (f"{error}; {', '.join(map(self._who, others))} refused as well",)
        raise error

    def _refresh(self) -> None:
        nodes = list(self.grid.get_nodes())
        online = {node.node_id for node in nodes}
        self._registered.update({node.node_id: node.name for node in nodes if node.name})
        for client in [c for c, node in self.nodes.items() if node not in online and c not in self.away]:
            log.warning("node %s has left; it is not asked until it is back", self.names[client])
            self.away.add(client)
        if self._asked:
            self._enrol(_addressed(self.grid.pull_messages(list(self._asked)), self._asked))
        known = set(self.present().values()) | set(self._refused) | set(self._asked.values())
        queries = [self._query(node) for node in sorted(online - known)]
        if queries:
            ids = self.grid.push_messages(queries)
            self._asked.update({i: q.metadata.dst_node_id for i, q in zip(ids, queries, strict=True) if i})

    def _wait_for_nodes(self, timeout: float) -> list[int]:
        """Return the node ids; in a run on nodes, wait until as many are there as the config says."""
        wanted = self._wanted()
        deadline, told = time.monotonic() + timeout, -1
        while True:
            nodes = list(self.grid.get_nodes())
            node_ids = [node.node_id for node in nodes]
            self._registered.update({node.node_id: node.name for node in nodes if node.name})
            if len(node_ids) >= wanted or time.monotonic() > deadline:
                return node_ids
            if len(node_ids) != told:
                told = len(node_ids)
                log.info("%d of %d nodes are there", told, wanted)
            time.sleep(_POLL_SECONDS)

    def _wanted(self) -> int:
        """So many nodes are waited for at the start; a simulation's are there or never."""
        if self.config.data.name != NODES:
            return 0
        return self.config.data.partition.clients or self.config.server.min_replies

    def _query(self, node: int) -> Message:
        about = ConfigRecord({"federation": self.federation, "label-names": list(self.label_names or [])})
        content = RecordDict({NODE_RECORD: about})
        return Message(content, node, MessageType.QUERY, ttl=self.config.server.timeout, group_id="0")

    def _enrol(self, replies: Iterable[Message]) -> None:
        """Read what nodes say of themselves; new names come after those that the run knows."""
        found: dict[str, int] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            self._asked.pop(reply.metadata.reply_to_message_id, None)
            if reply.has_error():
                if reply.error.code not in UNAVAILABLE:
                    error = refusal(self.config, self._who(node), reply.error.code, reply.error.reason)
                    self._refuse(node, error)
            elif NODE_RECORD in reply.content:
                about: Any = reply.content[NODE_RECORD]
                name = str(about["name"])
                self._registered[node] = self._registered.get(node) or name
                if about["labels"] != labels_digest(self.label_names):
                    self._refuse(node, refusal(self.config, name, ClientErrorCode.LABELS, LabelError.__name__))
                elif found.get(name, node) != node or self._taken(name, node):
                    raise RunError(f"two nodes call themselves {name}; give each a name of its own in node.toml")
                else:
                    found[name] = node
            else:
                metrics: Any = reply.content["metrics"]
                self.nodes[int(metrics["partition-id"])] = node
        if found and len(self.nodes) > len(self.names):
            raise RunError("real nodes and simulated clients do not mix; give every node its node-file")
        for name in sorted(found.keys() - set(self.names)):
            unfit = self.refuses(len(self.names), name)
            if unfit is None:
                self.names.append(name)
            else:
                self._refuse(found.pop(name), unfit)
        for name, node in found.items():
            client = self.names.index(name)
            if client in self.away:
                log.info("node %s is back", name)
                self.away.discard(client)
            self.nodes[client] = node
        ordered = sorted(self.nodes.items())
        self.nodes.clear()
        self.nodes.update(ordered)

    def _refuse(self, node: int, error: RunError | InputError) -> None:
        """Go on without a node; it is not asked again."""
        log.warning("%s", error)
        self._refused[node] = error

    def _taken(self, name: str, node: int) -> bool:
        """Tell whether another node that is there has the name."""
        if name not in self.names:
            return False
        return self.present().get(self.names.index(name), node) != node


def refusal(config: Config, who: str, code: int, reason: str | None) -> RunError | InputError:
    """Say in the server's words why a node does not take part; a node sends no text but class, key and number."""
    kind, _, detail = (reason or "no reason").partition(": ")
    verb = "refuses" if code in (*_FOR_GOOD, ClientErrorCode.INPUT) else "failed"
    said = f"{who} {verb} ({kind}, code {int(code)})"
    if detail.startswith("max_describes_per_day"):
        return RefusedError(f"{said}: it was asked as often as its owner allows, {detail}; try again tomorrow")
    if detail.startswith("models"):
        remedy = f"{said}: its owner does not list this model and revision in [policy] models of node.toml; ask them to"
        return InputError("model.name", config.model.name, remedy)
    if code == ClientErrorCode.POLICY:
        keys = _CONFIG_KEYS.get(detail.partition(" = ")[0], ("privacy.mode",))
        values = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in keys}
        key = next((key for key, value in values.items() if value is not None), keys[0])
        return InputError(key, values[key], f"{said}: its owner's policy is {detail}; keep to it")
    if code == ClientErrorCode.LABELS:
        remedy = f"{said}: its labels are others; name the classes of all nodes, in one spelling"
        return InputError("data.label_names", config.data.label_names, remedy)
    if code == ClientErrorCode.BUDGET:
        left = f"{detail} does not" if detail else "its privacy budget does not"
        remedy = "lower privacy.target_epsilon or client.local_steps, or ask its owner for a higher policy.max_epsilon"
        return RefusedError(f"{said}: {left} cover a round of this run; {remedy}")
    if code == ClientErrorCode.INPUT:
        return RefusedError(f"{said}: it cannot use the run's config or its own data; its own log says why")
    return RefusedError(f"{said}: its own log says why")


class AddressedGrid(GridDecorator):
    """Names the node in errors that the SuperLink answers in a node's place."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send and receive; replies are passed on as they come."""
        outgoing = list(messages)
        replies = self.grid.send_and_receive(outgoing, timeout=timeout)
        # Messages have their ids once they are sent, which a Grid may do only as its replies are asked for.
        for reply in replies:
            if reply.has_error():
                sent = {m.metadata.message_id: m.metadata.dst_node_id for m in outgoing if m.metadata.message_id}
                yield from _addressed([reply], sent)
            else:
                yield reply


def _addressed(replies: Iterable[Message], asked: dict[str, int]) -> Iterator[Message]:
    for reply in replies:
        node = asked.get(reply.metadata.reply_to_message_id)
        if reply.has_error() and node is not None and reply.metadata.src_node_id not in asked.values():
            reply.metadata.__dict__["_src_node_id"] = node
        yield reply

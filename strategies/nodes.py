"""Which clients are there: simulated ones by partition, real nodes by name, and who is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.communication.broadcast import group_of
from fedlora.communication.decorator import GridDecorator
from fedlora.config import NODES, Config
from fedlora.errors import ClientErrorCode, InputError, LabelError, RefusedError, RunError, plain_text
from fedlora.flower import set_reason, set_source
from fedlora.node.names import NODE_RECORD, labels_digest
from fedlora.strategies.base import UNAVAILABLE, RoundReport
from fedlora.strategies.replies import ReplyError, first_replies, read_description

log = logging.getLogger("fedlora")

_POLL_SECONDS = 3.0
_AT_ONCE = 4096  # clients that are asked at the start
_LONGEST_REASON = 200  # characters of what a node says of its error
_FOR_GOOD = (ClientErrorCode.BUDGET, ClientErrorCode.POLICY, ClientErrorCode.LABELS)
"""Codes of nodes that would refuse this run's next round as well."""

_CONFIG_KEYS = {
    "max_grad_norm": ("privacy.max_grad_norm",),
    "min_noise_multiplier": ("privacy.noise_multiplier", "privacy.target_epsilon"),
    "max_sample_rate": ("client.batch_size",),
    "allow_non_private": ("privacy.mode",),
    "unit": ("privacy.unit",),
    "require_secure_aggregation": ("server.secure_aggregation",),
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
    examples : dict of int to int
        Each client's number of examples, as it described itself.
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
        self.examples: dict[int, int] = {}
        self.away: set[int] = set()
        self._registered: dict[int, str] = {}  # node to the name under which the server let it in
        self._called: dict[int, str] = {}  # node to the name that it gave itself
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
        heard: set[int] = set()
        named: list[Message] = []
        while True:
            left = max(1.0, deadline - time.monotonic())
            nodes = [node for node in self._wait_for_nodes(left) if node not in heard]
            for start in range(0, len(nodes), _AT_ONCE):
                found = self._ask(nodes[start : start + _AT_ONCE], left)
                heard.update(reply.metadata.src_node_id for reply in found)
                if self.config.data.name == NODES:
                    named += found
                else:
                    self._enrol(found)  # at once: the messages of 100,000 clients take memory
            # A node that lost its connection counts as online for a while; it is asked again once it is back.
            if len(heard) >= self._wanted() or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        # All at once, so that numbers follow names.
        self._enrol(named)
        if len(self.nodes) < (self.config.server.min_replies if self.real or self._refused else 1):
            self._raise_refusal()
            raise RunError(f"{len(self.nodes) or 'no'} clients answered; server.min_replies asks for more")
        if self._refused:
            log.warning("the run continues with %d of %d nodes", len(self.nodes), len(self.nodes) + len(self._refused))

    def _ask(self, nodes: Sequence[int], timeout: float) -> list[Message]:
        """Return what nodes answer to the question what they hold, one reply each, and none of who is away."""
        queries = [self._query(node) for node in nodes]
        replies = AddressedGrid(self.grid).send_and_receive(queries, timeout=timeout)
        found = first_replies(replies, dict.fromkeys(nodes, -1), "", log.warning)
        return [reply for reply in found if not (reply.has_error() and reply.error.code in UNAVAILABLE)]

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
                raise RunError(f"{len(self.present())} nodes are online, too few for server.min_replies; away: {away}")
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
        return self._registered.get(node) or self._called.get(node) or f"node {node}"

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
                log.info("%d of %d nodes are online", told, wanted)
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
        claims: dict[str, list[tuple[str, int]]] = {}
        examples: dict[int, int] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            self._asked.pop(reply.metadata.reply_to_message_id, None)
            if reply.has_error():
                if reply.error.code not in UNAVAILABLE:
                    error = refusal(self.config, self._who(node), reply.error.code, reply.error.reason)
                    self._refuse(node, error)
                continue
            try:
                # Simulated clients' records tell that they are; only a config of real nodes expects others.
                real = self.config.data.name == NODES or NODE_RECORD in reply.content
                about = read_description(reply, real=real)
            except ReplyError as wrong:
                self._refuse(node, RefusedError(f"{self._who(node)} does not take part: {wrong}"))
                continue
            if about.examples is not None:
                examples[node] = about.examples
            if not real:
                self._enrol_simulated(about.partition, node)
                continue
            name = about.name
            self._called[node] = name
            if about.labels != labels_digest(self.label_names):
                self._refuse(node, refusal(self.config, name, ClientErrorCode.LABELS, LabelError.__name__))
            else:
                claims.setdefault(name.casefold(), []).append((name, node))
        found = self._settle(claims)
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
        self.examples |= {client: examples[node] for client, node in self.nodes.items() if node in examples}
        ordered = sorted(self.nodes.items())
        self.nodes.clear()
        self.nodes.update(ordered)

    def _refuse(self, node: int, error: RunError | InputError) -> None:
        """Go on without a node; it is not asked again."""
        log.warning("%s", error)
        self._refused[node] = error

    def _enrol_simulated(self, partition: int, node: int) -> None:
        if self.nodes.get(partition, node) != node:
            said = f"{self._who(node)} does not take part: partition {partition} is another's"
            self._refuse(node, RefusedError(said))
        else:
            self.nodes[partition] = node

    def _settle(self, claims: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, int]:
        """Return whose each name is, given the nodes that claim it in any case; refuse the others.

        It is that of the node that the server let in under it, if any; else of who has it in this run, else of the one
        node that claims it. Of several nothing tells which it is.
        """
        found: dict[str, int] = {}
        for folded, claimants in claims.items():
            let_in = {node for node, name in self._registered.items() if name.casefold() == folded}
            there = {node for client, node in self.present().items() if self.names[client].casefold() == folded}
            owners = let_in or there or {node for _, node in claimants}
            for name, node in claimants:
                if owners == {node}:
                    found[name] = node
                else:
                    remedy = "give each node a name of its own in node.toml"
                    said = f"node {node} does not take part: two nodes call themselves {name}; {remedy}"
                    self._refuse(node, RefusedError(said))
        return found


def refusal(config: Config, who: str, code: int, reason: str | None) -> RunError | InputError:
    """Say in the server's words why a node does not take part; a node sends no text but class, key and number."""
    # A node that is not ours may send any text.
    kind, _, detail = " ".join(plain_text(reason or "no reason", _LONGEST_REASON).split()).partition(": ")
    verb = "refuses" if code in (*_FOR_GOOD, ClientErrorCode.INPUT) else "failed"
    said = f"{who} {verb} ({kind}, code {int(code)})"
    if detail.startswith("max_describes_per_day"):
        return RefusedError(f"{said}: it was asked as often as its owner allows, {detail}; try again tomorrow")
    if detail.startswith(("max_evaluations_per_day", "min_test_examples")):
        return RefusedError(f"{said}: its owner's policy for evaluation is {detail}; ask them, or continue without it")
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
    """Names the node in errors that the SuperLink answers in a node's place.

    Parameters
    ----------
    grid : Grid
    streamed : bool
        Pass each reply on when it comes, so that who has enough of them need not wait for the others. Flower's own Grid
        returns all at the end.
    """

    def __init__(self, grid: Grid, streamed: bool = False) -> None:
        super().__init__(grid)
        self.streamed = streamed

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send and receive; replies are passed on as they come."""
        outgoing = list(messages)
        replies: Iterable[Message]
        if self.streamed:
            replies = self._stream(outgoing, timeout)
        else:
            replies = self.grid.send_and_receive(outgoing, timeout=timeout)
        # Messages have their ids once they are sent, which a Grid may do only as its replies are asked for.
        for reply in replies:
            if reply.has_error():
                sent = {m.metadata.message_id: m.metadata.dst_node_id for m in outgoing if m.metadata.message_id}
                yield from _addressed([reply], sent)
            else:
                yield reply

    def _stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = {message_id for message_id in self.grid.push_messages(messages) if message_id}
        while waiting:
            found = list(self.grid.pull_messages(list(waiting)))
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            yield from found
            if deadline is not None and time.monotonic() > deadline:
                break
            if waiting and not found:
                time.sleep(_POLL_SECONDS)


def _addressed(replies: Iterable[Message], asked: dict[str, int]) -> Iterator[Message]:
    for reply in replies:
        node = asked.get(reply.metadata.reply_to_message_id)
        if reply.has_error() and node is not None and reply.metadata.src_node_id not in asked.values():
            set_source(reply, node)
        yield reply


def told(replies: Iterable[Message], roster: Roster) -> Iterator[Message]:
    """Replace the text of a node's error by the server's own words."""
    for reply in replies:
        if reply.has_error():
            node, code, reason = reply.metadata.src_node_id, reply.error.code, reply.error.reason or ""
            set_reason(reply.error, roster.told(node, code, reason))
        yield reply


def in_round(
    messages: Iterable[Message],
    server_round: int,
    roster: Roster,
    exchange: int = 1,
    seconds: float | None = None,
    attempt: int = 0,
) -> Iterable[Message]:
    """Set round and time limit of messages; for real nodes, also the federation and their client number.

    The limit is ``server.timeout`` by default.
    """
    clients = roster.clients()
    for message in messages:
        settings = message.content.get("config")
        if isinstance(settings, ConfigRecord):  # a strategy that knows no rounds does not say it
            settings["server-round"] = server_round
            if attempt:
                settings["attempt"] = attempt
        message.metadata.group_id = group_of(server_round, exchange, attempt)
        message.metadata.ttl = roster.config.server.timeout if seconds is None else seconds
        if roster.real:
            client = clients.get(message.metadata.dst_node_id, -1)
            about = ConfigRecord({"federation": roster.federation, "client": client})
            # The content may be one object shared by all of a round's messages, so it is not changed in place.
            message.content = RecordDict({**message.content, NODE_RECORD: about})
        yield message

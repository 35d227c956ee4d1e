"""Frozen arrays travel once a client: with the first message that it gets in a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.communication.decorator import GridDecorator
from fedlora.communication.meter import INITIAL
from fedlora.errors import ClientErrorCode


class InitialBroadcast(GridDecorator):
    """Adds the record ``initial`` to the first training message to each node, whatever the strategy.

    A client that answers that it does not hold the arrays (its node was restarted) gets its message again, with them.

    Parameters
    ----------
    grid : Grid
    arrays : ArrayRecord
        The frozen arrays; if there are none, nothing is added.

    Attributes
    ----------
    contacted : set of int
        Nodes that got the arrays.
    """

    def __init__(self, grid: Grid, arrays: ArrayRecord) -> None:
        super().__init__(grid)
        self.arrays = arrays
        self.contacted: set[int] = set()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send with the frozen arrays where they are due, and pass the replies on as they come."""
        outgoing = [self._complete(message) for message in messages]
        by_node = {message.metadata.dst_node_id: message for message in outgoing}
        forgotten = []
        for reply in self.grid.send_and_receive(outgoing, timeout=timeout):
            node = reply.metadata.src_node_id
            lacks = reply.has_error() and reply.error.code == ClientErrorCode.NEEDS_INITIAL
            if lacks and node in by_node and node not in forgotten:
                self.contacted.discard(node)
                forgotten.append(node)
            else:
                yield reply
        if forgotten:
            again = [_copy(self._complete(by_node[node])) for node in forgotten]
            yield from self.grid.send_and_receive(again, timeout=timeout)

    def _complete(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if not len(self.arrays) or node in self.contacted:
            return message
        self.contacted.add(node)
        # The content may be one object shared by all of a round's messages, so it is not changed in place.
        message.content = RecordDict({**message.content, INITIAL: self.arrays})
        return message


def _copy(message: Message) -> Message:
    meta = message.metadata
    return Message(message.content, meta.dst_node_id, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)

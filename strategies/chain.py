"""From a round's replies to updates that may be averaged, one client at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from flwr.app import Message

from fedlora.chain import Shapes, Update, UpdateChain
from fedlora.privacy.mechanisms import Mechanism
from fedlora.strategies.replies import ReplyError, check_numbers, only_reply_errors, read_reply

_NOTHING = torch.empty(0)


def updates(
    replies: Iterable[tuple[int, Message]],
    chain: UpdateChain,
    *,
    mechanism: Mechanism,
    shapes: Callable[[int], Shapes],
    start: Callable[[int], torch.Tensor],
    weight: Callable[[int, int], float],
    refuse: Callable[[int, str], None],
) -> Iterator[Update]:
    """Yield what may be used of each reply, as the replies come.

    Parameters
    ----------
    replies : iterable of (int, Message)
        Client and reply, without errors; those of one client at most.
    chain : UpdateChain
    mechanism : Mechanism
        Says what a reply must tell of the privacy that was spent.
    shapes : callable (client)
        Names and shapes of what was asked for.
    start : callable (client) -> Tensor [n]
        What the client started from, in the order of its shapes.
    weight : callable (client, examples) -> float
        Its weight, given the number of examples that its reply says.
    refuse : callable (client, text)
        Is told of each reply that cannot be used, and why.
    """

    @only_reply_errors
    def read(client: int, message: Message) -> Update:
        record, metrics = read_reply(message, mechanism=mechanism)
        examples: Any = metrics["num-examples"]
        about = Update(client, weight(client, examples), _NOTHING, shapes(client), metrics)
        return chain.receive(record, about, start(client), check_numbers)

    for client, message in replies:
        try:
            update = read(client, message)
        except ReplyError as error:
            refuse(client, f"the reply is refused: {error}")
        else:
            yield update

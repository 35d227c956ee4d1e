"""From what a client sends to what may be used: all that can be wrong in a reply is looked at here, and only here.

A reply is somebody else's: whatever is in it costs that client its place in the round, and never the run. So each
function below raises a :class:`ReplyError`, whose text names what is wrong, and nothing else.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedlora.communication.codecs import Codec
from fedlora.errors import plain_text
from fedlora.flower import unchecked_metrics
from fedlora.node.names import NODE_RECORD, is_node_name
from fedlora.privacy.mechanisms import Mechanism

MOST_EXAMPLES = 10**8
"""So many examples one client may say that it has; the mean takes clients by them."""

LONGEST_REASON = 20_000
"""Characters that are kept of a client's error; a simulated client's is a traceback."""

NO_REPLY = 0
"""Code of a client's failure to answer in time."""

_MOST_STEPS = 10**12
_P = ParamSpec("_P")
_T = TypeVar("_T")


class ReplyError(ValueError):
    """A reply is not what was asked for; the text says in what."""


@dataclass(frozen=True)
class Description:
    """What a client says of itself before the first round.

    Attributes
    ----------
    examples : int or None
        None where a simulated client, which need not, does not say it.
    name, labels : str
        Of a real node: its owner's name for it, and the digest of its classes; "" in simulation.
    partition : int
        Of a simulated client; -1 on real nodes.
    """

    examples: int | None
    name: str = ""
    labels: str = ""
    partition: int = -1


def only_reply_errors(read: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let whatever a reply makes our code raise be a ReplyError."""

    @functools.wraps(read)
    def checked(*arguments: _P.args, **options: _P.kwargs) -> _T:
        try:
            return read(*arguments, **options)
        except Exception as error:
            raise ReplyError(plain_text(" ".join(str(error).split()) or type(error).__name__)) from None

    return checked


@only_reply_errors
def read_description(message: Message, *, real: bool) -> Description:
    """Read a client's answer to the question what it holds.

    Parameters
    ----------
    message : Message
        Without an error.
    real : bool
        Whether it comes from a real node.

    Raises
    ------
    ReplyError
        If something lacks, a node's name is none that node.toml takes, or the number of examples is no whole number
        from 1 (0 in simulation) to :data:`MOST_EXAMPLES`.
    """
    metrics = message.content.get("metrics")
    if not isinstance(metrics, MetricRecord):
        raise ReplyError("it sends no metrics")
    examples = _whole(metrics, "num-examples", MOST_EXAMPLES) if real or "num-examples" in metrics else None
    if not real:
        return Description(examples, partition=_whole(metrics, "partition-id", MOST_EXAMPLES))
    if examples == 0:
        raise ReplyError("num-examples is 0: it holds nothing to train on")
    about = message.content.get(NODE_RECORD)
    if not isinstance(about, ConfigRecord):
        raise ReplyError("it is no node with an owner's data; give it its node-file")
    name, labels = about.get("name"), about.get("labels")
    if not is_node_name(name):
        raise ReplyError(f"its name is {_shown(name)}; a name has letters, digits, '.', '_' and '-', 100 at most")
    if not isinstance(labels, str):
        raise ReplyError("it does not say its classes")
    return Description(examples, str(name), labels)


@only_reply_errors
def read_update(
    message: Message,
    shapes: Mapping[str, tuple[int, ...]],
    codec: Codec,
    *,
    mechanism: Mechanism,
    beside: Collection[str] = (),
) -> tuple[torch.Tensor, MetricRecord]:
    """Read what a client trained.

    Parameters
    ----------
    message : Message
        Without an error.
    shapes : mapping of str to tuple of int
        Names and shapes of the arrays that were asked for.
    codec : Codec
        Of the uplink, and of no other reply.
    mechanism : Mechanism
        Says what a reply must tell of what its client spent.
    beside : collection of str
        Keys of other records of arrays that were asked for; :func:`read_beside` reads them.

    Returns
    -------
    (Tensor [n], MetricRecord)
        All numbers, in the order of ``shapes``, and the metrics that :func:`read_metrics` lets through.

    Raises
    ------
    ReplyError
        If something lacks, arrays have other names or shapes or are encoded otherwise, a number is not finite, or a
        metric is nonsense.
    """
    record, read = read_reply(message, mechanism=mechanism, beside=beside)
    vector = codec.decode_vector(record, shapes)
    check_numbers(vector, shapes)
    return vector, read


@only_reply_errors
def read_reply(
    message: Message, *, mechanism: Mechanism, beside: Collection[str] = ()
) -> tuple[ArrayRecord, MetricRecord]:
    """Return the arrays of a reply as they came, and the metrics that :func:`read_metrics` lets through.

    Records of arrays under the keys ``beside`` are left to :func:`read_beside`.

    Raises
    ------
    ReplyError
        If it has not metrics and one record of arrays, or a metric is nonsense.
    """
    # Not content.array_records: its reference cycle keeps the arrays until the next garbage collection.
    records = [r for key, r in message.content.items() if isinstance(r, ArrayRecord) and key not in beside]
    metrics = message.content.get("metrics")
    if not isinstance(metrics, MetricRecord) or len(records) != 1:
        raise ReplyError("it needs metrics and one record of arrays")
    return records[0], read_metrics(metrics, mechanism=mechanism)


@only_reply_errors
def read_beside(message: Message, key: str, shapes: Mapping[str, tuple[int, ...]], codec: Codec) -> torch.Tensor:
    """Read arrays that a reply holds beside what its client trained, as one vector in the order of ``shapes``.

    Raises
    ------
    ReplyError
        If they lack, have other names or shapes or are encoded otherwise, or a number is not finite.
    """
    record = message.content.get(key)
    if not isinstance(record, ArrayRecord):
        raise ReplyError(f"it has no arrays under {key}")
    vector = codec.decode_vector(record, shapes)
    check_numbers(vector, shapes)
    return vector


def check_numbers(vector: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse numbers that are not finite, or would not stay so in a sum.

    Raises
    ------
    ReplyError
        Naming the array.
    """
    if not _in_range(vector):
        sizes = [math.prod(shape) for shape in shapes.values()]
        name = next(name for name, part in zip(shapes, vector.split(sizes), strict=True) if not _in_range(part))
        raise ReplyError(f"{name} is not finite")


@only_reply_errors
def read_metrics(metrics: MetricRecord, *, mechanism: Mechanism) -> MetricRecord:
    """Return the metrics that the server uses, each a number that can be one.

    A loss, a time or a worker that is none is left out: nothing hangs on it.

    Raises
    ------
    ReplyError
        If num-examples, or in a private run what was spent, is nonsense.
    """
    said: dict[str, Any] = dict(metrics.items())
    read: dict[str, Any] = {"num-examples": _whole(said, "num-examples", MOST_EXAMPLES)}
    for name in ("loss", "seconds", "worker"):
        value: Any = said.get(name)
        if _is_number(value) and (name == "loss" or value >= 0):
            read[name] = float(value)
        elif name == "loss" and isinstance(value, float):
            read[name] = math.nan  # of a client whose training diverges
    if "steps" in said:
        read["steps"] = _whole(said, "steps", _MOST_STEPS)
    if not mechanism.reply_metrics:
        return unchecked_metrics(read)
    if "steps" not in read:
        raise ReplyError("it does not say its steps")
    if "total-steps" in said:
        read["total-steps"] = _whole(said, "total-steps", _MOST_STEPS)
    for name, fits in mechanism.reply_metrics.items():
        value = said.get(name)
        if not (_is_number(value) or value == math.inf) or not fits(value):
            raise ReplyError(f"{name} is {_shown(value)}")
        read[name] = value
    if math.isinf(read.get("epsilon", 0.0)) and read.get("noise-multiplier", 0.0) > 0:
        raise ReplyError("epsilon is inf, with noise")
    return unchecked_metrics(read)


def first_replies(
    replies: Iterable[Message], asked: Mapping[int, int], group: str, note: Callable[[str], None]
) -> Iterator[Message]:
    """Pass on the first reply of each node that was asked, and no other.

    Parameters
    ----------
    replies : iterable of Message
    asked : mapping of int to int
        Node id to client number.
    group : str
        The messages' group, which is their round, exchange and attempt; "" takes any. A late reply has another. So has
        a late error, but one that the SuperLink makes may have none.
    note : callable (text)
        Is told of each reply that is dropped.
    """
    answered: set[int] = set()
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in asked:
            note(f"node {node} answered without being asked")
        elif node in answered:
            note(f"client {asked[node]} answered twice: its first reply counts")
        elif group and reply.metadata.group_id not in ((group,) if reply.has_content() else (group, "")):
            note(f"client {asked[node]} answered to round {_shown(reply.metadata.group_id)}, in round {group}")
        else:
            answered.add(node)
            yield reply


def is_finite(arrays: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers of all arrays are finite."""
    return all(bool(array.isfinite().all()) for array in arrays)


def _in_range(vector: torch.Tensor) -> bool:
    """Whether numbers are finite, and stay so when they are weighed and summed in float64."""
    if not vector.numel():
        return True
    low, high = (float(end) for end in vector.aminmax())  # NaN where there is one
    return max(-low, high) < _LARGEST and not math.isnan(low)


_LARGEST = torch.finfo(torch.float64).max / (MOST_EXAMPLES * 2**20)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _whole(metrics: Mapping[str, Any], name: str, most: int) -> int:
    value = metrics.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ReplyError(f"{name} is {_shown(value)}, no whole number from 0 to {most}")
    return int(value)


def _shown(value: object) -> str:
    return re.sub(r"(?<=.{60}).+", "...", ascii(value))

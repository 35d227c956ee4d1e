"""Error feedback: what a codec leaves out of a client's updates is added to its next ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord

from fedlora.arrays import Arrays
from fedlora.clients.participant import Participant
from fedlora.communication.codecs import Codec
from fedlora.communication.wire import COUNTED
from fedlora.transport import Coordinates

ERRORS = "errors"
"""The sort of a client's own arrays that this file keeps."""
_BASIS = "basis"


def encode_with_errors(
    client: Participant, updates: Arrays, codec: Codec, settings: Mapping[str, Any], coordinates: Coordinates
) -> ArrayRecord:
    """Encode a client's updates and what was left out of earlier ones; keep what is left out now.

    With u the updates and e the memory, C(u + e) is sent and e becomes u + e - C(u + e) (Seide et al., INTERSPEECH
    2014; Karimireddy et al., arXiv 1901.09847).

    Parameters
    ----------
    client : Participant
        It keeps the memory, in full precision: twice as many numbers as it sends.
    updates : dict of str to Tensor
    codec : Codec
    settings : mapping
        Of the message. :data:`COUNTED` is the last round of which a reply of this client entered the global arrays.
    coordinates : Coordinates
        Of the exchange: what was left out in others is carried into these.
    """
    # Under DP an update is what DP-SGD released, noise included, and the memory is made of such updates alone. So what
    # is sent is post-processing of it, and epsilon stays what it is.
    server_round = int(settings["server-round"])
    memory = ErrorMemory.of(client.own(ERRORS))
    memory.carry(coordinates)
    memory.enter(server_round, client.number, None if COUNTED not in settings else int(settings[COUNTED]))
    errors = memory.errors
    total = {name: array + errors[name] if name in errors else array for name, array in updates.items()}
    record = codec.encode(total)
    sent = codec.decode(record)
    memory.states[client.number] = {name: array - sent[name].to(array.dtype) for name, array in total.items()}
    if kept := memory.to_arrays():
        client.keep(kept, ERRORS)
    return record


class ErrorMemory:
    """What was left out of a client's updates: before its last round, and after each exchange of that round.

    A round may not count, and a reply may be refused or come too late: then the server has nothing of it, and the
    memory goes back to what it was before. So does that of a round which a resumed run repeats.

    Attributes
    ----------
    server_round : int
        The client's last round; 0 before its first.
    states : dict of int to dict of str to Tensor
        By exchange, from 1, the arrays that were sent in it; under 0, all arrays before the round.
    bases : dict of str to Tensor
        What the coordinates of all of them are relative to, where a method's coordinates turn.
    """

    def __init__(self) -> None:
        self.server_round = 0
        self.states: dict[int, Arrays] = {}
        self.bases: Arrays = {}

    @property
    def errors(self) -> Arrays:
        """The current memory; arrays without an error yet are not in it."""
        found: Arrays = {}
        for exchange in sorted(self.states):
            found |= self.states[exchange]
        return found

    def enter(self, server_round: int, exchange: int, counted: int | None) -> None:
        """Go to an exchange of a round; None if the server does not say which of the client's rounds counted."""
        if server_round == self.server_round:
            self.states = {e: arrays for e, arrays in self.states.items() if e < exchange}
            return
        lost = counted is not None and counted != self.server_round
        self.server_round, self.states = server_round, {0: self.states.get(0, {}) if lost else self.errors}

    def carry(self, coordinates: Coordinates) -> None:
        """Write all of it in the coordinates of another exchange."""
        self.states = {exchange: coordinates.here(arrays, self.bases) for exchange, arrays in self.states.items()}
        self.bases = coordinates.bases

    def to_arrays(self) -> Arrays:
        """Return named arrays from which :meth:`of` makes the memory again."""
        kept = [(str(exchange), arrays) for exchange, arrays in self.states.items()]
        if any(arrays for _, arrays in kept):
            kept.append((_BASIS, self.bases))
        return {f"{self.server_round}/{part}/{name}": array for part, arrays in kept for name, array in arrays.items()}

    @classmethod
    def of(cls, arrays: Arrays) -> ErrorMemory:
        """Make a memory of what :meth:`to_arrays` returned."""
        memory = cls()
        for full, array in arrays.items():
            server_round, part, name = full.split("/", 2)
            memory.server_round = int(server_round)
            (memory.bases if part == _BASIS else memory.states.setdefault(int(part), {}))[name] = array
        return memory

"""What travels: typed arrays on the wire, the meter that counts them, and the parts that clients keep."""

from fedlora.communication.broadcast import Broadcast
from fedlora.communication.meter import MeteredGrid
from fedlora.communication.wire import decode, digest, encode

__all__ = ["Broadcast", "MeteredGrid", "decode", "digest", "encode"]

"""What travels: typed arrays on the wire, the meter that counts them, and the one-time broadcast of frozen arrays."""

from fedlora.communication.broadcast import InitialBroadcast
from fedlora.communication.meter import MeteredGrid
from fedlora.communication.wire import decode, digest, encode

__all__ = ["InitialBroadcast", "MeteredGrid", "decode", "digest", "encode"]

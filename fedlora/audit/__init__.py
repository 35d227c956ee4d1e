"""Lower bounds on epsilon by attack, and checks of what the guarantee rests on: ``fedlora audit``."""

from fedlora.audit.run import audit

__all__ = ["audit"]

"""The run folder: write it, resume from it, and load its model."""

from fedlora.results.checkpoint import Checkpoint
from fedlora.results.finished import RunResult
from fedlora.results.folder import RunFolder

__all__ = ["Checkpoint", "RunFolder", "RunResult"]

"""The run folder: writing it, resuming from it, and loading the model in it."""

from fedlora.results.checkpoint import Checkpoint
from fedlora.results.folder import RunFolder, RunResult

__all__ = ["Checkpoint", "RunFolder", "RunResult"]

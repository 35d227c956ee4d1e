"""What can go wrong, in the user's words.

Every error that the user can mend is an :class:`InputError`; the command line prints it as one line and exits with 2.
Errors that travel from a client to the server carry one of the codes below in ``flwr.app.Error``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

INPUT_MARK = "input: "
"""Before the text of an :class:`InputError` that arose on a server, on its way to who submitted the run."""


class InputError(ValueError):
    """A config value, a file or a folder of the user's is wrong.

    Parameters
    ----------
    field : str
        The config key (``section.key``) or command-line option at fault.
    value : object
        What was given.
    remedy : str
        What to do about it.
    """

    def __init__(self, field: str, value: Any, remedy: str) -> None:
        shown = " ".join(repr(value).split())
        if len(shown) > 200:
            shown = shown[:197] + "..."
        self.field, self.value, self.remedy = field, value, " ".join(remedy.split())
        super().__init__(f"{field} = {shown}: {self.remedy}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, Any, str]]:
        return type(self), (self.field, self.value, self.remedy)


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that is not the user's config; exit code 1."""


class GuardError(RunError):
    """Training does not do what it says: a trainable without per-example gradients, or one that never moves."""


class BudgetError(RunError):
    """The next step would spend more privacy than the client's ceiling allows."""


class ClientErrorCode(IntEnum):
    """Codes in ``flwr.app.Error`` of a client's reply; above those that Flower uses itself."""

    FAILED = 101
    """Any exception while the client handled the message."""
    GUARD = 102
    """A :class:`GuardError`: the run must stop."""
    BUDGET = 103
    """A :class:`BudgetError`: the client releases nothing more."""
    INPUT = 104
    """An :class:`InputError` that shows only on the client."""
    NEEDS_INITIAL = 105
    """The client does not hold the run's frozen arrays; send them again."""
    WORKER_DIED = 106
    """The process that ran the client ended; nothing came back."""

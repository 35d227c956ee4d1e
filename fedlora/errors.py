"""What can go wrong, in the user's words.

Every error that the user can fix is an :class:`InputError`; the command line prints it as one line and exits with 2.
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


class LabelError(InputError):
    """Labels in the data are not the classes of the run."""


class RunError(RuntimeError):
    """A run that cannot continue, for a reason other than the user's config; exit code 1."""


class RoundError(RunError):
    """A round of which nothing came, since all its clients failed."""


class GuardError(RunError):
    """Training does not do what it says: a trainable without per-example gradients, or one that never moves."""


class BudgetError(RunError):
    """The next step would spend more privacy than the client's ceiling allows.

    Parameters
    ----------
    message : str
    left : float, optional
        Epsilon that is left; a node tells it to the server.
    """

    def __init__(self, message: str, left: float | None = None) -> None:
        self.left = left
        super().__init__(message)


class PolicyError(RunError):
    """A run asks for what a node's owner does not accept.

    Parameters
    ----------
    key : str
        The key of ``[policy]`` in the owner's node.toml, or ``unit`` of ``[data]``.
    limit : float or bool
        What the owner set there.
    given : object
        What the run asks for.
    """

    def __init__(self, key: str, limit: float | bool, given: object) -> None:
        self.key, self.limit = key, limit
        super().__init__(f"the node's policy is {key} = {limit}, the run asks for {given}")


class RefusedError(RunError):
    """Nodes do not take part in a run, for a reason of their own, and too few are left."""


class StaleError(RunError):
    """A message of an old round, of another run, or that came before."""


class NeedsInitialError(RunError):
    """The client does not hold the run's frozen arrays."""


class ClientErrorCode(IntEnum):
    """Codes in ``flwr.app.Error`` of a client's reply; above those that Flower uses itself."""

    FAILED = 101
    """Any exception while the client handled the message."""
    GUARD = 102
    """A :class:`GuardError`: the client's training does not do what it says."""
    BUDGET = 103
    """A :class:`BudgetError`: the client releases nothing more."""
    INPUT = 104
    """An :class:`InputError` that shows only on the client."""
    NEEDS_INITIAL = 105
    """The client does not hold the run's frozen arrays; send them again."""
    WORKER_DIED = 106
    """The process that ran the client ended; nothing came back."""
    POLICY = 107
    """A :class:`PolicyError`: the node's owner does not accept the run's config."""
    STALE = 108
    """A :class:`StaleError`: nothing was done, and no privacy spent."""
    LABELS = 109
    """A :class:`LabelError`: the node's labels are not the run's."""
    REPLY = 110
    """The server's own: what the client sent is not what it was asked for."""
    LATE = 111
    """A simulation's own: the client was at work when the round's deadline passed."""
    SURPLUS = 112
    """The server's own: the round had as many replies as it takes."""


_CODES: dict[type[Exception], ClientErrorCode] = {
    GuardError: ClientErrorCode.GUARD,
    BudgetError: ClientErrorCode.BUDGET,
    InputError: ClientErrorCode.INPUT,
    NeedsInitialError: ClientErrorCode.NEEDS_INITIAL,
    PolicyError: ClientErrorCode.POLICY,
    StaleError: ClientErrorCode.STALE,
    LabelError: ClientErrorCode.LABELS,
}


def plain_text(text: str, longest: int = 500) -> str:
    """Return a text of somebody else's, fit for a log and a terminal: no control characters, and no longer than this.

    Line breaks and tabs stay. Of a longer text the middle goes.
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text[: 8 * longest])
    half = (longest - 5) // 2
    return shown if len(shown) <= longest else f"{shown[:half]} ... {shown[-half:]}"


def error_code(error: Exception) -> ClientErrorCode:
    """Return the code under which an exception travels."""
    return _CODES.get(type(error), ClientErrorCode.FAILED)

"""What leaves a node of an error: its class and code, never a text that could contain data."""

from __future__ import annotations

import re

from flwr.app import Error

from fedlora.errors import BudgetError, PolicyError, error_code

_OUTWARD = re.compile(r"[A-Za-z_]\w{0,80}(: (epsilon left|[a-z_]{1,40}) = ([0-9.e+-]{1,20}|inf|true|false))?")


def outward_error(error: Exception) -> Error:
    """Return the error that a server receives for an exception.

    It holds the name of the class; for a :class:`BudgetError` also how much is left, and for a :class:`PolicyError` the
    owner's key and its value. It never holds the exception's own text.
    """
    reason = type(error).__name__
    if isinstance(error, BudgetError) and error.left is not None:
        reason += f": epsilon left = {error.left:.4g}"
    if isinstance(error, PolicyError):
        reason += f": {error.key} = {str(error.limit).lower() if isinstance(error.limit, bool) else error.limit}"
    return Error(code=error_code(error), reason=reason)


def is_outward(reason: str | None) -> bool:
    """Return whether a reason has the form of :func:`outward_error`. Nothing else may leave a node."""
    return reason is not None and _OUTWARD.fullmatch(reason) is not None

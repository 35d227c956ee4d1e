"""No privacy."""

from __future__ import annotations

from fedlora.privacy.mechanisms import Mechanism


class NoPrivacy(Mechanism):
    """Protects nothing."""

    name = "none"
    unit = ""
    noise_by = "nobody"

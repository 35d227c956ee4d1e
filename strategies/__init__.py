"""The server half: one Flower Strategy per file. ``METHODS`` names them all."""

from __future__ import annotations

import difflib

from fedlora.errors import InputError
from fedlora.strategies.base import FederatedStrategy
from fedlora.strategies.fed_sb import FedSB
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.flexmore import FlexMoRE

METHODS: dict[str, type[FederatedStrategy]] = {s.name: s for s in (FedIT, FFALoRA, FedSB, FlexMoRE)}


def get_strategy(name: str) -> type[FederatedStrategy]:
    """Return the strategy class of a method name.

    Raises
    ------
    InputError
        If there is no such method; close names are suggested.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(METHODS)}"
        raise InputError("method.name", name, f"is not a method; {hint}")
    return METHODS[name]

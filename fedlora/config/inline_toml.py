"""TOML values on one line, which keeps the order of what they hold: tomli_w puts long tables behind all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w


def inline_toml(value: Any) -> str:
    """Return a value as TOML on one line; mappings are inline tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_key(name)} = {inline_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline_toml, value)) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def toml_key(name: str) -> str:
    """Return a key as TOML, in quotes where it needs them."""
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")

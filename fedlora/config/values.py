"""Which values an annotation takes, in words."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "a table"}
_POWERS = {2**31: "2^31", 2**63: "2^63"}


def limits(metadata: Iterable[Any]) -> dict[str, str]:
    """Return the bounds among an annotation's metadata, by their names in :data:`BOUNDS`."""
    found: dict[str, str] = {}
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            found |= limits(limit.metadata)
            continue
        for name in BOUNDS:
            if (value := getattr(limit, name, None)) is not None:
                found[name] = _POWERS.get(value, str(value))
    return found


def range_words(bounds: Mapping[str, Any]) -> str:
    """Say in words which numbers lie within bounds; "" without any."""
    if {"ge", "le"} == set(bounds):
        return f"from {bounds['ge']} to {bounds['le']}"
    names = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    words = [f"{word} {bounds[name]}" for name, word in names.items() if name in bounds]
    return " and ".join([*words[:1], *(word.removeprefix("of ") for word in words[1:])])


def expected(annotation: Any) -> str:
    """Say in words which values an annotation takes, such as "a number above 0"; "" if it cannot be said."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words = expected(parts[0])
        return f"{words} {range_words(limits(parts[1:]))}".strip() if words else ""
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(map(repr, parts[:-1])), repr(parts[-1]))))
    if origin in (Union, types.UnionType):
        members = [expected(part) for part in parts if part is not type(None)]
        return " or ".join(dict.fromkeys(members)) if all(members) else ""
    if origin is list:
        of = expected(parts[0])
        return f"a list of values, each {of}" if of else ""
    return _KINDS.get(origin or annotation, "")

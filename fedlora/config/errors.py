"""Turn pydantic's errors into one line that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedlora.config.schema import Config
from fedlora.errors import InputError


def input_error(error: ValidationError, root: type[BaseModel] = Config, name: str = "CONFIG") -> InputError:
    """Turn pydantic's error about a ``root`` into one line that names the key, the value and the remedy."""
    # An InputError is one line, so only the first of several mistakes is reported.
    first, *others = error.errors(include_url=False)
    if isinstance(found := first.get("ctx", {}).get("error"), InputError):
        return found
    location = _real_path(first["loc"], root)
    # A quoted TOML key may hold anything: nothing at all, or line breaks.
    field = ".".join(part if part and part.isprintable() else repr(part) for part in location) or name
    if first["type"] == "extra_forbidden":
        return unknown_key(field, location[-1], first["input"], _known_keys(location[:-1], root))
    if first["type"] == "missing":
        return InputError(field, None, "is required; add it to the config")
    if first["type"] == "string_pattern_mismatch":
        return InputError(
            field, first["input"], "use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    if first["type"] == "model_type":
        return InputError(field, first["input"], f"is a section; write [{field}] and its keys below")
    # A union reports a mistake for each of its members; all of them are named.
    same = [first] + [other for other in others if _real_path(other["loc"], root) == location]
    expected = " or ".join(dict.fromkeys(mistake["msg"][0].lower() + mistake["msg"][1:] for mistake in same))
    return InputError(field, first["input"], f"{expected}; change the value")


def unknown_key(field: str, key: str, value: Any, known: Iterable[str], others: Iterable[str] = ()) -> InputError:
    """Return an error about an unknown key, with the closest of the ``known`` keys and ``others`` as a hint."""
    known = list(known)
    close = difflib.get_close_matches(key, [*known, *others], 1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return InputError(field, value, f"there is no such key; {hint}")


def _known_keys(path: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in path:
        if part.isdecimal() and model is not root:
            continue  # which one of a list of sections
        field = model.model_fields.get(part)
        # A section that may be absent is a union.
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _real_path(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, ...]:
    """Drop the parts that pydantic adds for the members of a union and of a list."""
    kept: list[str] = []
    for part in map(str, location):
        known = _known_keys(tuple(kept), root)
        if not known:
            break
        kept.append(part)
        if part not in known and not part.isdecimal():
            break
    return tuple(kept)

"""Turn pydantic's errors into one line that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ValidationError

from fedlora.config.schema import Config
from fedlora.config.values import expected, range_words
from fedlora.errors import InputError

_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
"""Pydantic's errors about ranges, and the bounds that they name."""
_WRONG = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing_size"), "an integer"),
    **dict.fromkeys(("float_type", *_BOUNDS), "a number"),
    "finite_number": "a finite number",
    **{"bool_type": "true or false", "string_type": "a text", "list_type": "a list", "dict_type": "a table"},
    "literal_error": "",
}
"""Pydantic's errors about types and ranges, and which values they ask for."""


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
    if all(mistake["type"] in _WRONG for mistake in same):
        return InputError(field, first["input"], f"give {_taken(location, same, root)}")
    told = " or ".join(dict.fromkeys(mistake["msg"][0].lower() + mistake["msg"][1:] for mistake in same))
    return InputError(field, first["input"], f"{told}; change the value")


def _taken(location: tuple[str, ...], mistakes: Sequence[Any], root: type[BaseModel]) -> str:
    """Say which values a key takes: by its own annotation, or for an option of a method by what pydantic says."""
    model = _section(location[:-1], root) if location else None
    if any(mistake["type"] == "finite_number" for mistake in mistakes):
        model = None  # an annotation does not say that its numbers are finite
    field = model.model_fields.get(location[-1]) if model else None
    words = ""
    if field is not None:
        words = expected(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
    return words or " or ".join(dict.fromkeys(map(_asked, mistakes)))


def _asked(mistake: Any) -> str:
    """Say what one of pydantic's errors asks for."""
    context = mistake.get("ctx", {})
    if mistake["type"] == "literal_error":
        return str(context["expected"])
    bounds = {name: context[name] for name in _BOUNDS.values() if name in context}
    return f"{_WRONG[mistake['type']]} {range_words(bounds)}".strip()


def unknown_key(field: str, key: str, value: Any, known: Iterable[str], others: Iterable[str] = ()) -> InputError:
    """Return an error about an unknown key, with the closest of the ``known`` keys and ``others`` as a hint."""
    known = list(known)
    close = difflib.get_close_matches(key, [*known, *others], 1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return InputError(field, value, f"there is no such key; {hint}")


def _section(path: tuple[Any, ...], root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section that lies at a path; None if a value does."""
    model: Any = root
    for part in path:
        if part.isdecimal() and model is not root:
            continue  # which one of a list of sections
        field = model.model_fields.get(part)
        # A section that may be absent is a union.
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return None
    return model


def _known_keys(path: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    section = _section(path, root)
    return list(section.model_fields) if section else []


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

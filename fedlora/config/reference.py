"""Every key of a config with its type, default and meaning, from the sections themselves."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedlora.config.schema import Config
from fedlora.config.section import Section
from fedlora.config.training import MethodSection
from fedlora.config.values import BOUNDS, limits
from fedlora.errors import InputError

_KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", list: "list", dict: "table"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes
    ----------
    name : str
        ``section.key``.
    method : str
        The method whose option it is; "" for all other keys.
    type : str
        What it may be, in words.
    bounds : str
        Range of a number; "" where there is none.
    default : str
        As in TOML; "required", or "" where it is computed or there is none.
    unit : str
        What a number counts, from the field's ``json_schema_extra={"unit": ...}``; "" where it has no unit.
    description : str
    """

    name: str
    method: str
    type: str
    bounds: str
    default: str
    unit: str
    description: str

    @property
    def section(self) -> str:
        """The section's name."""
        return self.name.rpartition(".")[0]

    @property
    def last(self) -> str:
        """The name without its section."""
        return self.name.rpartition(".")[2]


def all_keys(options: Mapping[str, type[MethodSection]]) -> list[Key]:
    """Return every key, in the order of the sections; below ``[method]`` each method's own after the common ones.

    Parameters
    ----------
    options : Mapping of str to type of MethodSection
        By the names of the methods.
    """
    keys: list[Key] = []
    for section, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        keys += _keys(field.annotation, section)
        if section == "method":
            common = {key.name for key in keys}
            for method, own in options.items():
                keys += [key for key in _keys(own, section, method) if key.name not in common]
    return keys


def find_keys(name: str, keys: list[Key]) -> list[Key]:
    """Return the keys of a section, or those of a name: several methods may have options of one name.

    Raises
    ------
    InputError
        If there are none; close names are suggested.
    """
    found = [key for key in keys if key.name == name or key.name.startswith(f"{name}.")]
    if found:
        return found
    # A key may be meant without its section; of two sections with such a key both are told.
    whole = {key.name for key in keys} | {key.section for key in keys}
    words = difflib.get_close_matches(name, sorted(whole | {key.last for key in keys}), 1)
    close = [word for word in words if word in whole]
    close = close or list(dict.fromkeys(key.name for key in keys if key.last in words))
    hint = f"did you mean {' or '.join(close[:3])}?" if close else "fedlora config --all lists all keys"
    raise InputError("KEY", name, f"there is no such key; {hint}")


def section_title(section: str) -> str:
    """Return what a section is for: the first line of its class' docstring."""
    model: Any = Config
    for part in section.split("."):
        model = model.model_fields[part].annotation
    return (model.__doc__ or "").strip().partition("\n")[0].replace("``", "")


def _keys(model: type[BaseModel], prefix: str, method: str = "") -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}.{name}", method)
            continue
        words, bounds = _type(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        extra = field.json_schema_extra
        unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
        yield Key(f"{prefix}.{name}", method, words, bounds, _default(field), unit, field.description or "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _type(annotation: Any) -> tuple[str, str]:
    """Say in words which values an annotation takes, and in which range."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words, bounds = _type(parts[0])
        own = (f"{BOUNDS[name]} {value}" for name, value in limits(parts[1:]).items())
        return words, " and ".join([*([bounds] if bounds else []), *own])
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in parts), ""
    if origin in (Union, types.UnionType):
        found = [_type(part) for part in parts if part is not type(None)]
        return " | ".join(dict.fromkeys(w for w, _ in found)), " and ".join(dict.fromkeys(b for _, b in found if b))
    if origin is list:
        return f"list of {_type(parts[0])[0]}", ""
    if origin is dict:
        return f"table of {_type(parts[1])[0]}", ""
    return _KINDS.get(annotation, str(annotation)), ""

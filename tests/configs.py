"""Configs for tests: a smallest one, its keys as the model of a run declares them, and values that are wrong."""

from __future__ import annotations

import copy
import datetime
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import assume
from hypothesis import strategies as st
from pydantic import BaseModel

from fedlora.config import Config
from fedlora.methods import methods

BASE: dict[str, Any] = {
    "model": {"name": "asset:minilm-l6"},
    "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": 4}},
    "method": {"name": "fedit"},
}


def keys(model: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every ``section.key`` with its annotation."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            yield f"{prefix}{name}", annotation


def accepted(annotation: Any) -> tuple[set[type], set[str]]:
    """Types of values, and words, that an annotation takes."""
    if get_origin(annotation) is Annotated:
        return accepted(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return set(), set(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [accepted(part) for part in get_args(annotation)]
        return set().union(*(t for t, _ in parts)), set().union(*(w for _, w in parts))
    kind = get_origin(annotation) or annotation
    return ({int, float} if kind is float else {kind}), set()


OPTIONS = {name: dict(keys(method.Options, "method.")) for name, method in methods().items()}
"""Keys of ``[method]`` by method."""
KEYS = dict(keys()) | {key: annotation for options in OPTIONS.values() for key, annotation in options.items()}
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS})
text = st.text(st.characters(exclude_categories=["Cs"]))
VALUES: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(),
    str: text,
    list: st.lists(st.integers() | text | st.booleans(), max_size=3),
    dict: st.dictionaries(text, st.integers() | text, max_size=2),
    datetime.date: st.dates(),
    datetime.datetime: st.datetimes(),
    datetime.time: st.times(),
}


@st.composite
def wrong_values(draw: st.DrawFn, known: dict[str, Any] = KEYS) -> tuple[str, Any]:
    """A known key, and a value of a type that it does not take (or a word that it does not know)."""
    key = draw(st.sampled_from(sorted(known)))
    kinds, words = accepted(known[key])
    kind = draw(st.sampled_from([k for k in VALUES if k not in kinds]))
    value = draw(VALUES[kind])
    assume(not (isinstance(value, str) and value in words))
    return key, value


def override(key: str, value: Any) -> dict[str, Any]:
    """BASE with a value in place, past the parsing of overrides."""
    content = copy.deepcopy(BASE)
    put(content, key, value)
    return content


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key``."""
    *parents, last = key.split(".")
    for part in parents:
        content = content.setdefault(part, {})
    content[last] = value

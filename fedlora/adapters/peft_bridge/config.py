"""PEFT's own config of a type, from ``[method]`` and ``[method.peft]``."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from fedlora.adapters.peft_bridge.bounds import quiet, said
from fedlora.config import Config, unknown_key
from fedlora.errors import InputError

TYPE, KEYS = "method.peft_type", "method.peft"

_OURS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
_LOADED = re.compile(r".*_(model|core|path|file|dir)")
"""Keys of code, models and files that PEFT would load. A node runs the config of a server, so no run may set them."""
_SEEDS = ("seed", "prng_key")
_NAME = re.compile(r"[\w.-]+")
"""PEFT takes the names in a pattern for regular expressions, and some of these run for ever."""
_LARGEST = 2**24
"""Above the number of weights of most layers: no size or count of an adapter comes near it."""


def peft_types() -> dict[str, type[PeftConfig]]:
    """Return PEFT's types that choose modules of a model, by name; those that change the input have none."""
    found = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {kind: made for kind, made in sorted(found.items()) if "target_modules" in _fields(made)}


def _fields(made: type[PeftConfig]) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(made) if field.init}


def _is_reserved(key: str) -> bool:
    return key in _OURS or _LOADED.fullmatch(key) is not None


def own_keys(peft_type: str) -> dict[str, Any]:
    """Return the keys of a type that ``[method.peft]`` takes, with their defaults.

    Raises
    ------
    InputError
        If PEFT has no such type, or it changes no layers.
    """
    types = peft_types()
    if peft_type not in types:
        close = difflib.get_close_matches(peft_type.upper(), types, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(types)}"
        hint = f"is no type of PEFT's that adapts chosen layers; {hint}"
        raise InputError(TYPE, peft_type, hint)
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    found = {}
    for name, field in _fields(types[peft_type]).items():
        if name not in common and not _is_reserved(name):
            made = field.default_factory
            found[name] = field.default if made is dataclasses.MISSING else made()
    return found


def alpha_key(peft_type: str) -> str | None:
    """Return the type's key for alpha, of s = alpha / r; None where it has none."""
    keys = own_keys(peft_type)
    names = [name for name in ("alpha", "lora_alpha", f"{peft_type.lower()}_alpha") if keys.get(name) is not None]
    return names[0] if names and rank_key(peft_type) else None


def rank_key(peft_type: str) -> str | None:
    """Return the type's key for the rank; None where it has none, or its default does not go by one."""
    return "r" if own_keys(peft_type).get("r") else None


def peft_config(
    peft_type: str, given: Mapping[str, Any], config: Config, seed: int | None = None, **settings: Any
) -> PeftConfig:
    """Make PEFT's config from ``[method]``.

    Parameters
    ----------
    peft_type : str
    given : mapping
        ``[method.peft]``: keys of the type. They go before all else.
    config : Config
        ``method.rank`` is the type's r, and ``method.alpha`` its alpha; without it, alpha / r is that of the type's
        own defaults. Seeds are the run's.
    seed : int, optional
        Takes the place of all seeds, those that were given too.
    **settings
        What is no business of the user's: target_modules and others.

    Raises
    ------
    InputError
        For a key that the type does not have, or a value that PEFT refuses.
    """
    keys = own_keys(peft_type)
    for key, value in given.items():
        field = f"{KEYS}.{key}"
        if _is_reserved(key):
            remedy = "is not for a run to say: modules are chosen by method.target_modules, and nothing else is loaded"
            raise InputError(field, value, f"{remedy}; leave it out")
        if key not in keys:
            raise unknown_key(field, key, value, keys)
        if (why := _misfit(key, value, keys[key])) is not None:
            raise InputError(field, value, why)
    seeds = [key for key in keys if key.endswith(_SEEDS)]
    values: dict[str, Any] = dict.fromkeys(seeds, config.run.seed)
    if seed is not None:
        settings |= dict.fromkeys(seeds, seed)
    rank, alpha = rank_key(peft_type), alpha_key(peft_type)
    if rank is not None:
        values[rank] = config.method.rank
    if rank is not None and alpha is not None:
        share = keys[alpha] / keys[rank]
        wanted = config.method.alpha if config.method.alpha is not None else share * (given.get(rank) or values[rank])
        values[alpha] = int(wanted) if wanted == int(wanted) else wanted
    for key in (key for key in keys if key.endswith("_modules")):
        # Some of the layers that were chosen, by name. PEFT's own choice for a model would not be theirs.
        names = [given[key]] if isinstance(given.get(key), str) else list(given.get(key) or ())
        settings[key] = [p for p in settings["target_modules"] if any(f".{p}".endswith(f".{name}") for name in names)]
    try:
        with quiet():
            return peft_types()[peft_type](**{**values, **given, **settings})
    except Exception as error:
        raise _refusal(peft_type, given, error) from None


def _misfit(key: str, value: Any, default: Any) -> str | None:
    """Return why a key cannot have a value; None if it can."""
    if not _fits(value, default):
        return f"has another type than PEFT's default {default!r}"
    if key.endswith("_modules") and not isinstance(value, str | list):
        return "is no name of a module; give a name, or a list of names"
    if key.endswith("_pattern") and not all(_NAME.fullmatch(name) for name in value or ()):
        return "takes names of modules or their paths, no regular expressions"
    numbers = [each for each in _leaves(value) if isinstance(each, int | float)]
    if not key.endswith(_SEEDS) and not all(abs(number) <= _LARGEST for number in numbers):
        return f"has a number above {_LARGEST:,}, the largest that is taken; use a smaller one"
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of a default's type; PEFT's dataclasses take anything."""
    if isinstance(default, bool):
        return isinstance(value, bool | str)  # init_lora_weights is True, or a name
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str)
    # A table in the place of one of PEFT's objects could name a module to import, or a file to read.
    return isinstance(default, dict) or not isinstance(value, dict)


def _refusal(peft_type: str, given: Mapping[str, Any], error: Exception) -> InputError:
    """Make one line of what PEFT said, of the key that it names."""
    why = said(error)
    named = [key for key in given if key in why]
    field, value = (f"{KEYS}.{named[0]}", given[named[0]]) if named else (TYPE, peft_type)
    return InputError(field, value, f"PEFT refuses it: {why}")

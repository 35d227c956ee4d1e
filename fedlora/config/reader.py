"""From a TOML file, text or mapping to a checked config."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedlora.config.errors import input_error
from fedlora.config.schema import COMMON_KEYS, Config
from fedlora.config.section import Section
from fedlora.errors import InputError
from fedlora.paths import find_path

# Integers of thousands of digits and arrays nested as deep are refused by Python, not by the TOML parser.
_NOT_TOML = (ValueError, RecursionError)


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override and check a config.

    Parameters
    ----------
    source : str, Path or Mapping
        A TOML file, TOML text (recognised by a line break), or the parsed content.
    overrides : Mapping[str, object], optional
        ``section.key`` to value; a string is parsed as a TOML value where it is one, an empty string removes the key.

    Returns
    -------
    Config

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or a key or value is wrong.
    """
    content = _content(source, overrides)
    # The common keys come first, so that their mistakes are reported before slow imports of the method's options.
    _common(content)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise input_error(error) from None
    from fedlora.methods import check_method

    config.method.check(config)  # now with the method's own options
    check_method(config)
    return config


def load_common(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Do as :func:`load_config`, but for the options of the method, whose imports take seconds: they are left out."""
    return _common(_content(source, overrides))


def _content(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    content = read_toml(source)
    for key, value in (overrides or {}).items():
        override(content, key, value)
    return content


def _common(content: dict[str, Any]) -> Config:
    try:
        config = Config.model_validate(content, context=COMMON_KEYS)
    except ValidationError as error:
        raise input_error(error) from None
    _check_sections(config)
    return config


def read_config(path: Path) -> Config:
    """Read the config.toml that a run left; its method need not be installed here.

    Raises
    ------
    InputError
        If the file cannot be read, or is no config.
    """
    try:
        return Config.from_toml(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise input_error(error) from None
    except (OSError, *_NOT_TOML) as error:
        raise InputError("CONFIG", str(path), f"cannot be read ({error}); run again into another folder") from None


def _check_sections(config: Config) -> None:
    """Refuse combinations that no single key shows."""
    for name in type(config).model_fields:
        section: Section = getattr(config, name)
        section.check(config)


def unused_keys(config: Config) -> list[str]:
    """Name the keys that were set but that the chosen method or mode does not use, each with the reason."""
    from fedlora.methods import unused_options

    notes: list[str] = []

    def note(section: Section, prefix: str, keys: str, why: str) -> None:
        for key in keys.split():
            *parents, last = key.split(".")
            place = section
            for parent in parents:
                place = getattr(place, parent)
            if last in place.model_fields_set:
                notes.append(f"{prefix}.{key} is not used: {why}")

    for name in type(config).model_fields:
        section: Section = getattr(config, name)
        for keys, why in section.unused(config):
            note(section, name, keys, why)
    notes.extend(f"method.{key} is not used: {why}" for key, why in config.method.others.items())
    for keys, why in unused_options(config):
        note(config.method, "method", keys, why)
    return notes


def read_toml(source: str | Path | Mapping[str, Any], field: str = "CONFIG") -> dict[str, Any]:
    """Return the content of a TOML file or text, or a copy of parsed content without its empty values.

    Raises
    ------
    InputError
        Named ``field``, if the file cannot be read or is no TOML.
    """
    if isinstance(source, Mapping):
        return _deep_copy(source)
    if isinstance(source, str) and "\n" in source:
        text, shown = source, "(text)"
    else:
        shown = str(source)
        path = find_path(shown, field)
        if path is None or path.is_dir():
            there = "is a folder" if path else "there is no such file"
            raise InputError(field, shown, f"{there}; give the path of a TOML file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(field, shown, f"cannot be read as UTF-8 text ({error}); give a TOML file") from None
    try:
        # Some editors begin a file with a byte-order mark.
        return tomllib.loads(text.removeprefix("\ufeff"))
    except _NOT_TOML as error:
        raise InputError(field, shown, f"is not valid TOML ({error}); fix that line") from None


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items() if item is not None}
    return value


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in parsed content; None or an empty string removes it.

    Raises
    ------
    InputError
        If ``key`` is none, or lies below a value.
    """
    parts = key.split(".")
    if len(parts) < 2 or not all(parts):
        raise InputError("--set", f"{key}={value}", "write section.key=value, for example run.seed=1")
    place = content
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError("--set", f"{key}={value}", f"{part!r} is a value and has no keys below it")
    if value is None or value == "":
        place.pop(parts[-1], None)
    else:
        place[parts[-1]] = _toml_value(value) if isinstance(value, str) else _deep_copy(value)


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except _NOT_TOML:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text

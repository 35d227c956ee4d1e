"""Mistakes on the command line, in one line each: what click and typer refuse before a command begins."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import click
from click.types import FloatParamType, IntParamType

from fedlora.config.values import range_words
from fedlora.errors import InputError

_BOUNDS = {(False, "min"): "ge", (True, "min"): "gt", (False, "max"): "le", (True, "max"): "lt"}


def usage_error(error: click.UsageError) -> InputError:
    """Turn click's error into one that names the option or the argument, the value and the remedy."""
    command = error.ctx.command_path if error.ctx else "fedlora"
    if isinstance(error, click.MissingParameter):
        return InputError(_name(error.param, error.ctx), None, f"is required; see {command} --help")
    if isinstance(error, click.BadParameter):
        return _bad_value(error, command)
    if isinstance(error, click.NoSuchOption):
        remedy = f"there is no such option; {_close(error.possibilities, command)}"
        return InputError("OPTION", error.option_name, remedy)
    if isinstance(error, click.BadOptionUsage):
        return InputError(error.option_name, None, f"{_sentence(error)}; see {command} --help")
    # click 8.1 has no class for unknown commands, and typer adds its suggestions to the text.
    if (
        unknown := re.fullmatch(r"No such command '(.*?)'\.(?: Did you mean (.*)\?)?", error.message, re.DOTALL)
    ) is not None:
        close = re.findall(r"'(.*?)'", unknown[2] or "")
        return InputError("COMMAND", unknown[1], f"there is no such command; {_close(close, command)}")
    if (extra := re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", error.message, re.DOTALL)) is not None:
        return InputError("ARGUMENT", extra[1], f"is one too many; {_without_space(error.ctx, command)}")
    return InputError("COMMAND", command, f"{_sentence(error)}; see {command} --help")


def _bad_value(error: click.BadParameter, command: str) -> InputError:
    name = _name(error.param, error.ctx)
    words = _words(error.param.type) if error.param else ""
    # The value stands in click's message alone, quoted where it is no number.
    value, refused, _ = error.message.partition(" is not ")
    if not words or not refused:
        return InputError(name, None, f"{_sentence(error)}; see {command} --help")
    try:
        return InputError(name, ast.literal_eval(value), f"give {words}")
    except (ValueError, SyntaxError):  # such as nan
        return InputError(name, value, f"give {words}")


def _name(param: click.Parameter | None, ctx: click.Context | None) -> str:
    """Return an option as it is written, or the name of an argument in the usage."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.make_metavar(ctx).strip("[].") if param and ctx else "ARGUMENT"


def _words(kind: Any) -> str:
    """Say which values a type of click's takes; "" for types that are not numbers."""
    if not isinstance(kind, IntParamType | FloatParamType):
        return ""
    sides: Mapping[str, Any] = {side: getattr(kind, side, None) for side in ("min", "max")}
    bounds = {
        _BOUNDS[getattr(kind, f"{side}_open"), side]: f"{limit:g}" for side, limit in sides.items() if limit is not None
    }
    noun = "an integer" if isinstance(kind, IntParamType) else "a number"
    return f"{noun} {range_words(bounds)}".strip()


def _without_space(ctx: click.Context | None, command: str) -> str:
    """Say how to write ``--set KEY VALUE``, or where the arguments are told."""
    pairs = ctx.params.get("set_") if ctx else None
    key = next((pair for pair in pairs or [] if "=" not in pair), None)
    return f"see {command} --help" if key is None else f"write KEY=VALUE, without a space: --set {key}=VALUE"


def _close(names: Any, command: str) -> str:
    return f"did you mean {' or '.join(names)}?" if names else f"see {command} --help"


def _sentence(error: click.UsageError) -> str:
    message = error.message.rstrip(".")
    return message[:1].lower() + message[1:]

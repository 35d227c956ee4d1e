"""Help: every command, argument and option says what it is, and every example is a command that there is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
import typer

from fedlora.cli import app
from fedlora.cli.examples import EXAMPLES
from tests.command import fedlora

GROUP = typer.main.get_command(app)


def commands(group: click.Command, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield all commands with their full names."""
    assert isinstance(group, click.Group)
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(GROUP))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_takes_and_looks_like(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    silent = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    if int(version("click").split(".")[1]) < 5:  # from 8.5 on, typer 0.20 loses the help of arguments
        silent += [p.name for p in command.params if isinstance(p, click.Argument) and not getattr(p, "help", None)]
    assert silent == []
    assert name in EXAMPLES
    words = " ".join(fedlora(*name.split(), "--help").out.split())
    assert EXAMPLES[name][0] in words


def test_examples_are_of_commands_that_exist() -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    for name, examples in EXAMPLES.items():
        for example in examples:
            program, *words = shlex.split(example)
            assert program == "fedlora"
            assert words[: len(name.split())] == name.split()
            # Raises for an option or a number of arguments that the command does not take.
            COMMANDS[name].make_context(name, words[len(name.split()) :], resilient_parsing=False)


def test_no_help_text_loses_words_in_brackets() -> None:
    """Rich takes ``[name]`` for markup, and drops it."""
    for command in COMMANDS.values():
        assert "[" not in (command.help or "")
        assert not [p.help for p in command.params if isinstance(p, click.Option) and "[" in (p.help or "")]


def test_the_version_is_printed() -> None:
    done = fedlora("--version")
    assert (done.code, done.out) == (0, f"fedlora {version('fedlora')}\n")


def test_the_shell_completes_commands_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_FEDLORA_COMPLETE", "complete_bash")
    for words, number, found in (
        ("fedlora sh", "1", "show"),
        ("fedlora config client.local_s", "2", "client.local_steps"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", number)
        assert fedlora().out.split() == [found]

"""Mistakes on the command line are one line that names the option or argument, the value and the remedy."""

from __future__ import annotations

import pytest

from tests.command import fedlora


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("audit a.toml --shadows 1.5", "--shadows = '1.5': give an integer of at least 0"),
        ("show a --every 0", "--every = 0: give an integer of at least 1"),
        ("report a --target high", "--target = 'high': give a number"),
        ("run", "CONFIG = None: is required; see fedlora run --help"),
        ("report", "DIR = None: is required; see fedlora report --help"),
        ("run a.toml --ouput b", "OPTION = '--ouput': there is no such option; did you mean --output?"),
        ("node status --jsn", "OPTION = '--jsn': there is no such option; did you mean --json?"),
        ("runn", "COMMAND = 'runn': there is no such command; did you mean run"),
        ("keys none-such", "COMMAND = 'none-such': there is no such command; see fedlora keys --help"),
        ("show a b", "ARGUMENT = 'b': is one too many; see fedlora show --help"),
        (
            "run a.toml --set client.batch_size 4",
            "ARGUMENT = '4': is one too many; write KEY=VALUE, without a space: --set client.batch_size=VALUE",
        ),
        ("run a.toml --set", "--set = None: option '--set' requires an argument"),
        ("run a.toml --json=1", "--json = None: option '--json' does not take a value"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, told: str) -> None:
    done = fedlora(*arguments.split())
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"fedlora: {told}"), line


@pytest.mark.parametrize("arguments", ["", "node", "keys"])
def test_without_arguments_there_is_help(arguments: str) -> None:
    done = fedlora(*arguments.split())
    assert done.code == 2
    assert "Usage: fedlora" in done.out + done.err
    assert "fedlora: " not in done.err


def test_the_version_ends_well() -> None:
    done = fedlora("--version")
    assert done.code == 0
    assert done.out.startswith("fedlora ")

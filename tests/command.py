"""The command ``fedlora``, called in this process."""

from __future__ import annotations

import io
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from fedlora import status
from fedlora.cli import main

IN_TURN = """
import json, sys
from fedlora.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["fedlora", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
"""
"""Python that gives one command after the other, for a process that imports everything once; the argument is JSON."""


@dataclass(frozen=True)
class Done:
    """What a command did: its exit code and what it printed."""

    code: object
    out: str
    err: str


def fedlora(*arguments: object) -> Done:
    """Run the command; anything but an exit is passed on.

    A slow machine must not change what a command prints, so no line says what goes on after a while.
    """
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with (
        patch.object(status, "SILENCE", math.inf),
        patch.object(sys, "argv", ["fedlora", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return Done(code or 0, out.getvalue(), err.getvalue())

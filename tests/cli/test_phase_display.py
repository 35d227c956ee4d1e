"""A display says what goes on: at all times on a terminal, else where nothing was said for a while."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from fedlora.cli.deployment import _talk
from fedlora.cli.phases import PhaseDisplay
from fedlora.timeline import phase


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_terminal_shows_every_phase_with_its_count_and_what_others_do_for_it() -> None:
    out = io.StringIO()
    display = PhaseDisplay(Console(file=out, width=100, force_terminal=True))
    with display:
        display.note = "loss 0.5 [red]"
        display.say("round 1")
        with phase("a", "rounds", 8, 2), phase("b", "training", 4, detail=lambda: "local steps 3/40") as here:
            here.advance()
            until(lambda: "loss 0.5 [red]" in out.getvalue())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"rounds +\S* +2/8 +0:00", text)
    assert re.search(r"training +\S* +1/4 +0:00 +\d s left", text)
    assert "training: local steps 3/40" in text
    assert "round 1\n" in text


def test_elsewhere_a_line_is_printed_where_nothing_was_said_for_a_while() -> None:
    out = io.StringIO()
    with PhaseDisplay(Console(file=out, width=100), silence=0.3) as display, phase("a", "evaluating", 20) as here:
        until(lambda: out.getvalue() == "evaluating 0/20\n")
        here.done = 3
        display.say("something else")
        told = r"something else\nevaluating 3/20 \(\d+ s left\)\n"
        until(lambda: re.search(told, out.getvalue()) is not None)


def test_a_log_of_what_waits_for_hours_says_so_once() -> None:
    out = io.StringIO()
    said: list[str] = []
    for log in (None, said.append):
        with PhaseDisplay(Console(file=out), silence=0.05, log=log), phase("a", "node", detail=lambda: "waiting"):
            time.sleep(0.5)
    assert said == ["node: waiting"]
    # Who works repeats it: a log that is still may be a run that hangs.
    assert out.getvalue().count("node: waiting\n") > 1


def test_a_node_logs_to_the_terminal_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fedlora.deployment")
    before = list(logger.handlers)
    with _talk():
        logging.getLogger("fedlora.deployment.node").info("[b]north is in")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+ INFO \[b\]north is in\n", capsys.readouterr().err)
    assert logger.handlers == before

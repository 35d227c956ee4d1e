"""Record what commands show over time, in a pseudo-terminal and in a pipe, and check that none is silent for long.

Each case is a command. What it shows is written to FOLDER/CASE.txt, a line for each change with the seconds since the
command began; clocks, bars and estimates alone are no change. The script fails where for more than 10 seconds a command
wrote nothing, or showed no phase, round or result::

    python -m fedlora.experiments.benchmarks.displays --cases quickstart flexmore study log --output displays
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 10.0
"""Seconds for which no display may be silent."""

STUDY = """
[study]
name = "two"

[base]
config = "{config}"

[base.run]
rounds = 2

[base.data]
max_examples = 4000

[axes]
"method.name" = ["ffa-lora", "fed-sb"]
"""

CASES: dict[str, tuple[bool, list[str]]] = {
    "quickstart": (True, ["run", "experiments/quickstart.toml", "--set", "run.rounds=3"]),
    "flexmore": (True, ["run", "experiments/flexmore.toml"]),
    "study": (True, ["study", "{study}"]),
    "log": (False, ["run", "experiments/flexmore.toml"]),
}
"""Whether a case is on a terminal, and its command without ``--output``; ``{study}`` is a file of :data:`STUDY`."""

_RUN = "from fedlora.cli import main; main()"
_WINDOW = 1.0  # seconds of output that are looked at together
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[━╸╺]")
_MOVING = re.compile(r"\d+:\d\d(:\d\d)?|\(?[\d.]+ (s|min|h)( left)?\)?")


@dataclass
class Recording:
    """What a command showed.

    Attributes
    ----------
    lines : list of (float, str)
        Seconds since it began, and what was new then.
    silent, wordless : float
        The longest time without a byte, and without a word.
    code : int
        The command's exit code.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    silent: float = 0.0
    wordless: float = 0.0
    code: int = 0


def record(command: list[str], terminal: bool) -> Recording:
    """Run a command and look at its output once a second."""
    found, began = Recording(), time.monotonic()
    last_byte = last_word = began
    shown: list[str] = []
    for text in _windows(command, terminal, found):
        now = time.monotonic()
        found.silent = max(found.silent, now - last_byte)
        last_byte = now if text else last_byte
        new = [line for line in _words(text) if _still(line) not in shown]
        found.wordless = max(found.wordless, now - last_word)
        if words := _words(text):
            last_word, shown = now, [_still(line) for line in words]
        found.lines += [(now - began, line) for line in dict.fromkeys(new)]
    return found


def _windows(command: list[str], terminal: bool, found: Recording) -> Iterator[str]:
    """Yield the output of every second."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    environment = os.environ | {"COLUMNS": "110", "LINES": "40", "TERM": "xterm-256color" if terminal else "dumb"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, env=environment)
    os.close(writing)
    ended, content, since = False, b"", time.monotonic()
    while not ended:
        ready, _, _ = select.select([reading], [], [], _WINDOW / 4)
        if ready:
            try:
                chunk = os.read(reading, 65536)
            except OSError:  # what a pseudo-terminal's end is told by
                chunk = b""
            ended, content = not chunk, content + chunk
        if ended or time.monotonic() - since >= _WINDOW:
            yield content.decode("utf-8", "replace")
            content, since = b"", time.monotonic()
    os.close(reading)
    found.code = process.wait()


def _words(text: str) -> list[str]:
    """Return the lines of output that say something, without control codes and bars; of like lines the last."""
    lines = [" ".join(_CONTROL.sub(" ", line).split()) for line in re.split(r"[\r\n]+", text)]
    last = {re.sub(r"\d+/\d+|[\d,]{4,}", "", _still(line)): line for line in lines if re.search(r"[A-Za-z]{2}", line)}
    return list(last.values())


def _still(line: str) -> str:
    """Return a line without what moves by itself."""
    return " ".join(_MOVING.sub(" ", line).split())


def main() -> None:
    """Record the cases, and exit with 1 if one is silent for too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, required=True, help="the folder of the recordings")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for case in options.cases:
        terminal, arguments = CASES[case]
        with tempfile.TemporaryDirectory(prefix="displays-") as folder:
            study = Path(folder) / "two.toml"
            study.write_text(STUDY.format(config=Path("experiments/quickstart.toml").resolve()), encoding="utf-8")
            told = [argument.format(study=study) for argument in arguments]
            found = record([sys.executable, "-c", _RUN, *told, "--output", f"{folder}/{case}"], terminal)
        where = "a terminal" if terminal else "a pipe"
        head = [
            f"fedlora {' '.join(arguments)}, in {where}".format(study="two.toml"),
            f"exit {found.code}; longest without a byte {found.silent:.1f} s, without a word {found.wordless:.1f} s",
        ]
        body = [f"{seconds:7.1f}  {line}" for seconds, line in found.lines]
        text = "\n".join([*head, "", *body, ""]).replace(folder, "runs")
        (options.output / f"{case}.txt").write_text(text, encoding="utf-8")
        print(case, head[1], flush=True)
        if found.code or max(found.silent, found.wordless) > LIMIT:
            failed.append(case)
    if failed:
        sys.exit(f"silent for more than {LIMIT:.0f} s, or failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""A disk that is full, and a user without a home: one line, nothing lost, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors import SafetensorError

from fedlora.storage import StorageError, is_full, storage_error, writes_to
from tests.command import IN_TURN, fedlora
from tests.tiny import save_llama

ADAPTER = "adapter/adapter_model.safetensors"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A model, data and a config, and the run of it."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        place = Path(name)
        patch.setenv("FEDLORA_CACHE", str(place / "cache"))
        save_llama(place / "model")
        texts = [f"w{4 + number} w{5 + number} w{6 + number}" for number in range(40)]
        (place / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config: dict[str, Any] = {
            "run": {"name": "small", "rounds": 2},
            "model": {"name": str(place / "model"), "task": "causal-lm", "max_length": 8},
            "data": {"name": str(place / "train.jsonl"), "partition": {"clients": 2}},
            "method": {"name": "fedit", "rank": 2},
            "client": {"batch_size": 4, "local_steps": 1},
            "simulation": {"workers": 0},
        }
        (place / "run.toml").write_text(tomli_w.dumps(config))
        assert fedlora("run", place / "run.toml", "--output", place / "whole").code == 0
        yield place


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [600, 34_000])
def test_a_full_disk_is_one_line_with_the_command_that_goes_on(place: Path, tmp_path: Path, size: int) -> None:
    """The smaller size is met when the folder is made, the larger one in a round."""
    out = tmp_path / "a run"
    given = ["run", str(place / "run.toml"), "--set", "client.weight_decay=0.0", "--output", str(out)]
    with largest_file(size):
        done = fedlora(*given)
    assert (done.code, len(done.err.splitlines())) == (1, 1), done
    assert done.err.startswith(f"fedlora: {out}")
    assert "cannot be written" in done.err
    command = shlex.split(done.err.strip().partition("continue with: ")[2])
    assert command == ["fedlora", *given, *(["--resume"] if out.exists() else [])]
    assert out.exists() == (size > 600)
    again = fedlora(*command[1:])
    assert (again.code, again.err) == (0, "")
    for name in (ADAPTER, "communication.csv", "partition.csv"):
        assert (out / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert not [path for path in out.rglob(".*")]


def test_an_export_that_finds_no_room_leaves_nothing(place: Path, tmp_path: Path) -> None:
    with largest_file(3000):
        done = fedlora("export", place / "whole", "--merged", "--output", tmp_path / "export")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done
    assert str(tmp_path / "export") in done.err
    assert not (tmp_path / "export").exists()
    assert fedlora("export", place / "whole", "--merged", "--output", tmp_path / "export").code == 0


def test_a_report_that_finds_no_room_is_one_line(place: Path, tmp_path: Path) -> None:
    with largest_file(3000):
        done = fedlora("report", place / "whole", "--output", tmp_path / "report")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done
    assert str(tmp_path / "report") in done.err
    assert fedlora("report", place / "whole", "--output", tmp_path / "report").code == 0


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "x"), errno.EDQUOT),
        (OSError(errno.EROFS, "x"), errno.EROFS),
        (PermissionError(errno.EACCES, "x"), errno.EACCES),
        (OSError(errno.EIO, "x"), errno.EIO),
        (OSError("4096 requested and 100 written"), errno.ENOSPC),  # numpy
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), errno.ENOSPC),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), errno.ENOSPC),  # pyarrow
        (FileNotFoundError(errno.ENOENT, "x"), None),
        (ValueError("os error 28"), None),
        (sqlite3.IntegrityError("x"), None),
    ],
)
def test_a_disk_that_fails_is_known_by_whoever_says_so(error: Exception, found: int | None, tmp_path: Path) -> None:
    assert storage_error(error) == found
    assert is_full(error) == (found in (errno.ENOSPC, errno.EDQUOT, errno.EIO))
    with pytest.raises(StorageError if found else type(error)) as raised, writes_to(tmp_path):
        raise error
    if found:
        assert len(str(raised.value).splitlines()) == 1
        assert str(tmp_path) in str(raised.value)


def test_sqlites_own_words_are_known(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "x")
    database.execute("PRAGMA max_page_count = 2")
    with pytest.raises(StorageError, match="No space left"), writes_to(tmp_path):
        database.executescript("CREATE TABLE a (x); CREATE TABLE b (x); CREATE TABLE c (x);")
    database.close()


# Nobody's home.


NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
"""Gives a process a user id without a name, which may read what the tests may read."""


def test_a_user_without_a_name_and_a_home_runs(place: Path, tmp_path: Path) -> None:
    """In this process and on a worker."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody have a user namespace")
    for name in ("work", "cache"):
        (tmp_path / name).mkdir()
    # Not below tmp_path: Ray's sockets want a short path.
    with tempfile.TemporaryDirectory() as temporary:
        known = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME")
        environment = {key: value for key, value in os.environ.items() if key not in known}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": temporary, "FEDLORA_CACHE": str(tmp_path / "cache")}
        run = ["run", str(place / "run.toml")]
        commands = [["--help"], run, [*run, "--set", "simulation.workers=1", "--output", "runs/worker"]]
        command = [*NOBODY, sys.executable, "-c", IN_TURN, json.dumps(commands)]
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert not list(Path(temporary).glob("fedlora-home-*"))
    # No folder called ~, in particular.
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["runs"]
    for name in ("small", "worker"):
        found = tmp_path / "work" / "runs" / name / ADAPTER
        assert found.read_bytes() == (place / "whole" / ADAPTER).read_bytes()

"""Copying a run folder from the server, without one."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from fedlora.deployment.control import Server
from fedlora.errors import InputError, RunError


def server(answer: httpx.Response) -> Server:
    made = object.__new__(Server)
    made.address = "fed.example:8000"
    made._http = httpx.Client(
        transport=httpx.MockTransport(lambda request: answer), base_url="https://fed.example:8000"
    )
    return made


def test_a_file_is_copied(tmp_path: Path) -> None:
    server(httpx.Response(200, content=b"a,b\n")).fetch("run", "privacy.csv", tmp_path / "run" / "privacy.csv")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "run").iterdir()] == [("privacy.csv", b"a,b\n")]


def test_a_file_that_went_is_left_out(tmp_path: Path) -> None:
    server(httpx.Response(404, text="Not Found")).fetch("run", "checkpoint-wal", tmp_path / "checkpoint-wal")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(500, RunError, "fed.example:8000 refuses: HTTP 500"), (403, InputError, "add its address to control_from")],
)
def test_what_the_server_answers_instead_is_told(tmp_path: Path, status: int, error: type, said: str) -> None:
    (tmp_path / "privacy.csv").write_text("old")
    with pytest.raises(error, match=said):
        server(httpx.Response(status, text="out of order")).fetch("run", "privacy.csv", tmp_path / "privacy.csv")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("privacy.csv", "old")]

"""The server's TOML file, and what is refused before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fedlora.deployment import keys
from fedlora.deployment.config import load_server
from fedlora.deployment.processes import Pauses, check_port
from fedlora.errors import InputError
from tests.command import fedlora

TLS = """
[tls]
ca_certificate = "keys/ca.crt"
certificate = "keys/server.crt"
private_key = "keys/server.key"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.make_ca(tmp_path / "keys")
    keys.make_server_certificate(tmp_path / "keys", ["localhost"])
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, f'directory = "there"\n{TLS}')
    monkeypatch.chdir(folder.parent)
    config = load_server(path.relative_to(folder.parent))
    assert config.folder == folder / "there"
    assert config.tls is not None
    assert Path(config.tls.private_key) == folder / "keys" / "server.key"


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "127.0.0.1:8000"), ("::", "[::1]:8000"), ("fl.example.org", "fl.example.org:8000")],
)
def test_own_processes_reach_the_server(folder: Path, host: str, address: str) -> None:
    assert load_server(written(folder, f'host = "{host}"')).address == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 8000", "did you mean port"),
        ("port = 0", "port = 0"),
        ('host = "https://fl.example.org"', "is no address or host name"),
        ('host = "fl.example.org:8000"', "is no address or host name"),
        ('host = "\u202e"', "is no address or host name"),
        ('control_from = ["10.0.0.0/99"]', "is no address or network"),
        ('control_from = ["10.0.0.1/8"]', "is no address or network"),
        ("[tls]\ncertificate = 'a'", "tls.ca_certificate = None: is required"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_mistakes_in_the_file_are_one_line_and_exit_2(folder: Path, text: str, said: str) -> None:
    done = fedlora("server", written(folder, text))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert said in done.err


def test_no_tls_is_never_a_default(folder: Path) -> None:
    done = fedlora("server", written(folder, "port = 8000"))
    assert done.code == 2
    assert "tls = None: is required" in done.err


def test_nodes_cannot_be_authenticated_without_tls(folder: Path) -> None:
    done = fedlora("server", written(folder, "port = 8000"), "--insecure-no-tls")
    assert done.code == 2
    assert "add --insecure-no-node-auth" in done.err


@pytest.mark.parametrize("file", ["ca.crt", "server.crt", "server.key"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / "keys" / file).unlink()
    done = fedlora("server", written(folder, TLS))
    assert done.code == 2
    assert f"{file}': cannot be read (No such file or directory)" in done.err


def test_an_open_private_key_is_refused(folder: Path) -> None:
    (folder / "keys" / "server.key").chmod(0o644)
    done = fedlora("server", written(folder, TLS))
    assert done.code == 2
    assert "has mode 0644, so others may read it; chmod 600 it" in done.err


def test_a_port_in_use_is_refused_and_nothing_is_made(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = fedlora("server", written(folder, f"port = {port}\n{TLS}"))
    assert done.code == 2
    assert f"port = {port}: is in use by another process" in done.err
    assert not (folder / "server").exists()


@pytest.mark.parametrize(("host", "said"), [("192.0.2.1", "no address of this"), ("no.invalid", "no known name")])
def test_an_address_of_another_machine_is_refused(host: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_port(host, 18999, "port")


def test_pauses_grow_to_half_a_minute() -> None:
    pauses = Pauses()
    assert [pauses.next() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]

"""Who is not let in: each refusal is a line that says what to do, and exit code 2."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fedlora.deployment import keys
from fedlora.deployment.control import Server
from fedlora.errors import InputError
from tests.command import Done, fedlora
from tests.deployment.federation import NAME, Federation, free_port


def refused(federation: Federation, name: str, *flags: str, **superlink: object) -> str:
    """Start a node that is not let in; return its line."""
    done = fedlora("node", federation.write_node(name, "east", **superlink), *flags)
    lines = [line for line in done.err.splitlines() if line.startswith("fedlora: ")]
    assert (done.code, len(lines)) == (2, 1), done.err
    assert "Traceback" not in done.err
    return lines[0]


@pytest.fixture(autouse=True)
def connections(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``--on`` looks for servers."""
    monkeypatch.setenv("FLWR_HOME", str(federation.home))


def test_no_key_in_the_file(federation: Federation) -> None:
    assert "superlink.private_key = None: is required" in refused(federation, "keyless", private_key=None)


@pytest.mark.federation
def test_no_key_shown_to_the_server(federation: Federation) -> None:
    line = refused(federation, "keyless", "--insecure-no-node-auth", private_key=None)
    assert "the server only accepts nodes with a key" in line


def test_a_key_that_was_never_registered(federation: Federation) -> None:
    keys.make_node_key(federation.folder / "keys", "stranger")
    assert "the server does not know this key" in refused(federation, "stranger")


def test_a_node_that_was_removed(federation: Federation) -> None:
    def register() -> Done:
        _, public = keys.make_node_key(federation.folder / "keys", "former")
        return fedlora("keys", "register", public, "--on", NAME)

    assert register().code == 0
    done = fedlora("keys", "unregister", "former", "--on", NAME)
    assert (done.code, done.out) == (0, f"former is no longer registered on {NAME}\n")
    assert "the server does not know this key" in refused(federation, "former")
    back = fedlora("keys", "register", federation.folder / "keys" / "former.pub", "--on", NAME)
    assert "PUBLIC_KEY = 'former': was removed under this name, for good" in back.err
    # With a new key the name is free.
    for file in (federation.folder / "keys").glob("former.*"):
        file.unlink()
    assert register().code == 0
    assert fedlora("keys", "unregister", "former", "--on", NAME).code == 0
    again = fedlora("keys", "unregister", "former", "--on", NAME)
    assert again.code == 2
    assert "NAME = 'former': is no registered node of 127.0.0.1:" in again.err
    assert "east" in again.err


@pytest.mark.federation
def test_a_key_that_another_node_uses(federation: Federation) -> None:
    line = refused(federation, "twin", private_key="keys/east.key")
    assert "another process is online with this key" in line
    with federation.server() as server:
        assert {node.name: node.status for node in server.nodes()}["east"] == "online"


def test_another_authority(federation: Federation) -> None:
    keys.make_ca(federation.folder / "other")
    line = refused(federation, "astray", private_key="keys/east.key", root_certificates="other/ca.crt")
    assert "root_certificates = " in line
    assert "does not vouch for" in line


def test_plain_http_to_the_server(federation: Federation) -> None:
    line = refused(federation, "plain", "--insecure-no-tls", "--insecure-no-node-auth", private_key=None)
    assert "does not answer plain HTTP" in line


@contextlib.contextmanager
def plain_http() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", free_port()), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_that_speaks_plain_http(federation: Federation) -> None:
    with plain_http() as port:
        line = refused(federation, "fooled", private_key="keys/east.key", address=f"127.0.0.1:{port}")
    assert "speaks plain HTTP, not TLS" in line


def test_a_ledger_is_one_nodes(federation: Federation) -> None:
    path = federation.write_node("copy", "east", private_key="keys/east.key")
    path.write_text(path.read_text().replace("state-copy", "state-east"))
    done = fedlora("node", path)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "state-east': is another running node's; give every node a directory of its own" in done.err


def test_no_tls_does_not_go_with_a_key(federation: Federation) -> None:
    assert "cannot prove who it is without TLS" in refused(federation, "mixed", "--insecure-no-tls")


def test_one_key_is_one_node(federation: Federation) -> None:
    done = fedlora("keys", "register", federation.folder / "keys" / "east.pub", "--on", NAME, "--name", "again")
    assert done.code == 2
    assert "is registered already under this name" in done.err


def test_one_name_is_one_node(federation: Federation) -> None:
    keys.make_node_key(federation.folder / "keys", "namesake")
    done = fedlora("keys", "register", federation.folder / "keys" / "namesake.pub", "--on", NAME, "--name", "east")
    assert done.code == 2
    assert "is the name of another node" in done.err


def test_an_unknown_server(federation: Federation) -> None:
    done = fedlora("keys", "list", "--on", "nowhere")
    assert done.code == 2
    assert "--on = 'nowhere': there is no such server; add [superlink.nowhere] of " in done.err
    assert 'address = "HOST:PORT"' in done.err
    assert len(done.err.splitlines()) == 1


def test_a_server_that_is_down() -> None:
    with (
        Server(f"127.0.0.1:{free_port()}", insecure=True) as server,
        pytest.raises(RuntimeError, match="is the server up"),
    ):
        server.nodes()


def test_a_certificate_file_that_is_none(federation: Federation) -> None:
    with pytest.raises(InputError, match="is no certificate in PEM"):
        Server("127.0.0.1:1", federation.folder / "server.toml")

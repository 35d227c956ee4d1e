"""Keys for a trial: what is made, for whose eyes, and what is refused."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedlora.deployment import keys
from fedlora.errors import InputError
from tests.command import fedlora

HOST = "fl.example.org"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keys.make_ca(folder)
    keys.make_server_certificate(folder, [HOST, "192.0.2.7"])
    keys.make_node_key(folder, "north")
    return folder


def check(folder: Path, host: str, certificate: str = "server.crt", key: str = "server.key") -> None:
    keys.check_certificate(folder / certificate, folder / key, ("tls.certificate", "tls.private_key"), host)


def test_private_files_are_for_their_owner_alone(made: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()}
    assert {name for name, mode in modes.items() if mode & 0o077 == 0} == {"ca.key", "server.key", "north.key"}


@pytest.mark.parametrize(
    "command", [["ca"], ["server", "--host", HOST], ["node", "north"]], ids=["ca", "server", "node"]
)
def test_nothing_is_overwritten(made: Path, command: list[str]) -> None:
    before = {path: path.read_bytes() for path in made.iterdir()}
    done = fedlora("keys", *command, "--folder", made)
    assert done.code == 2
    assert "is not overwritten" in done.err
    assert len(done.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in made.iterdir()} == before


def test_a_half_made_pair_is_left_alone_too(tmp_path: Path) -> None:
    (tmp_path / "south.pub").write_text("kept")
    with pytest.raises(InputError, match=r"south\.pub"):
        keys.make_node_key(tmp_path, "south")
    assert [path.name for path in tmp_path.iterdir()] == ["south.pub"]


@pytest.mark.parametrize("name", ["../south", "/south", "a/b", "", ".", "-south", "a b", "south\nssh-rsa"])
def test_a_nodes_keys_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "keys").mkdir()
    with pytest.raises(InputError, match="NAME"):
        keys.make_node_key(tmp_path / "keys", name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", [HOST, "localhost", "127.0.0.1"])
def test_a_client_that_trusts_the_authority_trusts_the_server(made: Path, name: str) -> None:
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(made / "server.crt", made / "server.key")
    here = ssl.create_default_context(cafile=str(made / "ca.crt"))
    first, second = socket.socketpair()
    with first, second:
        thread = threading.Thread(target=lambda: there.wrap_socket(second, server_side=True).recv(1))
        thread.start()
        with here.wrap_socket(first, server_hostname=name) as connection:
            connection.send(b"x")
            assert connection.version() == "TLSv1.3"
        thread.join()


def test_the_authority_may_sign_and_the_server_may_not(made: Path) -> None:
    authority, server = (
        x509.load_pem_x509_certificate((made / name).read_bytes()) for name in ("ca.crt", "server.crt")
    )
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    server.verify_directly_issued_by(authority)


def test_both_halves_of_a_node_key_name_the_same_key(made: Path) -> None:
    public = keys.read_public_key(made / "north.pub", "PUBLIC_KEY")
    assert public == keys.read_public_key(made / "north.key", "PUBLIC_KEY")
    assert serialization.load_pem_public_key(public).curve.name == "secp384r1"  # type: ignore[union-attr]


@pytest.mark.parametrize("content", [b"", b"ssh-rsa AAAA", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", b"\xff\xfe"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.pub").write_bytes(content)
    with pytest.raises(InputError, match="fedlora keys node"):
        keys.read_public_key(tmp_path / "some.pub", "PUBLIC_KEY")


@pytest.mark.parametrize(("mode", "fine"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)])
def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path, mode: int, fine: bool) -> None:
    path = tmp_path / "some.key"
    path.write_text("secret")
    path.chmod(mode)
    if fine:
        keys.check_secret(path, "tls.private_key")
    else:
        with pytest.raises(InputError, match="chmod 600"):
            keys.check_secret(path, "tls.private_key")


@pytest.mark.parametrize("host", [HOST, HOST.upper(), "192.0.2.7", "127.0.0.1", "::1", "localhost"])
def test_the_certificate_names_its_hosts(made: Path, host: str) -> None:
    check(made, host)


@pytest.mark.parametrize("host", ["192.0.2.8", "example.org", "a.fl.example.org"])
def test_another_host_is_refused(made: Path, host: str) -> None:
    with pytest.raises(InputError, match=rf"not {host}"):
        check(made, host)


def test_another_servers_key_is_refused(made: Path, tmp_path: Path) -> None:
    keys.make_ca(tmp_path)
    keys.make_server_certificate(tmp_path, [HOST])
    with pytest.raises(InputError, match="is not the key of"):
        keys.check_certificate(made / "server.crt", tmp_path / "server.key", ("a", "b"), HOST)


def test_a_certificate_that_ran_out_is_refused(tmp_path: Path) -> None:
    keys.make_ca(tmp_path)
    keys.make_server_certificate(tmp_path, [HOST], days=0)
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    assert x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes()).not_valid_before_utc < yesterday
    with pytest.raises(InputError, match="ran out"):
        check(tmp_path, HOST)


def test_a_server_certificate_needs_an_authority(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make an authority first"):
        keys.make_server_certificate(tmp_path, [HOST])

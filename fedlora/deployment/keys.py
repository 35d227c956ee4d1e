"""Make keys for a trial: a certificate authority, a server certificate, and key pairs of nodes.

In production the server's certificate comes from an authority that the nodes already trust. Then only the nodes' key
pairs are made here, each on its own node. Private keys have mode 0600, and no file is ever overwritten.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import InputError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""Names in every server certificate, since the SuperLink's child processes use the loopback address."""

CA_FILES = ("ca.crt", "ca.key")
SERVER_FILES = ("server.crt", "server.key")
_ONE_DAY = datetime.timedelta(days=1)


def make_ca(folder: Path, days: int = 3650) -> list[Path]:
    """Make a certificate authority: ca.crt, which every node gets, and ca.key, which signs server certificates.

    Raises
    ------
    InputError
        If one of the files exists.
    """
    certificate, key = _new_files(folder, CA_FILES)
    private = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"fedlora trial authority on {socket.gethostname()}")
    key_use = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    signed = (
        _builder(name, name, private.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_use, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    _write(key, _private_pem(private), secret=True)
    _write(certificate, signed.public_bytes(serialization.Encoding.PEM))
    return [certificate, key]


def make_server_certificate(folder: Path, hosts: Sequence[str], days: int = 825) -> list[Path]:
    """Make server.crt and server.key, signed by the authority in the same folder.

    Parameters
    ----------
    folder : Path
        With ca.crt and ca.key.
    hosts : sequence of str
        Names and addresses by which nodes reach the server; the loopback's are added.
    days : int
        How long it is valid.

    Raises
    ------
    InputError
        If the authority is missing, or one of the files exists.
    """
    certificate, key = _new_files(folder, SERVER_FILES)
    for file in CA_FILES:
        if not (folder / file).is_file():
            raise InputError("--ca", str(folder / file), "there is no such file; make an authority first: keys ca")
    authority = x509.load_pem_x509_certificate((folder / CA_FILES[0]).read_bytes())
    signer = serialization.load_pem_private_key((folder / CA_FILES[1]).read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    private = ec.generate_private_key(ec.SECP256R1())
    names = list(dict.fromkeys([*hosts, *LOCAL_NAMES]))
    signed = (
        _builder(_name(names[0]), authority.subject, private.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write(key, _private_pem(private), secret=True)
    _write(certificate, signed.public_bytes(serialization.Encoding.PEM))
    return [certificate, key]


def make_node_key(folder: Path, name: str) -> list[Path]:
    """Make NAME.key, which stays on the node, and NAME.pub, which the server's owner registers.

    Raises
    ------
    InputError
        If one of the files exists, or the name is no valid file name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError("NAME", name, "is no file name; use letters, digits, dots, dashes and underscores")
    key, public = _new_files(folder, (f"{name}.key", f"{name}.pub"))
    private = ec.generate_private_key(ec.SECP384R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    line = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(key, pem, secret=True)
    _write(public, line + f" {name}\n".encode())
    return [key, public]


def read_public_key(path: Path, field: str) -> bytes:
    """Return the key of a .pub file (or of the private key beside it) in the form that Flower compares: PEM.

    Raises
    ------
    InputError
        If it is missing, or is no key on a NIST curve.
    """
    content = read_file(path, field)
    try:
        if b"PRIVATE KEY" in content:
            private = serialization.load_ssh_private_key(content, None)
            public = private.public_key() if isinstance(private, ec.EllipticCurvePrivateKey) else None
        else:
            loaded = serialization.load_ssh_public_key(content)
            public = loaded if isinstance(loaded, ec.EllipticCurvePublicKey) else None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(field, str(path), f"is no OpenSSH key ({error}); make one: fedlora keys node") from None
    if public is None:
        raise InputError(field, str(path), "is no key on a NIST curve; make one: fedlora keys node")
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def check_secret(path: Path, field: str) -> None:
    """Refuse a private key that others on this machine can read.

    Raises
    ------
    InputError
        If it is missing, or its mode gives access to the group or others.
    """
    read_file(path, field)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(field, str(path), f"has mode {mode:04o}, so others may read it; chmod 600 it")


def check_certificate(certificate: Path, key: Path, fields: tuple[str, str], host: str) -> None:
    """Refuse a server certificate that has expired, does not match the key, or does not name the host.

    Parameters
    ----------
    certificate, key : Path
    fields : (str, str)
        Config keys of the two files, for errors.
    host : str
        Host name that the server's child processes use.

    Raises
    ------
    InputError
    """
    shown = str(certificate)
    try:
        loaded = x509.load_pem_x509_certificate(read_file(certificate, fields[0]))
        private = serialization.load_pem_private_key(read_file(key, fields[1]), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(fields[0], shown, f"or its key is no PEM without a passphrase ({error})") from None
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != loaded.public_key().public_bytes(*form):
        raise InputError(fields[1], str(key), f"is not the key of {shown}")
    if loaded.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise InputError(fields[0], shown, f"ran out on {loaded.not_valid_after_utc:%Y-%m-%d}; renew it")
    try:
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    if not _names(names, host):
        named = ", ".join(str(name.value) for name in names) or "nothing"
        remedy = f"names {named}, not {host}, by which this machine reaches the server; set host to a name of it"
        raise InputError(fields[0], shown, remedy)


def _names(names: x509.SubjectAlternativeName, host: str) -> bool:
    try:
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    except ValueError:
        known = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
        return host.lower() in known or f"*.{host.lower().partition('.')[2]}" in known


def read_file(path: Path, field: str) -> bytes:
    """Return a file's content.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(field, str(path), f"cannot be read ({error.strerror}); give the path of a file") from None


def _new_files(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        if path.exists():
            raise InputError("--folder", str(path), "exists already and is not overwritten; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--folder", str(folder), f"cannot be made ({error.strerror})") from None
    return paths


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    # O_EXCL: a file that somebody made meanwhile is kept. The mode is set before the first byte is written.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600 if secret else 0o644), "wb") as stream:
        stream.write(content)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise InputError("--host", name, f"is no host name or address ({error})") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Valid since yesterday: the clocks of two machines may differ.
        .not_valid_before(now - _ONE_DAY)
        .not_valid_after(now + days * _ONE_DAY)
    )

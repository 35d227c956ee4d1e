"""Client of a server: its nodes, its runs and their folders, through Flower's Control API."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import httpx
import tomli_w
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedlora.deployment.config import KEEP_ALIVE_SECONDS, NODE, RUNS
from fedlora.deployment.keys import read_file
from fedlora.errors import InputError, RunError, plain_text
from fedlora.flower import Control, NoConnectionError, build_app, error_of, read_connection

SERVER_APP, CLIENT_APP = "fedlora.strategies.server_app:app", "fedlora.clients.node_app:app"
ONLINE = "online"
_REMOVED = "unregistered"

_PLAIN = {"Accept-Encoding": "identity"}  # a compressed reply could grow a thousandfold
_MOST_BYTES_OF_A_LIST = 8 * 2**20
_MOST_BYTES_OF_LINES = 256 * 2**20
_MOST_BYTES_OF_AN_ERROR = 2**16


@dataclass(frozen=True)
class RegisteredNode:
    """A registered node.

    Attributes
    ----------
    name, status : str
        Status is registered (never seen), online or offline.
    public_key : bytes
        PEM.
    node_id : int
        Flower's.
    """

    name: str
    status: str
    public_key: bytes
    node_id: int


@dataclass(frozen=True)
class NodeStatus:
    """A node's status on the server.

    Attributes
    ----------
    status : str
        unknown, registered (never seen), online or offline.
    until : float
        End of an online node's lease, in seconds of the server's clock; each heartbeat extends it.
    """

    status: str
    until: float


@dataclass(frozen=True)
class RunState:
    """A run on the server.

    Attributes
    ----------
    status, outcome, details : str
        Status is pending, starting, running or finished; then outcome is completed, failed or stopped.
    sent_bytes, received_bytes : int
        Bytes on the server's sockets for this run, inside TLS, as counted by Flower.
    """

    status: str
    outcome: str
    details: str
    sent_bytes: int
    received_bytes: int


class Server:
    """A connection to a server.

    Parameters
    ----------
    address : str
        ``host:port``.
    root_certificates : Path, optional
        The authority that signed the server's certificate; None for this machine's own authorities.
    insecure : bool
        Plain HTTP.
    """

    def __init__(self, address: str, root_certificates: Path | None = None, insecure: bool = False) -> None:
        self.address, self.root_certificates = address, root_certificates
        verify: ssl.SSLContext | bool = not insecure
        if root_certificates is not None and not insecure:
            content = read_file(root_certificates, "root_certificates")
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                verify.load_verify_locations(cadata=content.decode("ascii", "replace"))
            except ssl.SSLError:
                raise InputError("root_certificates", str(root_certificates), "is no certificate in PEM") from None
        url = f"{'http' if insecure else 'https'}://{address}"
        self._control = Control(url, verify)
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS - 2)
        self._http = httpx.Client(base_url=url, verify=verify, timeout=30.0, limits=limits)

    @classmethod
    def named(cls, name: str) -> Server:
        """Connect to an entry ``[superlink.NAME]`` of Flower's config.toml.

        Raises
        ------
        InputError
            If there is no such entry, or something is wrong with it.
        """
        home = Path(os.environ.get("FLWR_HOME", "~/.flwr")) / "config.toml"
        entry_of = f'[superlink.{name}] of {home}: address = "HOST:PORT", root-certificates = "/path/of/ca.crt"'
        try:
            entry = read_connection(name)
        except NoConnectionError as error:
            raise InputError("--on", name, str(error) or f"there is no such server; add {entry_of}") from None
        if not entry.address or entry.address.startswith(":"):
            raise InputError("--on", name, f"has no address; add {entry_of}")
        certificates = Path(entry.root_certificates).expanduser() if entry.root_certificates else None
        return cls(entry.address, certificates, entry.insecure)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._control.close()
        self._http.close()

    def nodes(self) -> list[RegisteredNode]:
        """Return the registered nodes by name."""
        return [node for node in self._known() if node.status != _REMOVED]

    def _known(self) -> list[RegisteredNode]:
        """Return the nodes that are or were registered, by name."""
        with self._errors():
            listed = self._control.nodes()
        nodes = (RegisteredNode(info.name, info.status, info.public_key, info.node_id) for info in listed)
        return sorted(nodes, key=lambda node: node.name)

    def register(self, public_key: bytes, name: str) -> None:
        """Let a node in.

        Raises
        ------
        InputError
            If its key or its name is registered already, or its key was removed.
        """
        for node in self._known():
            if node.public_key == public_key:
                removed = "was removed under this name, for good; make a new key"
                known = "is registered already under this name; one key is one node"
                raise InputError("PUBLIC_KEY", node.name, removed if node.status == _REMOVED else known)
            if node.name == name and node.status != _REMOVED:
                raise InputError("--name", name, "is the name of another node; choose another")
        with self._errors():
            self._control.register(public_key, name)

    def unregister(self, name: str) -> None:
        """Let a node in no more. Its name is free again; its key cannot come back.

        Raises
        ------
        InputError
            If no node has that name.
        """
        nodes = self.nodes()
        found = [node.node_id for node in nodes if node.name == name]
        if not found:
            known = ", ".join(node.name for node in nodes) or "none"
            raise InputError("NAME", name, f"is no registered node of {self.address}; registered: {known}")
        with self._errors():
            self._control.unregister(found[0])

    def node_status(self, public_key: bytes) -> NodeStatus | None:
        """Return a node's status; None if the server does not run fedlora and has no such service."""
        with self._errors():
            body = self._get(f"{NODE}?key={quote(public_key.decode())}", _MOST_BYTES_OF_A_LIST)
            return None if body is None else NodeStatus(**json.loads(body))

    def start(self, config: str, *, resume: bool) -> int:
        """Submit a run; return its number.

        Parameters
        ----------
        config : str
            The config as TOML text.
        resume : bool
            Go on with the run folder that the server has.
        """
        app = _app()
        with self._errors():
            number, why = self._control.start_run(
                app, hashlib.sha256(app).hexdigest(), {"config": config, "resume": resume}
            )
        if number is None:
            raise RunError(f"{self.address} did not start the run: {_said(why) or 'no reason given'}")
        return number

    def run(self, number: int) -> RunState:
        """Return the state of a run."""
        with self._errors():
            run = self._control.runs(number)[number]
        status = run.status
        return RunState(status.status, status.sub_status, status.details, run.bytes_sent, run.bytes_recv)

    def unfinished(self) -> list[int]:
        """Return the numbers of the runs that have not ended."""
        with self._errors():
            runs = self._control.runs()
        return sorted(number for number, run in runs.items() if run.status.status != "finished")

    def stop(self, number: int) -> None:
        """Stop a run; busy ClientApps finish their message."""
        with self._errors():
            self._control.stop_run(number)

    def files(self, name: str) -> dict[str, int] | None:
        """Return the files of a run folder on the server with their sizes; None if there is no such folder.

        :func:`fedlora.deployment.download.check_files` decides which names may be written here.
        """
        with self._errors():
            body = self._get(f"{RUNS}/{quote(name)}", _MOST_BYTES_OF_A_LIST)
            return None if body is None else _sizes(json.loads(body, object_pairs_hook=_without_repeats))

    def lines(self, name: str, file: str) -> list[str]:
        """Return the lines of a growing file of a run folder; none if there is no such file."""
        with self._errors():
            body = self._get(f"{RUNS}/{quote(name)}/{quote(file)}", _MOST_BYTES_OF_LINES)
            # Text after the last line break is still being written.
            return (body or b"").decode("utf-8", "replace").split("\n")[:-1]

    def fetch(self, name: str, file: str, target: Path, size: int | None = None) -> bool:
        """Copy a file of a run folder; the target is replaced atomically.

        Parameters
        ----------
        name, file : str
        target : Path
        size : int, optional
            Bytes that it must have.

        Returns
        -------
        bool
            Whether the file still existed. Temporary files of a run may vanish after the folder was listed.

        Raises
        ------
        RunError
            If the server sends another number of bytes.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{os.getpid()}.part")
        try:
            with (
                self._errors(),
                self._http.stream("GET", f"{RUNS}/{quote(name)}/{quote(file)}", headers=_PLAIN) as reply,
            ):
                if reply.status_code == httpx.codes.NOT_FOUND:
                    return False
                self._check(reply)
                came = 0
                with temporary.open("wb") as stream:
                    for chunk in self._chunks(reply, sys.maxsize if size is None else size):
                        came += stream.write(chunk)
                if size is not None and came != size:
                    raise RunError(f"{self.address} sends {came} bytes of {file}, and listed {size}")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _get(self, path: str, most: int) -> bytes | None:
        """Return the content of a path, up to a limit; None if there is no such path."""
        with self._http.stream("GET", path, headers=_PLAIN) as reply:
            if reply.status_code == httpx.codes.NOT_FOUND:
                return None
            self._check(reply)
            return b"".join(self._chunks(reply, most))

    def _check(self, reply: httpx.Response) -> None:
        if not reply.is_success:
            begin = next(reply.iter_bytes(_MOST_BYTES_OF_AN_ERROR), b"")
            raise self._refusal(reply.status_code, begin.decode("utf-8", "replace"))

    def _chunks(self, reply: httpx.Response, most: int) -> Iterator[bytes]:
        """Yield a reply's bytes as they arrive; refuse compressed replies and more bytes than the limit."""
        if reply.headers.get("content-encoding", "identity") != "identity":
            raise RunError(f"{self.address} sends compressed bytes, which were not requested")
        came = 0
        for chunk in reply.iter_bytes():
            came += len(chunk)
            if came > most:
                raise RunError(f"{self.address} sends more than the {most} bytes that it may")
            yield chunk

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise self._refusal(error.response.status_code, error.response.text) from None
        except httpx.TransportError as error:
            raise self._explain(error) from None
        except InputError:
            raise
        except (httpx.HTTPError, DecodeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RunError(f"{self.address} does not answer like a fedlora server ({type(error).__name__})") from None

    def _refusal(self, status: int, text: str) -> InputError | RunError:
        if status == httpx.codes.FORBIDDEN:
            remedy = "takes no orders from this machine; add its address to control_from in the server's TOML"
            return InputError("address", self.address, remedy)
        flowers = error_of(text)
        said = f"[{flowers[0]}] {_said(flowers[1])}" if flowers else f"HTTP {status}"
        return RunError(f"{self.address} refuses: {said}")

    def _explain(self, error: httpx.TransportError) -> InputError | UnreachableError:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            given = str(self.root_certificates) if self.root_certificates else "(this machine's authorities)"
            why = text.partition("CERTIFICATE_VERIFY_FAILED]")[2].partition(" (_ssl")[0].strip(": ")
            why = why.removeprefix("certificate verify failed: ")
            remedy = f"does not vouch for {self.address} ({why}); give the authority that signed its certificate"
            return InputError("root_certificates", given, remedy)
        if "SSL" in text and ("WRONG_VERSION" in text or "record layer" in text or "UNKNOWN_PROTOCOL" in text):
            return InputError("address", self.address, "speaks plain HTTP, not TLS; give the address of a TLS server")
        if isinstance(error, httpx.RemoteProtocolError) and self._http.base_url.scheme == "http":
            return InputError("address", self.address, "does not answer plain HTTP; leave TLS on")
        return UnreachableError(f"{self.address} cannot be reached ({text or type(error).__name__}); is the server up?")


def _sizes(content: object) -> dict[str, int]:
    if not isinstance(content, dict) or not all(type(size) is int and size >= 0 for size in content.values()):
        raise ValueError("no sizes by name")
    return content


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _said(text: str) -> str:
    return " ".join(plain_text(text).split())


class UnreachableError(RunError):
    """The address does not answer, or the connection broke."""


def _app() -> bytes:
    """Return the app that Flower requires with a run. It has no code: both sides have fedlora installed."""
    about = {
        "project": {"name": "fedlora", "version": version("fedlora"), "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedlora",
                    "components": {"serverapp": SERVER_APP, "clientapp": CLIENT_APP},
                    "config": {"config": "", "output": "", "resume": False},
                }
            }
        },
    }
    return build_app(tomli_w.dumps(about))

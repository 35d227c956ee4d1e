"""A server seen from outside: its nodes, its runs and their folders, through Flower's Control API."""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import click
import httpx
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.cli.flower_config import read_superlink_connection
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor

from fedlora.deployment.config import KEEP_ALIVE_SECONDS, NODE, RUNS
from fedlora.deployment.keys import read_file
from fedlora.errors import InputError, RunError

SERVER_APP, CLIENT_APP = "strategies.server_app:app", "clients.node_app:app"
ONLINE = "online"


@dataclass(frozen=True)
class Node:
    """A registered node.

    Attributes
    ----------
    name, status : str
        Status is registered (never seen), online or offline.
    public_key : bytes
        PEM.
    """

    name: str
    status: str
    public_key: bytes


@dataclass(frozen=True)
class NodeStatus:
    """What the federation knows of a node.

    Attributes
    ----------
    status : str
        unknown, registered (never seen), online or offline.
    until : float
        When its lease ends, in seconds of the server's clock: for online nodes; a sign of life moves it.
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
        What went over the server's sockets for this run, inside TLS, as Flower counts it.
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
        The authority that signed the server's certificate; this machine's own authorities if None.
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
        interceptors: list[ProtobufClientInterceptor] = [
            CliClientHttpInterceptor(),
            RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
        ]
        self._control = ControlHttpClient(url, interceptors=interceptors, verify=verify)
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
            entry = read_superlink_connection(name)
        except click.ClickException as error:
            # Flower's words for this mistake begin with another.
            _, missing, _ = error.message.partition("not found in the Flower configuration file")
            remedy = f"there is no such server; add {entry_of}" if missing else error.message
            raise InputError("--on", name, remedy) from None
        if not entry.address or entry.address.startswith(":"):
            raise InputError("--on", name, f"has no address; add {entry_of}")
        certificates = Path(entry.root_certificates).expanduser() if entry.root_certificates else None
        return cls(entry.address, certificates, bool(entry.insecure))

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

    def nodes(self) -> list[Node]:
        """Return the registered nodes by name."""
        with self._errors():
            listed = self._control.ListNodes(ListNodesRequest()).nodes_info
        return sorted(
            (Node(info.name, info.status, info.public_key) for info in listed if info.status != "unregistered"),
            key=lambda node: node.name,
        )

    def register(self, public_key: bytes, name: str) -> None:
        """Let a node in.

        Raises
        ------
        InputError
            If its key or its name is registered already.
        """
        for node in self.nodes():
            if node.public_key == public_key:
                raise InputError("PUBLIC_KEY", node.name, "is registered already under this name; one key is one node")
            if node.name == name:
                raise InputError("--name", name, "is the name of another node; choose another")
        with self._errors():
            self._control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def node_status(self, public_key: bytes) -> NodeStatus | None:
        """Return what the federation knows of a node; None if this is no server of fedlora's, and does not tell."""
        with self._errors():
            reply = self._http.get(NODE, params={"key": public_key.decode()})
            if reply.status_code == httpx.codes.NOT_FOUND:
                return None
            return NodeStatus(**reply.raise_for_status().json())

    def start(self, config: str, *, resume: bool) -> int:
        """Submit a run; return its number.

        Parameters
        ----------
        config : str
            The config as TOML text.
        resume : bool
            Go on with the run folder that the server has.
        """
        override = user_config_to_proto({"config": config, "resume": resume})
        with self._errors():
            reply = self._control.StartRun(StartRunRequest(fab=_bundle(), override_config=override))
        if not reply.HasField("run_id"):
            raise RunError(f"{self.address} did not start the run: {reply.note or 'no reason given'}")
        return int(reply.run_id)

    def run(self, number: int) -> RunState:
        """Return where a run stands."""
        with self._errors():
            run = self._control.ListRuns(ListRunsRequest(run_id=number)).run_dict[number]
        status = run.status
        return RunState(status.status, status.sub_status, status.details, run.bytes_sent, run.bytes_recv)

    def unfinished(self) -> list[int]:
        """Return the numbers of the runs that go on."""
        with self._errors():
            runs = self._control.ListRuns(ListRunsRequest()).run_dict
        return sorted(number for number, run in runs.items() if run.status.status != "finished")

    def stop(self, number: int) -> None:
        """Stop a run; ClientApps that are at work finish their message."""
        with self._errors():
            self._control.StopRun(StopRunRequest(run_id=number))

    def files(self, name: str) -> dict[str, int] | None:
        """Return the files of a run folder on the server with their sizes; None if there is no such folder."""
        with self._errors():
            reply = self._http.get(f"{RUNS}/{quote(name)}")
            if reply.status_code == httpx.codes.NOT_FOUND:
                return None
            return dict(reply.raise_for_status().json())

    def lines(self, name: str, file: str) -> list[str]:
        """Return the lines of a growing file of a run folder; none if there is no such file."""
        with self._errors():
            reply = self._http.get(f"{RUNS}/{quote(name)}/{quote(file)}")
            if reply.status_code == httpx.codes.NOT_FOUND:
                return []
            # What follows the last line break is on its way to the disk.
            return reply.raise_for_status().content.decode("utf-8", "replace").split("\n")[:-1]

    def fetch(self, name: str, file: str, target: Path) -> None:
        """Copy a file of a run folder, if it is there; the target is there whole, or as it was."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with self._errors(), self._http.stream("GET", f"{RUNS}/{quote(name)}/{quote(file)}") as reply:
                if reply.status_code == httpx.codes.NOT_FOUND:
                    return  # it went since the folder was listed: what a run writes beside its files is short-lived
                if reply.is_error:
                    reply.read()  # what it says is wrong
                reply.raise_for_status()
                with temporary.open("wb") as stream:
                    for chunk in reply.iter_bytes():
                        stream.write(chunk)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            response = error.response
            if response.status_code == httpx.codes.FORBIDDEN:
                remedy = "takes no orders from this machine; add its address to control_from in the server's TOML"
                raise InputError("address", self.address, remedy) from None
            flowers = FlowerError.from_json(response.text)
            said = f"[{flowers.code}] {flowers.message}" if flowers else f"HTTP {response.status_code}"
            raise RunError(f"{self.address} refuses: {said}") from None
        except httpx.TransportError as error:
            raise self._explain(error) from None

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


class UnreachableError(RunError):
    """Nobody answers at the address, or the connection broke."""


def _bundle() -> Fab:
    """The app that Flower wants with a run: no code, only where the code is that both sides have installed."""
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
    content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(about).encode()})
    return Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)

"""Everything that reaches below Flower's public interface, so that a new Flower is met in this file alone.

All else imports ``flwr.app``, ``flwr.clientapp``, ``flwr.serverapp`` and ``flwr.common.constant``. tests/test_flower.py
says of each thing here what breaks when Flower changes it. What only servers and nodes need is imported where it is
used: it takes seconds, and simulated clients do without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    import ssl

    from fastapi import FastAPI
    from flwr.supercore.control import ControlHttpClient
    from starlette.middleware import Middleware

__all__ = ["NodeInfo", "Run"]  # of a Grid's signatures


# Messages and runs


def act_as(run_id: int, node_id: int) -> None:
    """Let this process make messages: Flower's runtimes set who it is, and ``Message(...)`` reads it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def empty_run(run_id: int) -> Run:
    """Return run information with nothing but an id."""
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will name."""
    message.metadata.__dict__["_message_id"] = message_id


def set_run_id(message: Message, run_id: int) -> None:
    """Make a message one of another run."""
    message.metadata.__dict__["_run_id"] = run_id


def set_source(message: Message, node_id: int) -> None:
    """Make a message one that another node sent."""
    message.metadata.__dict__["_src_node_id"] = node_id


def set_reason(error: Error, reason: str) -> None:
    """Change an error's text."""
    error.__dict__["_reason"] = reason


def with_metadata(content: RecordDict | Error, metadata: Metadata) -> Message:
    """Put a message together from its parts."""
    return Message(content, metadata=metadata)  # type: ignore[call-overload]


def metadata_values(message: Message) -> dict[str, Any]:
    """Return everything that Flower knows of a message beside its content, by name."""
    return vars(message.metadata)


def unchecked_record(arrays: Iterable[tuple[str, str, tuple[int, ...], str, bytes]]) -> ArrayRecord:
    """Put an array record together without Flower's checks of each array.

    Parameters
    ----------
    arrays : iterable of tuple
        Name, dtype, shape, stype and data of each, of the types that Flower's own records hold.
    """
    record = ArrayRecord()
    held = record.__dict__["_data"]
    for name, dtype, shape, stype, data in arrays:
        array = held[name] = Array.__new__(Array)
        array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return record


def unchecked_metrics(values: Mapping[str, int | float]) -> MetricRecord:
    """Make a metric record of single numbers without Flower's checks of each."""
    record = MetricRecord()
    record.__dict__["_data"].update(values)
    return record


# Bytes


def to_bytes(record: RecordDict) -> bytes:
    """Serialise a record dict in Flower's protobuf form."""
    return bytes(recorddict_to_proto(record).SerializeToString())


def from_bytes(blob: bytes) -> RecordDict:
    """Undo :func:`to_bytes`."""
    return recorddict_from_proto(ProtoRecordDict.FromString(blob))


class States(MutableMapping[int, RecordDict]):
    """Clients' states by client, each kept as its bytes: who passes one on need not read it.

    Parameters
    ----------
    blobs : mutable mapping of int to bytes, optional
        Where the bytes are kept; a dict by default.
    """

    def __init__(self, blobs: MutableMapping[int, bytes] | None = None) -> None:
        self.blobs: MutableMapping[int, bytes] = {} if blobs is None else blobs

    def __getitem__(self, client: int) -> RecordDict:
        return from_bytes(self.blobs[client])

    def __setitem__(self, client: int, state: RecordDict) -> None:
        self.blobs[client] = to_bytes(state)

    def __delitem__(self, client: int) -> None:
        del self.blobs[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self.blobs)

    def __len__(self) -> int:
        return len(self.blobs)


def record_size(key: str, record: ArrayRecord) -> int:
    """Bytes of an array record, under its key, in a message's content."""
    return int(recorddict_to_proto(RecordDict({key: record})).ByteSize())


def message_sizes(message: Message) -> tuple[int, int]:
    """Bytes of a message in Flower's protobuf form, and of the content in it."""
    proto = message_to_proto(message)
    return int(proto.ByteSize()), int(proto.content.ByteSize())


# Secure aggregation: what it needs of cryptography is imported where it is used


def create_shares(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Divide a secret into so many shares, of which ``threshold`` give it back and fewer tell nothing (Shamir)."""
    from flwr.common.secure_aggregation.crypto import shamir

    return shamir.create_shares(secret, threshold, count)


def combine_shares(shares: list[bytes]) -> bytes:
    """Undo :func:`create_shares`; shares that do not fit together give a ValueError, or another secret."""
    from flwr.common.secure_aggregation.crypto import shamir

    return shamir.combine_shares(shares)


def agreed_key(private: Any, public: Any) -> bytes:
    """Return the 32 bytes, in URL-safe base64, on which two pairs of elliptic-curve keys agree."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key

    return generate_shared_key(private, public)


def encrypt(key: bytes, text: bytes) -> bytes:
    """Encrypt and authenticate a text (Fernet)."""
    from flwr.common.secure_aggregation.crypto import symmetric_encryption

    return symmetric_encryption.encrypt(key, text)


def decrypt(key: bytes, sealed: bytes) -> bytes:
    """Undo :func:`encrypt`; what another key sealed, or somebody changed, raises an exception."""
    from flwr.common.secure_aggregation.crypto import symmetric_encryption

    return symmetric_encryption.decrypt(key, sealed)


# Processes of servers and nodes

Load = Callable[..., Callable[[str, str, str], Callable[[Any, Any], Message]]]


def run_clientapp(load: Load, install: Callable[..., None]) -> None:
    """Run ``flwr-clientapp`` with this process' command line.

    Parameters
    ----------
    load : callable
        Takes the place of Flower's loader of the app that came with a run.
    install : callable
        Takes the place of Flower's unpacking of that app.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as runtime

    # Hooks that Flower does not declare.
    for name, ours in {"get_load_client_app_fn": load, "install_from_fab": install}.items():
        getattr(runtime, name)  # another Flower, which has no such hook, stops here
        setattr(runtime, name, ours)
    sys.argv[0] = "flwr-clientapp"
    flwr_clientapp()


def run_supernode() -> None:
    """Run ``flower-supernode`` with this process' command line."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    flower_supernode()


def run_superlink(middleware: Sequence[Middleware], configure: Callable[[FastAPI], None]) -> None:
    """Run ``flower-superlink`` with this process' command line.

    Parameters
    ----------
    middleware : sequence of Middleware
        What stands before Flower's own interfaces.
    configure : callable (FastAPI)
        Adds routes beside them.
    """
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink

    lengthen_task_lease()
    # Flower asks these two hooks for its enterprise extensions.
    for name, ours in {"get_middleware": lambda: tuple(middleware), "configure_app": configure}.items():
        getattr(extensions, name)
        setattr(extensions, name, ours)
    flower_superlink()


def lengthen_task_lease() -> None:
    """Let the SuperLink of this process wait 150 seconds for a ServerApp's heartbeat, in place of 60.

    A ServerApp sends one every 17 to 23 seconds. If the server's machine is suspended for 40, or waits so long for its
    disk, Flower would give the run up.
    """
    from flwr.supercore.corestate import sql_corestate

    patience = "HEARTBEAT_PATIENCE"  # in intervals of 30 seconds; another Flower, which has no such number, stops here
    setattr(sql_corestate, patience, max(5, getattr(sql_corestate, patience)))


def end_with(parent: int) -> None:
    """End this process when the process with that id has ended."""
    from flwr.supercore.app_utils import start_parent_process_monitor

    start_parent_process_monitor(parent)


def task_programs() -> list[str]:
    """Return the programs that a SuperNode may start for a task, whatever its kind."""
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    return list(TASK_TYPE_TO_COMMAND.values())


def node_lease(app: FastAPI, public_key: bytes) -> tuple[str, float] | None:
    """Return the status of the node with a public key, and until when it counts as online; None if it is unknown.

    ``app`` is the SuperLink's.
    """
    state = app.state.linkstate_factory.state()
    number = state.get_node_id_by_public_key(public_key)
    found = state.get_node_info(node_ids=[number]) if number is not None else []
    return (found[0].status, found[0].online_until) if found else None


# The Control API


@dataclass(frozen=True)
class Connection:
    """An entry of Flower's config.toml."""

    address: str | None
    root_certificates: str | None
    insecure: bool


class NoConnectionError(Exception):
    """There is no such entry, or something is wrong with it: the text says what, and is empty if there is none."""


def read_connection(name: str) -> Connection:
    """Read ``[superlink.NAME]`` of Flower's config.toml.

    Raises
    ------
    NoConnectionError
    """
    import click
    from flwr.cli.flower_config import read_superlink_connection

    try:
        entry = read_superlink_connection(name)
    except click.ClickException as error:
        # Flower's words for this mistake begin with another.
        missing = "not found in the Flower configuration file" in error.message
        raise NoConnectionError("" if missing else error.message) from None
    return Connection(entry.address, entry.root_certificates, bool(entry.insecure))


class Control:
    """A SuperLink's Control API.

    Parameters
    ----------
    url : str
    verify : ssl.SSLContext or bool
        As for httpx.
    """

    def __init__(self, url: str, verify: ssl.SSLContext | bool) -> None:
        from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        interceptors: list[Any] = [
            CliClientHttpInterceptor(),
            RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
        ]
        self._client: ControlHttpClient = ControlHttpClient(url, interceptors=interceptors, verify=verify)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def nodes(self) -> Sequence[Any]:
        """Return the nodes that are or were registered, each with ``name``, ``status`` and ``public_key``."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return self._client.ListNodes(ListNodesRequest()).nodes_info

    def register(self, public_key: bytes, name: str) -> None:
        """Let a node in."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node_id: int) -> None:
        """Let a node in no more."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(self, app: bytes, digest: str, config: dict[str, Any]) -> tuple[int | None, str]:
        """Submit a run of an app; return its number, or None and why there is none."""
        from flwr.common.serde import user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        bundle = Fab(hash_str=digest, content=app)
        request = StartRunRequest(fab=bundle, override_config=user_config_to_proto(config))
        reply = self._client.StartRun(request)
        return int(reply.run_id) if reply.HasField("run_id") else None, reply.note

    def runs(self, number: int | None = None) -> Mapping[int, Any]:
        """Return the runs, or one of them, by number; each has ``status``, ``bytes_sent`` and ``bytes_recv``."""
        from flwr.proto.control_pb2 import ListRunsRequest

        return self._client.ListRuns(ListRunsRequest(run_id=number)).run_dict

    def stop_run(self, number: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._client.StopRun(StopRunRequest(run_id=number))


def build_app(pyproject: str) -> bytes:
    """Pack an app that has nothing but a pyproject.toml."""
    from flwr.cli.build import build_fab_from_files

    content, _ = build_fab_from_files({"pyproject.toml": pyproject.encode()})
    return content


def error_of(text: str) -> tuple[Any, str] | None:
    """Return code and text of an error that Flower sent as JSON; None if it is none."""
    from flwr.supercore.error import FlowerError

    found = FlowerError.from_json(text)
    return (found.code, found.message) if found else None

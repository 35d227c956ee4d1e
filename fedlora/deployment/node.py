"""Supervise a SuperNode: start it, check that the server counts it as online, restart it, and shut it down."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.clients.node_app import APP
from fedlora.deployment.control import ONLINE, Server, UnreachableError
from fedlora.deployment.keys import check_secret, read_file, read_public_key
from fedlora.deployment.processes import Child, Pauses, check_port, flower_environment, until_signal, wait_until
from fedlora.errors import InputError, RunError
from fedlora.flower import task_programs
from fedlora.node.config import NodeConfig
from fedlora.node.resident import start_worker, stop_worker, worker_folder
from fedlora.status import DOING, read_written
from fedlora.timeline import phase

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
_MISSES = 4
_STOP_SECONDS = 20.0
_MESSAGE_SECONDS = 60.0


def join(file: Path, config: NodeConfig, *, tls: bool = True, node_auth: bool = True) -> None:
    """Run a node until SIGTERM or SIGINT.

    Parameters
    ----------
    file : Path
        Path of node.toml, which the ClientApp reads again for each message.
    config : NodeConfig
        Its content.
    tls : bool
        Without TLS anybody on the network path can read and change messages, or pose as the server.
    node_auth : bool
        Without it the node does not authenticate.

    Raises
    ------
    InputError
        If a file, an address or a port is wrong, or the server refuses the node for good.
    """
    link = config.superlink
    key = _key(config, tls, node_auth)
    certificates = Path(link.root_certificates) if link.root_certificates and tls else None
    if certificates is not None:
        read_file(certificates, "superlink.root_certificates")
    check_port("127.0.0.1", link.port, "superlink.port")
    try:
        config.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError("state.directory", str(config.directory), f"cannot be made ({error.strerror})") from None
    child = Child(
        "fedlora.deployment.supernode_process",
        [
            *("--superlink", link.address, "--port", str(link.port)),
            *(("--root-certificates", str(certificates)) if certificates else () if tls else ("--insecure",)),
            *(("--auth-supernode-private-key", str(link.private_key)) if key else ()),
            *("--node-config", f'node-file="{file.absolute()}"'),
        ],
        config.directory,
        config.directory / "supernode.log",
        flower_environment(config.directory / "flower", [_programs(config.directory / "bin")]),
    )
    with (
        _alone(config.directory),
        Server(link.address, certificates, insecure=not tls) as server,
        until_signal() as stopping,
    ):
        workers = _Workers(file.absolute(), config)
        try:
            with phase("node", f"node {config.name}", detail=partial(_doing, worker_folder(config) / DOING)):
                _watch(child, workers, server, config, key, stopping)
        finally:
            _shut_down(child, workers)


def _doing(file: Path) -> str:
    return read_written(file) or "waiting for messages from the server"


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Lock a node's directory: its ledger and its worker belong to one node."""
    lock = FileLock(directory / "node.lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        remedy = "is another running node's; give every node a directory of its own"
        raise InputError("state.directory", str(directory), remedy) from None
    try:
        yield
    finally:
        lock.release()


def _key(config: NodeConfig, tls: bool, node_auth: bool) -> bytes | None:
    if not node_auth:
        return None
    given = config.superlink.private_key
    if not tls:
        remedy = "a node cannot prove who it is without TLS: add --insecure-no-node-auth"
        raise InputError("--insecure-no-tls", True, remedy)
    if given is None:
        raise InputError("superlink.private_key", None, "is required: the node's key (fedlora keys node)")
    check_secret(Path(given), "superlink.private_key")
    return read_public_key(Path(given), "superlink.private_key")


def _programs(folder: Path) -> Path:
    """Write the programs that Flower starts for tasks: ours for a message, a refusal for all others.

    A SuperLink may request other kinds of tasks, such as an agent, which bring their own code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for program in task_programs():
        ours = program == "flwr-clientapp"
        line = f'exec "{sys.executable}" -m fedlora.deployment.clientapp_process "$@"' if ours else "exit 1"
        path = folder / f".{program}"
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        path.chmod(0o700)
        os.replace(path, folder / program)
    return folder


class _Workers:
    """Starts the node's resident worker early, so that the first message need not wait for its imports."""

    def __init__(self, file: Path, config: NodeConfig) -> None:
        self.file, self.config = file, config
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the worker, unless one runs already."""
        self._processes = [process for process in self._processes if process.poll() is None]
        self._processes.append(start_worker(self.file, self.config, APP))

    def stop(self) -> None:
        """End the worker, whoever started it, even during its start."""
        stop_worker(self.config)
        for process in self._processes:
            process.terminate()
            process.wait()


def _watch(
    child: Child, workers: _Workers, server: Server, config: NodeConfig, key: bytes | None, stopping: threading.Event
) -> None:
    """Keep the node online: start the SuperNode when its key is free, and restart it whenever it drops out."""
    pauses = Pauses()
    first = True
    while not stopping.is_set():
        if _admitted(server, config, key, stopping, first):
            child.start()
            workers.start()
            _stay(child, server, config, key, stopping)
            if stopping.is_set():
                return
            refusal = _refusal(child, config, key)
            if refusal is not None and first:
                raise refusal
            log.warning("%s is out of the federation; joining again", config.name)
            child.stop(_STOP_SECONDS)
            first = False
        stopping.wait(pauses.next())


def _admitted(server: Server, config: NodeConfig, key: bytes | None, stopping: threading.Event, first: bool) -> bool:
    """Query the server before joining, since the SuperNode hardly says why it is refused; wait while the key is in use.

    Raises
    ------
    InputError
        If the server does not know the key, or another process is alive with it.
    """
    lease: float | None = None
    while not stopping.is_set():
        try:
            # Without a key there is no status to query; the call still checks the server's certificate.
            node = server.node_status(key or b"none")
        except UnreachableError as error:
            log.warning("%s", error)
            return False
        if key is None or node is None or node.status in ("registered", "offline"):
            return True
        shown = str(config.superlink.private_key)
        if node.status == "unknown":
            remedy = "the server does not know this key; its owner registers the .pub file: fedlora keys register"
            if first:
                raise InputError("superlink.private_key", shown, remedy)
            log.warning("%s", remedy)
            return False
        if lease is not None and node.until > lease:
            remedy = "another process is online with this key; one key is one node"
            raise InputError("superlink.private_key", shown, remedy)
        if lease is None:
            log.info("%s still counts as online; waiting up to a minute for its lease to end", config.name)
        lease = node.until
        stopping.wait(2.0)
    return False


def _stay(child: Child, server: Server, config: NodeConfig, key: bytes | None, stopping: threading.Event) -> None:
    """Return when the SuperNode has ended, or has been offline for a while."""
    seen = misses = 0
    while not stopping.wait(_LOOK_SECONDS if seen else 1.0):
        if not child.running:
            return
        child.turn_log()
        try:
            node = server.node_status(key) if key is not None else None
        except (RunError, InputError):
            # The server does not answer. The SuperNode retries by itself; if it gives up, its process ends.
            continue
        if node is None or node.status == ONLINE:
            if not seen:
                log.info("%s is in the federation at %s", config.name, config.superlink.address)
            seen, misses = 1, 0
        else:
            misses += 1
            # Starting takes the SuperNode some seconds.
            if misses >= (_MISSES if seen else 20 * _MISSES):
                return


def _refusal(child: Child, config: NodeConfig, key: bytes | None) -> InputError | None:
    """Return from the SuperNode's output why the server refused it permanently, if it did."""
    output = child.output()
    if key is None and "[code: 2001]" in output:
        remedy = "the server only accepts nodes with a key, and this one shows none: remove --insecure-no-node-auth"
        return InputError("superlink.private_key", None, remedy)
    return None


def _shut_down(child: Child, workers: _Workers) -> None:
    """Let the current message finish, since its privacy is spent; then end the SuperNode and the resident worker."""
    marker = "fedlora.deployment.clientapp_process"
    wait_until(lambda: not child.running or not child.started(marker), _MESSAGE_SECONDS)
    child.stop(_STOP_SECONDS)
    workers.stop()

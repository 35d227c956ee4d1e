"""Pass messages from Flower's client process to the node's resident worker, over a private local socket.

Flower starts a process for every message, which loads this module only. Model, tokens and torch stay in the worker. It
starts with the first message and ends after an idle time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from filelock import FileLock, Timeout
from flwr.app import Context, Error, Message

from fedlora.errors import ClientErrorCode, InputError
from fedlora.node.config import NodeConfig, load_node
from fedlora.node.outward_errors import outward_error
from fedlora.simulation.envelope import pack, unpack

log = logging.getLogger("fedlora")

READY = "ready"
START_SECONDS = 300.0
_LOG_BYTES = 10 * 2**20


class WorkerDiedError(RuntimeError):
    """The resident worker ended while handling a message, or did not start."""


def ask(node_file: str, app: str, message: Message, context: Context) -> Message:
    """Have the node's resident worker handle a message; start the worker if none runs.

    A worker that dies during a message is replaced. The message is then handled again, unless a step was taken: no
    charged step is taken twice. An error in the reply holds no text (:func:`outward_error`).

    Parameters
    ----------
    node_file : str
        Path of node.toml.
    app : str
        ``module:attribute`` of the ClientApp, in the owner's own installation.
    message : Message
    context : Context
        Its state is replaced by what the app left in it.
    """
    try:
        node = load_node(node_file)
        try:
            return _exchange(node_file, node, app, message, context)
        except WorkerDiedError as error:
            log.error("the worker ended; the message is handled again", exc_info=error)
        reply = _exchange(node_file, node, app, message, context)
        if reply.has_error() and reply.error.code == ClientErrorCode.STALE:
            # Not stale: the worker that died had begun the round.
            raise WorkerDiedError
        return reply
    except WorkerDiedError as error:
        log.error("the worker ended", exc_info=error)
        reason = WorkerDiedError.__name__
        return Message(Error(code=ClientErrorCode.WORKER_DIED, reason=reason), reply_to=message)
    except Exception as error:
        log.error("the message could not be handled", exc_info=error)
        return Message(outward_error(error), reply_to=message)


def start_worker(node_file: str | Path, node: NodeConfig, app: str) -> subprocess.Popen[bytes]:
    """Start the resident worker in its own session; it ends at once if the node already has one.

    It runs the owner's installation of fedlora, not the code sent with the run.
    """
    folder = worker_folder(node)
    environment = {**os.environ, "FEDLORA_CACHE": str(node.cache), "TOKENIZERS_PARALLELISM": "false"}
    if node.worker.device != "auto":
        environment["CUDA_VISIBLE_DEVICES"] = node.worker.device.removeprefix("cpu").removeprefix("cuda:")
    with _open_log(folder / "worker.log") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fedlora.node.worker_process", str(node_file), app],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=environment,
            start_new_session=True,
        )


def stop_worker(node: NodeConfig, patience: float = 10.0) -> bool:
    """End the node's resident worker, if any; return whether there was one.

    Its loaded model and tokens are lost; its ledger is on disk.

    Raises
    ------
    TimeoutError
        If it still runs after ``patience`` seconds.
    """
    folder, lock = worker_folder(node), worker_lock(node)
    with contextlib.suppress(Timeout), lock.acquire(timeout=0):
        return False
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((folder / "worker.pid").read_text()), signal.SIGTERM)
    try:
        with lock.acquire(timeout=patience):
            return True
    except Timeout:
        raise TimeoutError(f"the resident worker did not end within {patience:.0f} s") from None


def worker_folder(node: NodeConfig) -> Path:
    """Return the folder of the worker's socket, lock and log, which only its user can enter.

    Raises
    ------
    InputError
        If others can enter it, or it cannot be created.
    """
    folder = node.directory / "worker"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        remedy = f"cannot hold the worker's socket ({error.strerror}); give a folder that can be written"
        raise InputError("state.directory", node.state.directory, remedy) from None
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        remedy = f"others can enter {folder}, which holds the worker's socket; make it private (chmod 700)"
        raise InputError("state.directory", node.state.directory, remedy)
    return folder


def worker_lock(node: NodeConfig) -> FileLock:
    """Return the lock that a worker holds while it runs."""
    return FileLock(worker_folder(node) / "worker.lock", mode=0o600)


@contextlib.contextmanager
def socket_address(folder: Path) -> Iterator[str]:
    """Yield a socket address that is short enough for the system, however long the folder's path is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/worker.sock"
    finally:
        os.close(descriptor)


def _exchange(node_file: str, node: NodeConfig, app: str, message: Message, context: Context) -> Message:
    connection = _connect(node_file, node, app)
    with connection:
        try:
            connection.send((pack(message), context))
            envelope, state = connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError from error
    context.state = state
    return unpack(envelope)


def _connect(node_file: str, node: NodeConfig, app: str) -> Connection:
    """Return a connection to a worker that is ready for a message."""
    folder = worker_folder(node)
    started: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        connection = _try_connect(folder)
        if connection is not None:
            return connection
        if started is not None and started.poll():
            raise WorkerDiedError(f"the worker ended with {started.returncode} at its start; see {folder}/worker.log")
        if started is None or (started.poll() == 0 and not _is_running(node)):
            started = start_worker(node_file, node, app)
        time.sleep(0.05)
    raise WorkerDiedError(f"no worker was ready after {START_SECONDS:.0f} s")


def _try_connect(folder: Path) -> Connection | None:
    client = socket.socket(socket.AF_UNIX)
    try:
        with socket_address(folder) as address:
            client.connect(address)
        connection = Connection(client.detach())
    except OSError:
        client.close()
        return None
    try:
        # It may be busy with another message. A worker that is just ending sends nothing.
        if connection.recv() == READY:
            return connection
    except (EOFError, OSError):
        pass
    connection.close()
    return None


def _is_running(node: NodeConfig) -> bool:
    try:
        with worker_lock(node).acquire(timeout=0):
            return False
    except Timeout:
        return True


def turn_log(folder: Path) -> None:
    """Redirect this process's output to a new log if the worker's log is long, since servers' messages add to it."""
    path = folder / "worker.log"
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        with _open_log(path) as descriptor:
            for output in (1, 2):
                os.dup2(descriptor, output)


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[int]:
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        os.replace(path, path.with_suffix(".log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

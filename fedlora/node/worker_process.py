"""The resident worker: keeps the base model and the owner's tokens loaded between messages.

Run as ``python -m fedlora.node.worker_process NODE_FILE MODULE:APP``; :mod:`fedlora.node.resident` does so when a
message comes. It is the simulation's :class:`~fedlora.simulation.worker.Worker`, reached over a local socket in a
private folder instead of Ray, and it ends after ``worker.idle_seconds`` without a message, which frees the GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout
from flwr.app import Error

from fedlora.imports import quick_imports
from fedlora.node.config import NodeConfig, load_node
from fedlora.node.outward_errors import is_outward
from fedlora.node.resident import READY, socket_address, turn_log, worker_folder, worker_lock
from fedlora.node.room import tidy
from fedlora.simulation.envelope import Envelope
from fedlora.status import DOING, Teller, written
from fedlora.timeline import phase

if TYPE_CHECKING:
    from fedlora.simulation.worker import Worker

log = logging.getLogger("fedlora")

_LONGEST_RECORD = 20_000


def main(node_file: str, app: str) -> None:
    """Serve until ``worker.idle_seconds`` pass without a message; return at once if the node already has a worker."""
    # Files created from here on (log, tokens, socket) are readable by the owner only.
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_ShortLines("%(asctime)s %(levelname)s %(message)s"))
    node = load_node(node_file)
    lock = worker_lock(node)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    with lock:
        folder = worker_folder(node)
        (folder / "worker.pid").write_text(str(os.getpid()))
        tidy(node.cache)
        with written(folder / DOING), Teller(log.info):
            serve(node, app, folder)


def serve(node: NodeConfig, app: str, folder: Path) -> None:
    """Load the app and handle messages one by one."""
    started = time.perf_counter()
    with phase("worker: imports", "importing libraries"), quick_imports():
        from fedlora.simulation.worker import Worker

        worker = Worker(app, node.worker.threads or os.cpu_count() or 1)
    with socket.socket(socket.AF_UNIX) as listener, socket_address(folder) as address:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        listener.bind(address)
        listener.listen()
        listener.settimeout(node.worker.idle_seconds)
        log.info("worker %d of %s is ready after %.1f s", os.getpid(), node.name, time.perf_counter() - started)
        while True:
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                break
            accepted.setblocking(True)
            turn_log(folder)
            with Connection(accepted.detach()) as connection:
                _handle(worker, connection)
        os.unlink(address)
    log.info("no message for %.0f s: worker %d ends", node.worker.idle_seconds, os.getpid())


class _ShortLines(logging.Formatter):
    """Truncates text whose length a server controls."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if len(text) <= _LONGEST_RECORD else f"{text[:_LONGEST_RECORD]}... ({len(text)} characters)"


def _handle(worker: Worker, connection: Connection) -> None:
    started = time.perf_counter()
    try:
        connection.send(READY)
        envelope, context = connection.recv()
        (reply,), (state,), _ = worker.handle([envelope], [context], {}, 1)
        connection.send((_outward(reply), state))
        kind, done = envelope.metadata.message_type, "an error" if reply.error else "arrays and counts"
        log.info("%s of run %d: %s, %.2f s", kind, envelope.metadata.run_id, done, time.perf_counter() - started)
    except (EOFError, OSError) as error:
        # The client process ended; charged steps stay charged.
        log.warning("a message could not be answered: %s", error)


def _outward(envelope: Envelope) -> Envelope:
    """Remove the text of an error, unless the app made it fit to leave the node."""
    error = envelope.error
    envelope = replace(envelope, notes=())  # the owner's log holds the details
    if error is None or is_outward(error.reason):
        return envelope
    log.error("the app failed: %s", error.reason)
    return Envelope(envelope.metadata, None, Error(code=error.code, reason="Error"))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Supervise a SuperLink: start it, watch its nodes, restart it, and shut it down."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedlora.deployment.config import ServerFile
from fedlora.deployment.control import ONLINE, Server
from fedlora.deployment.keys import check_certificate, check_secret, read_file
from fedlora.deployment.processes import Child, Pauses, check_port, flower_environment, until_signal, wait_until
from fedlora.errors import InputError, RunError
from fedlora.status import DOING, read_written
from fedlora.timeline import phase

log = logging.getLogger(__name__)

_START_SECONDS = 90.0
_LOOK_SECONDS = 5.0
_MISSES = 4
_STOP_SECONDS = 20.0
_GOODBYE_SECONDS = 5.0


def serve(config: ServerFile, *, tls: bool = True, node_auth: bool = True) -> None:
    """Run a server until SIGTERM or SIGINT.

    Parameters
    ----------
    config : ServerFile
    tls : bool
        Without TLS anybody on the network path can read and change messages, and nodes cannot be authenticated.
    node_auth : bool
        Without it anybody who reaches the port is accepted as a node.

    Raises
    ------
    InputError
        If a file, an address or a port is wrong.
    RunError
        If the SuperLink does not start.
    """
    arguments = _tls_arguments(config, tls, node_auth)
    check_port(config.host, config.port, "port")
    try:
        (config.folder / "runs").mkdir(parents=True, exist_ok=True)
        # The database holds the nodes' names, and models in transit.
        config.folder.chmod(0o700)
    except OSError as error:
        raise InputError("directory", config.directory, f"cannot be made ({error.strerror})") from None
    child = Child(
        "fedlora.deployment.superlink_process",
        [
            *("--host", config.host, "--runs", str(config.folder / "runs")),
            *(part for network in config.control_from for part in ("--control-from", network)),
            *("--", "--port", str(config.port), "--database", str(config.folder / "state.db"), *arguments),
            "--disable-runtime-dependency-installation",
        ],
        config.folder,
        config.folder / "superlink.log",
        flower_environment(config.folder / "flower"),
    )
    certificates = Path(config.tls.ca_certificate) if config.tls is not None and tls else None
    with Server(config.address, certificates, insecure=not tls) as server, until_signal() as stopping:
        try:
            _start(child, server, stopping)
            log.info("server on %s:%d, runs in %s", config.host, config.port, config.folder / "runs")
            with phase("server", "server", detail=partial(_doing, config.folder / "runs")):
                _watch(child, server, stopping)
        finally:
            _shut_down(child, server)


def _doing(runs: Path) -> str:
    """Describe the runs that are under way."""
    told = {file.parent.name: read_written(file) for file in sorted(runs.glob(f"*/{DOING}"))}
    return "; ".join(f"run {name}: {text}" for name, text in told.items() if text) or "waiting for runs"


def _tls_arguments(config: ServerFile, tls: bool, node_auth: bool) -> list[str]:
    if not tls:
        # Flower's authentication of nodes needs TLS below it.
        if node_auth:
            raise InputError(
                "--insecure-no-tls", True, "nodes cannot be authenticated without TLS: add --insecure-no-node-auth"
            )
        return ["--insecure"]
    if config.tls is None:
        raise InputError("tls", None, "is required: ca_certificate, certificate and private_key (fedlora keys server)")
    paths = {key: Path(value) for key, value in config.tls.model_dump().items()}
    read_file(paths["ca_certificate"], "tls.ca_certificate")
    check_secret(paths["private_key"], "tls.private_key")
    check_certificate(
        paths["certificate"], paths["private_key"], ("tls.certificate", "tls.private_key"), config.own_host
    )
    arguments = [
        *("--ssl-ca-certfile", str(paths["ca_certificate"])),
        *("--ssl-certfile", str(paths["certificate"]), "--ssl-keyfile", str(paths["private_key"])),
    ]
    return [*arguments, "--enable-supernode-auth"] if node_auth else arguments


def _start(child: Child, server: Server, stopping: threading.Event) -> None:
    child.start()
    wait_until(lambda: not child.running or _answers(server), _START_SECONDS, stopping)
    if stopping.is_set() or _answers(server):
        return
    lines = child.output().strip().splitlines()
    raise RunError(f"the SuperLink does not start; {child.log} ends with: {lines[-1] if lines else 'nothing'}")


def _answers(server: Server) -> bool:
    try:
        server.nodes()
    except RunError:
        return False
    return True


def _watch(child: Child, server: Server, stopping: threading.Event) -> None:
    """Log which nodes come and go; restart the SuperLink if it died or no longer answers."""
    pauses = Pauses()
    known: dict[str, str] = {}
    misses = 0
    while not stopping.wait(_LOOK_SECONDS):
        try:
            seen = {node.name: node.status for node in server.nodes()}
            misses = 0
        except RunError:
            misses += 1
            if child.running and misses < _MISSES:
                continue
            log.warning("the SuperLink %s; starting it again", "does not answer" if child.running else "died")
            child.stop(grace=5.0)
            if not stopping.wait(pauses.next()):
                try:
                    _start(child, server, stopping)
                    log.info("the SuperLink is back; continue runs with --resume")
                except RunError as error:
                    log.warning("%s", error)
            continue
        for name, status in seen.items():
            if known.get(name) != status:
                online = sum(other == ONLINE for other in seen.values())
                log.info("node %s is %s (%d of %d online)", name, status, online, len(seen))
        known = seen


def _shut_down(child: Child, server: Server) -> None:
    """Stop the runs, let their ServerApps and ClientApps finish, then end the SuperLink."""
    if child.running:
        try:
            running = server.unfinished()
            for number in running:
                log.info("stopping run %d; continue it with --resume", number)
                server.stop(number)
            if running:
                # Busy ClientApps still push their reply, and would wait for a SuperLink that has ended.
                time.sleep(3.0)
        except (RunError, InputError) as error:
            log.warning("%s", error)
    server.close()
    child.stop(_STOP_SECONDS)
    # A ServerApp may still be reporting its end.
    wait_until(lambda: not child.started(), _GOODBYE_SECONDS)
    for number in child.started():
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)

"""The SuperLink's process: Flower's own, behind a guard, and with a service for run folders.

Flower serves three interfaces on one port: Fleet for nodes, Control for those who submit runs, Runtime for its own
child processes. Only Fleet authenticates callers. The guard therefore admits only this machine to Runtime, and this
machine and the networks of ``control_from`` to Control and the run folders.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.middleware import Middleware
from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedlora.deployment.config import KEEP_ALIVE_SECONDS, NODE, RUNS
from fedlora.deployment.processes import PARENT
from fedlora.flower import end_with, node_lease, run_superlink

_FOR_ALL = ("/v1/fleet/", "/health", NODE)
_FOR_THIS_MACHINE = ("/v1/runtime/",)
_GRACE_SECONDS = 3
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Guard:
    """Answers 403 to callers without access to an interface.

    Parameters
    ----------
    app : ASGIApp
    own : sequence of networks
        This machine's addresses.
    control : sequence of networks
        Networks, beside this machine, that may call Control.
    """

    def __init__(self, app: ASGIApp, own: Sequence[Network], control: Sequence[Network]) -> None:
        self.app, self.own, self.control = app, own, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a call, or refuse it."""
        if scope["type"] != "http" or self._allowed(scope):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("not from this address: see control_from", 403)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path = scope["path"]
        # An allow-list, so that no other spelling of a path slips through.
        if path.startswith(_FOR_ALL) and ".." not in path:
            return True
        caller = ipaddress.ip_address(scope["client"][0]) if scope.get("client") else None
        if isinstance(caller, ipaddress.IPv6Address) and caller.ipv4_mapped:
            caller = caller.ipv4_mapped
        if caller is None:
            return False
        networks = self.own if path.startswith(_FOR_THIS_MACHINE) else (*self.own, *self.control)
        return any(caller in network for network in networks)


def add_routes(app: FastAPI, runs: Path) -> None:
    """Serve run folders read-only, and the status of nodes."""

    @app.get(RUNS + "/{name}", name="fedlora_run_files", response_model=None)
    def files(name: str) -> dict[str, int]:
        """List a run folder's files with their sizes."""
        folder = _run_folder(runs, name)
        # Names with a leading dot are unfinished files.
        found = {}
        for path in sorted(folder.rglob("*")):
            # A refused run may delete its folder meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.name.startswith("."):
                    found[str(path.relative_to(folder))] = path.stat().st_size
        return found

    @app.get(RUNS + "/{name}/{file:path}", name="fedlora_run_file", response_model=None)
    def file(name: str, file: str) -> FileResponse:
        """Send one file of a run folder."""
        folder = _run_folder(runs, name).resolve()
        path = (folder / file).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise HTTPException(404)
        return FileResponse(path)

    @app.get(NODE, name="fedlora_node", response_model=None)
    def node(request: Request, key: str) -> dict[str, str | float]:
        """Return the status of the node with a public key, and the end of its lease."""
        status, until = node_lease(request.app, key.encode()) or ("unknown", 0)
        return {"status": status, "until": until}


def _run_folder(runs: Path, name: str) -> Path:
    if not _RUN_NAME.fullmatch(name) or not (runs / name).is_dir():
        raise HTTPException(404)
    return runs / name


def own_networks(host: str) -> list[Network]:
    """Return the loopback networks and the addresses of the server's host name."""
    found = {"127.0.0.0/8", "::1/128"}
    if host not in ("0.0.0.0", "::"):
        found |= {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    return [ipaddress.ip_network(network) for network in sorted(found)]


def main() -> None:
    """Run ``flower-superlink`` with the arguments after ``--``."""
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--control-from", action="append", default=[])
    options = parser.parse_args(sys.argv[1:split])
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
    own = own_networks(options.host)
    control = [ipaddress.ip_network(network) for network in options.control_from]
    # Keep a node's connection open between two queries, which saves TLS handshakes, without delaying the shutdown.
    uvicorn.run = functools.partial(
        uvicorn.run, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=_GRACE_SECONDS
    )
    # A line for every query of every node would fill the disk within a year.
    logging.getLogger("uvicorn.access").addFilter(lambda record: False)
    logging.getLogger("flwr").addFilter(lambda record: "ListNodes" not in record.getMessage())
    sys.argv = ["flower-superlink", "--host", options.host, *sys.argv[split + 1 :]]
    run_superlink([Middleware(Guard, own=own, control=control)], lambda app: add_routes(app, options.runs))


if __name__ == "__main__":
    main()

"""A federation on this machine, as its owners would start it: keys, a server, and a node for each data file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.deployment import keys
from fedlora.deployment.control import ONLINE, Server
from fedlora.deployment.processes import free_ports

ROOT = Path(__file__).parents[2]
NAME = "trial"


def free_port() -> int:
    """Return a port that nobody uses now."""
    return free_ports(1)[0]


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something; fail if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.2)


class Federation:
    """A server and nodes, each a command of its own.

    Parameters
    ----------
    folder : Path
    data : mapping of str to Path
        Each node's file by its name.
    cache : Path
        For FEDLORA_CACHE, shared by all.
    """

    def __init__(self, folder: Path, data: Mapping[str, Path], cache: Path) -> None:
        self.folder, self.data, self.cache = folder, data, cache
        self.policy: dict[str, Any] = {"max_epsilon": 100.0, "delta": 1e-3}
        self.home = folder / "flower"
        self.environment = {
            **os.environ,
            "FEDLORA_CACHE": str(cache),
            "FLWR_HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.port = free_port()
        self.ports: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.proxy = Proxy(self.port)
        keys.make_ca(folder / "keys")
        keys.make_server_certificate(folder / "keys", ["localhost"])
        self.ca = folder / "keys" / "ca.crt"
        tls = {"ca_certificate": "keys/ca.crt", "certificate": "keys/server.crt", "private_key": "keys/server.key"}
        self._write("server.toml", {"port": self.port, "directory": "server", "tls": tls})
        entry = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(self.ca)}
        self._write("flower/config.toml", {"superlink": {NAME: entry}})
        for name in data:
            keys.make_node_key(folder / "keys", name)
            self.ports[name] = free_port()
            self.write_node(name)

    def write_node(self, name: str, like: str | None = None, **superlink: object) -> Path:
        """Write a node.toml: it calls the server through the counting proxy.

        ``like`` names the node whose data it holds, if not its own; None removes a key of ``superlink``.
        """
        link = {
            "address": f"127.0.0.1:{self.proxy.port}",
            "root_certificates": "keys/ca.crt",
            "private_key": f"keys/{name}.key",
            "port": self.ports.get(name) or free_port(),
            **superlink,
        }
        content = {
            "name": name,
            "superlink": {key: value for key, value in link.items() if value is not None},
            "data": {"path": str(self.data[like or name])},
            "policy": self.policy,
            "worker": {"threads": 1, "device": "cpu"},
            "state": {"directory": f"state-{name}", "cache": str(self.cache)},
        }
        return self._write(f"{name}.toml", content)

    def set_policy(self, **policy: Any) -> None:
        """Let all owners change their ``[policy]``; it holds from the next message on."""
        self.policy = policy
        for name in self.data:
            self.write_node(name)

    def empty_ledgers(self) -> None:
        """Let the owners forget what other tests spent."""
        for name in self.data:
            for file in (self.folder / f"state-{name}").glob("ledger.sqlite*"):
                file.unlink()

    def __enter__(self) -> Federation:
        try:
            self.start_server()
            with self.server() as server:
                for name in self.data:
                    server.register(keys.read_public_key(self.folder / "keys" / f"{name}.pub", "PUBLIC_KEY"), name)
            for name in self.data:
                self.start_node(name)
            self.wait_online(len(self.data))
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def command(self, *arguments: object) -> list[str]:
        """A command of fedlora's."""
        return [sys.executable, "-c", "from fedlora.cli import main; main()", *map(str, arguments)]

    def fedlora(self, *arguments: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        """Run a command of fedlora's to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def start(self, name: str, *arguments: object) -> None:
        """Start a command of fedlora's; its output goes to NAME.out."""
        with (self.folder / f"{name}.out").open("ab") as stream:
            self.processes[name] = subprocess.Popen(
                self.command(*arguments), env=self.environment, cwd=self.folder, stdout=stream, stderr=stream
            )

    def output(self, name: str) -> str:
        """What a started command printed."""
        return (self.folder / f"{name}.out").read_text(encoding="utf-8")

    def start_server(self) -> None:
        """Start the server, and wait for it."""
        self.start("server", "server", "server.toml")
        until(lambda: "INFO server on" in self.output("server"), 600, "server")

    def start_node(self, name: str) -> None:
        """Start a node."""
        self.start(name, "node", f"{name}.toml")

    def server(self) -> Server:
        """Connect to the server."""
        return Server(f"127.0.0.1:{self.port}", self.ca)

    def wait_online(self, count: int, seconds: float = 600) -> None:
        """Wait until so many nodes are in the federation."""
        with self.server() as server:
            until(lambda: sum(n.status == ONLINE for n in server.nodes()) == count, seconds, f"{count} nodes online")

    def children(self, marker: str, name: str | None = None) -> list[int]:
        """Process ids of this federation with a text on their command line; a node's own if its name is given."""
        homes = [self.folder / f"state-{name}", self.folder / f"{name}.toml"] if name else [self.folder]
        return [
            pid for pid, line, env in _processes() if marker in line and any(str(home) in line + env for home in homes)
        ]

    def kill(self, marker: str, name: str | None = None) -> None:
        """SIGKILL the processes of this federation with a text on their command line; there is one at least."""
        found = self.children(marker, name)
        assert found, f"no process with {marker}"
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """End the nodes, then the server, each in its own order."""
        for name in sorted(self.processes, key="server".__eq__):
            process = self.processes[name]
            process.terminate()
        for process in self.processes.values():
            process.wait(60)
        self.proxy.close()

    def left(self) -> list[str]:
        """Command lines of what is still there."""
        return left_of(self.folder)

    def _write(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        return path


def left_of(folder: Path) -> list[str]:
    """Command lines of the processes, beside this one, that name a folder there or in their environment."""
    return [line for pid, line, env in _processes() if str(folder) in line + env and pid != os.getpid()]


def _processes() -> Iterator[tuple[int, str, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        # Processes end while one looks.
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            environment = (entry / "environ").read_bytes().decode("utf-8", "replace")
            if line:
                yield int(entry.name), line, environment


class Proxy:
    """Passes bytes between the nodes and the server, and counts them: what is on the wire.

    Attributes
    ----------
    port : int
    down, up : int
        Bytes from and to the server.
    """

    def __init__(self, server: int) -> None:
        self.down = self.up = 0
        self._server = server
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def total(self) -> int:
        """Bytes both ways."""
        return self.down + self.up

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._server))
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._copy, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, "down"), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                target.sendall(chunk)
                with self._lock:
                    setattr(self, way, getattr(self, way) + len(chunk))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

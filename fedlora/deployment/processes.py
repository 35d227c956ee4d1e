"""Child processes of a supervisor: environment, log, restarts and shutdown."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedlora.errors import InputError

PARENT = "FEDLORA_PARENT_PID"
"""Variable with the supervisor's process id: a child ends itself when its supervisor is gone."""

LONGEST_PAUSE = 30.0
_LOG_SIZE = 20_000_000


class Child:
    """A child process that can be restarted.

    Parameters
    ----------
    module : str
        Python module that is run.
    arguments : sequence of str
    folder : Path
        Working directory.
    log : Path
        Where its output goes; one older log is kept.
    environment : mapping of str to str
        Added to this process's own.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.command = [sys.executable, "-m", module, *arguments]
        self.folder, self.log = folder, log
        self.environment = {**os.environ, **environment, PARENT: str(os.getpid())}
        self.process: subprocess.Popen[bytes] | None = None
        self._offset = 0

    def start(self) -> None:
        """Start it; its output is added to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > _LOG_SIZE:
            os.replace(self.log, self.log.with_name(self.log.name + ".1"))
        with self.log.open("ab") as stream:
            self._offset = stream.tell()
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to the supervisor alone, which ends its children in order.
                start_new_session=True,
            )

    def turn_log(self) -> None:
        """Start a new log if the log is long; its content is kept as the one older log.

        The process keeps appending to the same file, so the file is emptied, not moved.
        """
        if self.log.stat().st_size > _LOG_SIZE:
            shutil.copyfile(self.log, self.log.with_name(self.log.name + ".1"))
            os.truncate(self.log, 0)
            self._offset = 0

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def output(self) -> str:
        """What it has written since its last start."""
        with self.log.open("rb") as stream:
            stream.seek(self._offset)
            return stream.read().decode("utf-8", "replace")

    def started(self, marker: str = "") -> list[int]:
        """Ids of its descendants whose command line contains a text; they are recognised by FLWR_HOME."""
        home = f"FLWR_HOME={self.environment['FLWR_HOME']}".encode()
        own = (os.getpid(), self.process.pid if self.process is not None else None)
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            # It may have ended, or belong to another user.
            with suppress(OSError):
                line, variables = ((entry / file).read_bytes() for file in ("cmdline", "environ"))
                if int(entry.name) not in own and marker.encode() in line and home in variables.split(b"\0"):
                    found.append(int(entry.name))
        return found

    def stop(self, grace: float) -> None:
        """Send SIGTERM; after ``grace`` seconds send SIGKILL to it and all that it started."""
        if self.process is None:
            return
        if self.running:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        # Its session: processes that it started and left behind.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Pauses:
    """Pause before the next start: 1, 2, 4 ... seconds; back to 1 after a minute without a restart."""

    def __init__(self) -> None:
        self._next, self._last = 1.0, time.monotonic()

    def next(self) -> float:
        """Return the pause in seconds."""
        if time.monotonic() - self._last > 2 * LONGEST_PAUSE:
            self._next = 1.0
        pause, self._next = self._next, min(2 * self._next, LONGEST_PAUSE)
        self._last = time.monotonic()
        return pause


def flower_environment(home: Path, programs: Sequence[Path] = ()) -> dict[str, str]:
    """Return the variables that Flower's processes need.

    Parameters
    ----------
    home : Path
        FLWR_HOME. Processes must not share it, since Flower installs apps there by a copy that is not atomic.
    programs : sequence of Path
        Folders to look for programs in first.
    """
    # Flower starts its child programs by their bare names.
    path = [str(folder) for folder in programs] + [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2"),
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
    }


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback address that nobody uses now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def check_port(host: str, port: int, field: str) -> None:
    """Refuse a port that is taken, or an address that is not this machine's.

    Raises
    ------
    InputError
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except PermissionError:
        raise InputError(field, port, "is reserved for the system; choose one above 1023") from None
    except OSError as error:
        if host not in ("127.0.0.1", "0.0.0.0") and not isinstance(error, socket.gaierror) and error.errno == 99:
            raise InputError("host", host, "is no address of this machine") from None
        if isinstance(error, socket.gaierror):
            raise InputError("host", host, f"is no known name or address ({error.strerror})") from None
        raise InputError(field, port, "is in use by another process; choose another, or stop that one") from None


@contextmanager
def until_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set, instead of their usual effect."""
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until(condition: Callable[[], bool], seconds: float, stopping: threading.Event | None = None) -> bool:
    """Check a condition every 0.2 s; return whether it became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or (stopping is not None and stopping.is_set()):
            return False
        time.sleep(0.2)
    return True

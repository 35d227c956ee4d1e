"""A trial federation on this machine: a server and nodes as their owners would start them, and one run on them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedlora.config import Config
from fedlora.deployment.control import ONLINE, Server
from fedlora.deployment.keys import read_public_key
from fedlora.deployment.processes import Child, flower_environment, until_signal, wait_until
from fedlora.deployment.trial_files import NAME, TrialFiles, write_trial
from fedlora.errors import RunError
from fedlora.node.config import load_node
from fedlora.node.status import node_status

Say = Callable[[str], None]

_START_SECONDS = 180.0
_STOP_SECONDS = 100.0
"""A node finishes its message first, which takes it up to a minute."""
_RUN_STOP_SECONDS = 60.0


class Trial:
    """A server and nodes, each a ``fedlora`` command of its own, and what they are told.

    Parameters
    ----------
    files : TrialFiles
    say : callable (str)
        Prints a line.

    Attributes
    ----------
    started : list of Child
        The server's process, then the nodes'.
    """

    def __init__(self, files: TrialFiles, say: Say) -> None:
        self.files, self.say = files, say
        self.started: list[Child] = []
        self._step = 0

    def tell_files(self) -> None:
        """Print what :func:`write_trial` made, and the commands that make keys."""
        files = self.files
        self._head("Each machine has its own files: examples, keys, and a TOML file")
        self.say(f"    {files.coordinator}: the coordinator's; {files.tested} test examples")
        keys = files.ca.parent
        self._command("keys", "ca", "--folder", keys)
        self._command("keys", "server", "--host", "127.0.0.1", "--folder", keys)
        for name, count in files.examples.items():
            self.say(f"    {files.folder / name}: an owner's; {count} examples, and a copy of {files.ca}")
            self._command("keys", "node", name, "--folder", files.folder / name / "keys")

    def start(self) -> None:
        """Start the server and the nodes, and let the nodes in.

        Raises
        ------
        RunError
            If one of them ends, or is not there in time.
        """
        files, folder = self.files, self.files.coordinator
        self._head("The coordinator starts the server")
        server = self._start(folder, "server")
        with Server(files.address, files.ca) as control:
            self._wait(lambda: "INFO server on" in server.output(), [server], "the server")
            self.say(f"    it listens on {files.address}; process {_pid(server)}, log {server.log}")
            self._head("The coordinator registers each owner's public key")
            for name in files.examples:
                public = files.folder / name / "keys" / f"{name}.pub"
                self._command("keys", "register", public, "--on", NAME, home=True)
                control.register(read_public_key(public, "PUBLIC_KEY"), name)
            self._head("Each owner starts a node")
            nodes = {name: self._start(files.folder / name, "node") for name in files.examples}
            for name, node in nodes.items():
                self.say(f"    {name}: process {_pid(node)}, log {node.log}")

            def online() -> int:
                return sum(node.status == ONLINE for node in control.nodes())

            self._wait(lambda: online() == len(nodes), [server, *nodes.values()], "the nodes")
            self._command("keys", "list", "--on", NAME, home=True)
            for registered in control.nodes():
                self.say(f"    {registered.name:<32}{registered.status}")

    def run(self) -> None:
        """Run the config, and show what the owners spent.

        Raises
        ------
        RunError
            If the run did not end well.
        """
        files = self.files
        self._head("The coordinator runs a config on the nodes")
        output = files.folder / "run"
        words = self._command("run", files.coordinator / "run.toml", "--on", NAME, "--output", output, home=True)
        code = _in_front(words, self._environment)
        if code:
            raise RunError(f"the run ended with exit code {code}; the logs are in {files.folder}")
        self._head("Each owner sees what the run spent")
        for name in files.examples:
            self._command("node", "status", files.folder / name / "node.toml")
            self.say(f"    {_spent(files.folder / name / 'node.toml')}")

    def tell_how_to_stop(self) -> None:
        """Print what is left running, and the line that ends it."""
        self._head("The server and the nodes are left running: for another run, and to stop them")
        again = ["run", self.files.coordinator / "run.toml", "--set", "run.name=again"]
        again += ["--on", NAME, "--output", self.files.folder / "again"]
        self._command(*again, home=True)
        self.say(f"    kill {' '.join(str(_pid(child)) for child in reversed(self.started))}")

    def stop(self) -> None:
        """Stop the nodes, then the server, by their process ids; a second Ctrl-C does not interrupt it."""
        with until_signal():
            running = [child for child in self.started if child.running]
            if running:
                self._head("The nodes and the server are stopped")
            for group in (running[1:], running[:1]):
                for child in group:
                    child.process.terminate()  # type: ignore[union-attr]
                wait_until(partial(_ended, group), _STOP_SECONDS)
            for child in running:
                child.stop(0.0)
                self.say(f"    process {_pid(child)} has ended")

    @property
    def _environment(self) -> dict[str, str]:
        return flower_environment(self.files.coordinator.absolute() / "flower")

    def _head(self, text: str) -> None:
        self._step += 1
        self.say(f"\n{self._step}. {text}")

    def _command(self, *words: object, home: bool = False) -> list[str]:
        """Print the command that a step is, with the FLWR_HOME that it needs; return its words."""
        shown = shlex.join(["fedlora", *map(str, words)])
        prefix = f"FLWR_HOME={shlex.quote(str(self.files.coordinator / 'flower'))} " if home else ""
        self.say(f"    {prefix}{shown}")
        return list(map(str, words))

    def _start(self, folder: Path, kind: str) -> Child:
        file = folder / f"{kind}.toml"
        self._command(kind, file)
        child = Child("fedlora.cli", [kind, str(file.absolute())], folder, folder / f"{kind}.log", self._environment)
        self.started.append(child)
        child.start()
        return child

    def _wait(self, condition: Callable[[], bool], needed: Sequence[Child], what: str) -> None:
        wait_until(lambda: condition() or not all(child.running for child in needed), _START_SECONDS)
        for child in needed:
            if not child.running:
                lines = child.output().strip().splitlines()
                raise RunError(f"{what}: a process ended; {child.log} ends with: {lines[-1] if lines else 'nothing'}")
        if not condition():
            raise RunError(f"{what} did not start within {_START_SECONDS:g} s; the logs are in {self.files.folder}")


def run_trial(config: Config, folder: Path, say: Say, *, keep: bool = False) -> None:
    """Start a trial federation, run a config on it, and stop what was started.

    Parameters
    ----------
    config : Config
        Of a simulation, whose clients become nodes.
    folder : Path
        For all files of the trial; must not exist.
    say : callable (str)
        Prints a line.
    keep : bool
        Leave the server and the nodes running, unless something fails.

    Raises
    ------
    InputError
        If something is wrong with the config or the folder; then nothing is started.
    RunError
        If the server, a node or the run fails, or it is interrupted.
    """
    trial, kept = None, False
    try:
        trial = Trial(write_trial(config, folder), say)
        trial.tell_files()
        trial.start()
        trial.run()
        kept = keep
    except KeyboardInterrupt:
        raise RunError("stopped") from None
    finally:
        if trial is not None and not kept:
            trial.stop()
    if kept:
        trial.tell_how_to_stop()
    for line in two_machines(trial.files):
        say(line)


def two_machines(files: TrialFiles) -> Iterator[str]:
    """Yield the steps of the same federation on machines of its own."""
    steps = {
        f"the coordinator, in {files.coordinator}": (
            "rm keys/server.crt keys/server.key",
            "fedlora keys server --host SERVER --folder keys",
            'write into server.toml: host = "0.0.0.0"',
            "fedlora server server.toml",
            "give keys/ca.crt to each owner",
        ),
        f"each owner, in a folder like {files.folder / next(iter(files.examples))}": (
            "fedlora keys node NAME --folder keys",
            f'write into node.toml: its name, key and data, and address = "SERVER:{files.ports[0]}"',
            "give keys/NAME.pub to the coordinator",
        ),
        "the coordinator": ("export FLWR_HOME=$PWD/flower", f"fedlora keys register NAME.pub --on {NAME}"),
        "each owner": ("fedlora node node.toml",),
        "the coordinator again": (f"fedlora run run.toml --on {NAME}",),
    }
    yield "\nThe same on two machines, where SERVER is the address of the coordinator's:"
    for who, lines in steps.items():
        yield f"  {who}:"
        yield from (f"    {line}" for line in lines)


def _spent(file: Path) -> str:
    found = node_status(load_node(file))
    left = "there is no ceiling" if found.left is None else f"{found.left:.4g} of {found.max_epsilon:g} left"
    return f"{found.name}: epsilon {found.epsilon:.4g} spent at delta {found.delta:g}, {left}"


def _ended(group: Sequence[Child]) -> bool:
    return not any(child.running for child in group)


def _pid(child: Child) -> int:
    assert child.process is not None
    return child.process.pid


def _in_front(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command of fedlora's on this terminal; Ctrl-C stops it, once."""
    command = [sys.executable, "-m", "fedlora.cli", *words]
    # In a session of its own it gets no Ctrl-C but the one passed on here.
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # stops it as Ctrl-C does
        with suppress(subprocess.TimeoutExpired):
            process.wait(_RUN_STOP_SECONDS)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()

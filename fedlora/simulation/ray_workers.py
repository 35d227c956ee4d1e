"""The worker processes of a simulation, as Ray actors: started with their grid, or before it."""

from __future__ import annotations

import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import ray

from fedlora.errors import InputError
from fedlora.imports import import_modules, quick_imports
from fedlora.simulation.placement import count_free, count_workers
from fedlora.simulation.ray_cluster import start_ray
from fedlora.status import read_written, written
from fedlora.timeline import phase

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp

    from fedlora.capacity import Capacity
    from fedlora.simulation.envelope import Envelope, StoredContext
    from fedlora.simulation.worker import Part, Worker

    StoredPart = tuple[list[Envelope], list[bytes | None], Capacity]


class WorkerActor:
    """A :class:`fedlora.simulation.worker.Worker` in a Ray actor, and its methods.

    The driver needs none of what a worker imports to start one: both import at the same time.

    Parameters
    ----------
    app : ClientApp or str
    threads : int
    doing : str, optional
        A file that is kept up to date with what the worker does.
    """

    def __init__(self, app: ClientApp | str, threads: int, doing: str | None = None) -> None:
        if doing is not None:
            self._told = ExitStack()
            self._told.enter_context(written(Path(doing)))
        with phase("worker: imports", "importing libraries"), quick_imports():
            from fedlora.simulation.worker import Worker

            self._worker: Worker = Worker(app, threads)
        self._clients: Iterator[tuple[StoredContext, Context]] = iter(())

    def ready(self) -> None:
        """Answer once the worker has started."""

    def prepare(self, *arguments: Any) -> None:
        self._worker.prepare(*arguments)

    def borrow(self, *arguments: Any) -> None:
        self._worker.borrow(*arguments)

    def capacity(self, *arguments: Any) -> Capacity:
        return self._worker.capacity(*arguments)

    def handle(self, packed: bytes, references: dict[int, list[Any]], part: int) -> StoredPart:
        """Handle a batch of messages and the stored contexts of their clients, which are pickled."""
        envelopes, stored = pickle.loads(packed)
        contexts = [client.open() for client in stored]
        self._clients = zip(stored, contexts, strict=True)
        return self._stored(self._worker.handle(envelopes, contexts, references, part))

    def more(self, part: int) -> StoredPart:
        return self._stored(self._worker.more(part))

    def _stored(self, part: Part) -> StoredPart:
        """Return what the driver stores of a part: of states the bytes, where they changed."""
        envelopes, _, allowed = part
        clients = itertools.islice(self._clients, len(envelopes))
        return envelopes, [stored.changed(context) for stored, context in clients], allowed


class RayWorkers:
    """Starts Ray, unless it runs already, and workers on it.

    Parameters
    ----------
    app : ClientApp or str
        The app, or ``module:attribute``.
    wanted : int, optional
        ``simulation.workers``; None for as many as fit.
    cpus, gpus
        What a worker takes.
    address : str, optional
        A running Ray cluster.

    Attributes
    ----------
    actors : list
        One for each worker.
    here : bool
        Whether all are on this machine for sure.

    Raises
    ------
    InputError
        If no worker fits, or a GPU is asked for and there is none.
    """

    def __init__(self, app: ClientApp | str, wanted: int | None, cpus: int, gpus: float, address: str | None) -> None:
        self.asked = (app, wanted, cpus, gpus, address)
        self.app, self.cpus, self.gpus = app, cpus, gpus
        self.actors: list[Any] = []
        self._starting: list[Any] = []
        self._folder = TemporaryDirectory(prefix="fedlora-workers-", ignore_cleanup_errors=True)
        self._files: list[Path] = []  # of the actors, in their order
        self._numbers = itertools.count()
        self._started_ray = start_ray(address)
        self.here = self._started_ray and address is None
        try:
            number = count_workers(wanted, cpus, gpus)
            if not self._started_ray:
                number = count_free(number, wanted, cpus, gpus, _held())
        except InputError as error:
            self.close()
            if self._started_ray:
                raise
            remedy = f"{error.remedy}; this is a Ray that runs already: give it more, or end it with ray.shutdown()"
            raise InputError(error.field, error.value, remedy) from None
        self.actors = [self.start_worker() for _ in range(number)]
        _OPEN.add(self)

    def start_worker(self) -> Any:
        """Start a worker more; it imports what it needs while the caller goes on."""
        kind = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(WorkerActor)
        self._files.append(Path(self._folder.name) / str(next(self._numbers)))
        # A worker on another machine has no such folder, and tells nothing.
        started: Any = kind.remote(self.app, self.cpus, str(self._files[-1]))
        self._starting.append(started.ready.remote())
        return started

    def prepare(self, *arguments: Any) -> None:
        """Have every worker load the app's model and data, which is a part of its start."""
        self._starting += [actor.prepare.remote(*arguments) for actor in self.actors]

    def starting(self) -> bool:
        """Whether a worker is starting."""
        if self._starting:
            # One that ended meanwhile is found by whoever asks it.
            _, self._starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        return bool(self._starting)

    def doing(self) -> str:
        """Describe what the first worker does that says so, and how many have begun to start while some have not."""
        if not self.here:
            return ""
        begun = sum(file.exists() for file in self._files)
        told = next((text for file in self._files if (text := read_written(file))), "")
        waiting = f"starting workers {begun}/{len(self._files)}" if begun < len(self._files) else ""
        return ", ".join(filter(None, (waiting, told)))

    def replace(self, worker: int, *, kill: bool) -> Any:
        """Replace a worker that has ended, or end it first; return the new one."""
        if kill:
            ray.kill(self.actors[worker])
        self.actors[worker] = self.start_worker()
        self._files[worker] = self._files.pop()
        return self.actors[worker]

    def close(self) -> None:
        """End the workers, and Ray if this started it."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        _OPEN.discard(self)
        self._folder.cleanup()
        if self._started_ray:
            ray.shutdown()


def _held() -> tuple[float, float]:
    """CPUs and GPUs that the open workers of this process hold."""
    return sum(len(one.actors) * one.cpus for one in _OPEN), sum(len(one.actors) * one.gpus for one in _OPEN)


_OPEN: weakref.WeakSet[RayWorkers] = weakref.WeakSet()

_early: list[RayWorkers] = []
"""Workers that were started before their grid."""


def start_early(modules: Sequence[str], start: Callable[[], RayWorkers]) -> None:
    """Start workers for a grid to come, and import modules at the same time.

    Ray's start is mostly waiting, so that a second thread imports beside it. Ray itself starts in the caller's thread,
    which signals interrupt. What Ray refuses is left for the grid to say: mistakes in the config come first. Workers
    that no grid takes end with the process.
    """
    with _imported(modules), suppress(InputError):
        _early.append(start())


def take_workers(app: ClientApp | str, wanted: int | None, cpus: int, gpus: float, address: str | None) -> RayWorkers:
    """Return workers as asked for: those that were started early, or new ones. Raises as :class:`RayWorkers`."""
    while _early:
        workers = _early.pop()
        if workers.asked == (app, wanted, cpus, gpus, address):
            return workers
        workers.close()
    return RayWorkers(app, wanted, cpus, gpus, address)


@contextmanager
def _imported(modules: Sequence[str]) -> Iterator[None]:
    """Import modules in a thread, beside what is inside."""

    def run() -> None:
        # Whoever imports them next sees why it fails.
        with suppress(Exception):
            import_modules(modules)

    thread = threading.Thread(target=run, name="imports")
    thread.start()
    yield
    thread.join()

"""Milliseconds that a runtime adds to one client message.

In a round the server sends the same float32 tensors to every client, each client returns them untrained, and the server
sums what came back. Whatever such a round takes beyond a plain loop is the runtime's own. With ``client = "decode"`` a
Flower client turns the message into numpy arrays and back, as one that trains must; with ``"forward"`` it returns the
serialised bytes unopened. The loop and pfl have no messages, so this does not touch them. Compared are

- ``loop``: a plain loop in one process,
- ``raygrid``: :class:`fedlora.simulation.RayGrid`,
- ``flower``: Flower's own simulation runtime,
- ``pfl``: Apple's pfl, a ``SimulatedBackend`` with federated averaging, in one process.

Every measurement runs in a process of its own. The first rounds count as start-up and are reported apart::

    python -m fedlora.experiments.benchmarks.grid_overhead --output overhead.json --pfl-python PATH
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedlora.experiments.benchmarks.machine import machine

# flwr, fedlora and pfl are imported where they are measured: pfl may run in an interpreter that has nothing else.
if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # pfl chooses the device by itself; nobody gets the GPU here.
    "CUDA_VISIBLE_DEVICES": "",
}

Arrays = list[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """One measurement: how many clients, what they do (``decode`` or ``forward``), payload and rounds."""

    clients: int
    client: str
    workers: int
    cohort_size: int
    tensors: int
    payload_bytes: int
    rounds: int
    warmup_rounds: int

    def arrays(self) -> Arrays:
        """Return the payload: ``tensors`` equal float32 vectors of ones."""
        return [np.ones(self.payload_bytes // (4 * self.tensors), dtype=np.float32) for _ in range(self.tensors)]


@dataclass(frozen=True)
class Timing:
    """When the warm-up ended, on the machine's monotonic clock, and the seconds of each round after it."""

    ready: float
    rounds: list[float]


def measure_loop(case: Case) -> Timing:
    """Time the plain loop."""
    arrays = case.arrays()

    def run_round() -> Arrays:
        return _sum(arrays for _ in range(case.clients))

    return _time_rounds(case, run_round)


def measure_raygrid(case: Case) -> Timing:
    """Time fedlora's grid."""
    from fedlora.experiments.benchmarks.echo_app import echo_app
    from fedlora.simulation import RayGrid

    with RayGrid(
        echo_app, num_clients=case.clients, workers=case.workers, cpus_per_worker=1, cohort_size=case.cohort_size
    ) as grid:
        return _time_rounds(case, lambda: _message_round(case, grid))


def measure_flower(case: Case) -> Timing:
    """Time Flower's simulation runtime."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedlora.experiments.benchmarks.echo_app import echo_app

    timings = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < case.clients:
            time.sleep(0.05)
        timings.append(_time_rounds(case, lambda: _message_round(case, grid)))

    # Deprecated in Flower 1.41 in favour of `flwr run`, which runs the same code after a longer start.
    run_simulation(
        server_app,
        echo_app,
        num_supernodes=case.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": case.workers, "include_dashboard": False},
        },
    )
    return timings[0]


def measure_pfl(case: Case) -> Timing:
    """Time pfl: federated averaging without the local steps, so that a client's update is its model difference."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.payload = torch.nn.ParameterList(torch.from_numpy(array) for array in case.arrays())

        def loss(self, *_: Any, **__: Any) -> torch.Tensor:
            raise AssertionError("nothing is trained")

        def metrics(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {}

    class Echo(FederatedAveraging):
        def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
            return model.get_model_difference(initial_model_state), Metrics()

        def process_aggregated_statistics(
            self, central_context: Any, aggregate_metrics: Any, model: Any, statistics: Any
        ) -> Any:
            assert statistics.weight == case.clients
            return super().process_aggregated_statistics(central_context, aggregate_metrics, model, statistics)

    ends: list[float] = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            ends.append(time.perf_counter())
            return False, Metrics()

    users = [str(user) for user in range(case.clients)]
    data = FederatedDataset(
        lambda user: Dataset((torch.zeros(1),), user_id=user), get_user_sampler("minimize_reuse", users)
    )
    module = Module()
    total_rounds = case.warmup_rounds + case.rounds
    Echo().run(
        NNAlgorithmParams(
            central_num_iterations=total_rounds,
            evaluation_frequency=total_rounds + 1,
            train_cohort_size=case.clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.0, local_batch_size=None),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    timed = ends[case.warmup_rounds - 1 :]
    return Timing(timed[0], [end - begin for begin, end in pairwise(timed)])


PEERS: dict[str, Callable[[Case], Timing]] = {
    "loop": measure_loop,
    "raygrid": measure_raygrid,
    "flower": measure_flower,
    "pfl": measure_pfl,
}


def _sum(replies: Iterable[Arrays]) -> Arrays:
    """Sum the replies, since a round whose replies nobody reads is no round."""
    iterator = iter(replies)
    total = [array.copy() for array in next(iterator)]
    for reply in iterator:
        for accumulated, array in zip(total, reply, strict=True):
            accumulated += array
    return total


def _time_rounds(case: Case, run_round: Callable[[], Arrays]) -> Timing:
    ready, seconds = 0.0, []
    for number in range(case.warmup_rounds + case.rounds):
        begin = time.perf_counter()
        total = run_round()
        end = time.perf_counter()
        assert all((array == case.clients).all() for array in total), "a reply is missing or not what was sent"
        if number < case.warmup_rounds:
            ready = end
        else:
            seconds.append(end - begin)
    return Timing(ready, seconds)


def _message_round(case: Case, grid: Grid) -> Arrays:
    """Send the payload to every node of a Flower grid and sum the replies."""
    from flwr.app import ArrayRecord, Message, RecordDict

    content = RecordDict({"arrays": ArrayRecord(case.arrays())})
    messages = [Message(content, dst_node_id=node, message_type=f"train.{case.client}") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    return _sum(reply.content.array_records["arrays"].to_numpy_ndarrays() for reply in replies)


def _run_child(peer: str, case: Case, python: str) -> dict[str, Any]:
    """Measure in a fresh process; a peer that is missing or fails is told, not raised."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [
            python,
            "-m",
            "fedlora.experiments.benchmarks.grid_overhead",
            "--child",
            peer,
            json.dumps(asdict(case)),
        ]
        spawned = time.perf_counter()
        done = subprocess.run(
            [*command, "--output", str(answer)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"FLWR_HOME": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode != 0:
            return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        content: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        # Linux has one monotonic clock for all processes, so imports and the interpreter's own start count too.
        return {"startup": content.pop("ready") - spawned, **content} if "ready" in content else content


def _child(peer: str, case: Case, output: Path) -> None:
    if peer == "pfl" and importlib.util.find_spec("pfl") is None:
        answer: dict[str, Any] = {"error": "not installed"}
    else:
        answer = {**asdict(PEERS[peer](case)), "versions": _versions(peer)}
    output.write_text(json.dumps(answer), encoding="utf-8")


def _versions(peer: str) -> dict[str, str]:
    packages = {"loop": [], "raygrid": ["flwr", "ray"], "flower": ["flwr", "ray"], "pfl": ["pfl", "torch"]}[peer]
    versions = {package: importlib.metadata.version(package) for package in ["numpy", *packages]}
    return {"python": platform.python_version(), **versions}


def main() -> int:
    """Run the benchmark from the command line; exit code 1 if a peer that is installed failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--output", type=Path, help="where to write the raw figures as JSON")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--pfl-python", default=sys.executable, help="a Python that has pfl installed")
    parser.add_argument("--child", nargs=2, metavar=("PEER", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        peer, case = options.child
        _child(peer, Case(**json.loads(case)), options.output)
        return 0

    settings = tomllib.loads(options.config.read_text(encoding="utf-8"))
    payloads = settings.pop("payload")
    environment = machine()
    results = []
    print(f"{'peer':8} {'payload':>9} {'ms a message (least to most)':>30} {'start-up s':>11}")
    for payload in payloads:
        case = Case(**settings, payload_bytes=payload["bytes"], rounds=payload["rounds"])
        for peer in options.only:
            python = options.pfl_python if peer == "pfl" else sys.executable
            # The minute before: a busy machine makes every figure worse, and not all of them alike.
            load_average = os.getloadavg()[0]
            answer = _run_child(peer, case, python)
            results.append({"peer": peer, "case": asdict(case), "load_average": load_average, **answer})
            print(_row(peer, case, answer), flush=True)
    if options.output:
        options.output.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    return int(any(result.get("error", "not installed") != "not installed" for result in results))


def _row(peer: str, case: Case, answer: dict[str, Any]) -> str:
    start = f"{peer:8} {case.payload_bytes / 1024:6.0f} KB"
    if "error" in answer:
        return f"{start} {answer['error']}"
    each = [1000 * seconds / case.clients for seconds in answer["rounds"]]
    spread = f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"
    return f"{start} {spread:>30} {answer['startup']:11.1f}"


if __name__ == "__main__":
    sys.exit(main())

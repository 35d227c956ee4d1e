"""Seconds of a federated round of training in fedlora and in Apple's pfl.

pfl has no DP-SGD with per-example clipping, so the nearest task that it can run is the same federation without privacy:
the same model, data, partition, adapters (FFA-LoRA's B and the head), optimiser, batches and steps. pfl trains PEFT's
layers one client at a time in one process; fedlora runs its own simulation, messages and metering included. Evaluation
counts in neither::

    python -m fedlora.experiments.benchmarks.pfl_training --output pfl_training.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora import simulate
from fedlora.cli import parse_overrides
from fedlora.config import Config, load_config
from fedlora.data.tokens import FederatedData, TokenTable, prepare_data
from fedlora.experiments.benchmarks.machine import machine
from fedlora.models import load_base
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.server_app import resolve
from fedlora.training.batches import shuffled_batches
from fedlora.training.loss import per_example_loss


def measure_ours(config: Config) -> list[float]:
    """Seconds of each round but the first, without evaluation."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        simulate(config.model_dump(exclude_none=True), output=folder)
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [sum(v for name, v in line["seconds"].items() if name != "evaluate") for line in lines[1:]]


def measure_pfl(config: Config) -> list[float]:
    """Seconds of each of pfl's central iterations but the first."""
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

    data = prepare_data(config)
    module = _peft_module(config, data)
    users = [str(client) for client in range(len(data.partition))]

    class LocalTraining(FederatedAveraging):
        """pfl's federated averaging; the local steps, which pfl leaves to the model, are the benchmark's."""

        def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
            _train(module, data.train, data.partition[int(user_dataset.user_id)], config)
            difference = model.get_model_difference(initial_model_state)
            model.set_parameters(initial_model_state)
            return difference, Metrics()

    ends: list[float] = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return False, Metrics()

    dataset = FederatedDataset(
        lambda user: Dataset((torch.zeros(1),), user_id=user), get_user_sampler("minimize_reuse", users)
    )
    LocalTraining().run(
        NNAlgorithmParams(
            central_num_iterations=config.run.rounds,
            evaluation_frequency=config.run.rounds + 1,
            train_cohort_size=len(users),
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=dataset, val_data=dataset),
        PyTorchModel(
            model=module,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.1, local_batch_size=config.client.batch_size
        ),
        callbacks=[Clock()],
    )
    return np.diff(ends).tolist()


def _peft_module(config: Config, data: FederatedData) -> Any:
    from peft import LoraConfig, get_peft_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(config, data.label_names, device)
    rank = config.method.rank
    module: Any = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["query", "value"]))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_B" in name or "classifier" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    head = module.get_base_model().classifier
    head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    # pfl asks its model for these two.
    module.loss = module.metrics = lambda *_, **__: {}
    return module.train()


def _train(module: Any, table: TokenTable, rows: np.ndarray, config: Config) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.client.learning_rate or 1e-3, weight_decay=0.0)
    steps = config.client.local_steps or 1
    for chosen in shuffled_batches(rows, config.client.batch_size, steps, torch.Generator()):
        batch = table.batch(chosen, parameters[0].device)
        logits = module(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        per_example_loss(logits, batch["labels"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Measure both, print the ratio and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_name("end_to_end.toml")))
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    nearest = {"privacy.mode": "none", "method.name": FFALoRA.name, "run.rounds": arguments.rounds}
    config = resolve(load_config(arguments.config, parse_overrides(arguments.set) | nearest))
    seconds = {"fedlora": measure_ours(config), "pfl": measure_pfl(config)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:8} {value:8.3f} s a round")
    print(f"pfl takes {medians['pfl'] / medians['fedlora']:.1f} times as long")
    if arguments.output:
        results = {"machine": machine(), "config": config.to_toml(), "seconds_a_round": seconds}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What goes through a model at once: what is worth a pass, and where it does not fit, what is lowered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapters import AdaptedModel
from fedlora.config import Config
from fedlora.training import capacity, passes, train_cohort
from fedlora.training.checkpointing import layers_of
from fedlora.training.soundness import dependence
from tests import tiny
from tests.fake_gpus import FakeGPUs

WITHOUT = 4
"""How many times the memory a row takes here without checkpointing."""


class SmallMemory:
    """Lets a model's passes run out of memory, in the forward or in the middle of the backward pass.

    Attributes
    ----------
    passes : list of (int, bool)
        Rows of each pass that fitted, and whether checkpointing was on.
    """

    def __init__(self, adapted: AdaptedModel, room: int, where: str) -> None:
        self.adapted, self.room, self.passes = adapted, room, list[tuple[int, bool]]()
        if where == "forward":
            adapted.model.register_forward_pre_hook(lambda _, __, kwargs: self.check(kwargs), with_kwargs=True)
        else:
            first = layers_of(adapted)[0]
            first.register_forward_hook(lambda _, args, output: self.later(len(args[0]), output))

    def check(self, kwargs: dict[str, Any]) -> None:
        self.take(len(kwargs["input_ids"]))

    def later(self, rows: int, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.take(rows))

    def take(self, rows: int) -> None:
        on = layers_of(self.adapted)[0].gradient_checkpointing
        if rows * (1 if on else WITHOUT) > self.room:
            raise torch.cuda.OutOfMemoryError("out of memory")
        self.passes.append((rows, on))


def made(setting: Any = "auto", dropout: float = 0.0, **client: Any) -> tuple[AdaptedModel, Config]:
    client = {"optimizer": "sgd", "local_steps": 2, "batch_size": 8, "gradient_checkpointing": setting, **client}
    config = tiny.settings("llama", client=client, method={"dropout": dropout})
    return tiny.adapted_model("llama", config), config


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    ("setting", "room", "fitted"),
    [
        ("auto", 32, (8, False)),
        ("auto", 8, (8, True)),
        ("auto", 3, (2, True)),
        (True, 3, (2, True)),
        (False, 8, (2, False)),
    ],
)
def test_a_step_is_made_to_fit(
    setting: Any, room: int, fitted: tuple[int, bool], private: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes out is what a larger memory gives; the next training begins with what was found."""
    adapted, config = made(setting)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table("llama", 8)
    plans = [tiny.plan(0.5, 0.1, 1.0, 8.0)] if private else None
    charged: list[None] = []
    (job,) = tiny.jobs_of([start], [np.arange(8)], plans)
    job = replace(job, on_step=lambda: charged.append(None))
    (expected,) = train_cohort(adapted, examples, [job], config)
    memory = SmallMemory(adapted, room, where)
    for _ in range(2):
        for kept in (memory.passes, caplog, charged):
            kept.clear()
        (result,) = train_cohort(adapted, examples, [job], config)
        assert tiny.difference(result.arrays, expected.arrays) < 1e-6
        assert result.loss == tiny.same_loss(expected.loss)
        assert memory.passes == [fitted] * (2 * 8 // fitted[0])
        assert len(charged) == 2
    assert not caplog.messages
    assert tiny.difference(expected.arrays, start) > 1e-3


def test_what_is_lowered_is_told(caplog: pytest.LogCaptureFixture) -> None:
    adapted, config = made()
    start = adapted.arrays(tiny.trained_names(adapted, config))
    SmallMemory(adapted, 4, "forward")
    train_cohort(adapted, tiny.table("llama", 8), tiny.jobs_of([start], [np.arange(8)]), config)
    told = [message.partition("from now on ")[2] for message in caplog.messages]
    assert told == ["client.gradient_checkpointing is on", "client.physical_batch_size is 4"]


def test_a_pass_that_failed_leaves_the_dropout_masks_as_they_were() -> None:
    """Checkpointing alone was needed: the masks are those of a pass that fitted at once."""
    adapted, config = made(dropout=0.4)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples, (job,) = tiny.table("llama", 8), tiny.jobs_of([start], [np.arange(8)])
    (expected,) = train_cohort(adapted, examples, [job], config)
    memory = SmallMemory(adapted, 8, "backward")
    (result,) = train_cohort(adapted, examples, [job], config)
    assert memory.passes == [(8, True)] * 2
    assert tiny.difference(result.arrays, expected.arrays) < 1e-6


def test_of_several_clients_fewer_are_tried_first() -> None:
    adapted, config = made()
    start = adapted.arrays(tiny.trained_names(adapted, config))
    dependence(adapted, config, 0)
    memory = SmallMemory(adapted, 32, "forward")
    jobs = tiny.jobs_of([start, start], tiny.split([8, 8]))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train_cohort(adapted, tiny.table("llama", 16), jobs, config)
    train_cohort(adapted, tiny.table("llama", 16), jobs[:1], config)
    assert memory.passes == [(8, False)] * 2


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    adapted, config = made()
    start = adapted.arrays(tiny.trained_names(adapted, config))
    SmallMemory(adapted, 0, "forward")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train_cohort(adapted, tiny.table("llama", 8), tiny.jobs_of([start], [np.arange(8)]), config)


BATCH, TOKENS = 8, 4.875
"""Examples of a step here, and their mean tokens."""

MEMORY, ALL, ENOUGH = "fill the memory", "are all that a worker has", "keep the GPU busy"


@pytest.mark.parametrize(
    ("busy", "free", "most", "clients", "rows", "on", "why"),
    [
        # A batch is too small: as many clients as are worth a pass, as there are, or as fit.
        (10, 4000, 9, 5, 8, False, ENOUGH),
        (20, 4000, 5, 5, 8, False, ALL),
        (20, 1300, 5, 4, 8, False, MEMORY),
        (20, 400, 5, 1, 8, False, MEMORY),
        (20, 100, 5, 1, 8, True, MEMORY),
        # A batch is enough, or its half, or a quarter.
        (8, 4000, 5, 1, 8, False, ENOUGH),
        (4, 4000, 5, 1, 4, False, ENOUGH),
        (2, 4000, 5, 1, 2, False, ENOUGH),
        # Memory holds less: smaller passes, then checkpointing, then smaller ones again.
        (8, 130, 5, 1, 2, False, MEMORY),
        (8, 39, 5, 1, 2, True, MEMORY),
        (8, 10, 5, 1, 1, True, MEMORY),
    ],
)
def test_what_a_pass_takes_is_chosen(
    busy: int, free: int, most: int, clients: int, rows: int, on: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``busy`` examples keep these GPUs busy."""
    adapted, config = made()
    table, start = tiny.table("llama", BATCH), adapted.arrays(tiny.trained_names(adapted, config))
    assert table.lengths.mean() == TOKENS
    dependence(adapted, config, table.pad_token_id)
    monkeypatch.setattr(passes, "BUSY", busy * TOKENS * passes.mean_product(adapted))
    monkeypatch.setattr(passes, "COHORT", 4)
    monkeypatch.setattr(passes, "SMALLEST", 4)
    FakeGPUs(monkeypatch, free)
    (job,) = tiny.jobs_of([start], [np.arange(BATCH)], [tiny.plan(0.5, 0.1, 1.0, 4.0)])
    found = capacity.cohort_capacity(adapted, table, job, config, most)
    assert found.clients == clients
    sizes = {} if rows == BATCH else {"client.physical_batch_size": rows}
    assert found.settings == sizes | ({"client.gradient_checkpointing": True} if on else {})
    checkpointing = "gradient checkpointing" if on else "no checkpointing"
    size = f"physical batch {rows} of {BATCH}, cohort {clients}, {checkpointing}"
    assert found.note == f"{size}: {round(clients * rows * TOKENS)} tokens a pass {why}, 0 GiB"


def test_on_a_cpu_a_batch_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BUSY", 1.0)
    adapted, config = made()
    start = adapted.arrays(tiny.trained_names(adapted, config))
    memory = SmallMemory(adapted, 100, "forward")
    train_cohort(adapted, tiny.table("llama", BATCH), tiny.jobs_of([start], [np.arange(BATCH)]), config)
    assert memory.passes == [(BATCH, False)] * 2

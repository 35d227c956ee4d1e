"""Several texts in a row give what each gives alone: losses, gradients, cohorts, whole runs; or packing is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st

from fedlora.adapters import AdaptedModel, adapt
from fedlora.config import Config, load_config, unused_keys
from fedlora.data.packing import packed_batch, packed_rows
from fedlora.data.tokens import TokenTable
from fedlora.errors import InputError
from fedlora.experts.expert_model import adapt_experts
from fedlora.study.forecast import forecast
from fedlora.tasks import IGNORED, get_task
from fedlora.training import ClientResult, cohort, train_cohort
from fedlora.training.soundness import check_packing
from tests import tiny
from tests.families import family_model
from tests.small_runs import World, world

CARRY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2", "gpt2")


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(60, 200))
@examples_of(max_examples=200, deadline=None)
def test_every_text_is_in_one_row_and_rows_are_few(lengths: list[int], most: int) -> None:
    rows = packed_rows(np.array(lengths, np.int64), most)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in row) for row in rows]
    assert all(0 < total <= most for total in filled)
    padded = len(rows) * max(filled, default=0)
    assert padded <= len(lengths) * max(lengths, default=0)
    assert padded <= 2 * sum(lengths) + max(lengths, default=0)


def test_a_batch_of_packed_rows() -> None:
    table = TokenTable(
        np.arange(10, 22, dtype=np.int32),
        np.array([0, 3, 5, 9, 12]),
        None,
        np.array([0, 1, 2, 0]),
        None,
        0,
        get_task("causal-lm"),
    )
    batch = packed_batch(table, [np.array([2, 1]), np.array([0])])
    assert batch["input_ids"].tolist() == [[15, 16, 17, 18, 13, 14], [10, 11, 12, 0, 0, 0]]
    # Padding counts on: a row of one text is none of several.
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, 17, 18, no, 14], [no, 11, 12, no, no, no]]
    assert batch["weights"].tolist() == [[0.5] * 4 + [1.0] * 2, [0.5] * 3 + [0.0] * 3]
    nothing = packed_batch(table, [])
    assert nothing["input_ids"].shape == (0, 0)


def packing(config: Config, on: bool = True, **client: Any) -> Config:
    data = config.data.model_copy(update={"packing": on})
    return config.model_copy(update={"data": data, "client": config.client.model_copy(update=client)})


def model(model_type: str, **options: Any) -> tuple[AdaptedModel, Config]:
    config = tiny.settings(
        "llama",
        model={"max_length": 32},
        method={"target_modules": "all-linear"},
        client={"batch_size": 5, "local_steps": 3, "optimizer": "sgd"},
    )
    adapted = adapt(family_model(model_type, causal=True, **options), config, "lora")
    tiny.start(adapted)
    return adapted, config


@pytest.mark.parametrize("model_type", CARRY)
def test_losses_and_gradients_are_those_of_each_text_alone(model_type: str) -> None:
    """Attention windows of some of them are shorter than a text."""
    sliding = {"sliding_window": 4} if model_type in ("mistral", "gemma2", "gemma3_text", "qwen2", "phi3") else {}
    adapted, _ = model(model_type, **sliding)
    table = tiny.table("llama", 9, length=14)
    adapted.set_clients([adapted.drawn(0)])
    rows = packed_rows(table.lengths, 32)
    assert 1 < len(rows) < 9
    batch = packed_batch(table, [np.array(row) for row in rows])
    adapted.layout.set_rows([len(rows)])
    logits = adapted.logits(batch)
    together = torch.autograd.grad(
        table.task.packed_loss(logits, batch["labels"], batch["weights"]).sum(), adapted.parameters()
    )
    alone_sum = torch.zeros(())
    for row, members in enumerate(rows):
        place = 0
        for text in members:
            alone = table.batch([text])
            adapted.layout.set_rows([1])
            expected = adapted.logits(alone)
            length = int(table.lengths[text])
            targets, own = alone["labels"][0, 1:], slice(place, place + length - 1)
            by_token = [
                torch.nn.functional.cross_entropy(value, targets, reduction="none")
                for value in (expected[0, :-1], logits[row, own])
            ]
            torch.testing.assert_close(by_token[1], by_token[0], rtol=0, atol=1e-5)
            alone_sum = alone_sum + table.task.loss(expected, alone["labels"]).sum()
            place += length
    for got, wanted in zip(together, torch.autograd.grad(alone_sum, adapted.parameters()), strict=True):
        tiny.assert_close(got, wanted)


def test_models_that_cannot_tell_texts_apart_are_refused_by_name() -> None:
    for model_type in ("bloom", "mamba", "mpt"):
        adapted, config = model(model_type)
        with pytest.raises(InputError, match=r"does not work with tiny: .*; set it to false") as error:
            check_packing(adapted, config, 0)
        assert error.value.field == "data.packing"


def trained(adapted: AdaptedModel, config: Config, sizes: list[int], alone: bool = False) -> list[ClientResult]:
    """Train clients of unequal numbers of texts, the second without any in a step of the others."""
    table = tiny.table("llama", sum(sizes), length=14)
    names = [name for name in adapted.stacked_layers() if not name.endswith("public_router")]
    drawn = [adapted.drawn(seed) for seed in range(len(sizes))]
    starts = [{name: arrays[name] for name in names} for arrays in drawn]
    jobs = tiny.jobs_of(starts, tiny.split(sizes), learning_rate=0.02)
    if alone:
        return [train_cohort(adapted, table, [job], config)[0] for job in jobs]
    return train_cohort(adapted, table, jobs, config)


@pytest.mark.parametrize(
    "client", [{}, {"physical_batch_size": 2}, {"gradient_checkpointing": True}, {"max_grad_norm": 0.1}]
)
def test_training_is_that_without_packing(client: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, config = model("llama")
    expected = trained(adapted, packing(config, False, **client), [7, 2, 5])
    rows: list[int] = []
    make = cohort.packed_batch
    monkeypatch.setattr(cohort, "packed_batch", lambda table, own: rows.append(len(own)) or make(table, own))
    for alone in (False, True):
        rows.clear()
        found = trained(adapted, packing(config, **client), [7, 2, 5], alone)
        assert 0 < sum(rows) < sum(result.steps * min(5, result.examples) for result in expected)
        for result, other in zip(found, expected, strict=True):
            assert tiny.difference(result.arrays, other.arrays) < 1e-6
            assert result.loss == tiny.same_loss(other.loss)
            assert (result.steps, result.examples) == (other.steps, other.examples)


def test_experts_are_trained_in_packed_rows_too() -> None:
    config = tiny.settings("llama", model={"max_length": 32}, method={"name": "flexmore", "rank": 2})
    config = config.model_copy(
        update={"client": config.client.model_copy(update={"local_steps": 2, "optimizer": "sgd"})}
    )
    adapted = adapt_experts(tiny.base_model("llama"), config)
    expected = trained(adapted, config, [6, 3])
    for result, other in zip(trained(adapted, packing(config), [6, 3]), expected, strict=True):
        assert tiny.difference(result.arrays, other.arrays) < 1e-6


def test_dropout_does_not_depend_on_the_cohort() -> None:
    config = tiny.settings(
        "llama",
        model={"max_length": 32},
        method={"dropout": 0.3},
        client={"batch_size": 5, "local_steps": 2, "optimizer": "sgd"},
    )
    adapted = tiny.adapted_model("llama", config)
    together, alone = (trained(adapted, packing(config), [7, 2, 5], each) for each in (False, True))
    for result, other in zip(together, alone, strict=True):
        assert tiny.difference(result.arrays, other.arrays) < 1e-6


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("packing")) as made:
        rng = np.random.default_rng(1)
        rows = [{"text": " ".join(f"w{i}" for i in rng.integers(4, 50, n))} for n in rng.integers(2, 30, 30)]
        (made.folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield made


def content(here: World, **data: Any) -> dict[str, Any]:
    path = str(here.folder / "texts.jsonl")
    return {
        "run": {"seed": 3, "rounds": 2},
        "model": {"name": str(here.folder / "llama"), "task": "causal-lm", "max_length": 16},
        "data": {"name": path, "test": path, "partition": {"clients": 3}, **data},
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 4, "local_epochs": 1, "optimizer": "sgd", "learning_rate": 0.1},
        "simulation": {"workers": 0, "cohort_size": 2},
    }


@pytest.mark.parametrize("data", [{"packing": True}, {"long_texts": "split"}, {"long_texts": "split", "packing": True}])
def test_a_run_resumes_to_the_same_bits_and_is_as_forecast(
    here: World, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, taken = content(here, **data), list[int]()
    step = cohort._Stepper.step
    with monkeypatch.context() as counting:
        counting.setattr(
            cohort._Stepper,
            "step",
            lambda self, rows, n: taken.append(sum(map(bool, map(len, rows)))) or step(self, rows, n),
        )
        run = here.run(given)
    again = here.run(given, stops=(1,)).arrays()
    assert all(torch.equal(array, again[name]) for name, array in run.arrays().items())
    expected = forecast(load_config(given))
    sent = {
        way: sum(row["payload_bytes"] for row in run.rows("communication.csv") if row["direction"] == way)
        for way in ("up", "down")
    }
    assert sent == {"up": expected.uplink_bytes, "down": expected.downlink_bytes}
    assert expected.steps == sum(taken)
    plain = here.run(content(here, **{key: value for key, value in data.items() if key != "packing"}))
    for name, array in plain.arrays().items():
        tiny.assert_close(run.arrays()[name], array)
    assert run.summary["final"]["loss"] == pytest.approx(plain.summary["final"]["loss"], rel=1e-5)


def test_packing_is_refused_with_privacy_by_example() -> None:
    privacy = {"mode": "example", "target_epsilon": 8.0}
    with pytest.raises(InputError, match="remove it, or set privacy") as error:
        tiny.settings("llama", data={"packing": True}, privacy=privacy)
    assert error.value.field == "data.packing"
    # Other tasks do not read the key.
    other = tiny.settings("bert", data={"packing": True}, privacy=privacy)
    assert any("data.packing is not used" in note for note in unused_keys(other))

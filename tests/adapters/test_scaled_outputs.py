"""A parameterisation that is no product of matrices trains, alone, in cohorts and under DP, and is exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedlora
from fedlora.adapters import AdaptedModel, adapt
from fedlora.adapters.peft_format import export_peft
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import forget_methods, get_method
from fedlora.models import dense_weight
from fedlora.registry import PARAMETERISATIONS
from fedlora.roles import HEAD
from fedlora.study.forecast import forecast
from fedlora.training import train_cohort
from fedlora.training.dp import per_example_gradients
from fedlora.training.soundness import dependence
from tests import tiny
from tests.packages import lay_package
from tests.small_runs import KINDS, World, world

POINTS = {
    "fedlora.methods": {"scaled-mean": "tests.scaled_outputs:ScaledMean"},
    "fedlora.parameterisations": {"scaled-outputs": "tests.scaled_outputs:ScaledOutputs"},
}


@pytest.fixture(autouse=True, scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put a package that names the method and the parameterisation on the path."""
    site = tmp_path_factory.mktemp("site")
    lay_package(site, "scaled", POINTS)

    def forget() -> None:
        forget_methods()
        for found in ("_entry_points", "_files"):
            vars(PARAMETERISATIONS).pop(found, None)
        PARAMETERISATIONS._classes.pop("scaled-outputs", None)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        forget()
        yield
    forget()


def drawn_model(kind: str, dtype: torch.dtype = torch.float64) -> AdaptedModel:
    settings = tiny.settings(kind, method={"target_modules": "all-linear"})
    adapted = adapt(tiny.base_model(kind, dtype), settings, "scaled-outputs")
    adapted.set_shared(vectors(adapted, 0))
    return adapted


def vectors(adapted: AdaptedModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    arrays = adapted.arrays(adapted.names(["scale_v", HEAD]))
    return {n: a + 0.3 * torch.randn(a.shape, generator=generator).to(a.dtype) for n, a in arrays.items()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_computes_what_its_update_says(kind: str) -> None:
    adapted = drawn_model(kind)
    stock = tiny.base_model(kind, torch.float64)
    for path, adapter in adapted.adapters.items():
        layer = stock.get_submodule(path)
        frozen = {"weight": dense_weight(layer)} | ({} if layer.bias is None else {"bias": layer.bias.detach()})
        factors = {"scale_v": adapted.arrays([f"{path}.scale_v"])[f"{path}.scale_v"]}
        update = PARAMETERISATIONS.get("scaled-outputs")().update(factors, frozen, 1.0)
        assert update.keys() == frozen.keys()
        x = torch.randn(2, 3, frozen["weight"].shape[1], dtype=torch.float64)
        adapted.layout.set_rows([2])
        expected = x @ (frozen["weight"] + update["weight"]).T + sum(
            part["bias"] for part in (frozen, update) if "bias" in part
        )
        with torch.no_grad():
            torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_example_has_a_gradient_of_its_own(kind: str) -> None:
    """Those of two clients in one pass equal autograd on one example at a time."""
    adapted = drawn_model(kind)
    clients = [vectors(adapted, seed) for seed in (1, 2)]
    table = tiny.table(kind, 5)
    adapted.set_clients(clients)
    adapted.model.train()
    adapted.layout.set_rows([3, 2])
    with per_example_gradients(adapted):
        batch = table.batch(np.arange(5))
        table.task.loss(adapted.logits(batch), batch["labels"]).sum().backward()
        samples = {name: adapted.parameter(name).grad_sample for name in adapted.trained}  # type: ignore[attr-defined]
    for row in range(5):
        adapted.set_clients([clients[0 if row < 3 else 1]])
        adapted.layout.set_rows([1])
        batch = table.batch([row])
        table.task.loss(adapted.logits(batch), batch["labels"]).sum().backward()
        for name, sample in samples.items():
            gradient = adapted.parameter(name).grad
            assert gradient is not None
            found = sample[row] if isinstance(sample, torch.Tensor) else sample.g[row].T @ sample.x[row]
            torch.testing.assert_close(found, gradient[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_cohort_equals_its_clients_alone(kind: str, private: bool) -> None:
    adapted = drawn_model(kind)
    config = tiny.settings(kind, client={"optimizer": "sgd", "local_steps": 3})
    assert dependence(adapted, config, 0) is None
    starts = [vectors(adapted, seed) for seed in range(3)]
    plans = [tiny.plan(0.7, 0.5)] * 3 if private else None
    jobs = tiny.jobs_of(starts, tiny.split([7, 2, 4]), plans)
    table = tiny.table(kind, 13)
    together = train_cohort(adapted, table, jobs, config)
    for start, job, result in zip(starts, jobs, together, strict=True):
        (alone,) = train_cohort(adapted, table, [job], config)
        assert tiny.difference(result.arrays, alone.arrays) < 1e-10
        assert all(not torch.equal(result.arrays[name], start[name]) for name in start)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("scaled")) as made:
        yield made


@pytest.mark.parametrize("mode", ["none", "example"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_exact_costs_what_was_forecast_and_loads_with_stock_peft(here: World, kind: str, mode: str) -> None:
    privacy = {"none": {}, "example": {"target_epsilon": 20.0}}[mode]
    content = here.content(
        "scaled-mean",
        kind,
        model={"name": str(here.folder / kind), "task": KINDS[kind], "max_length": 10, "dtype": "float64"},
    )
    run = here.run({**content, "privacy": {"mode": mode, **privacy}})
    assert max(run.errors) < 1e-10
    sent = run.summary["communication"]
    assert sent["payload_bytes"] == sent["formula_bytes"] == forecast(run.config).payload_bytes
    assert run.per_example == ([] if mode == "none" else run.per_example)
    assert set().union(*run.per_example) == (
        set() if mode == "none" else {"scale_v"} | ({HEAD} if kind == "bert" else set())
    )
    expected = run.logits.double()
    ids = {name: value for name, value in run.batch.items() if name in ("input_ids", "attention_mask")}
    model_class = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    labels = {} if kind == "llama" else {"num_labels": 3}
    stock = model_class.from_pretrained(run.config.model.name, dtype=torch.float64, **labels)
    for model in (PeftModel.from_pretrained(stock, run.folder / "adapter").eval(), fedlora.load(run.folder)[0]):
        with torch.no_grad():
            found = model(**ids).logits.double()
        mask = ids.get("attention_mask", torch.ones_like(ids["input_ids"])).bool()
        rows = mask if found.dim() == 3 else slice(None)
        torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-5)


def test_what_peft_has_no_form_for_is_refused_in_one_line(here: World, tmp_path: Path) -> None:
    config: Config = tiny.settings("llama")
    adapted = drawn_model("llama")
    path, adapter = next(iter(adapted.adapters.items()))
    adapted.set_residual({path: torch.ones_like(dense_weight(adapter.base))})
    with pytest.raises(InputError, match=r"^method\.name = .*PEFT has no scaled outputs beside a residual") as caught:
        export_peft(adapted, config, tmp_path, None)
    assert "\n" not in str(caught.value)


def test_the_method_and_its_parameterisation_are_found() -> None:
    assert get_method("scaled-mean").parameterisation in PARAMETERISATIONS.names()

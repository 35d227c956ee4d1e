"""PEFT's adapters, one by one: which are carried, how clients and examples stay apart, what stock PEFT reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedlora
from fedlora.adapters.peft_bridge import (
    DRAWN_KIND,
    FINGERPRINT,
    ROWS,
    TRAINED_KIND,
    PeftAdaptedModel,
    bounds,
    peft_config,
    peft_types,
)
from fedlora.config import Config, load_config, unused_keys
from fedlora.errors import InputError
from fedlora.roles import HEAD
from fedlora.strategies.peft import Peft
from fedlora.training import train_cohort
from fedlora.training.dp import per_example_gradients
from fedlora.training.soundness import check_sound, dependence
from tests import tiny
from tests.small_runs import World, logits, world

KEYS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 30},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 12},
    "WAVEFT": {"n_frequency": 30},
}
"""What fits layers as small as these; all other types have PEFT's defaults."""

EXACT = {"BEFT", "C3A", "FOURIERFT", "IA3", "LN_TUNING", "MISS", "SHIRA", "SUPERTUNING", "TINYLORA", "WAVEFT"}
"""Linear by their papers' formulas: one trained vector, vector of places or matrix, and nothing times another."""

REFUSED = {
    "ADALORA": "ranks between steps",
    "ADAMSS": "scikit-learn",
    "ADAPTION_PROMPT": "Unsupported model type",
    "FROD": "beside its layers",
    "OSF": "by hooks",
    "POLY": "task_ids",
    "PVERA": "at random in training",
    "SHADOW": "locate the transformer backbone",
    "TRAINABLE_TOKENS": "does not run alone",
}
CARRIED = [kind for kind in peft_types() if kind not in REFUSED]
TARGETS = ["query", "intermediate.dense", "q_proj", "up_proj", "c_attn", "c_fc"]

PRIVATE = ("VERA", "RANDLORA", "SHIRA", "MISS", "FOURIERFT", "LOHA", "IA3", "VBLORA", "UNILORA")
NAMED = (*PRIVATE, "LOKR", "OFT", "BOFT")


def settings(peft_type: str, kind: str = "bert", given: dict[str, Any] | None = None, **sections: Any) -> Config:
    keys = KEYS.get(peft_type, {}) if given is None else given
    method = {"name": "peft", "peft_type": peft_type, "peft": keys, "rank": 2, "alpha": None, "target_modules": TARGETS}
    method = {key: value for key, value in method.items() if value is not None}
    return tiny.settings(kind, method=method, **sections)


def made(config: Config, kind: str = "bert", dtype: torch.dtype = torch.float64) -> PeftAdaptedModel:
    return Peft.adapt(tiny.base_model(kind, dtype), config)


# Which types.


@pytest.mark.parametrize("peft_type", peft_types())
def test_a_type_is_carried_or_refused_in_one_line_and_exactness_is_measured(peft_type: str) -> None:
    if peft_type not in REFUSED:
        found = made(settings(peft_type), dtype=torch.float32)
        assert found.probed.exact == (peft_type in EXACT)
        assert found.names([TRAINED_KIND])
        return
    with pytest.raises(InputError) as caught:
        made(settings(peft_type))
    assert REFUSED[peft_type] in str(caught.value)
    assert peft_type in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("peft_type", "given", "exact"),
    [("LORA", {"use_dora": True}, False), ("LOHA", {"alpha": 3}, False), ("MISS", {"init_weights": "bat"}, True)],
)
def test_keys_of_a_type_count(peft_type: str, given: dict[str, Any], exact: bool) -> None:
    plain, found = made(settings(peft_type)), made(settings(peft_type, given=given))
    assert found.probed.exact == exact
    if peft_type == "LORA":
        assert len(found.names([TRAINED_KIND])) > len(plain.names([TRAINED_KIND]))


@pytest.mark.parametrize(
    ("method", "field", "says"),
    [
        ({"peft_type": "veraa"}, "method.peft_type", "did you mean VERA?"),
        ({"peft_type": "PROMPT_TUNING"}, "method.peft_type", "adapts chosen layers"),
        ({"peft": {"d_inital": 0.2}}, "method.peft.d_inital", "d_initial"),
        ({"peft": {"d_initial": "much"}}, "method.peft.d_initial", "0.1"),
        ({"peft": {"target_modules": "q"}}, "method.peft.target_modules", "method.target_modules"),
        ({"peft_type": "LORA", "peft": {"megatron_config": {"a": 1}}}, "method.peft.megatron_config", "another type"),
        ({"peft_type": "LORA", "peft": {"megatron_core": "this"}}, "method.peft.megatron_core", "else is loaded"),
        ({"peft_type": "SHADOW", "peft": {"shadow_model": "/home"}}, "method.peft.shadow_model", "else is loaded"),
        ({"peft_type": "SHIRA", "peft": {"r": 0}}, "method.peft.r", "positive integer"),
        ({"peft_type": "TINYLORA", "peft": {"weight_tying": 7.5}}, "method.peft.weight_tying", "weight_tying"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(method: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        Peft.adapt(tiny.base_model("bert"), tiny.settings(method={"name": "peft", **method}))
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


_ENDLESS = "(([a-z.0-9_]+)+)+x"
"""A regular expression that takes hours on a path of fifty letters."""


@pytest.mark.parametrize(
    ("peft_type", "given", "says"),
    [
        ("LORA", {"rank_pattern": {_ENDLESS: 4}}, "no regular expressions"),
        ("C3A", {"block_size_pattern": {_ENDLESS: 8}}, "no regular expressions"),
        ("IA3", {"feedforward_modules": 5}, "name of a module"),
        ("LORA", {"r": float("inf")}, "a number above"),
        ("LORA", {"r": float("nan")}, "a number above"),
        ("FOURIERFT", {"n_frequency": 1e12}, "a number above"),
        ("LORA", {"rank_pattern": {"query": 10**9}}, "a number above"),
        ("LORA", {"r": 10**7}, "numbers"),
        ("HRA", {"r": 10**6}, "numbers"),
        ("VBLORA", {"vector_length": 8, "num_vectors": 10**7}, "numbers"),
        ("LORA", {"init_lora_weights": "pissa_niter_100000000"}, "operations"),
        ("PEANUT", {"depth": 10**6}, "operations"),
        ("OFT", {"oft_block_size": 8, "num_cayley_neumann_terms": 10**7}, "operations"),
    ],
)
def test_no_key_keeps_a_node_busy_or_fills_its_memory(
    peft_type: str, given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "_OPERATIONS", 2**10)
    method = {"name": "peft", "peft_type": peft_type, "peft": given, "rank": 2, "alpha": None}
    with pytest.raises(InputError) as caught:
        Peft.adapt(tiny.base_model("bert"), tiny.settings(method=method))
    assert caught.value.field.startswith("method.peft")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rank_is_bounded_too() -> None:
    with pytest.raises(InputError, match=r"more than .* numbers"):
        Peft.adapt(tiny.base_model("bert"), tiny.settings(method={"name": "peft", "rank": 10**7}))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.empty(n),
        lambda n: torch.rand(n, generator=torch.Generator()),
        lambda n: torch.randperm(n),
        lambda n: torch.eye(n // 1000),
        lambda n: torch.ones(n // 10**4, 1).repeat(1, 10**4),
        lambda n: torch.ones(n // 10**5, 1) * torch.ones(10**5),
        lambda n: torch.diag(torch.ones(n // 10**4)),
        lambda n: [torch.empty(1000) for _ in range(n // 1000)],
    ],
)
def test_numbers_are_counted_before_they_take_memory(make: Any) -> None:
    layer = torch.nn.Linear(10, 10)
    with pytest.raises(RuntimeError, match=r"more than .* numbers"), bounds.Bounded([layer], bounds.MADE):
        make(10**9)
    with bounds.Bounded([layer], bounds.MADE) as counted:
        torch.nn.Linear(5, 7).weight.expand(10**9, 7, 5)
    assert counted.made == 5 * 7 + 7


def test_dropout_is_refused_since_a_cohort_would_share_its_mask() -> None:
    with pytest.raises(InputError, match="dropout"):
        made(settings("VERA", given={"vera_dropout": 0.3}))
    notes = unused_keys(tiny.settings(method={"name": "peft", "dropout": 0.1, "alpha": 2.0}))
    assert any("method.dropout" in note for note in notes)
    assert any("VERA has no alpha" in note for note in notes)


def test_rank_and_alpha_are_the_types_own() -> None:
    """Without alpha, alpha / r stays what the type's defaults say: 640 / 32 for RandLoRA."""
    config = settings("RANDLORA")
    config = config.model_copy(update={"method": config.method.model_copy(update={"alpha": None, "rank": 4})})
    found = peft_config("RANDLORA", {}, config, target_modules=["any"]).to_dict()
    assert (found["r"], found["randlora_alpha"]) == (4, 80)
    found = peft_config("RANDLORA", {"r": 5}, config, target_modules=["any"]).to_dict()
    assert (found["r"], found["randlora_alpha"]) == (5, 100)
    config = tiny.settings(method={"name": "peft", "peft_type": "LORA", "rank": 4, "alpha": 6.0})
    layer: Any = next(iter(Peft.adapt(tiny.base_model("bert"), config).adapters.values()))
    assert layer.tuner.scaling["default"] == pytest.approx(1.5)


def test_layers_of_a_kind_are_some_of_those_that_were_chosen() -> None:
    """IA3 scales the inputs of feed-forward layers, and the outputs of others."""
    adapted = made(settings("IA3", given={"feedforward_modules": ["intermediate.dense"]}))
    query, inner = adapted.names([TRAINED_KIND])[:2]
    assert "query" in query
    assert "intermediate" in inner
    assert adapted.parameter(query).shape == (1, 32, 1)
    assert adapted.parameter(inner).shape == (1, 1, 32)


# Clients and examples apart.


@pytest.mark.parametrize(("peft_type", "kind"), [*((t, "bert") for t in CARRIED), ("VERA", "llama"), ("LORA", "gpt2")])
def test_examples_and_clients_stay_apart(peft_type: str, kind: str) -> None:
    """Per-example gradients are those of each row alone, and a cohort's clients those trained alone."""
    config = settings(peft_type, kind, client={"optimizer": "sgd", "local_steps": 2, "batch_size": 2})
    # PSOFT takes no weights in float64.
    adapted = made(config, kind, torch.float32 if peft_type == "PSOFT" else torch.float64)
    examples = tiny.table(kind, 6)
    if peft_type == "LILY":  # its router takes a mean over the batch
        assert dependence(adapted, config, 0) is not None
        with pytest.raises(InputError, match="examples depend on their batch"):
            check_sound(adapted, config, 0)
        return
    starts = [
        {name: array.to(adapted.parameter(name).dtype) for name, array in adapted.drawn(seed).items()}
        for seed in (0, 1)
    ]
    rows = [np.arange(4), np.arange(4, 6)]
    adapted.set_clients(starts)
    adapted.model.train()
    with per_example_gradients(adapted):
        adapted.layout.set_rows([len(r) for r in rows])
        batch = examples.batch(np.concatenate(rows), adapted.device)
        examples.task.loss(adapted.logits(batch), batch["labels"]).sum().backward()
        samples = {name: getattr(adapted.parameter(name), "grad_sample") for name in adapted.trained}  # noqa: B009
    for client, mine in enumerate(rows):
        adapted.set_clients([starts[client]])
        for row in mine:
            adapted.layout.set_rows([1])
            batch = examples.batch(np.array([row]), adapted.device)
            examples.task.loss(adapted.logits(batch), batch["labels"]).sum().backward()
            for name in adapted.trained:
                parameter = adapted.parameter(name)
                assert parameter.grad is not None
                got: Any = samples[name]
                scale = max(1.0, float(parameter.grad.abs().max()))
                # Some types take a Fourier transform in float32, and Llama its norms.
                assert float((got[row] - parameter.grad[0]).abs().max()) <= 1e-5 * scale, name
                parameter.grad = None
    plans = [None, [tiny.plan(1.0, 0.05), tiny.plan(2.0, 0.05)]]
    for of_both in plans:
        jobs = tiny.jobs_of(starts, rows, of_both)
        together = train_cohort(adapted, examples, jobs, config)
        for k, job in enumerate(jobs):
            alone = train_cohort(adapted, examples, [job], config)[0]
            assert tiny.difference(together[k].arrays, alone.arrays) <= 2e-5
            assert tiny.difference(alone.arrays, {n: starts[k][n] for n in alone.arrays}) > 0


def test_a_type_that_does_not_run_under_vmap_is_named() -> None:
    assert made(settings("LOHA")).probed.way == ROWS
    private = settings("LOHA", privacy={"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3})
    assert any(ROWS in note for note in made(private).notes)
    assert not any(ROWS in note for note in made(settings("LOHA")).notes)


# What is drawn.


def test_what_is_drawn_comes_from_the_runs_seed_alone() -> None:
    def drawn(seed: int, given: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed + 100)  # must not matter
        adapted = made(settings("VERA", given=given, run={"seed": seed}))
        return adapted.arrays(adapted.names([DRAWN_KIND]))

    one = drawn(1)
    assert len(one) == 2  # both projections are shared by all layers
    assert tiny.difference(one, drawn(1)) == 0
    assert tiny.difference(one, drawn(2)) > 0
    # Chosen by the user instead: still sent, since it is no constant.
    assert tiny.difference(drawn(1, {"projection_prng_key": 7}), drawn(2, {"projection_prng_key": 7})) == 0


def test_places_that_layers_keep_to_themselves_are_checked_by_their_digest() -> None:
    server, client, other = (made(settings("SHIRA", run={"seed": seed})) for seed in (1, 1, 2))
    sent = server.arrays(server.names([DRAWN_KIND]))
    assert set(sent) == {FINGERPRINT}
    client.set_shared(sent)
    with pytest.raises(RuntimeError, match="other versions"):
        other.set_shared(sent)


# Whole runs.


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with world(tmp_path_factory.mktemp("types")) as found:
        yield found
    torch.set_num_threads(threads)


def content(here: World, peft_type: str, kind: str = "bert", **sections: Any) -> dict[str, Any]:
    method = {"peft_type": peft_type, "peft": KEYS.get(peft_type, {})}
    method |= {"peft": {"use_dora": True}} if peft_type == "LORA" else {}
    given = here.content("peft", kind, method=method, **sections)
    given["data"]["partition"] = {"kind": "iid", "clients": 10}
    given["run"]["rounds"] = 2
    return given


@pytest.mark.parametrize(
    ("peft_type", "private"),
    [*((kind, False) for kind in (*NAMED, "LORA")), *((kind, True) for kind in (*PRIVATE, "LORA"))],
)
def test_ten_clients_train_it_and_stock_peft_loads_it(here: World, peft_type: str, private: bool) -> None:
    mode = {"mode": "example", "noise_multiplier": 0.5, "max_grad_norm": 0.5, "target_delta": 1e-2}
    sections: dict[str, Any] = {"privacy": mode} if private else {}
    run = here.run(content(here, peft_type, **sections))
    facts = run.summary["peft"]
    rows = run.rows("communication.csv")
    head = run.summary["trainable_parameters"] - facts["trained_numbers"]
    assert head == 3 * 32 + 3
    for row in rows:
        numbers = {"initial": facts["drawn_numbers"], "down": facts["trained_numbers"] + head}
        expected = numbers.get(row["direction"], numbers["down"])
        assert row["payload_bytes"] == row["formula_bytes"] == 4 * expected
    assert sum(row["direction"] == "up" for row in rows) == 20
    assert sum(row["direction"] == "initial" for row in rows) == (10 if facts["drawn_numbers"] else 0)
    assert facts["exact"] == (peft_type in EXACT)
    assert private == ("epsilon" in run.summary and run.summary["epsilon"] is not None)
    check_loads(run)


@pytest.mark.parametrize("peft_type", ["MISS", "VERA", "OFT"])
def test_a_language_model_too(here: World, peft_type: str) -> None:
    check_loads(here.run(content(here, peft_type, "llama")))


@contextmanager
def no_warnings() -> Iterator[None]:
    """PEFT warns of arrays that are missing or left over; and of what BOFT cannot do without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="(Failed to load the CUDA extension|Setting boft_n_butterfly)")
        yield


def check_loads(run: Any) -> None:
    """Load the result with stock PEFT on the stock model, and with fedlora.load."""
    folder = run.folder / "adapter"
    about = json.loads((folder / "adapter_config.json").read_text())
    if run.logits.dim() == 3:
        stock: Any = AutoModelForCausalLM.from_pretrained(about["base_model_name_or_path"])
    else:
        stock = AutoModelForSequenceClassification.from_pretrained(about["base_model_name_or_path"], num_labels=3)
    batch = {name: run.batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool() if run.logits.dim() == 3 else torch.ones(len(run.logits), dtype=torch.bool)
    with no_warnings():
        adapted = PeftModel.from_pretrained(stock, str(folder)).eval()
    with torch.no_grad():
        tiny.assert_close(adapted(**batch).logits[real], run.logits[real], 3e-5)
        tiny.assert_close(fedlora.load(run.folder)[0](**batch).logits[real], run.logits[real], 3e-5)


def test_mean_pooling_keeps_its_head_beside_the_adapter(here: World) -> None:
    run = here.run(content(here, "LOKR", model={"pooling": "mean"}))
    model, _ = fedlora.load(run.folder)
    with torch.no_grad():
        batch = {name: run.batch[name] for name in ("input_ids", "attention_mask")}
        tiny.assert_close(model(**batch).logits, run.logits, 3e-5)
    assert (run.folder / "adapter" / "head.safetensors").is_file()


@pytest.mark.parametrize("peft_type", [kind for kind in CARRIED if kind not in NAMED and kind != "LORA"])
def test_every_other_type_is_exported_as_stock_peft_reads_it(here: World, peft_type: str, tmp_path: Path) -> None:
    """Of drawn values instead of a run's."""
    config = load_config(content(here, peft_type))
    strategy = Peft(config)
    no_data: Any = type("Data", (), {"label_names": ["a", "b", "c"]})()
    adapted = strategy.server_model(no_data, "cpu")
    start = strategy.start_arrays(adapted, no_data)
    adapted.set_shared(start | adapted.drawn(0))
    strategy.export(adapted, no_data, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=3)
    with no_warnings():
        loaded = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    tokens = torch.randint(3, 50, (4, 7))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        tiny.assert_close(loaded(**batch).logits, logits(adapted, batch), 3e-5)
    assert {Peft.roles(config, 1)[kind].trained for kind in (TRAINED_KIND, HEAD)} == {True}


@pytest.mark.usefixtures("cached", "bare")
def test_on_the_real_minilm(tmp_path: Path) -> None:
    """RandLoRA under privacy, on real reviews."""
    given = {
        "run": {"seed": 3, "rounds": 2},
        "model": {"name": "asset:minilm-l6", "pooling": "mean", "max_length": 16, "num_hidden_layers": 1},
        "data": {
            "name": "asset:rotten-tomatoes",
            "max_examples": 200,
            "max_test_examples": 50,
            "partition": {"kind": "iid", "clients": 10},
        },
        "method": {"name": "peft", "peft_type": "FOURIERFT", "peft": {"scaling": 15.0}},
        "client": {"batch_size": 4, "local_steps": 2},
        "privacy": {"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-3},
        "simulation": {"workers": 0},
    }
    result = fedlora.simulate(given, output=tmp_path / "run")
    assert result.summary["peft"]["exact"]
    assert result.summary["peft"]["trained_numbers"] == 2 * 1000
    assert result.summary["epsilon"]["max"] <= 8.0

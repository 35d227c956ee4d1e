"""A model that is split over two devices trains, evaluates and answers as on one, to the last bit on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import modeling
from torch import nn

from fedlora import output_layer
from fedlora.adapters import AdaptedModel, adapt
from fedlora.config import Config
from fedlora.devices import devices_of, move_inputs, split_by_layers
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.models import load_base
from fedlora.roles import trained_kinds
from fedlora.training import ClientResult, evaluate, train_cohort
from fedlora.training.answering import generate
from fedlora.training.soundness import dependence
from tests import tiny
from tests.architectures import DECODERS, ENCODERS, build
from tests.two_devices import DEVICES, FIRST, SECOND, DeviceError, TwoDevices

SIZES = [4, 1, 6]
CLIENT = {"optimizer": "adamw", "local_steps": 2, "batch_size": 3}
ARCHITECTURES = ("bert", "deberta-v3", "distilbert", "modernbert", "gpt2", "llama", "gemma3", "phi3")

PRIVATE, DROPOUT, CLIPPED = {"private": True}, {"method": {"dropout": 0.3}}, {"client": {"max_grad_norm": 0.05}}
CHECKPOINTED = {"client": {"gradient_checkpointing": True, "physical_batch_size": 2}}
WAYS: list[dict[str, Any]] = [{}, PRIVATE, PRIVATE | DROPOUT, CLIPPED, PRIVATE | CHECKPOINTED | DROPOUT]


def made(base: nn.Module, causal: bool, mode: TwoDevices | None = None, **sections: Any) -> tuple[AdaptedModel, Config]:
    """Put adapters into a base model; with a mode it is split first."""
    method = {"name": "fedit", "target_modules": "all-linear", **sections.get("method", {})}
    client = {**CLIENT, **sections.get("client", {})}
    config = tiny.settings("llama" if causal else "bert", method=method, client=client)
    if mode is not None:
        mode.put(base, split_by_layers(base, DEVICES))
        move_inputs(base)
    adapted = adapt(base, config, "lora")
    tiny.start(adapted)
    return adapted, config


def trained(base: nn.Module, causal: bool, mode: TwoDevices | None, private: bool, **sections: Any) -> list[Any]:
    """Train a cohort of three clients with unequal numbers of examples."""
    adapted, config = made(base, causal, mode, **sections)
    start = adapted.arrays((*adapted.stacked_layers(), *(n for n in adapted.head_names if n.endswith("bias"))))
    plans = [tiny.plan(0.5, 0.1, 0.7, 2.0)] * 3 if private else None
    examples = tiny.table("llama" if causal else "bert", sum(SIZES), length=14)
    jobs = tiny.jobs_of([start] * 3, tiny.split(SIZES), plans, learning_rate=0.02)
    if mode is not None:
        assert {adapted.parameter(name).device for name in adapted.stacked_layers()} == set(DEVICES)
        for path, adapter in adapted.adapters.items():
            factors = [adapted.parameter(f"{path}.{factor}") for factor in adapter.factors]
            assert {p.device for p in factors} == {adapter.weight.device}
    return train_cohort(adapted, examples, jobs, config)


def check_equal(results: Sequence[ClientResult], expected: Sequence[ClientResult]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert tiny.difference(result.arrays, other.arrays) == 0
        assert result.loss == other.loss


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_training_gives_the_same_bits(kind: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # A recomputation is compared with the first pass by the devices too, which have no names within an operation.
    monkeypatch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default", lambda x: x.shape)
    causal, sections = kind in tiny.CAUSAL, {"private": False, **way}
    expected = trained(tiny.base_model(kind), causal, None, **sections)
    with TwoDevices() as mode:
        results = trained(tiny.base_model(kind), causal, mode, **sections)
    check_equal(results, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_train_under_dp(name: str) -> None:
    causal = name in DECODERS
    parts = *(DECODERS | ENCODERS)[name], "causal-lm" if causal else "default"
    expected = trained(build(*parts), causal, None, private=True)
    with TwoDevices() as mode:
        check_equal(trained(build(*parts), causal, mode, private=True), expected)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fed-sb"},
        {"name": "ravan"},
        {"name": "flexmore"},
        {"name": "peft", "peft_type": "LORA"},
        {"name": "peft", "peft_type": "VERA"},
    ],
    ids=lambda method: "-".join(method.values()),
)
def test_methods_train_under_dp(method: dict[str, str]) -> None:
    kind = get_method(method["name"])
    config = tiny.settings("llama", method=method, client=CLIENT)
    examples = tiny.table("llama", sum(SIZES), length=14)

    def results(mode: TwoDevices | None) -> tuple[list[ClientResult], float]:
        base = tiny.base_model("llama")
        if mode is not None:
            mode.put(base, split_by_layers(base, DEVICES))
            move_inputs(base)
        adapted = kind.adapt(base, config)
        if method["name"] != "peft":  # PEFT draws its own
            adapted.set_shared(adapted.drawn(0))
        start = adapted.arrays(adapted.names(trained_kinds(kind.roles(config, 1))))
        jobs = tiny.jobs_of([start] * 3, tiny.split(SIZES), [tiny.plan(0.5, 0.1, 0.7, 2.0)] * 3, learning_rate=0.02)
        found = train_cohort(adapted, examples, jobs, config)
        adapted.set_clients([found[0].arrays])
        return found, evaluate(adapted, examples, 4)["loss"]

    expected, loss = results(None)
    with TwoDevices() as mode:
        found, split_loss = results(mode)
    check_equal(found, expected)
    assert split_loss == loss


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_evaluation_answers_and_the_probe_of_independence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = kind in tiny.CAUSAL
    # Losses in chunks of tokens, so that the output layer gets hidden states.
    monkeypatch.setattr(output_layer, "CHUNK", 7 * tiny.VOCABULARY)
    examples = tiny.table("llama" if causal else "bert", 9)

    def results(mode: TwoDevices | None) -> tuple[Any, ...]:
        adapted, config = made(tiny.base_model(kind), causal, mode)
        assert dependence(adapted, config, 0) is None
        answers = generate(adapted, [[5, 6, 7], [8, 9]], 5, 2, stop=[2], pad_token_id=0) if causal else []
        return evaluate(adapted, examples, 4), answers

    expected = results(None)
    with TwoDevices() as mode:
        assert results(mode) == expected


def test_a_model_is_loaded_without_hooks_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are one device to torch, so that the model is not split; but transformers divides it. Each weight is where it
    # belongs already, as it is on GPUs.
    monkeypatch.setattr(modeling, "check_device_same", lambda *_: True)
    config = tiny.settings("llama", model={"name": str(tiny.save_llama(tmp_path))})
    split, whole = load_base(config, None, DEVICES), load_base(config, None)
    for (name, first), (other, second) in zip(split.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(first, second)
    for module in split.modules():
        assert not {"forward", "to", "cuda", "_hf_hook", "_old_forward"} & set(vars(module))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(split(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_without_moving_its_inputs_a_split_model_cannot_run() -> None:
    with TwoDevices() as mode:
        adapted, _ = made(tiny.base_model("llama"), True, mode)
        assert devices_of(adapted.model) == DEVICES
        batch = {"input_ids": torch.arange(3, 8)[None]}
        adapted.layout.set_rows([1])
        assert adapted.logits(batch).device == FIRST
        for module in adapted.model.modules():
            module._forward_pre_hooks.clear()
        with pytest.raises(DeviceError, match="cpu:1"):
            adapted.logits(batch)


def test_a_model_on_one_device_has_no_hooks() -> None:
    model = move_inputs(tiny.base_model("llama"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with TwoDevices() as mode:
        mode.put(model, split_by_layers(model, DEVICES))
        for _ in range(2):
            move_inputs(model)
        assert max(len(module._forward_pre_hooks) for module in model.modules()) == 1


@pytest.mark.parametrize("cards", [2, 3, 4])
def test_layers_are_divided_in_order_and_evenly(cards: int) -> None:
    from transformers import LlamaForCausalLM

    devices = [torch.device("cuda", number) for number in range(cards)]
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny.llama_config(num_hidden_layers=24, tie_word_embeddings=False))
    places = split_by_layers(model, devices)
    order = [places[f"model.layers.{number}"].index for number in range(24)]
    assert order == sorted(order)
    assert places["model.embed_tokens"].index == places["model.rotary_emb"].index == 0
    assert places["model.norm"].index == places["lm_head"].index == cards - 1
    assert set(places) >= {"model.embed_tokens", "lm_head"}
    sizes = np.zeros(cards)
    for name, parameter in model.named_parameters():
        (card,) = {d.index for path, d in places.items() if name.startswith(f"{path}.")}
        sizes[card] += parameter.numel()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert np.ptp(sizes) <= 2 * layer


def test_weights_in_common_stay_on_one_device() -> None:
    model = tiny.base_model("gpt2")  # its output layer is its embeddings
    places = split_by_layers(model, DEVICES)
    assert places["lm_head"] == places["transformer.wte"] == FIRST
    assert places["transformer.ln_f"] == SECOND


def test_too_few_layers_are_refused() -> None:
    devices = [torch.device("cuda", number) for number in range(3)]
    with pytest.raises(InputError, match=r"simulation\.gpus_per_worker = 3.*layers"):
        split_by_layers(tiny.base_model("bert"), devices)

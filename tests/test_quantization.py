"""A quantised base: what it computes with, what trains beside it, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from fedlora import output_layer
from fedlora.adapters import adapt
from fedlora.arrays import Arrays
from fedlora.config import Config, load_config
from fedlora.errors import InputError
from fedlora.kernels import activations
from fedlora.models import dense_weight, linear_shape, load_base
from fedlora.quantization import is_quantized
from fedlora.results.load import load
from fedlora.training import train_cohort
from fedlora.training.soundness import dependence
from tests import tiny
from tests.small_runs import World, world

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

KINDS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("quantized")) as made:
        torch.manual_seed(0)
        # 4-bit blocks have 64 weights.
        wide = LlamaForCausalLM(tiny.llama_config(hidden_size=64, intermediate_size=128))
        wide.save_pretrained(made.folder / "llama")
        yield made


def config_of(here: World, quantization: str | None, method: str = "fedit", **sections: Any) -> Config:
    model = {"quantization": quantization} if quantization else {}
    return load_config(here.content(method, "llama", model=model, **sections))


def base(here: World, quantization: str) -> Any:
    return load_base(config_of(here, quantization), None)


@pytest.mark.parametrize("quantization", KINDS)
def test_its_gates_are_fused_where_trying_them_changes_nothing(
    here: World, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = base(here, quantization), torch.tensor([[5, 6, 7]])
    expected = base(here, quantization)(input_ids=ids).logits
    monkeypatch.setattr(activations, "triton", object())
    activations.use_activation_kernels(model)
    assert any(isinstance(m, activations.GatedFeedForward) for m in model.modules()) == (quantization == "nf4")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("quantization", KINDS)
def test_the_blocks_linear_layers_are_quantised_and_nothing_else(here: World, quantization: str) -> None:
    model, plain = base(here, quantization), load_base(config_of(here, None), None)
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            own = model.get_submodule(path)
            assert is_quantized(own) == (".layers." in path)
            assert linear_shape(own) == linear_shape(layer)
            error = float((dense_weight(own) - layer.weight).norm() / layer.weight.norm())
            assert (1e-3 < error < 0.15) if ".layers." in path else error == 0
    with torch.device("meta"):
        assert load_base(config_of(here, quantization), None, "meta") is not None


def test_a_4_bit_layer_computes_with_its_dense_weight(here: World) -> None:
    layer = base(here, "nf4").get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantization", KINDS)
def test_a_texts_logits_do_not_depend_on_the_texts_beside_it(here: World, quantization: str) -> None:
    """LLM.int8()'s treatment of outliers would."""
    model = base(here, quantization)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] *= 300  # a token with outliers
    ids = torch.tensor([[4, 5, 6, 7], [9, 9, 9, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:1], model(ids[:1]).logits, rtol=0, atol=1e-5)


def test_whether_texts_depend_on_each_other_is_told_in_full_precision(here: World) -> None:
    """In bfloat16 a layer of 4 bits rounds otherwise for other numbers of tokens; afterwards it does so again."""
    model = {"quantization": "nf4", "dtype": "bfloat16"}
    config = load_config(here.content("fedit", "llama", model=model))
    adapted = adapt(load_base(config, None), config, "lora")
    layers: list[Any] = [m for m in adapted.model.modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.compute_dtype))
    assert dependence(adapted, config, 0) is None
    assert set(seen) == {torch.float32}
    adapted.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert set(seen[-len(layers) :]) == {torch.bfloat16}


def dense_copy(model: Any) -> Any:
    """The same model with floating-point layers of the weights that the quantised ones compute with."""
    found = copy.deepcopy(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and is_quantized(layer):
            made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            made.weight = nn.Parameter(dense_weight(layer).clone(), requires_grad=False)
            found.set_submodule(path, made)
    return found


def trained(model: Any, config: Config, private: bool, clients: int) -> list[Arrays]:
    adapted = adapt(model, config, tiny.FACTORS[config.method.name][0])
    tiny.start(adapted, scale=0.1)
    names = adapted.names(tiny.FACTORS[config.method.name][1])
    starts = [adapted.arrays(names)] * clients
    rows = tiny.split([6] * clients)
    plans = [tiny.plan(sigma=1.0, clip=0.1)] * clients if private else None
    results = train_cohort(adapted, tiny.table("llama", 6 * clients), tiny.jobs_of(starts, rows, plans), config)
    return [result.arrays for result in results]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("quantization", KINDS)
def test_less_memory_changes_no_number(
    here: World, quantization: str, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient checkpointing, and losses in chunks of seven tokens."""
    config = config_of(here, quantization)
    expected = trained(base(here, quantization), config, private, 3)
    client = config.client.model_copy(update={"gradient_checkpointing": True})
    monkeypatch.setattr(output_layer, "CHUNK", 7 * tiny.VOCABULARY)
    config = config.model_copy(update={"client": client})
    for mine, other in zip(trained(base(here, quantization), config, private, 3), expected, strict=True):
        assert tiny.difference(mine, other) < 1e-6


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("method", ["fedit", "fed-sb"])
def test_training_beside_4_bits_is_training_beside_their_values(here: World, method: str, private: bool) -> None:
    config = config_of(here, "nf4", method)
    quantised = base(here, "nf4")
    dense = dense_copy(quantised)
    own, other = trained(quantised, config, private, 3), trained(dense, config, private, 3)
    for mine, theirs in zip(own, other, strict=True):
        assert tiny.difference(mine, theirs) <= 1e-6
    assert tiny.difference(own[0], own[1]) > 1e-4


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("private", [False, True])
def test_a_cohort_is_its_clients_alone(here: World, quantization: str, private: bool) -> None:
    noise = {"mode": "example", "noise_multiplier": 1.0, "max_grad_norm": 0.5, "target_delta": 1e-2}
    sections: dict[str, Any] = {"privacy": noise} if private else {}
    given = here.content("ffa-lora", "llama", model={"quantization": quantization}, **sections)
    alone, together = here.run(given), here.run(given | {"simulation": {"workers": 0, "cohort_size": 3}})
    assert tiny.difference(alone.arrays(), together.arrays()) <= 1e-4
    assert alone.rows("communication.csv") == together.rows("communication.csv")


def test_a_run_is_merged_into_the_unquantised_weights(here: World) -> None:
    run = here.run(here.content("fed-sb", "llama", model={"quantization": "nf4"}))
    model, _ = load(run.folder)
    assert not any(is_quantized(layer) for layer in model.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        close = model(run.batch["input_ids"]).logits - run.logits
    assert 1e-6 < float(close.abs().mean()) < float(run.logits.abs().mean())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"dtype": "float64"}}, "computes in float32 or bfloat16"),
        ({"method": {"name": "peft", "peft_type": "MISS"}}, "peft computes with the weights of frozen layers"),
        ({"method": {"name": "flexmore"}}, "flexmore computes with the weights of frozen layers"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(here: World, sections: dict[str, Any], words: str) -> None:
    content = here.content("fedit", "llama")
    content["model"] |= {"quantization": "nf4", **sections.get("model", {})}
    content["method"] = {"rank": 2} | sections.get("method", content["method"])
    with pytest.raises(InputError, match=rf"model\.quantization = 'nf4': .*{words}"):
        load_config(content)


def test_the_extra_is_named_where_the_package_is_missing(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs the package bitsandbytes; install it: pip install "fedlora\['):
        config_of(here, "nf4")

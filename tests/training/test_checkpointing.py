"""Gradient checkpointing changes no number: with cohorts, DP, ghost norms, dropout and PEFT's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapters import AdaptedModel, adapt, stacked
from fedlora.adapters.stacked import ClientDropout, StackedLinear
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.experts.expert_model import adapt_experts
from fedlora.strategies.peft import Peft
from fedlora.training import ClientJob, ClientResult, train_cohort
from fedlora.training.checkpointing import layers_of
from fedlora.training.dp import GradSampleHooks
from fedlora.training.soundness import dependence
from tests import tiny
from tests.architectures import DECODERS, ENCODERS, build

SIZES = [4, 1, 6]
CLIENT = {"optimizer": "sgd", "local_steps": 2, "batch_size": 3}


def made(name: str, **sections: Any) -> tuple[AdaptedModel, Config]:
    """Make an architecture with adapters in it, none of them zero."""
    causal = name in DECODERS
    method = {"target_modules": "all-linear", **sections.pop("method", {})}
    config = tiny.settings("llama" if causal else "bert", method=method, client={**CLIENT, **sections})
    adapted = adapt(build(*(DECODERS | ENCODERS)[name], "causal-lm" if causal else "default"), config, "lora")
    tiny.start(adapted)
    return adapted, config


def switched(config: Config, on: bool) -> Config:
    client = config.client.model_copy(update={"gradient_checkpointing": on})
    return config.model_copy(update={"client": client})


def jobs(adapted: AdaptedModel, causal: bool, private: bool) -> tuple[Any, list[ClientJob]]:
    """Three clients of unequal numbers of examples."""
    start = adapted.arrays((*adapted.stacked_layers(), *(n for n in adapted.head_names if n.endswith("bias"))))
    plans = [tiny.plan(0.5, 0.1, 0.7, 2.0)] * 3 if private else None
    examples = tiny.table("llama" if causal else "bert", sum(SIZES), length=14)
    return examples, tiny.jobs_of([start] * 3, tiny.split(SIZES), plans, learning_rate=0.02)


def check(adapted: AdaptedModel, config: Config, causal: bool, private: bool) -> None:
    """Train a cohort without checkpointing, with it, and its clients alone with it; each layer then runs twice."""
    examples, three = jobs(adapted, causal, private)
    dependence(adapted, config, examples.pad_token_id)  # measured once, by passes that do not count here
    runs: Counter[int] = Counter()
    hooks = [layer.register_forward_pre_hook(lambda *_: runs.update([0])) for layer in inner(adapted)]
    expected = train_cohort(adapted, examples, three, switched(config, False))
    once = runs.pop(0)
    together = train_cohort(adapted, examples, three, switched(config, True))
    assert runs.pop(0) == 2 * once
    alone = [train_cohort(adapted, examples, [job], switched(config, True))[0] for job in three]
    for results, tolerance in ((together, 1e-9), (alone, 1e-6)):
        for result, other in zip(results, expected, strict=True):
            assert tiny.difference(result.arrays, other.arrays) < tolerance
            assert result.loss == tiny.same_loss(other.loss)
    assert all(tiny.difference(e.arrays, job.arrays) > 1e-3 for e, job in zip(expected, three, strict=True))
    for hook in hooks:
        hook.remove()
    assert not any(layer.gradient_checkpointing for layer in layers_of(adapted))


def inner(adapted: AdaptedModel) -> Iterator[torch.nn.Module]:
    """A module in each transformer layer, as a layer's own hooks are not called again."""
    for layer in layers_of(adapted):
        yield next(module for module in layer.modules() if isinstance(module, StackedLinear))


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "deberta-v3"])
def test_training_is_that_without_it(name: str, private: bool) -> None:
    """DeBERTa's layers take a table that the batch shares."""
    check(*made(name), name in DECODERS, private)


@pytest.mark.parametrize("private", [False, True])
def test_dropout_masks_are_drawn_once(private: bool) -> None:
    check(*made("llama", method={"dropout": 0.3}), True, private)


@pytest.mark.parametrize("ghost", [False, True])
def test_ghost_norms_and_physical_batches(ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "ghost_norms_pay", lambda *_: ghost)
    check(*made("llama", physical_batch_size=2), True, True)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("peft_type", ["LORA", "VERA"])
def test_layers_of_pefts(peft_type: str, private: bool) -> None:
    method = {"name": "peft", "peft_type": peft_type, "rank": 2, "target_modules": ["q_proj", "v_proj"]}
    config = tiny.settings("llama", method=method, client=CLIENT)
    adapted = Peft.adapt(tiny.base_model("llama"), config)
    examples, three = jobs(adapted, True, private)
    three = [replace(job, arrays=adapted.drawn(k)) for k, job in enumerate(three)]
    expected = train_cohort(adapted, examples, three, switched(config, False))
    for result, other in zip(train_cohort(adapted, examples, three, switched(config, True)), expected, strict=True):
        assert tiny.difference(result.arrays, other.arrays) < 1e-6
    assert all(tiny.difference(e.arrays, job.arrays) > 1e-6 for e, job in zip(expected, three, strict=True))


@pytest.mark.parametrize("private", [False, True])
def test_experts(private: bool) -> None:
    config = tiny.settings("llama", method={"name": "flexmore", "rank": 2}, client=CLIENT)
    adapted = adapt_experts(tiny.base_model("llama"), config)
    names = [name for name in adapted.stacked_layers() if not name.endswith("public_router")]
    examples, three = jobs(adapted, True, private)
    drawn = adapted.drawn(0)
    three = [replace(job, arrays={name: drawn[name] for name in names}) for job in three]
    expected = train_cohort(adapted, examples, three, switched(config, False))
    for result, other in zip(train_cohort(adapted, examples, three, switched(config, True)), expected, strict=True):
        assert tiny.difference(result.arrays, other.arrays) < 1e-6


def test_the_backward_pass_meets_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, config = made("llama", batch_size=6)
    config = config.model_copy(update={"client": config.client.model_copy(update={"local_steps": 1})})
    examples, three = jobs(adapted, True, True)
    sampler, calls = GradSampleHooks.GRAD_SAMPLERS[StackedLinear], Counter[str]()

    def counted(layer: StackedLinear, *arguments: Any) -> Any:
        calls[layer.name] += 1
        return sampler(layer, *arguments)

    dependence(adapted, config, examples.pad_token_id)
    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, StackedLinear, counted)
    train_cohort(adapted, examples, three, switched(config, True))
    assert calls == dict.fromkeys(adapted.stacked_layers(), 1)


@pytest.mark.parametrize("secret", [False, True])
def test_a_recomputation_sees_the_same_masks(secret: bool) -> None:
    """Those of the operating system's entropy too, which can be drawn but once."""
    adapted, config = made("llama", method={"dropout": 0.5})
    examples, (job, *_) = jobs(adapted, True, True)
    plan = tiny.plan(0.5, 0.1, 1.0, 2.0)
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in adapted.model.named_modules():
        if isinstance(module, ClientDropout):
            module.register_forward_hook(lambda _, __, y, path=path: seen.setdefault(path, []).append(y.detach() == 0))
    train_cohort(adapted, examples, [replace(job, plan=plan)], switched(config, True))
    seen.clear()
    train_cohort(adapted, examples, [replace(job, plan=plan, secret=secret)], switched(config, True))
    assert len(seen) == len(adapted.adapters)
    for masks in seen.values():
        first, again, second, last = masks
        assert torch.equal(first, again)
        assert torch.equal(second, last)
        assert not torch.equal(first, second)
        assert 0.3 < float(first.double().mean()) < 0.7


def peak(adapted: AdaptedModel, examples: Any, job: ClientJob, config: Config) -> int:
    """Return by how many bytes the memory in use rises at most in a training."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_cohort(adapted, examples, [job], config)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("private", [False, True])
def test_memory_falls(private: bool) -> None:
    """Eight layers of 24 rows of 32 tokens: what is kept is a layer's input instead of a dozen tensors of its size."""
    kind, options = DECODERS["llama"]
    method = {"target_modules": "all-linear"}
    config = tiny.settings("llama", method=method, client={**CLIENT, "local_steps": 1, "batch_size": 24})
    adapted = adapt(build(kind, options | {"num_hidden_layers": 8}, "causal-lm"), config, "lora")
    tiny.start(adapted)
    examples = tiny.table("llama", 24, length=32)
    start = adapted.arrays(adapted.stacked_layers())
    plans = [tiny.plan(0.5, 0.1, 1.0, 24.0)] if private else None
    (job,) = tiny.jobs_of([start], [np.arange(24)], plans)
    train_cohort(adapted, examples, [job], config)
    without, with_it = (peak(adapted, examples, job, switched(config, on)) for on in (False, True))
    assert with_it < 0.3 * without


def test_a_model_without_layers_for_it_is_refused() -> None:
    """ALBERT's one layer is none that transformers checkpoints."""
    adapted, config = made("albert")
    examples, three = jobs(adapted, False, False)
    with pytest.raises(InputError, match=r"gradient_checkpointing = True: .* set it to false"):
        train_cohort(adapted, examples, three, switched(config, True))
    results: list[ClientResult] = train_cohort(adapted, examples, three, config)
    assert len(results) == 3

"""What an example gives must not depend on its batch: measured on any model, and refused where it does."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from fedlora import simulate
from fedlora.adapters import AdaptedModel, RowLayout, StackedLinear, adapt
from fedlora.adapters.layers import FactoredLinear
from fedlora.adapters.own_rows import OwnRows
from fedlora.adapters.peft_format import export_peft
from fedlora.arrays import Arrays
from fedlora.data.tokens import TokenTable
from fedlora.errors import GuardError, InputError
from fedlora.experts.expert_model import adapt_experts
from fedlora.results import RunResult
from fedlora.training import soundness, train_cohort
from fedlora.training.checkpointing import layers_of
from fedlora.training.dp import per_example_gradients
from fedlora.training.soundness import check_sound, dependence
from tests import tiny
from tests.architectures import DECODERS, ENCODERS, REFUSED, adapted_case, build, cases, save

PAD = 0
CLIENTS = ([0], [1, 2], [3, 4, 5])


def test_there_are_architectures_enough():
    assert len(ENCODERS | DECODERS) >= 55
    assert {name if isinstance(name, str) else name[0] for name in REFUSED} < set(ENCODERS | DECODERS)


def gradients(
    adapted: AdaptedModel, examples: TokenTable, clients: list[list[int]] | tuple[list[int], ...], arrays: list[Arrays]
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Per-example gradients of every trained array and logits, by row."""
    rows = np.concatenate(clients)
    adapted.model.train()
    adapted.set_clients(arrays)
    with per_example_gradients(adapted):
        batch = examples.batch(rows)
        adapted.layout.set_rows([len(mine) for mine in clients])
        logits = adapted.logits(batch)
        examples.task.loss(logits, batch["labels"]).sum().backward()
        samples = {name: adapted.parameter(name).grad_sample for name in adapted.trained}
    return [{name: sample[i] for name, sample in samples.items()} for i in range(len(rows))], logits.detach()


@pytest.mark.parametrize(("name", "task", "kind"), cases())
def test_gradients_in_company_are_those_alone_or_the_model_is_refused(name, task, kind):
    """Three clients of 1, 2 and 3 rows of 3 to 20 tokens, of other arrays each; gradients to 2e-3 of a row's norm."""
    if (name, task) == ("xlnet", "mean"):  # no layer is left that an adapter could be in
        with pytest.raises(InputError, match="all texts in one row after the other"):
            adapted_case(name, task, kind)
        return
    adapted, config = adapted_case(name, task, kind)
    found = dependence(adapted, config, PAD)
    assert (found is not None) == (name in REFUSED or (name, task) in REFUSED), found
    if found is not None:
        with pytest.raises(InputError, match=r"model\.name"):
            check_sound(adapted, config, PAD)
        return
    tiny.start(adapted)
    every = [*adapted.stacked_layers(), *(n for n in adapted.head_names if n.endswith("bias"))]
    start = adapted.arrays(every)
    arrays = [{n: a + 0.1 * (k + 1) * torch.randn(a.shape) for n, a in start.items()} for k in range(3)]
    examples = tiny.table("llama" if task == "causal-lm" else "bert", 6, seed=3, length=20)
    assert len(set(examples.lengths.tolist())) > 3
    together, logits = gradients(adapted, examples, CLIENTS, arrays)
    for client, rows in enumerate(CLIENTS):
        for row in rows:
            (alone,), own = gradients(adapted, examples, [[row]], [arrays[client]])
            whole = torch.stack([g.norm() for g in alone.values()]).norm()
            apart = torch.stack([(alone[n] - together[row][n]).norm() for n in alone]).norm()
            assert apart <= 2e-3 * whole
            mine = logits[row] if own.dim() == 2 else logits[row, : own.shape[1]]
            torch.testing.assert_close(mine, own[0], rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def leaky(change: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor], kind: str = "bert") -> AdaptedModel:
    """Plant a leak in BERT: ``change`` of the first layer's output [N, T, d] and the rows' lengths [N]."""
    base = tiny.base_model(kind)
    body = base.bert if kind == "bert" else base.encoder
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[:] = [kwargs["attention_mask"].reshape(len(kwargs["attention_mask"]), -1).sum(1)]

    def plant(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return change(module, output, seen[0])

    body.register_forward_pre_hook(look, with_kwargs=True)
    body.encoder.layer[0].register_forward_hook(plant)
    return adapt(base, tiny.settings(), "lora")


def others(hidden: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
    """Add a thousandth of the batch's mean to the rows that are chosen."""
    return hidden + 1e-3 * when.reshape(-1, 1, 1) * (hidden[:, :1].mean(0, keepdim=True) - hidden[:, :1])


def everybody(hidden: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(hidden))


LEAKS = {
    "beside rows of twice the length": lambda m, h, n: others(h, (2 * n <= n.max()).float()),
    "from shorter rows to those of twice the length": lambda m, h, n: others(h, (n >= 2 * n.min()).float()),
    "in batches of three or more": lambda m, h, n: others(h, everybody(h)) if len(h) >= 3 else h,
    "in batches of eight or more": lambda m, h, n: others(h, everybody(h)) if len(h) >= 8 else h,
    "in batches of forty or more": lambda m, h, n: others(h, everybody(h)) if len(h) >= 40 else h,
    "among rows of one length": lambda m, h, n: (
        others(h, everybody(h)) if len(h) > 1 and len(set(n.tolist())) == 1 else h
    ),
    "into the first row": lambda m, h, n: others(h, torch.eye(len(h))[0]),
    "into the last row": lambda m, h, n: others(h, torch.eye(len(h))[-1]),
    "from the sum of lengths": lambda m, h, n: h * (1 + 1e-3 * n.sum()),
    "from padding": lambda m, h, n: h + 1e-3 * h.mean(1, keepdim=True),
    "only in training": lambda m, h, n: others(h, everybody(h)) if m.training else h,
    "only in evaluation": lambda m, h, n: h if m.training else others(h, everybody(h)),
    "only in gradients": lambda m, h, n: h + (h.mean(0, keepdim=True) - h.mean(0, keepdim=True).detach()),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_caught(name):
    adapted = leaky(LEAKS[name])
    found = dependence(adapted, tiny.settings(model={"max_length": 32}), PAD)
    assert found is not None
    assert "examples depend on their batch: beside" in found


def test_without_a_leak_the_planted_model_is_sound():
    assert dependence(leaky(lambda m, h, n: h.clone()), tiny.settings(), PAD) is None


def test_a_leak_beside_the_longest_rows_alone_is_caught():
    adapted = leaky(lambda m, h, n: others(h, everybody(h)) if h.shape[1] > 24 else h)
    assert dependence(adapted, tiny.settings(model={"max_length": 16}), PAD) is None
    assert "beside a row of 31 tokens" in str(dependence(adapted, tiny.settings(model={"max_length": 31}), PAD))


def test_a_norm_over_the_batch_is_caught_and_its_statistics_stay():
    adapted = leaky(lambda m, h, n: h)
    layer = adapted.model.bert.encoder.layer[1]
    layer.norm = nn.BatchNorm1d(32)
    layer.register_forward_hook(lambda m, args, h: m.norm(h.transpose(1, 2)).transpose(1, 2))
    assert dependence(adapted, tiny.settings(), PAD) is not None
    assert int(layer.norm.num_batches_tracked) == 0
    assert not layer.norm.running_mean.any()


def test_chance_is_told_from_company():
    adapted = leaky(lambda m, h, n: nn.functional.dropout(h, 0.5))
    assert "draws at random" in str(dependence(adapted, tiny.settings(), PAD))


@pytest.mark.parametrize("extraction", ["direct", "svd"])
def test_an_owners_expert_is_sound(extraction):
    config = tiny.settings("llama", method={"name": "flexmore", "rank": 2, "extraction": extraction})
    adapted = adapt_experts(tiny.base_model("llama"), config)
    assert dependence(adapted, config, PAD) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_measured_too(dtype):
    sound = adapt(tiny.base_model("bert", dtype), tiny.settings(), "lora")
    assert dependence(sound, tiny.settings(), PAD) is None
    assert {p.dtype for p in sound.model.bert.embeddings.parameters()} == {dtype}
    mixing = leaky(LEAKS["beside rows of twice the length"])
    mixing.model.to(dtype)
    assert dependence(mixing, tiny.settings(), PAD) is not None


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_large_model_computes_in_float32_one_layer_at_a_time(kind, monkeypatch):
    config = tiny.settings(kind)
    adapted = adapt(tiny.base_model(kind, torch.bfloat16), config, "lora")
    layers, parameters = layers_of(adapted), dict(adapted.model.named_parameters())
    assert len(layers) > 1
    seen = []

    def look(layer, *_):
        seen.append([one for one in layers if next(one.parameters()).dtype == torch.float32] == [layer])

    for layer in layers:
        list(layer.modules())[-1].register_forward_pre_hook(partial(look, layer))
    monkeypatch.setattr(soundness, "LARGE", 0)
    assert dependence(adapted, config, PAD) is None
    assert len(seen) > len(layers)
    assert all(seen)
    assert all(value is parameters[name] for name, value in adapted.model.named_parameters())
    assert not any("forward" in vars(layer) or layer.gradient_checkpointing for layer in layers)
    mixing = leaky(LEAKS["beside rows of twice the length"])
    mixing.model.to(torch.bfloat16)
    assert "beside" in dependence(mixing, tiny.settings(), PAD)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_measuring_leaves_everything_as_it_was(kind):
    config = tiny.settings(kind)
    adapted = tiny.adapted_model(kind, config)
    adapted.model.eval()
    adapted.layout.set_rows([2, 3], [4, 5])
    parameters = dict(adapted.model.named_parameters())
    state = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    layout, trained = dict(vars(adapted.layout)), adapted.trained
    chance = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert dependence(adapted, config, PAD) is None
    assert all(value is parameters[name] for name, value in adapted.model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in adapted.model.state_dict().items())
    assert dict(vars(adapted.layout)) == layout
    assert adapted.trained == trained
    assert not any(module.training for module in adapted.model.modules())
    assert not any(layer.ghost for layer in adapted.stacked_layers().values())
    assert not any(module._forward_hooks for module in adapted.model.modules())
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert np.random.get_state()[1].tolist() == chance[1]
    assert random.getstate() == chance[2]


def deberta(method: str) -> tuple[AdaptedModel, object]:
    config = tiny.settings(
        method={"name": method, "target_modules": ["query_proj", "key_proj", "value_proj"]},
        client={"optimizer": "sgd", "local_steps": 2, "batch_size": 3},
    )
    adapted = adapt(build(*ENCODERS["deberta-v3"], "mean"), config, tiny.FACTORS[method][0])
    tiny.start(adapted)
    return adapted, config


@pytest.mark.parametrize("method", tiny.FACTORS)
@pytest.mark.parametrize("private", [False, True])
def test_clients_of_deberta_train_in_a_cohort_as_alone(method, private):
    """Its table of positions is one row, which meets the weights of every client."""
    adapted, config = deberta(method)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    starts = [{n: a + 0.1 * torch.randn(a.shape) for n, a in start.items()} for _ in range(3)]
    examples = tiny.table("bert", 9, length=14)
    plans = [tiny.plan(0.5)] * 3 if private else None
    jobs = tiny.jobs_of(starts, tiny.split([2, 3, 4]), plans)
    together = train_cohort(adapted, examples, jobs, config)
    for job, result in zip(jobs, together, strict=True):
        (alone,) = train_cohort(adapted, examples, [job], config)
        assert tiny.difference(result.arrays, alone.arrays) < 2e-5


def test_one_example_moves_debertas_clipped_sum_by_no_more_than_two_norms():
    adapted, config = deberta("fedit")
    start = adapted.arrays(tiny.trained_names(adapted, config))
    examples = tiny.table("bert", 12, length=16)
    config = config.model_copy(update={"client": config.client.model_copy(update={"local_steps": 1})})
    sums = []
    for last in (10, 11):
        rows = np.array([*range(10), last])
        job = tiny.jobs_of([start], [rows], [tiny.plan(0.0, 1e-3, 1.0, 1.0)], learning_rate=1.0)
        (result,) = train_cohort(adapted, examples, job, config)
        sums.append(torch.cat([(result.arrays[n] - start[n]).flatten() for n in start]).double())
    assert 0 < float((sums[0] - sums[1]).norm()) <= 2.001e-3


def convbert(task: str = "mean") -> tuple[AdaptedModel, object]:
    adapted, config = adapted_case("convbert", task, "lora")
    return adapted, config


def test_clients_of_a_model_that_mixes_rows_train_one_at_a_time(caplog):
    adapted, config = convbert()
    tiny.start(adapted)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    starts = [{n: a + 0.1 for n, a in start.items()}, start]
    examples = tiny.table("bert", 7, length=14)
    jobs = tiny.jobs_of(starts, tiny.split([3, 4]))
    with caplog.at_level(logging.WARNING, "fedlora"):
        together = train_cohort(adapted, examples, jobs, config)
    assert "one at a time" in caplog.text
    assert "differ" in caplog.text
    for job, result in zip(jobs, together, strict=True):
        (alone,) = train_cohort(adapted, examples, [job], config)
        assert tiny.difference(result.arrays, alone.arrays) == 0
        assert result.loss == alone.loss


def test_a_model_that_mixes_rows_is_refused_under_privacy_before_a_step():
    adapted, config = convbert()
    start = adapted.arrays(tiny.trained_names(adapted, config))
    steps: list[int] = []
    (job,) = tiny.jobs_of([start], tiny.split([4]), [tiny.plan(1.0)])
    job = type(job)(**{**vars(job), "on_step": lambda: steps.append(1)})
    with pytest.raises(InputError, match=r"model\.name = 'tiny': examples depend on their batch") as caught:
        train_cohort(adapted, tiny.table("bert", 4), [job], config)
    assert "\n" not in str(caught.value)
    assert not steps


def mixing_run(tmp_path: Path, name: str, **sections: dict) -> RunResult:
    """Simulate a model of the table without Ray."""
    rows = [(f"the film was {'good' if i % 2 else 'bad and dull'} " * (1 + i % 4), "yn"[i % 2]) for i in range(24)]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(",".join(row) for row in rows))
    content = {
        "run": {"rounds": 2},
        "model": {"name": str(save(name, tmp_path / "model")), "pooling": "mean", "max_length": 24},
        "data": {"name": str(tmp_path / "data.csv"), "test": str(tmp_path / "data.csv"), "partition": {"clients": 3}},
        "method": {"name": "fedit", "rank": 2, "target_modules": "all-linear"},
        "client": {"local_steps": 1, "batch_size": 4},
        "simulation": {"workers": 0, "cohort_size": 3},
    }
    return simulate({**content, **sections}, output=tmp_path / f"run{len(list(tmp_path.iterdir()))}")


@pytest.mark.usefixtures("bare")
def test_a_run_refuses_epsilon_for_a_model_that_mixes_rows(tmp_path):
    with pytest.raises(InputError, match=r"model\.name = '.*model': examples depend on their batch.*privacy\.mode"):
        mixing_run(tmp_path, "convbert", privacy={"mode": "example", "target_epsilon": 8.0, "target_delta": 1e-2})


@pytest.mark.usefixtures("bare")
def test_a_run_in_cohorts_equals_one_client_at_a_time_and_says_so_once(tmp_path):
    together = mixing_run(tmp_path, "convbert")
    alone = mixing_run(tmp_path, "convbert", simulation={"workers": 0, "cohort_size": 1})
    weights = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (together, alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    log = (together.folder / "run.log").read_text()
    assert log.count("one at a time") == 1
    assert "examples depend on their batch" in log
    assert "one at a time" not in (alone.folder / "run.log").read_text()


def test_debertas_adapter_gives_peft_our_logits(tmp_path):
    adapted, config = deberta("fedit")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 50, (4, 9)))
    adapted.layout.set_rows([4])
    adapted.model.eval()
    with torch.no_grad():
        ours = adapted.model.encoder(input_ids=ids).last_hidden_state
    export_peft(adapted, config, tmp_path, ["a", "b", "c"])
    stock = build(*ENCODERS["deberta-v3"], "mean").encoder
    theirs = PeftModel.from_pretrained(stock, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).last_hidden_state, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("counts", "per_example"), [([1, 2], False), ([3], True)])
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_that_sees_other_rows_raises(counts, per_example, rows, trained):
    layout = RowLayout()
    layout.set_rows(counts)
    layout.per_example = per_example
    layer = StackedLinear(4, 2, layout, bias=True)
    if trained:
        layer.weight = nn.Parameter(torch.zeros(len(counts), 2, 4))
    layer.name = "encoder.query.lora_A"
    with pytest.raises(GuardError, match=rf"encoder.query.lora_A sees {rows} rows of a batch of 3.*target_modules"):
        layer(torch.zeros(rows, 5, 4))


def test_a_client_alone_without_privacy_may_see_anything():
    layout = RowLayout()
    layout.set_rows([3])
    assert StackedLinear(4, 2, layout)(torch.zeros(15, 4)).shape == (15, 2)


def test_gradients_of_other_rows_are_not_added_by_broadcasting():
    """A layer that is called twice, on the batch and on one row, as with positions of the batch's."""
    layout = RowLayout()
    layout.set_rows([3])
    layer = StackedLinear(4, 2, layout)
    layer.weight = nn.Parameter(torch.ones(1, 2, 4))
    model = nn.Sequential(layer).train()

    class Twice(AdaptedModel):
        def __init__(self) -> None:
            self.model, self.layout = model, layout

    with per_example_gradients(Twice()):
        batch = layer(torch.randn(3, 5, 4))
        layout.set_rows([1])
        table = layer(torch.randn(1, 5, 4))
        layout.set_rows([3])
        with pytest.raises(GuardError, match="rows"):
            (batch * table).sum().backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize("use", ["repeat", "expand", "add", "matmul"])
def test_a_shared_row_becomes_each_examples_own(use):
    """Its values and gradients are those of a layer that sees a row for each example."""
    layout = RowLayout()
    layout.set_rows([1, 2])
    base = nn.Linear(4, 6).requires_grad_(False)
    layer = FactoredLinear(base, {"lora_A": (2, 4), "lora_B": (6, 2)}, 1.5, layout)
    for name in layer.factors:
        stacked = getattr(layer, name)
        stacked.weight = nn.Parameter(torch.randn(2, *stacked.weight.shape[1:]))
    layer.double()
    table, other = torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)

    def meet(y: torch.Tensor) -> torch.Tensor:
        y = y.view(y.shape[0], 5, 2, 3).permute(0, 2, 1, 3).contiguous()
        if use == "repeat":
            y = y.view(-1, 5, 3).repeat(6 // len(y.view(-1, 5, 3)), 1, 1).view(3, 2, 5, 3)
        heads = other.view(3, 5, 2, 3).transpose(1, 2)
        if use == "expand":
            y = y.expand(3, -1, -1, -1)
        return heads @ y.transpose(-1, -2) if use == "matmul" else heads * (heads + y)

    shared = layer(table)
    assert isinstance(shared, OwnRows)
    assert shared.shape == (1, 5, 6)
    got = meet(shared)
    expected = meet(layer(table.expand(3, -1, -1)))
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected)
    parameters = list(layer.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)

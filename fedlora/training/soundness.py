"""Whether a model's examples are independent: measured on synthetic rows, whatever the model is called.

Differential privacy by example and cohorts of clients both assume that what an example gives does not depend on the
others in its batch. Some models break that: a convolution that reads padding, a statistic of the batch, positions that
follow the longest row, a layer that sees the batch in another shape. So rows are run alone, and in company of equal,
longer and much longer ones, and their logits and gradients compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fedlora.adapters import AdaptedModel
from fedlora.adapters.stacked import RowProducts
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.packing import packed_batch
from fedlora.data.tokens import TokenTable
from fedlora.errors import GuardError, InputError
from fedlora.models import has_token_types, unchanged
from fedlora.quantization import computing_in
from fedlora.tasks import Task, get_task
from fedlora.timeline import phase
from fedlora.training.checkpointing import layers_of, set_checkpointing
from fedlora.training.dp import per_example_gradients

LOGITS, GRADIENTS = 1e-4, 5e-3
"""By how much a row's logits and gradients may differ through rounding, as a share of their norm.

Half precision is measured in float32, since in 30 layers of it a row's gradient may be rounding altogether; of float64
models compute norms and positions in float32. Seen: at most 3e-6 and 3e-4, in a Llama of 30 layers."""

SMALL = 0.1
"""An array's gradient below this share of the example's whole gradient is compared with that share, since its own
rounding may be large; clipping looks at the whole."""

ROOM = 0.7
"""Of a GPU's free memory that a float32 copy of the model may take."""

LARGE = 4 * 2**30
"""Bytes of a float32 copy of all layers, above which each layer has one for as long as it computes."""

BATCHES = ([0, 1], [4, 0], [3, 1, 0], [2, 0, 4], [0, 1, 2, 1, 0, 2, 2, 0, 1])
"""The batches in which rows 0 to 4 meet: of one length, short beside long, in several orders and numbers."""

LONG = 4096
"""Tokens of the longest row, where ``model.max_length`` allows so many; more would take minutes in float32."""

PACKED = ([[2, 0], [4]], [[1, 0, 1]])
"""The rows of two clients in a pass, each of several texts."""

COHORT = ([0], [3, 2])
"""The rows of two clients in a pass."""


@phase("soundness", "checking that examples stay apart")
def check_sound(adapted: AdaptedModel, config: Config, pad_token_id: int) -> None:
    """Refuse a model whose examples' gradients depend on each other, under differential privacy by example.

    Parameters
    ----------
    adapted : AdaptedModel
    config : Config
        Section model.
    pad_token_id : int
        The tokenizer's.

    Raises
    ------
    InputError
        Naming the model and what differs.
    """
    found = dependence(adapted, config, pad_token_id)
    if found is not None:
        remedy = f"{found}; under privacy.mode = example take a model whose examples are independent, such as a BERT"
        raise InputError("model.name", config.model.name, remedy)


def dependence(adapted: AdaptedModel, config: Config, pad_token_id: int) -> str | None:
    """Say how examples of a batch depend on each other; None where they do not.

    Parameters
    ----------
    adapted : AdaptedModel
        Left as it is: weights, buffers, modes and generators too. The answer is kept with it.
    config : Config
        ``model.max_length``.
    pad_token_id : int

    Returns
    -------
    str or None
        A clause.

    Notes
    -----
    All factors and the head get drawn values: at their start one factor is 0, and gradients would say little. The model
    is in training mode, and once in evaluation mode, in float32 if it is kept in half precision (on the CPU where the
    GPU lacks the memory). Beside a row of ``model.max_length`` tokens, but no more than 4,096, and among many rows,
    only values are compared, since gradients would take as long as a step of training.
    """
    key = (config.model.max_length, pad_token_id)
    if key not in adapted.independent:
        # Compiling for these few rows would take longer than the rows.
        with _unchanged(adapted), torch.compiler.set_stance("force_eager"), _in_float32(adapted):
            adapted.independent[key] = _measure(adapted, _synthetic(adapted, config, pad_token_id))
    return adapted.independent[key]


def check_packing(adapted: AdaptedModel, config: Config, pad_token_id: int) -> None:
    """Refuse ``data.packing`` for a model of which texts in one row are not each what they are alone.

    It is measured as :func:`dependence` is, and once for a model.

    Raises
    ------
    InputError
        Naming what differs.
    """
    key = ("packing", config.model.max_length, pad_token_id)
    if key not in adapted.independent:
        with _unchanged(adapted), torch.compiler.set_stance("force_eager"), _in_float32(adapted):
            adapted.independent[key] = _measure_packing(adapted, _synthetic(adapted, config, pad_token_id))
    found = adapted.independent[key]
    if found is not None:
        raise InputError("data.packing", True, f"does not work with {config.model.name}: {found}; set it to false")


def _measure_packing(adapted: AdaptedModel, examples: _Examples) -> str | None:
    adapted.model.train()
    try:
        return _compare_packed(adapted, examples)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return f"a pass over several texts in a row fails ({type(error).__name__}: {error})"


def _compare_packed(adapted: AdaptedModel, examples: _Examples) -> str | None:
    """Compare texts in the rows of two clients with each alone: losses, the clients' gradients, and a long text."""
    arrays, task = [adapted.drawn(seed) for seed in (0, 1)], cast(Any, examples.task)
    clients = [[np.array(row) for row in rows] for rows in PACKED]
    expected = [_alone(adapted, examples, *own) for own in zip(arrays, clients, strict=True)]
    adapted.set_clients(arrays)
    batch = examples.packed([row for client in clients for row in client], adapted.device)
    adapted.layout.set_rows([len(client) for client in clients])
    losses = task.packed_loss(adapted.logits(batch), batch["labels"], batch["weights"])
    if not (share := _share(losses.detach(), torch.cat([found for found, _ in expected]))) <= LOGITS:
        return f"losses of texts that share a row differ by {share:.2%} from those of each alone"
    together = torch.autograd.grad(losses.sum(), adapted.parameters(), allow_unused=True)
    for client, (_, gradients) in enumerate(expected):
        whole = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        for name, alone, both in zip(adapted.trained, gradients, together, strict=True):
            if alone is None or both is None:
                continue
            share = float((both[client] - alone[0]).norm()) / max(float(alone.norm()), SMALL * whole, 1e-30)
            if not share <= GRADIENTS:
                return f"the gradient of {name} of texts that share a row differs by {share:.2%} from theirs alone"
    adapted.set_clients(arrays[:1])
    short, long = examples.rows[0], examples.rows[-1][len(examples.rows[0]) :]
    if not len(long):
        return None
    two = replace(examples, rows=[short, long])  # together of the maximal length
    behind = _states(adapted, two.packed([np.arange(2)], adapted.device))[:, len(short) :]
    if not (share := _share(behind, _states(adapted, two.batch([1], adapted.device)))) <= LOGITS:
        return f"states of a text of {len(long)} tokens differ by {share:.2%} behind another text of its row"
    return None


def _alone(
    adapted: AdaptedModel, examples: _Examples, arrays: Arrays, rows: Sequence[np.ndarray]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Return each row's sum of its texts' losses, and their gradients, from passes over one text at a time."""
    adapted.set_clients([arrays])
    adapted.layout.set_rows([1])
    batches = [[examples.batch([text], adapted.device) for text in row] for row in rows]
    each = [torch.cat([examples.task.loss(adapted.logits(b), b["labels"]) for b in row]) for row in batches]
    losses = torch.stack([values.sum() for values in each])
    return losses.detach(), torch.autograd.grad(losses.sum(), adapted.parameters(), allow_unused=True)


@dataclass
class _Pass:
    """What a batch gave.

    Attributes
    ----------
    logits : Tensor [N, ...]
    samples : dict of str to Tensor [N, ...] or RowProducts
        Per-example gradients, by the array's name.
    """

    logits: torch.Tensor
    samples: dict[str, torch.Tensor | RowProducts]


def _measure(adapted: AdaptedModel, examples: _Examples) -> str | None:
    arrays = [adapted.drawn(seed) for seed in (0, 1)]
    for layer in adapted.stacked_layers().values():
        layer.ghost = True
    adapted.model.train()
    try:
        return _compare(adapted, examples, arrays)
    except torch.cuda.OutOfMemoryError:
        raise
    except GuardError as error:
        return str(error)
    except Exception as error:
        return f"a pass over drawn examples fails ({type(error).__name__}: {error})"


def _compare(adapted: AdaptedModel, examples: _Examples, arrays: list[Arrays]) -> str | None:
    adapted.set_clients(arrays[:1])
    # The longest first: a model may change for good with the first short row, as BigBird's attention does.
    longest = _states(adapted, examples.batch([len(examples.rows) - 1], adapted.device))
    alone: dict[tuple[int, int], _Pass] = {}
    for client, rows in enumerate(([4, 3, 2, 1, 0], COHORT[1])):
        adapted.set_clients([arrays[client]])
        with per_example_gradients(adapted):
            for row in rows:
                alone[client, row] = _run(adapted, examples, [[row]])
                if not torch.isfinite(alone[client, row].logits).all():
                    return "its logits are not finite, so that nothing can be compared"
            for batch in BATCHES if client == 0 else ():
                company = _run(adapted, examples, [batch])
                found = _difference(company, batch, [alone[0, row] for row in batch], examples)
                if found is not None:
                    return _explain(adapted, examples, alone[0, 0]) or found
    adapted.set_clients(arrays)
    with per_example_gradients(adapted):
        company = _run(adapted, examples, COHORT)
    batch = [row for rows in COHORT for row in rows]
    apart = [alone[client, row] for client, rows in enumerate(COHORT) for row in rows]
    found = _difference(company, batch, apart, examples, ", with several clients in a pass")
    if found is not None:
        return found
    adapted.set_clients(arrays[:1])
    return _compare_values(adapted, examples, longest)


def _compare_values(adapted: AdaptedModel, examples: _Examples, longest: torch.Tensor) -> str | None:
    """Compare logits in evaluation mode, beside the longest row (whose own are given) and among many."""
    last = len(examples.rows) - 1
    for training, batch in ((False, [3, 1, 0]), (True, [0, last]), (True, [0, 1] * 20 + [0])):
        adapted.model.train(training)
        alone = {0: _states(adapted, examples.batch([0], adapted.device)), last: longest}
        company = _states(adapted, examples.batch(batch, adapted.device))
        for place, row in enumerate(batch):
            if row not in alone:
                continue
            share = _share(company[place, : alone[row].shape[1]], alone[row][0])
            if not share <= LOGITS:
                return _sentence("logits", share, examples, batch, row, LOGITS)
    return None


@torch.no_grad()
def _states(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits [N, classes], or the last hidden states [N, T, d], whose logits would cost more than all else."""
    adapted.layout.set_rows([len(batch["input_ids"])])
    body: Any = adapted.model
    while not adapted.head and getattr(body, "base_model", body) is not body:
        body = body.base_model
    if isinstance(body, PreTrainedModel) and not adapted.head:
        states: torch.Tensor = body(**{n: batch[n] for n in ("input_ids", "position_ids") if n in batch})[0]
        return states
    return adapted.logits(batch)


def _run(adapted: AdaptedModel, examples: _Examples, clients: Sequence[Sequence[int]]) -> _Pass:
    """Run a batch forwards and backwards as training does."""
    rows = [row for mine in clients for row in mine]
    batch = examples.batch(rows, adapted.device)
    adapted.layout.set_rows([len(mine) for mine in clients])
    logits = adapted.logits(batch)
    examples.task.loss(logits, batch["labels"]).sum().backward()
    samples = {}
    for name in adapted.trained:
        parameter: Any = adapted.parameter(name)
        if getattr(parameter, "grad_sample", None) is None:
            raise GuardError(f"the model does not use {name}; leave the layer out of method.target_modules")
        samples[name], parameter.grad_sample, parameter.grad = parameter.grad_sample, None, None
    return _Pass(logits.detach(), samples)


def _difference(
    company: _Pass, batch: list[int], alone: Sequence[_Pass], examples: _Examples, among: str = ""
) -> str | None:
    """Compare the rows of a batch with the same rows alone."""
    for place, (row, one) in enumerate(zip(batch, alone, strict=True)):
        mine = company.logits[place]
        if one.logits.dim() == 3:
            mine = mine[: one.logits.shape[1]]
        share = _share(mine, one.logits[0])
        if not share <= LOGITS:
            return _sentence("logits", share, examples, batch, row, LOGITS) + among
    names = list(company.samples)
    norms, apart = [], []
    for name in names:
        # All rows at once, and no number read before the end: on a GPU each would wait for it.
        reference = torch.cat([_gradients(one.samples[name]) for one in alone]).flatten(1)
        norms.append(reference.norm(dim=1))
        apart.append((_gradients(company.samples[name]).flatten(1) - reference).norm(dim=1))
    first = norms[0].device
    norm, distance = (torch.stack([each.to(first) for each in found]) for found in (norms, apart))
    shares = (distance / norm.maximum(SMALL * norm.norm(dim=0)).clamp(min=1e-30)).cpu()
    for place, row in enumerate(batch):
        worst = int(shares[:, place].nan_to_num(nan=torch.inf).argmax())
        if not (share := float(shares[worst, place])) <= GRADIENTS:
            return _sentence(f"the gradient of {names[worst]}", share, examples, batch, row, GRADIENTS) + among
    return None


def _sentence(what: str, share: float, examples: _Examples, batch: list[int], row: int, limit: float) -> str:
    lengths = [len(examples.rows[r]) for r in batch]
    place = batch.index(row)
    others = [*lengths[:place], *lengths[place + 1 :]]
    company = ", ".join(map(str, sorted(set(others))))
    count = "a row" if len(others) == 1 else f"{len(others)} rows"
    return (
        f"examples depend on their batch: beside {count} of {company} tokens, {what} of a row of {lengths[place]} "
        f"{'differ' if what == 'logits' else 'differs'} by {share:.2%} from the row alone (rounding: below {limit:.2%})"
    )


def _explain(adapted: AdaptedModel, examples: _Examples, before: _Pass) -> str | None:
    """Say if a row is not the same twice: then it is chance and not company."""
    again = _run(adapted, examples, [[0]])
    share = _share(again.logits[0], before.logits[0])
    if share <= LOGITS:
        return None
    return f"the same row's logits differ by {share:.2%} from one time to the next: the model draws at random"


def _share(values: torch.Tensor, reference: torch.Tensor) -> float:
    apart = (values.double() - reference.double()).norm()
    return float(apart / reference.double().norm().clamp(min=1e-30))


def _gradients(samples: torch.Tensor | RowProducts) -> torch.Tensor:
    """Return each row's gradient, multiplied out."""
    return samples.g.mT @ samples.x if isinstance(samples, RowProducts) else samples


@dataclass
class _Examples:
    """Drawn rows of tokens, for a task and a head of some outputs."""

    rows: list[np.ndarray]
    pad_token_id: int
    task: Task
    outputs: int
    pairs: bool

    def batch(self, chosen: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Return rows as the token table does: padded on the right; on a GPU without a mask where nothing is padded."""
        lengths = [len(self.rows[row]) for row in chosen]
        ids = torch.full((len(chosen), max(lengths)), self.pad_token_id)
        for place, row in enumerate(chosen):
            ids[place, : lengths[place]] = torch.from_numpy(self.rows[row])
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        labels = self.task.drawn_labels(ids, mask, torch.tensor(chosen), self.outputs)
        batch = {"input_ids": ids, "labels": labels}
        if self.pairs:
            # The second half of a row is the second text.
            second = torch.arange(max(lengths)) >= (torch.tensor(lengths)[:, None] + 1) // 2
            batch["token_type_ids"] = (second & mask).long()
        if device.type == "cpu" or not mask.all():
            batch["attention_mask"] = mask.long()
        return {name: value.to(device) for name, value in batch.items()}

    def packed(self, rows: Sequence[np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
        """Return rows that hold several of these, of a task whose labels are the tokens."""
        starts, offsets = np.zeros(len(self.rows), np.int64), np.cumsum([0, *map(len, self.rows)])
        table = TokenTable(np.concatenate(self.rows), offsets, None, starts, None, self.pad_token_id, self.task)
        return {name: value.to(device) for name, value in packed_batch(table, rows).items()}


def _synthetic(adapted: AdaptedModel, config: Config, pad_token_id: int) -> _Examples:
    """Draw rows of 5, 5, 8, 11 and 24 tokens and a long one; ``model.max_length`` bounds all."""
    max_length = config.model.max_length
    shape: Any = getattr(adapted.model, "config", None)
    shape = getattr(getattr(adapted.model, "encoder", None), "config", shape)
    # Some models want exactly one end of text, and none of the others' marks.
    marks = {n: _mark(shape, f"{n}_token_id") for n in ("bos", "eos", "pad", "sep", "cls", "mask", "unk")}
    embeddings: Any = adapted.model.get_input_embeddings()  # type: ignore[operator]
    ordinary = sorted(set(range(embeddings.weight.shape[0])) - {pad_token_id, *marks.values()})
    rng = np.random.default_rng(0)
    rows = [rng.choice(ordinary or [0], min(length, max_length)) for length in (5, 5, 8, 11, 24, LONG)]
    outputs = next(reversed(adapted.head.values())).out_features if adapted.head else 0
    for row in rows if adapted.head else ():
        if marks["eos"] is not None:
            row[-1] = marks["eos"]
    task = get_task(config.model.task)
    pairs = len(task.columns(config.data)) > 1 and shape is not None and has_token_types(shape)
    return _Examples(rows, pad_token_id, task, outputs, pairs)


def _mark(shape: Any, name: str) -> int | None:
    value = getattr(shape, name, None)
    return value[0] if isinstance(value, list) else value


@contextmanager
def _unchanged(adapted: AdaptedModel) -> Iterator[None]:
    """Put back whatever running the model changes: parameters, buffers, modes, the layout, and all generators."""
    model, trained, layout = adapted.model, adapted.trained, dict(vars(adapted.layout))
    chance = random.getstate(), np.random.get_state()
    devices = [device for device in adapted.devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices), unchanged(model):
            yield
    finally:
        random.setstate(chance[0])
        np.random.set_state(chance[1])
        adapted.trained = trained
        vars(adapted.layout).clear()
        vars(adapted.layout).update(layout)


@contextmanager
def _in_float32(adapted: AdaptedModel) -> Iterator[None]:
    """Let a model in half precision compute in float32, a large one's layers one at a time, in either direction."""
    layers: Any = layers_of(adapted)
    trained = set(map(id, adapted.parameters()))
    inside = {id(t): t for layer in layers for t in _narrow(layer) if id(t) not in trained}
    if 4 * sum(t.numel() for t in inside.values()) <= LARGE:
        _widen(adapted, {})
        with computing_in(adapted.model, torch.float32):
            yield
        return
    _widen(adapted, inside)
    own = [vars(layer).get("forward") for layer in layers]
    # A layer's float32 weights are not kept for the way back, but made again.
    set_checkpointing(adapted, True)
    for layer in layers:
        wide, run = partial(_forward_in_float32, layer), cast(Any, layer)._gradient_checkpointing_func
        layer.forward = partial(wide, layer.forward)
        # What is computed again is not always the attribute above.
        layer._gradient_checkpointing_func = partial(_checkpointed, run, wide)
    try:
        with computing_in(adapted.model, torch.float32):
            yield
    finally:
        set_checkpointing(adapted, False)  # as of now; whoever trains sets it as the step needs
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _checkpointed(run: Callable[..., Any], wide: Callable[..., Any], function: Callable[..., Any], *given: Any) -> Any:
    return run(partial(wide, function), *given)


def _forward_in_float32(layer: nn.Module, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    kept = [(part, dict(part)) for module in layer.modules() for part in (module._parameters, module._buffers)]
    _replace(layer, {id(t): _wide(t) for t in _narrow(layer)})
    try:
        return forward(*given, **named)
    finally:
        for part, content in kept:
            part.update(content)  # type: ignore[arg-type]


def _narrow(module: nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers in half precision."""
    tensors = (*module.parameters(), *module.buffers())
    return [t for t in tensors if t.is_floating_point() and t.element_size() < 4]


def _wide(tensor: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    value = tensor.detach().to(device or tensor.device, torch.float32 if narrow else tensor.dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _replace(model: nn.Module, wide: Mapping[int, torch.Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, by the ids of these."""
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({name: wide[id(t)] for name, t in kept.items() if id(t) in wide})  # type: ignore[misc]


def _widen(adapted: AdaptedModel, but: Mapping[int, torch.Tensor]) -> None:
    """Put float32 copies in the place of tensors in half precision but for some; :func:`_unchanged` undoes it."""
    model, to_cpu = adapted.model, False
    narrow = {id(t): t for t in _narrow(model) if id(t) not in but}
    if not narrow:
        return
    for device in adapted.devices:
        needed = 4 * sum(t.numel() for t in narrow.values() if t.device == device)
        to_cpu |= device.type == "cuda" and needed > ROOM * torch.cuda.mem_get_info(device)[0]
    if to_cpu:
        narrow = {id(t): t for t in (*model.parameters(), *model.buffers())}
    _replace(model, {key: _wide(tensor, "cpu" if to_cpu else None) for key, tensor in narrow.items()})

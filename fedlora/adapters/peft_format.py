"""Adapters as a PEFT folder: the interchange format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.layers import AdapterLayer
from fedlora.adapters.model import AdaptedModel
from fedlora.adapters.parameterisations import Parameterisation
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.continuing import HEAD_FILE, LABELS_FILE, TASK_FILE
from fedlora.models import MeanPoolingClassifier, pools_mean, pretrained_source
from fedlora.registry import PARAMETERISATIONS
from fedlora.tasks import get_task

if TYPE_CHECKING:
    from peft import TaskType


def export_peft(adapted: AdaptedModel, config: Config, folder: Path, label_names: list[str] | None) -> None:
    """Write client 0's arrays as a PEFT folder, of the form that the parameterisation has there.

    Parameters
    ----------
    adapted : AdaptedModel
    config : Config
    folder : Path
        Gets adapter_config.json and adapter_model.safetensors, and ``head.safetensors`` for pooling mean.
    label_names : list of str or None

    Notes
    -----
    A product of matrices becomes a plain LoRA of the same rank and ``lora_alpha = s r``. A residual of the frozen
    weights is part of the adapter too: s B A + residual is factored anew, at the rank that it has (``rank_pattern``
    where layers differ); README.md in the folder says so. Only the sum of the residuals is at hand, not its factors, so
    each layer [m, n] with a residual takes one singular value decomposition in float64, of m n min(m, n) operations.
    The folder loads with ``peft.PeftModel.from_pretrained`` on
    the stock model. Layers whose weights the checkpoint lacks are in it whole, like the head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mean_pooled = isinstance(adapted.model, MeanPoolingClassifier)
    prefix = "encoder." if mean_pooled else ""
    tensors: dict[str, torch.Tensor] = {}
    whole = {} if mean_pooled else _whole(adapted)
    parameterisation: Parameterisation = PARAMETERISATIONS.made(adapted.kind)
    scaling, layers = config.scaling(), {}
    for path, adapter in adapted.adapters.items():
        arrays = adapted.arrays([f"{path}.{factor}" for factor in adapter.factors])
        factors = {name.rpartition(".")[2]: array for name, array in arrays.items()}
        residual = None if adapter.residual is None else adapter.residual.cpu()
        if path in whole:
            _add(whole[path], parameterisation.update(factors, _oriented(whole[path], adapter.base), scaling), adapter)
            continue
        stock = path.removeprefix(prefix)
        layers[stock] = parameterisation.peft_arrays(factors, residual, scaling)
        tensors |= {f"base_model.model.{stock}.{name}": array for name, array in layers[stock].items()}
    for path, weights in whole.items():
        tensors |= {f"base_model.model.{path}.{name}": weight for name, weight in weights.items()}
    write_about(config, folder, label_names)
    head = adapted.arrays(adapted.head_names)
    if mean_pooled:
        save_file(head, folder / HEAD_FILE)
    else:
        tensors |= {f"base_model.model.{name}": array for name, array in head.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "target_modules": _targets(adapted, [path for path in adapted.adapters if path not in whole], prefix),
        "task_type": task_type(config),
        "modules_to_save": [*_heads(adapted), *sorted(whole)] if head and not mean_pooled else None,
        "fan_in_fan_out": any(isinstance(adapter.base, Conv1D) for adapter in adapted.adapters.values()),
        "base_model_name_or_path": pretrained_source(config),
        "inference_mode": True,
    }
    peft_config = parameterisation.peft_config(layers, config, settings)
    peft_config.save_pretrained(str(folder))
    if adapted.residual:
        (folder / "README.md").write_text(_README.format(rank=config.method.rank, most=peft_config.to_dict()["r"]))


_README = """\
# A LoRA adapter

The run trained factors of rank {rank}, and added a residual to the frozen weights beside them. This adapter is the
sum of both: a LoRA adapter of rank {most} at most. It loads like any other:

    peft.PeftModel.from_pretrained(model, folder)
"""


def _oriented(weights: Arrays, base: nn.Module) -> Arrays:
    """Return a layer's parameters with the weight as [m, n]: Conv1D stores it transposed."""
    return {n: w.T if n == "weight" and isinstance(base, Conv1D) else w for n, w in weights.items()}


def _add(weights: Arrays, update: Arrays, adapter: AdapterLayer) -> None:
    """Add an update, and the layer's residual, to a layer's parameters, in place."""
    if adapter.residual is not None:
        update = {**update, "weight": update["weight"] + adapter.residual.cpu()}
    for name, value in _oriented(update, adapter.base).items():
        weights[name] += value


def _heads(adapted: AdaptedModel) -> list[str]:
    return sorted({name.split(".")[0] for name in adapted.head_names})


def saved_whole(model: nn.Module, heads: Sequence[str], adapters: Sequence[str]) -> set[str]:
    """Return the paths of layers that PEFT saves whole, beside the head.

    These are the layers that were drawn, and those whose names end like the head's (DistilBERT's ``pre_classifier``):
    PEFT takes them for the head.

    Parameters
    ----------
    model : torch.nn.Module
    heads : sequence of str
        First parts of the head's paths.
    adapters : sequence of str
        Paths of adapters, whose own parts are no layers of the model.
    """
    paths = {name.rpartition(".")[0] for name in getattr(model, "drawn", [])}
    inside = tuple(f"{path}." for path in adapters)
    return paths | {
        path
        for path, _ in model.named_modules()
        if heads and path.endswith(tuple(heads)) and path not in heads and not path.startswith(inside)
    }


def _whole(adapted: AdaptedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Copy the weights of the layers that are saved whole, by path; an adapter in one of them is not added yet."""
    paths = saved_whole(adapted.model, _heads(adapted), list(adapted.adapters))
    found = {}
    for path in paths:
        layer = adapted.adapters[path].base if path in adapted.adapters else adapted.model.get_submodule(path)
        weights = {name: p.detach().cpu().clone() for name, p in layer.named_parameters()}
        found[path] = {name: w if w.dtype == torch.float64 else w.float() for name, w in weights.items()}
    return found


def _targets(adapted: AdaptedModel, paths: list[str], prefix: str) -> list[str]:
    """Short names where they choose the same modules, else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    others = [p for p, _ in adapted.model.named_modules() if p.rpartition(".")[2] in names and p not in paths]
    return [path.removeprefix(prefix) for path in paths] if others else names


def write_about(config: Config, folder: Path, label_names: list[str] | None) -> None:
    """Write beside an adapter what PEFT's files do not say: the task, and the classes' names."""
    (folder / TASK_FILE).write_text(json.dumps(config.model.task) + "\n", encoding="utf-8")
    if label_names is not None:
        (folder / LABELS_FILE).write_text(json.dumps(label_names) + "\n", encoding="utf-8")


def task_type(config: Config) -> TaskType:
    """Return PEFT's task type for a run."""
    from peft import TaskType  # slow, and first used at a run's end

    return TaskType.FEATURE_EXTRACTION if pools_mean(config) else TaskType[get_task(config.model.task).peft_type]

"""Experts on disk: a folder an owner, which stock PEFT loads, or full weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft import LoraConfig, TaskType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.alignment import aligned
from fedlora.arrays import Arrays
from fedlora.errors import InputError
from fedlora.experts.expert import FULL, Expert
from fedlora.experts.mixture import Mixture
from fedlora.models import dense_weight

ROUTER_FILE = "router.safetensors"
"""The owner's router row and bias in every block, which no PEFT format has."""

FULL_FILE = "full.safetensors"
"""Whole matrices of a full expert, under the public model's own names."""

EXPERT_FILE = "expert.json"

MIXTURE, EXPERTS = "mixture", "experts"
"""Folders of a run folder: the whole model, and a folder for each owner's expert."""

_LONGEST = 255  # characters of a folder's name that file systems take


def folder_name(owner: str) -> str:
    """Return the owner as the name of a folder: itself, where that is one; cut, with a hash, where it is too long."""
    name = re.sub(r"^\.", "%2E", quote(owner, safe=" +,=@()!")) or "%"
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(owner.encode()).hexdigest()[:16]
    return f"{name[: _LONGEST - 17]}~{digest}"


def save_expert(expert: Expert, mixture: Mixture, folder: Path, base: str) -> None:
    """Write an expert's folder.

    Parameters
    ----------
    expert : Expert
    mixture : Mixture
        Whose public model the expert belongs to.
    folder : Path
        Gets ``adapter_config.json`` and ``adapter_model.safetensors`` (LoRA on the feed-forward projections, which
        stock PEFT loads; the expert then takes the public one's place), or :data:`FULL_FILE`; :data:`ROUTER_FILE`;
        and :data:`EXPERT_FILE` with owner, rank and the digest of the public weights.
    base : str
        Folder or hub id of the public model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    routers = {n: a.contiguous() for n, a in expert.arrays.items() if n.rpartition(".")[2].startswith("router")}
    updates: Arrays = {n: a.contiguous() for n, a in expert.arrays.items() if n not in routers}
    layers = _layers(mixture)
    if expert.rank == FULL:
        full = {}
        for name, delta in updates.items():
            path = name.removesuffix(".delta")
            whole = dense_weight(layers[path]).cpu().to(delta.dtype) + delta
            full[f"{path}.weight"] = (whole.T if isinstance(layers[path], Conv1D) else whole).contiguous()
        save_file(full, folder / FULL_FILE, metadata={"format": "pt"})
    else:
        tensors = {f"base_model.model.{name}.weight": array for name, array in updates.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(
            r=expert.rank,
            lora_alpha=expert.rank,
            target_modules=list(layers),
            task_type=TaskType.CAUSAL_LM,
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
            base_model_name_or_path=base,
            inference_mode=True,
        ).save_pretrained(str(folder))
    save_file(routers, folder / ROUTER_FILE)
    facts = {"owner": expert.owner, "rank": expert.rank, "public_digest": expert.public_digest}
    (folder / EXPERT_FILE).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_expert(folder: str | Path, mixture: Mixture) -> Expert:
    """Read an expert's folder, for example to add it to another mixture of the same public model.

    Raises
    ------
    InputError
        If it is no expert's folder.
    """
    path = Path(folder)
    if not (path / EXPERT_FILE).is_file():
        raise InputError("FOLDER", str(folder), f"holds no expert (no {EXPERT_FILE}); give a folder in experts/")
    facts: dict[str, Any] = json.loads((path / EXPERT_FILE).read_text(encoding="utf-8"))
    arrays: Arrays = dict(load_file(path / ROUTER_FILE))
    if facts["rank"] == FULL:
        layers = _layers(mixture)
        for name, weight in load_file(path / FULL_FILE).items():
            module = name.removesuffix(".weight")
            whole = weight.T if isinstance(layers[module], Conv1D) else weight
            arrays[f"{module}.delta"] = whole - dense_weight(layers[module]).cpu().to(whole.dtype)
    else:
        tensors = load_file(path / "adapter_model.safetensors")
        arrays |= {n.removeprefix("base_model.model.").removesuffix(".weight"): a for n, a in tensors.items()}
    return Expert(facts["owner"], facts["rank"], {n: aligned(a) for n, a in arrays.items()}, facts["public_digest"])


def _layers(mixture: Mixture) -> dict[str, nn.Module]:
    """Public layers by their stock module path."""
    pairs = zip(mixture.forms, mixture.blocks, strict=True)
    return {path: block.public(role) for form, block in pairs for role, path in form.projections.items()}

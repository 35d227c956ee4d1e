"""From a run folder to a model: in memory, or exported for transformers and PEFT."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedlora.config import Config, read_toml
from fedlora.continuing import beside, merged
from fedlora.errors import InputError
from fedlora.experts.folder import folder_name
from fedlora.experts.mixture import Mixture, load_mixture
from fedlora.models import load_tokenizer, quiet
from fedlora.results.checkpoint import Checkpoint
from fedlora.results.folder import to_json, write_atomically
from fedlora.results.outputs import check_sums, find_outputs, write_sums
from fedlora.storage import is_full, writes_to


def load(folder: str | Path) -> tuple[Any, Any]:
    """Return the model that a run made, with its adapter merged in (or the mixture of experts), and the tokenizer.

    Parameters
    ----------
    folder : str or Path
        A run folder.

    Returns
    -------
    (transformers.PreTrainedModel, tokenizer)
        In evaluation mode, on the CPU; ``model.config.id2label`` names the classes.

    Raises
    ------
    InputError
        If the folder holds no finished run, or its files cannot be read.

    Examples
    --------
    >>> model, tokenizer = load("runs/quickstart")  # doctest: +SKIP
    >>> logits = model(**tokenizer("A joy to watch.", return_tensors="pt")).logits  # doctest: +SKIP
    """
    try:
        return _load(Path(folder))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError("FOLDER", str(folder), f"cannot be read ({reason}); run again into another") from None


def _load(path: Path) -> tuple[Any, Any]:
    if (path / "mixture" / "config.json").is_file():
        check_sums(path, "mixture")
        return load_mixture(path / "mixture"), load_tokenizer(_config(path))
    adapter = path / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(
            "FOLDER", str(path), "holds no finished run (neither adapter/ nor mixture/); give a run folder"
        )
    check_sums(path, "adapter")
    config = _config(path)
    return merged(config, adapter), load_tokenizer(config)


def _config(folder: Path) -> Config:
    try:
        content = read_toml(folder / "config.toml")
    except InputError as error:
        raise ValueError(f"config.toml: {error.remedy}") from None  # the user gave the folder, not this file
    config = Config.model_validate(content)
    return config.model_copy(
        update={"model": config.model.model_copy(update={"name": beside(config.model.name, folder)})}
    )


def export_run(folder: str | Path, output: str | Path | None = None, *, merged: bool = False) -> Path:
    """Write a run's model for others to load.

    Parameters
    ----------
    folder : str or Path
        A run folder.
    output : str or Path, optional
        Where to; ``FOLDER/merged`` or ``FOLDER/export`` by default. It must not exist.
    merged : bool
        A whole model with tokenizer, for ``from_pretrained``; else the PEFT adapter with the tokenizer. A mixture is
        always written whole; its owners' PEFT folders lie in ``experts/``.

    Raises
    ------
    InputError
        If the folder holds no finished run, or the output exists or cannot be written.
    """
    target = Path(output) if output is not None else Path(folder) / ("merged" if merged else "export")
    if os.path.lexists(target):
        raise InputError("--output", str(target), "exists already; choose another folder")
    with torch.no_grad():
        model, tokenizer = load(folder)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            "--output", str(target), f"cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        if merged or isinstance(model, Mixture):
            with quiet():
                model.save_pretrained(target)
        else:
            shutil.copytree(Path(folder) / "adapter", target, dirs_exist_ok=True)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(target, ignore_errors=True)  # a part of a model would be in the way of the next attempt
        if is_full(error):
            with writes_to(target):
                raise
        remedy = f"cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder"
        raise InputError("--output", str(target), remedy) from None
    return target


def opt_out(folder: str | Path, owner: str) -> Mixture:
    """Take an owner's expert out of a finished run: out of its mixture, its experts/ and its checkpoint.

    Parameters
    ----------
    folder : str or Path
        A run folder of method flexmore.
    owner : str

    Returns
    -------
    Mixture
        What ``mixture/`` now holds. It equals one that the expert was never merged into; but where the router was tuned
        (``router_tuned`` in summary.json), the other rows keep what they learned beside that expert.

    Raises
    ------
    InputError
        If the folder holds no mixture, or that owner has no expert in it.
    """
    path = Path(folder)
    if not (path / "mixture" / "config.json").is_file():
        raise InputError("FOLDER", str(folder), "holds no mixture; give the folder of a finished flexmore run")
    mixture, tokenizer = load(path)
    mixture.remove_expert(owner)
    new, old = path / ".mixture.new", path / ".mixture.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with quiet():
        mixture.save_pretrained(new)
    tokenizer.save_pretrained(new)
    checkpoint = Checkpoint(path / "checkpoint" / "state.sqlite")
    try:
        arrays = checkpoint.get_arrays("trained") or {}
        checkpoint.set_arrays("trained", {n: a for n, a in arrays.items() if n.rpartition("/")[0] != owner})
        checkpoint.commit()
        checkpoint.forget_previous()  # which holds the expert still
        (path / "mixture").rename(old)
        new.rename(path / "mixture")
        shutil.rmtree(old)
        shutil.rmtree(path / "experts" / folder_name(owner), ignore_errors=True)
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        summary["opted_out"] = [*summary.get("opted_out", []), owner]
        write_atomically(path / "summary.json", to_json(summary, indent=2) + "\n")
        outputs = find_outputs(path)
        write_sums(path, outputs)
        checkpoint["outputs"] = outputs
        checkpoint.commit()
        checkpoint.forget_previous()
    finally:
        checkpoint.close()
    return mixture

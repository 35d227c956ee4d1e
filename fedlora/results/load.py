"""Load a run's model into memory, or export it for transformers and PEFT."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fedlora.alignment import align_loaded
from fedlora.assets import find_asset, find_model, is_asset
from fedlora.config import ANY_METHOD, Config, read_toml
from fedlora.continuing import ADAPTER_FILE, beside, merged, run_method
from fedlora.errors import InputError
from fedlora.methods import ADAPTER, BEST, CLIENTS, Method
from fedlora.models import load_tokenizer, quiet
from fedlora.results.card import write_card
from fedlora.results.outputs import check_sums
from fedlora.storage import is_full, writes_to
from fedlora.tasks import get_task


def load(folder: str | os.PathLike[str], client: int | None = None, *, best: bool = False) -> tuple[Any, Any]:
    """Return the model that a run made, with its adapter merged in, and the tokenizer.

    Parameters
    ----------
    folder : str, Path or RunResult
        A run folder.
    client : int, optional
        Whose model, in a run whose clients have models of their own.
    best : bool
        Give the model of the round that validation prefers, instead of the last round's.

    Returns
    -------
    (transformers.PreTrainedModel, tokenizer)
        In evaluation mode, on the CPU; ``model.config.id2label`` names the classes.

    Raises
    ------
    InputError
        If the folder holds no finished run, its files cannot be read, or it holds no model of that client or no best
        round.

    Examples
    --------
    >>> model, tokenizer = load("runs/quickstart")  # doctest: +SKIP
    >>> logits = model(**tokenizer("A joy to watch.", return_tensors="pt")).logits  # doctest: +SKIP
    """
    try:
        return _load(Path(folder), client, best)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError("FOLDER", str(folder), f"cannot be read ({reason}); run again into another") from None


def _load(path: Path, client: int | None, best: bool) -> tuple[Any, Any]:
    part = run_method(path).outputs[0]
    if best:
        if not (path / BEST).is_dir():
            remedy = f"holds no model of a best round (it has no {BEST}/); run with data.validation, or load the last"
            raise InputError("FOLDER", str(path), remedy)
        part = f"{BEST}/{part}"
    whole = (path / part / "config.json").is_file()
    if not whole and not (path / part / ADAPTER_FILE).is_file():
        raise InputError("FOLDER", str(path), f"holds no finished run (it has no {part}/); give a run folder")
    check_sums(path, part)
    config = _config(path)
    made = _of_client(path / part, config, client, run_method(path))
    model = _whole(config, made) if whole else merged(config, made)
    return model, load_tokenizer(config)


def _of_client(made: Path, config: Config, client: int | None, method: type[Method]) -> Path:
    """Return the folder of a client's own model, in a run that has such models; else that of the run's one model."""
    own = method is not Method and method.personalised(config)
    if own and client is not None and (made / CLIENTS / str(client) / ADAPTER_FILE).is_file():
        return made / CLIENTS / str(client)
    if not own and client is None:
        return made
    if not own:
        raise InputError("client", client, "has no model of its own: the run has one model; leave client out")
    there = sorted(int(path.name) for path in (made / CLIENTS).glob("*") if path.name.isdecimal())
    shown = f"choose one of {', '.join(map(str, there))}" if there else "their owners' nodes have them"
    why = "is needed: each of the run's clients has a model of its own" if client is None else "has no model here"
    raise InputError("client", client, f"{why}; {shown}")


def _whole(config: Config, folder: Path) -> Any:
    """Load a model that a run saved whole, in its own dtype."""
    model_class = getattr(transformers, get_task(config.model.task).auto_class)
    with quiet():
        model = model_class.from_pretrained(str(folder), dtype="auto", trust_remote_code=False)
    return align_loaded(model).eval()


def _config(folder: Path) -> Config:
    try:
        content = read_toml(folder / "config.toml")
    except InputError as error:
        raise ValueError(f"config.toml: {error.remedy}") from None  # the user gave the folder, not this file
    config = Config.model_validate(content, context=ANY_METHOD)
    base = beside(config.model.name, folder)
    try:
        find_model(base)
    except InputError:
        remedy = f"its base model is not at {base}; set model.name in its config.toml to where that model is here"
        raise InputError("FOLDER", str(folder), remedy) from None
    return config.model_copy(update={"model": config.model.model_copy(update={"name": base})})


def export_run(
    folder: str | os.PathLike[str],
    output: str | Path | None = None,
    *,
    merged: bool = False,
    client: int | None = None,
    best: bool = False,
) -> Path:
    """Write a run's model for others to load.

    Parameters
    ----------
    folder : str or Path
        A run folder.
    output : str or Path, optional
        The folder to write, which must not exist; ``FOLDER/merged`` or ``FOLDER/export`` by default, with ``best``
        ``FOLDER/best/merged`` or ``FOLDER/best/export``.
    merged : bool
        Write a whole model with tokenizer, for ``from_pretrained``; else the PEFT adapter with the tokenizer. A run
        without an adapter always gives a whole model. README.md is a model card.
    client : int, optional
        Whose model, in a run whose clients have models of their own.
    best : bool
        Write the model of the round that validation prefers, instead of the last round's.

    Raises
    ------
    InputError
        If the folder holds no finished run or no best round, or the output exists or cannot be written.
    """
    made = Path(folder) / BEST if best else Path(folder)
    target = Path(output) if output is not None else made / ("merged" if merged else "export")
    if os.path.lexists(target):
        raise InputError("--output", str(target), "exists already; remove it, or choose another folder")
    with torch.no_grad():
        model, tokenizer = load(folder, client, best=best)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            "--output", str(target), f"cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        adapter = made / ADAPTER
        adapter = adapter if client is None else adapter / CLIENTS / str(client)
        if merged or not (adapter / ADAPTER_FILE).is_file():
            with quiet():
                model.save_pretrained(target)
        else:
            shutil.copytree(adapter, target, dirs_exist_ok=True)
            _name_base(target / ADAPTER_FILE, _config(Path(folder)))
        tokenizer.save_pretrained(target)
        write_card(Path(folder), target, adapter=(target / ADAPTER_FILE).is_file(), best=best)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(target, ignore_errors=True)  # a partial model would block the next attempt
        if is_full(error):
            with writes_to(target):
                raise
        remedy = f"cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder"
        raise InputError("--output", str(target), remedy) from None
    return target


def _name_base(file: Path, config: Config) -> None:
    """Let an exported adapter name an asset as the hub or the catalogue does, not by its folder in this cache.

    PEFT's ``AutoPeftModel`` and a further run load the base by that name. The path of any other folder stays, so that
    it is found here.
    """
    if is_asset(config.model.name):
        base = find_asset(config.model.name).hub or config.model.name
        about = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")


def opt_out(folder: str | Path, owner: str) -> Any:
    """Remove an owner's part from a finished run whose method keeps the owners' parts apart.

    Parameters
    ----------
    folder : str or Path
        A run folder.
    owner : str

    Returns
    -------
    transformers.PreTrainedModel
        The model without that part; the folder then holds it, too.

    Raises
    ------
    InputError
        If the folder holds no finished run of such a method, or that owner has no part in it.
    """
    return run_method(Path(folder)).opt_out(Path(folder), owner)

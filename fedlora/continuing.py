"""What a finished run left as the base of another: its adapter merged into its base, with the head that was trained."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file

from fedlora.assets import asset_of, build_once, cache_dir
from fedlora.config import ANY_METHOD, Config, MethodSection, ModelSection, input_error, read_toml
from fedlora.errors import InputError
from fedlora.methods import ADAPTER, CLIENTS, Method, get_method
from fedlora.models import MeanPoolingClassifier, load_base, load_tokenizer, quiet
from fedlora.quantization import unquantized
from fedlora.tasks import tasks

HEAD_FILE = "head.safetensors"
"""Head of a mean-pooled classifier, which no stock transformers model has."""

LABELS_FILE = "labels.json"
"""Names of the classes, in the order of the logits."""

TASK_FILE = "task.json"
"""The task that an adapter was trained for; PEFT's own task type fits several."""

ADAPTER_FILE = "adapter_config.json"
_FIELD = "model.name"


def run_source(name: str, folder: Path) -> Path | None:
    """Return the folder of a whole model, for a folder that a run left; None for any other.

    Parameters
    ----------
    name : str
        ``model.name``, for errors.
    folder : Path
        A run folder, or a folder of its result.

    Returns
    -------
    Path or None
        A whole model as the run left it; an adapter merged into its base, in the cache.

    Raises
    ------
    InputError
        If the run is not finished, or its base is not there or cannot be loaded.
    """
    if (folder / "config.json").is_file():
        return None
    made = folder / run_method(folder).outputs[0]
    if (made / "config.json").is_file():
        return made
    adapter = folder if (folder / ADAPTER_FILE).is_file() else folder / ADAPTER
    if not (adapter / ADAPTER_FILE).is_file():
        if (folder / "config.toml").is_file():
            raise InputError(_FIELD, name, "is the folder of a run that is not finished; finish it with --resume")
        return None
    if (adapter / CLIENTS).is_dir():
        remedy = (
            f"is of a run whose clients have models of their own; give one of them: a folder in {ADAPTER}/{CLIENTS}"
        )
        raise InputError(_FIELD, name, remedy)
    config = adapter_config(name, adapter)
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(adapter.iterdir()) if f.is_file()]
    facts = [str(adapter.resolve()), stats, config.model.model_dump(), _identity(config.model.name)]
    target = cache_dir() / "continued" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return build_once(target, lambda made: _merge(name, config, adapter, made), _FIELD, name)


def run_method(folder: Path) -> type[Method]:
    """Return the method of a run folder, or :class:`Method` itself if its config.toml names none that is installed."""
    try:
        return get_method(str(read_toml(folder / "config.toml")["method"]["name"]))
    except (InputError, KeyError, TypeError):
        return Method


def _identity(base: str) -> Any:
    """Tell one base from another that was saved under the same name since."""
    path = Path(base)
    if not os.path.isdir(path):
        return None
    return sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir() if f.is_file())


def _merge(name: str, config: Config, adapter: Path, target: Path) -> None:
    try:
        model = merged(config, adapter)
        with quiet():
            model.save_pretrained(target)
            load_tokenizer(config).save_pretrained(target)
    except InputError as error:
        why = str(error)
    except Exception as error:  # the folder's files may be damaged in any way
        why = " ".join(str(error).split())[:300]
    else:
        return
    base = config.model.name
    remedy = f"its adapter cannot be merged into its base {base} ({why}); give a folder of fedlora export --merged"
    raise InputError(_FIELD, name, remedy)


def merged(config: Config, adapter: Path) -> Any:
    """Load a run's base with its adapter merged in and the head that was trained.

    Parameters
    ----------
    config : Config
        The run's.
    adapter : Path
        Its folder ``adapter/``.

    Raises
    ------
    InputError, OSError, ValueError, KeyError, safetensors.SafetensorError
        If the base cannot be loaded, or the folder's files are damaged.
    """
    task, labels = adapter / TASK_FILE, adapter / LABELS_FILE
    if task.is_file() and json.loads(task.read_text(encoding="utf-8")) != config.model.task:
        raise ValueError(f"{TASK_FILE} names another task than the run's {config.model.task}")
    names = json.loads(labels.read_text(encoding="utf-8")) if labels.is_file() else None
    model: Any = load_base(unquantized(config), names)
    if isinstance(model, MeanPoolingClassifier):
        model.encoder = _with_adapter(model.encoder, adapter)
        head = load_file(adapter / HEAD_FILE)
        dtype = next(model.parameters()).dtype
        model.load_state_dict({name: value.to(dtype) for name, value in head.items()}, strict=False)
    else:
        model = _with_adapter(model, adapter)
    model.requires_grad_(False)
    return model.eval()


def _with_adapter(model: Any, adapter: Path) -> Any:
    """Return a stock model with a PEFT adapter merged into its weights."""
    from peft import PeftModel  # slow, and few runs continue another

    with warnings.catch_warnings():
        # PEFT 0.21 reads this property of every model; transformers 5 has another name for it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter), trust_remote_code=False)
    return wrapped.merge_and_unload()


def adapter_config(name: str, adapter: Path) -> Config:
    """Return the config of the run that left an adapter; of one without its run, what its own files say.

    The base is loaded in float32 at least, so that merging rounds nothing off.
    """
    run = adapter.parent
    try:
        if adapter.name == ADAPTER and (run / "config.toml").is_file():
            config = Config.model_validate(read_toml(run / "config.toml"), context=ANY_METHOD)
        else:
            about = json.loads((adapter / ADAPTER_FILE).read_text(encoding="utf-8"))
            task = adapter / TASK_FILE
            about["task"] = json.loads(task.read_text(encoding="utf-8")) if task.is_file() else None
            config = Config.model_validate(_described(about))
    except ValidationError as error:
        raise InputError(_FIELD, name, f"its run's config is wrong ({input_error(error)}); fix it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(_FIELD, name, f"its files cannot be read ({error}); give a finished run's adapter") from None
    dtype = "float64" if config.model.dtype == "float64" else "float32"
    found = {"name": beside(config.model.name, run), "dtype": dtype}
    return config.model_copy(update={"model": config.model.model_copy(update=found)})


def _described(about: dict[str, Any]) -> dict[str, Any]:
    kind = about["task_type"]
    # PEFT's kind fits several tasks; TASK_FILE says which. Without it: the default one, if it fits, else the first.
    default = ModelSection.model_fields["task"].default
    of_kind = sorted((n for n, task in tasks().items() if task.peft_type == kind), key=lambda n: n != default)
    model = {
        "name": asset_of(about["base_model_name_or_path"]),
        "task": about["task"] or (of_kind[0] if of_kind else default),
        "pooling": "mean" if kind == "FEATURE_EXTRACTION" else "default",
        "max_length": 2,
    }
    return {"model": model, "data": {"name": "none", "partition": {"clients": 1}}, "method": MethodSection(name="none")}


def beside(name: str, folder: Path) -> str:
    """Find a relative path that a run folder's files name, from wherever they are read.

    It was relative to where the run was started, which is most often above the run folder.
    """
    path = Path(name)
    if path.is_absolute() or os.path.exists(path):
        return name
    parents = folder.absolute().parents
    return next((str(parent / path) for parent in parents if os.path.exists(parent / path)), name)

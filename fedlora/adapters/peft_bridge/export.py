"""Writes the result as PEFT saves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.peft_bridge.bounds import quiet, seeded
from fedlora.adapters.peft_bridge.config import own_keys, peft_config
from fedlora.adapters.peft_bridge.layers import PeftLayer, adapter_arrays
from fedlora.adapters.peft_bridge.model import PeftAdaptedModel
from fedlora.adapters.peft_format import saved_whole, task_type, write_about
from fedlora.config import Config
from fedlora.continuing import HEAD_FILE
from fedlora.models import MeanPoolingClassifier, load_base, pretrained_source


def export_adapter(
    adapted: PeftAdaptedModel,
    config: Config,
    peft_type: str,
    given: Mapping[str, Any],
    folder: Path,
    label_names: list[str] | None,
) -> None:
    """Write client 0's arrays as PEFT's own ``save_pretrained`` does.

    The base is loaded once more, since PEFT saves models and not arrays. Layers whose weights the checkpoint lacks are
    in the adapter whole, like the head; the head of mean pooling, which no stock model has, lies beside it.

    Parameters
    ----------
    adapted : PeftAdaptedModel
    config : Config
    peft_type : str
    given : mapping
        The type's own keys.
    folder : Path
    label_names : list of str or None
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_about(config, folder, label_names)
    stock: Any = load_base(config, label_names)
    head, prefix, whole = adapted.arrays(adapted.head_names), "", set()
    saved: dict[str, Any] = {}
    if isinstance(stock, MeanPoolingClassifier):
        save_file(head, folder / HEAD_FILE)
        stock, head, prefix = stock.encoder, {}, "encoder."
    elif head:
        heads = sorted({name.split(".")[0] for name in head})
        whole = saved_whole(stock, heads, ())
        saved["modules_to_save"] = [*heads, *sorted(whole)]
    if any(isinstance(layer.base, Conv1D) for layer in adapted.adapters.values()):
        saved |= {"fan_in_fan_out": True} if "fan_in_fan_out" in own_keys(peft_type) else {}
    paths = {path.removeprefix(prefix): layer for path, layer in adapted.adapters.items()}
    made = peft_config(peft_type, given, config, target_modules=list(paths), task_type=task_type(config), **saved)
    with seeded(config.run.seed):
        peft_model: Any = get_peft_model(stock, made)
    for path, layer in paths.items():
        assert isinstance(layer, PeftLayer)
        values = layer.arrays_of(0)
        for name, array in adapter_arrays(stock.get_submodule(path)):
            if name in values:
                array.data = values[name].detach().to(array.device, copy=True)
    for path in whole:
        head |= {f"{path}.{n}": p.detach() for n, p in adapted.model.get_submodule(path).named_parameters()}
    for path, wrapper in stock.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for name, parameter in wrapper.modules_to_save["default"].named_parameters():
                parameter.data = head[f"{path}.{name}"].to(parameter.device, copy=True)
    made.base_model_name_or_path = pretrained_source(config)
    with quiet():
        peft_model.save_pretrained(str(folder))

"""Which modules of a model get adapters: by names as in PEFT, or by what the model's attention is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import regex
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.errors import InputError
from fedlora.models import MeanPoolingClassifier
from fedlora.quantization import is_ours

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)

_FIELD = "method.target_modules"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SECONDS = 1.0
# Names of projections without what does not tell them apart: q_proj, q_lin, query_proj, project_q, Wq, q_b_proj ...
_AFFIXES = re.compile(r"^(project_|w(?=[qkv]))|(_?(proj|lin|linear|layer|head))$")
_QUERY = {"q", "query", "q_b", "query_key"}
_VALUE = {"v", "value", "kv", "kv_b"}
_FUSED = {"qkv", "query_key_value", "c_attn", "in_proj_qkv", "in_proj_qkvz"}


def target_paths(
    model: nn.Module,
    targets: str | Sequence[str] | None,
    exclude: str | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> list[str]:
    """Choose the modules to adapt, as PEFT does.

    Parameters
    ----------
    model : torch.nn.Module
    targets : str, sequence of str or None
        A regular expression for whole paths, ``all-linear``, a list of names (a path or its end), or None for every
        attention's query and value, or the layer that computes both.
    exclude : str, optional
        Path of the head, which is trained in full instead.
    exclude_modules : str or sequence of str, optional
        Which of them to leave out: a regular expression for whole paths, or a list of names.

    Raises
    ------
    InputError
        If nothing matches or all is excluded, or a match is no Linear or Conv1D layer of floating-point weights, or
        shares its weight with the embeddings.
    """
    modules = {
        path: module
        for path, module in model.named_modules()
        if path and not (exclude and (path == exclude or path.startswith(f"{exclude}.")))
    }
    # Paths are those of the stock model, around which a mean-pooling classifier is wrapped.
    wrapper = "encoder." if isinstance(model, MeanPoolingClassifier) else ""
    if targets is None:
        found = _attention(model, modules)
    elif targets == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = [p for p, m in modules.items() if isinstance(m, LINEAR) and m is not output]
    else:
        found = _matching(modules, targets, _FIELD, wrapper)
    if not found:
        names = sorted({p.rpartition(".")[2] for p, m in modules.items() if isinstance(m, LINEAR)})
        remedy = f"matches no module of the model; its linear layers are {', '.join(names) or 'none'}"
        raise InputError(_FIELD, targets, remedy)
    if exclude_modules:
        found = _without(found, exclude_modules, wrapper)
    embeddings = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    for path in found:
        module = modules[path]
        if not isinstance(module, LINEAR):
            kind = type(module).__name__
            raise InputError(_FIELD, targets, f"matches {path}, a {kind}; only Linear and Conv1D layers take adapters")
        if not is_ours(module) and (module.weight.dtype not in _FLOATS or module.weight.dim() != 2):
            remedy = f"matches {path}, a quantised {type(module).__name__}; take the model's unquantised weights"
            raise InputError(_FIELD, targets, remedy)
        if module.weight is embeddings:
            remedy = f"matches {path}, whose weight is the embeddings' too, so it could not be merged; leave it out"
            raise InputError(_FIELD, targets, remedy)
    return found


def _matching(paths: Iterable[str], names: str | Sequence[str], field: str, wrapper: str) -> list[str]:
    """Return the paths that a regular expression matches whole, or that are or end with one of the names."""
    if not isinstance(names, str):
        return [p for p in paths if any(p == name or p.endswith(f".{name}") for name in names)]
    try:
        pattern = regex.compile(names)
        # A server's expression must not keep a node busy: some take for ever on a path of fifty letters.
        return [p for p in paths if any(pattern.fullmatch(n, timeout=_SECONDS) for n in {p, p.removeprefix(wrapper)})]
    except regex.error as error:
        raise InputError(field, names, f"is not a regular expression ({error})") from None
    except TimeoutError:
        raise InputError(field, names, f"takes more than {_SECONDS} s on one path; simplify it") from None


def _without(found: list[str], names: str | Sequence[str], wrapper: str) -> list[str]:
    field = "method.exclude_modules"
    # Every name must say something: one that was mistyped would leave its module in.
    for part in [names] if isinstance(names, str) else names:
        if not _matching(found, part if isinstance(names, str) else [part], field, wrapper):
            last = sorted({path.rpartition(".")[2] for path in found})
            remedy = (
                f"{part!r} is none of the modules that method.target_modules chooses ({', '.join(last)}); change it"
            )
            raise InputError(field, names, remedy)
    excluded = set(_matching(found, names, field, wrapper))
    kept = [path for path in found if path not in excluded]
    if not kept:
        raise InputError(field, names, "leaves no module to adapt; exclude fewer")
    return kept


def _attention(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Find every attention's query and value, or the layer in which they are fused, by its own layers' names."""
    found = []
    for path, module in [("", model), *modules.items()]:
        layers = {name: _role(name) for name, child in module.named_children() if isinstance(child, LINEAR)}
        fused = _FUSED | ({"in"} if "attention" in type(module).__name__.lower() else set())
        roles = set(layers.values())
        if roles & fused:
            wanted = fused
        elif roles & _QUERY and roles & _VALUE:
            wanted = _QUERY | _VALUE
        else:
            continue
        paths = [f"{path}.{name}".removeprefix(".") for name, role in layers.items() if role in wanted]
        found += [p for p in paths if p in modules]
    if found:
        return found
    # Such as RWKV, which has values without queries.
    kind = _model_type(model)
    known = _known_targets().get(kind)
    if known is None:
        remedy = f'a {kind} model has no attention with linear query and value; name the modules, or "{ALL_LINEAR}"'
        raise InputError(_FIELD, None, remedy)
    return _matching(modules, known, _FIELD, "")


def _role(name: str) -> str:
    short, before = name.lower(), ""
    while short != before:
        before, short = short, _AFFIXES.sub("", short)
    return short


def beyond_linear(model: nn.Module) -> tuple[list[str], int]:
    """Name the weights that ``all-linear`` does not reach, such as matrices fused in one, and count their numbers.

    Returns
    -------
    (list of str, int)
        Paths with ``*`` for the layers' numbers, and how many parameters they have in all.
    """
    names: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, LINEAR):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            # Three dimensions: matrices one after the other. Convolutions are no linear layers in PEFT either.
            if parameter.dim() == 3 and "conv" not in type(module).__name__.lower():
                short = re.sub(r"\.\d+(?=\.)", ".*", name)
                names[short] = names.get(short, 0) + parameter.numel()
    return list(names), sum(names.values())


def _known_targets() -> Mapping[str, Sequence[str]]:
    """Return PEFT's own defaults, by type of model."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN  # slow

    return KNOWN


def _model_type(model: nn.Module) -> str:
    """Name the base's architecture; a mean-pooled classifier's base is inside it."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    kinds = [str(config.model_type) for config in configs if getattr(config, "model_type", "")]
    known = [kind for kind in kinds if kind in _known_targets()]
    return (known or kinds or [type(model).__name__])[0]

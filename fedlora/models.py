"""A frozen base model and its tokenizer, from an asset, a folder or a hub id."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import logging
import pickle
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedlora.alignment import align_loaded, align_weights
from fedlora.assets import build_once, cache_dir, fetch, find_asset, find_model, is_asset
from fedlora.config import Config
from fedlora.devices import Placement, cards_of, move_inputs, split_by_layers, without_accelerate
from fedlora.errors import InputError
from fedlora.kernels import use_kernels
from fedlora.methods import get_method
from fedlora.quantization import dequantized, is_quantized, keep_layout, quantized_loading
from fedlora.tasks import Task, get_task, tasks

T = TypeVar("T")

_HEADS = ("classifier", "score", "classification_head", "logits_proj")
_BEFORE_HEADS = ("pre_classifier", "pooler", "sequence_summary")
# Their first positions are reserved for padding, so fewer tokens fit than there are position embeddings.
_PADDED_POSITIONS = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text"),
    *("mpnet", "longformer", "luke", "xmod", "ibert"),
}


class MeanPoolingConfig(PreTrainedConfig):
    """Config of a :class:`MeanPoolingClassifier`.

    Parameters
    ----------
    encoder : dict
        The encoder's own config.
    hidden_size : int, optional
        Width of what the encoder returns, where that is not its config's ``hidden_size``.
    """

    model_type = "mean-pooling-classifier"

    def __init__(self, encoder: dict[str, Any] | None = None, hidden_size: int | None = None, **kwargs: Any) -> None:
        self.encoder, self.hidden_size = encoder or {}, hidden_size
        super().__init__(**kwargs)


class MeanPoolingClassifier(PreTrainedModel):
    """A linear classifier on the mean of an encoder's (or decoder's) last hidden states; padding does not count.

    A transformers model like any other: it saves, and loads with ``AutoModelForSequenceClassification`` once this
    module is imported.

    Parameters
    ----------
    config : MeanPoolingConfig
    encoder : transformers.PreTrainedModel, optional
        The base model, whose output has ``last_hidden_state`` [N, T, hidden]; made from the config by default.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: MeanPoolingConfig, encoder: Any = None) -> None:
        super().__init__(config)
        if encoder is None:
            base = AutoConfig.for_model(**config.encoder)
            model_class: Any = transformers.MODEL_MAPPING[type(base)]
            encoder = model_class(base, **_without_pooler(model_class))
        self.encoder = encoder
        width = config.hidden_size or encoder.config.hidden_size
        self.classifier = nn.Linear(width, int(config.num_labels or 2), dtype=encoder.dtype)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load as every transformers model does, with the weights aligned, so that the same bits come out again."""
        return align_loaded(super().from_pretrained(*arguments, **options))

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: they are loaded, or drawn from the run's seed."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Return the logits [N, num_labels] of token ids [N, T] with mask [N, T] (1 token, 0 padding)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        if attention_mask is None:
            pooled = hidden.mean(dim=1)
        else:
            weight = attention_mask.unsqueeze(-1).to(hidden)  # its dtype, and its device where the model is split
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def give_boolean_masks(model: Any) -> bool:
    """Let a model's body on a GPU get masks in the form of which transformers need not read the values.

    Reading them would wait for the GPU. That form is a boolean [N, 1, 1, T], which a model has to take: its tokens see
    each other both ways and at any distance, and it attends by PyTorch's function alone. One that computes attention
    itself adds its mask to the scores, where a boolean hides nothing; one with windows would lose them.

    Returns
    -------
    bool
        Whether the model is such a one; others keep their masks.
    """
    body = model.encoder if isinstance(model, MeanPoolingClassifier) else getattr(model, "base_model", model)
    configs = [module.config for module in body.modules() if hasattr(module, "config")]
    ways = {getattr(config, "_attn_implementation", None) for config in configs}
    layers = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()}
    causal = any(getattr(module, "is_causal", False) for module in body.modules())
    if ways != {"sdpa"} or causal or layers - {"full_attention"}:
        return False
    body.register_forward_pre_hook(_with_boolean_mask, with_kwargs=True)
    return True


def _with_boolean_mask(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    mask = named.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        named = {**named, "attention_mask": mask[:, None, None, :].bool()}
    return given, named


AutoConfig.register(MeanPoolingConfig.model_type, MeanPoolingConfig)
AutoModelForSequenceClassification.register(MeanPoolingConfig, MeanPoolingClassifier)


def head_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the name and the module of a classification head; None for a model without one, as a causal LM."""
    for name in _HEADS:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return name, module
    return None


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a Linear or Conv1D layer."""
    if isinstance(layer, nn.Linear):  # a quantised one stores its weight in another shape
        return layer.out_features, layer.in_features
    columns, rows = layer.weight.shape  # type: ignore[misc]
    return rows, columns


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """Return the weight [outputs, inputs] of a Linear or Conv1D layer (Conv1D stores it transposed), dequantised."""
    if is_quantized(layer):
        return dequantized(layer)
    weight: torch.Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def pretrained_source(config: Config) -> str:
    """Return the folder or hub id of the base model, such that transformers' ``from_pretrained`` can load it.

    Assets are fetched into the cache; one that holds GGUF weights is converted to safetensors there, once. So is a
    finished run (its folder, or its ``adapter/``) merged with its base.

    Raises
    ------
    InputError
        If ``model.name`` is no known model asset, no folder with a model, and cannot be a hub id.
    """
    from fedlora.continuing import run_source

    name = config.model.name
    if is_asset(name):
        folder = fetch(name, "model", "model.name")
        asset = find_asset(name, "model", "model.name")
        if not any(member.endswith(".gguf") for member in asset.files):
            return str(folder)
        gguf = asset.file(".gguf")
        converted = cache_dir() / "converted" / f"{asset.name}-{asset.version}"
        return str(build_once(converted, lambda target: _convert_gguf(folder, gguf, target), "model.name", name))
    path = find_model(name)
    if path is None:
        return name
    trained = run_source(name, path)
    if trained is None and not (path / "config.json").is_file():
        raise InputError("model.name", name, "has no config.json; give a folder of save_pretrained")
    _know_architecture(trained or path)
    # Written into results, which are read from anywhere.
    return str((trained or path).absolute())


def _know_architecture(folder: Path) -> None:
    """Import the method whose own architecture a saved model has; importing it registers the architecture.

    The architecture's ``model_type`` is the method's name (:attr:`fedlora.methods.Method.outputs`).
    """
    with suppress(OSError, ValueError, KeyError, TypeError, InputError):  # what is wrong shows when it is loaded
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind not in CONFIG_MAPPING:
            get_method(kind)


def model_config(config: Config) -> Any:
    """Return the transformers config of the base model: no dropout, ``model.num_hidden_layers`` applied.

    Raises
    ------
    InputError
        If it cannot be loaded, has fewer layers than asked for, or fewer positions than ``model.max_length`` (or fewer
        at which an example does not depend on its batch).
    """
    source = pretrained_source(config)
    with _loading(config):
        pretrained: Any = AutoConfig.from_pretrained(source, revision=_revision(config), trust_remote_code=False)
        if isinstance(pretrained, MeanPoolingConfig):
            pretrained = _inner_config(config, pretrained)
        text = pretrained.get_text_config()
    for part in {id(part): part for part in (pretrained, text)}.values():
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(part, name, 0.0)
    wanted = config.model.num_hidden_layers
    if wanted is not None:
        there = getattr(text, "num_hidden_layers", None)
        if not isinstance(there, int):
            raise InputError("model.num_hidden_layers", wanted, "the model has no such number to lower; leave it out")
        if wanted > there:
            raise InputError("model.num_hidden_layers", wanted, f"the model has {there} layers; lower it")
        try:
            text.num_hidden_layers = wanted
        except NotImplementedError:
            remedy = f"the layers of a {text.model_type} model have no such number to lower; leave it out"
            raise InputError("model.num_hidden_layers", wanted, remedy) from None
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:wanted]
    positions = getattr(text, "max_position_embeddings", None)
    padded, vocabulary = pretrained.model_type in _PADDED_POSITIONS, vocabulary_size(pretrained)
    if not _has_embedding(getattr(text, "pad_token_id", None), vocabulary):
        text.pad_token_id = None  # it may be -1, a list, or a token that was added to the tokenizer alone
    if padded and pretrained.pad_token_id is None:
        # Positions are counted from the padding's number.
        pretrained.pad_token_id = _tokenizer(config, source).pad_token_id
        if not _has_embedding(pretrained.pad_token_id, vocabulary):
            remedy = "neither its config nor its tokenizer says which token is padding; set pad_token_id in config.json"
            raise InputError("model.name", config.model.name, remedy)
    if isinstance(positions, int) and positions > 0:
        if padded:
            positions -= pretrained.pad_token_id + 1
        longest = config.model.max_length
        if longest > positions:
            raise InputError("model.max_length", longest, f"the model has {positions} positions; lower it")
    alone = _positions_alone(pretrained)
    if alone is not None and config.model.max_length > alone:
        remedy = f"beyond {alone} tokens this model's positions depend on the longest row of a batch; lower it"
        raise InputError("model.max_length", config.model.max_length, remedy)
    return pretrained


def _is_token(number: Any) -> bool:
    """Whether a config's entry is one token: it may be lacking, -1 or a list."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def vocabulary_size(pretrained: Any) -> int | None:
    """Return how many token embeddings a model has, by its config; None if that does not say."""
    size = getattr(pretrained.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def has_token_types(pretrained: Any) -> bool:
    """Whether a model tells the two texts of a pair by the types of their tokens, as BERT does."""
    return (getattr(pretrained.get_text_config(), "type_vocab_size", None) or 0) > 1


def pools_mean(config: Config) -> bool:
    """Whether the model is to be a :class:`MeanPoolingClassifier`."""
    return config.model.pooling == "mean" and "mean" in get_task(config.model.task).poolings


def _inner_config(config: Config, pooled: MeanPoolingConfig) -> Any:
    """Return the encoder's config of a saved mean-pooled classifier, with the classes in it."""
    if not pools_mean(config):
        fitting = " or ".join(name for name, task in tasks().items() if "mean" in task.poolings)
        remedy = f"that model has a head on the mean of its tokens; set model.pooling = mean and model.task = {fitting}"
        raise InputError("model.name", config.model.name, remedy)
    inner = AutoConfig.for_model(**pooled.encoder)
    inner.id2label, inner.label2id = pooled.id2label, pooled.label2id
    inner.mean_pooled = True
    return inner


def _pathless(pretrained: Any) -> dict[str, Any]:
    """Return a config as a dict without the folder that it came from: it is saved and published with the model."""
    return {key: value for key, value in pretrained.to_dict().items() if key != "_name_or_path"}


def _positions_alone(pretrained: Any) -> int | None:
    """Return up to how many tokens a row's positions do not depend on the others in its batch; None for any number.

    LongRoPE changes all rows' frequencies as soon as one row is longer: an example's gradient would not be its own.
    """
    parameters = getattr(pretrained.get_text_config(), "rope_parameters", None) or {}
    # Some models have such parameters for each type of layer.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return min((p["original_max_position_embeddings"] for p in kinds if p.get("rope_type") == "longrope"), default=None)


def load_tokenizer(config: Config) -> Any:
    """Return the base model's tokenizer: pads and truncates on the right, with a padding token (if none, the eos).

    Raises
    ------
    InputError
        If it cannot be loaded or has neither a padding nor an end-of-sequence token.
    """
    tokenizer = _tokenizer(config, pretrained_source(config))
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    vocabulary = vocabulary_size(model_config(config))
    if not _has_embedding(tokenizer.pad_token_id, vocabulary):
        if not _has_embedding(tokenizer.eos_token_id, vocabulary):
            remedy = "its tokenizer has no pad or eos token with an embedding in the model; add one"
            raise InputError("model.name", config.model.name, remedy)
        with quiet():
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer(config: Config, source: str) -> Any:
    with _loading(config):
        return AutoTokenizer.from_pretrained(source, revision=_revision(config), trust_remote_code=False)


def _has_embedding(token: Any, vocabulary: int | None) -> bool:
    return _is_token(token) and (vocabulary is None or token < vocabulary)


def load_base(config: Config, label_names: list[str] | None, device: Placement = "cpu") -> nn.Module:
    """Load the base model with every parameter frozen and every dropout at 0.

    Parameters
    ----------
    config : Config
        ``model.*`` says which and how; a classification head is drawn anew from ``run.seed`` (normal with the model's
        ``initializer_range``, bias 0), in every process alike.
    label_names : list of str, optional
        The classes; None for tasks without classes.
    device : str, torch.device or sequence of these
        Where the model goes, straight from the file. Over several devices it is split by layers
        (:mod:`fedlora.devices`). On ``meta`` it is a skeleton without weights, of which nothing is read.

    Returns
    -------
    nn.Module
        A transformers model with a head, or a :class:`MeanPoolingClassifier` with pooling mean. ``drawn`` names the
        parameters before the head that the checkpoint lacks, such as a pooler's; they are drawn like the head.

    Raises
    ------
    InputError
        If the model cannot be loaded or does not fit the task.
    """
    devices = cards_of(device)
    pretrained, task, mean = model_config(config), get_task(config.model.task), pools_mean(config)
    whole = vars(pretrained).pop("mean_pooled", False)  # the checkpoint is a classifier of ours, head and all
    known = _labels(pretrained)
    if not task.causal:
        label_names = _set_labels(config, task, pretrained, label_names, mean)
    with torch.random.fork_rng(devices=[]), _loading(config):
        torch.manual_seed(config.run.seed)
        model, missing, mismatched = _build(config, task, pretrained, devices, whole)
        if mean and not isinstance(model, MeanPoolingClassifier):
            labels: dict[str, Any] = {"id2label": pretrained.id2label, "label2id": pretrained.label2id}
            if task.problem_type is not None:
                labels["problem_type"] = task.problem_type
            width = _hidden_size(config, model)
            model = MeanPoolingClassifier(MeanPoolingConfig(_pathless(pretrained), width, **labels), model)
            model.classifier.to(devices[-1])  # beside the last layer
    head = None if task.causal else head_of(model)
    if not task.causal and head is None:
        remedy = "use pooling mean" if "mean" in task.poolings else "choose another model"
        raise InputError("model.name", config.model.name, f"its head has an unknown name; {remedy}")
    _check_complete(config, missing, mismatched, head[0] if head else None)
    fresh = set() if mean else missing | mismatched
    # Frozen like the rest, but nobody who loads the checkpoint draws them alike: who exports a result needs them.
    model.drawn = sorted(n for n in fresh if head is None or not n.startswith(f"{head[0]}."))
    model.notes = []
    if head is not None and known and (whole or not mean):
        of_head = {n for n in missing | mismatched if n.startswith(f"{head[0]}.")}
        if known == label_names and not of_head:
            head = None  # it goes on from the checkpoint's
        elif not of_head & missing and not any(name.startswith("LABEL_") for name in known):
            classes = ", ".join(known[:5])
            model.notes.append(f"the model's head is of other classes ({classes}), so a new one is drawn")
    if head is not None:
        fresh |= {f"{head[0]}.{name}" for name, _ in head[1].named_parameters()}
    _draw(model, fresh, config.run.seed, getattr(pretrained, "initializer_range", None) or 0.02)
    for module in model.modules():
        if "dropout" in type(module).__name__.lower() and isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    model.requires_grad_(False)
    if len(devices) == 1 and not config.model.quantization:
        model.to(devices[0])  # what the checkpoint does not hold
    # Before kernels replace modules: what a skeleton answered holds for the model with kernels, too.
    vars(model)["architecture"] = _architecture(model)
    if devices[0].type == "cuda":
        give_boolean_masks(model)
        use_kernels(model)
    return align_weights(move_inputs(model))


def _set_labels(config: Config, task: Task, pretrained: Any, label_names: list[str] | None, mean: bool) -> list[str]:
    """Write the task's classes into a checkpoint's config, and return their names."""
    outputs = task.outputs(label_names)
    if not outputs:
        raise ValueError(f"label_names are needed for {task.name}")
    # As transformers calls outputs without a name.
    names = label_names or [f"LABEL_{index}" for index in range(outputs)]
    pretrained.num_labels = outputs
    pretrained.id2label = dict(enumerate(names))
    pretrained.label2id = {name: index for index, name in enumerate(names)}
    if task.problem_type is not None:
        pretrained.problem_type = task.problem_type
    if not mean and (not _sees_ahead(pretrained) or getattr(pretrained, "pad_token_id", None) is None):
        # A decoder's own head reads the last token before the padding, which is this tokenizer's.
        pretrained.pad_token_id = load_tokenizer(config).pad_token_id
    return names


def _build(
    config: Config, task: Task, pretrained: Any, devices: tuple[torch.device, ...], whole: bool
) -> tuple[Any, set[str], set[str]]:
    """Return the model, the parameters that its checkpoint lacks, and those that it has in other shapes, by name.

    With pooling mean it is the encoder alone, unless the checkpoint is a whole classifier of ours.
    """
    mean = pools_mean(config)
    model_class = _model_class(config, task, pretrained, mean)
    if devices[0].type == "meta":
        with devices[0], no_init_weights():
            model = model_class(pretrained, **(_without_pooler(model_class) if mean else {}))
        model.tie_weights()  # which drawing weights would have done
        return model, set(), set()
    options: dict[str, Any] = {"dtype": getattr(torch, config.model.dtype), "output_loading_info": True}
    if getattr(model_class, "_supports_sdpa", False):
        options["attn_implementation"] = "sdpa"
    if mean and not whole:
        options |= _without_pooler(model_class)
    if not task.causal and (whole or not mean):
        options["ignore_mismatched_sizes"] = True
    source, loaded = pretrained_source(config), pretrained
    if whole:
        model_class = MeanPoolingClassifier
        loaded = MeanPoolingConfig.from_pretrained(source, trust_remote_code=False)
        loaded.encoder = _pathless(pretrained)
        loaded.id2label, loaded.label2id = pretrained.id2label, pretrained.label2id
    options |= _placing(config, model_class, loaded, devices)
    model, report = model_class.from_pretrained(
        source, config=loaded, revision=_revision(config), trust_remote_code=False, **options
    )
    if config.model.quantization is not None:
        keep_layout(model)
    if len(devices) > 1:
        move_inputs(without_accelerate(model))
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]}
    return model, set(report["missing_keys"]), mismatched


def _placing(config: Config, model_class: Any, pretrained: Any, devices: tuple[torch.device, ...]) -> dict[str, Any]:
    """Return the options with which ``from_pretrained`` reads each weight straight onto its device."""
    options: dict[str, Any] = {}
    quantized = config.model.quantization is not None
    if quantized or len(devices) > 1:
        with torch.device("meta"):
            skeleton = model_class(pretrained)
    if quantized:
        options |= quantized_loading(config, skeleton)
    if len(devices) > 1:
        options["device_map"] = split_by_layers(skeleton, devices)
    elif quantized or devices[0].type != "cpu":
        options["device_map"] = {"": devices[0]}
    return options


def _without_pooler(model_class: Any) -> dict[str, bool]:
    takes = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


def _sees_ahead(pretrained: Any) -> bool:
    """Whether a model is an encoder, whose tokens see those behind them."""
    encoder = type(pretrained) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return encoder and not any(getattr(pretrained, name, False) for name in ("is_decoder", "is_encoder_decoder"))


def _model_class(config: Config, task: Task, pretrained: Any, mean: bool) -> Any:
    if task.causal and _sees_ahead(pretrained):
        remedy = f"would see the tokens that it predicts: a {pretrained.model_type} model is an encoder; take a decoder"
        raise InputError("model.task", config.model.task, remedy)
    mapping = transformers.MODEL_MAPPING if mean else getattr(transformers, task.auto_class)._model_mapping
    try:
        found = mapping[type(pretrained)]
    except KeyError:
        remedy = f"transformers has no such model of type {pretrained.model_type}; choose another model or task"
        raise InputError("model.task", config.model.task, remedy) from None
    return found[0] if isinstance(found, tuple | list) else found


def _labels(pretrained: Any) -> list[str] | None:
    """Return the names of a checkpoint's classes, in order; None where its config has no such list."""
    names = getattr(pretrained, "id2label", None)
    if not isinstance(names, dict):
        return None
    try:
        return [str(names[number]) for number in range(len(names))]
    except KeyError:
        return None


@torch.no_grad()
def _hidden_size(config: Config, model: Any) -> int:
    """Return the width of what an encoder returns for a text, which is not always its config's ``hidden_size``.

    Refuses an encoder-decoder like T5, whose decoder wants a text of its own; others, like BART, give it the same.
    """
    try:
        width: int = on_skeleton(model, lambda: run_short_text(model).last_hidden_state.shape[-1], "width")
    except InputError as error:
        if not getattr(model.config, "is_encoder_decoder", False):
            raise
        remedy = "its decoder needs a text beside the encoder's; take a model of one text, such as an encoder"
        raise InputError("model.name", config.model.name, remedy) from error
    return width


SHORT_TEXTS = 3
"""How many :func:`run_short_text` runs at once."""


def run_short_text(model: Any) -> Any:
    """Run a model on three texts of eight tokens, which end as a text does; return its output.

    Raises
    ------
    InputError
        If it fails on them.
    """
    base = model.encoder.config if isinstance(model, MeanPoolingClassifier) else getattr(model, "config", None)
    text = base.get_text_config() if base is not None else None
    vocabulary = (vocabulary_size(base) if base is not None else None) or 2
    device = next(model.parameters()).device
    ids = (torch.arange(8 * SHORT_TEXTS, device=device).reshape(SHORT_TEXTS, 8) * 7 + 3) % vocabulary
    # Heads look for the end, and for the padding behind it.
    end: Any = getattr(text, "eos_token_id", None)
    padding: Any = getattr(text, "pad_token_id", None)
    for special in (end, padding):
        if _is_token(special):
            other = next((token for token in range(vocabulary) if token not in (end, padding)), 0)
            ids = ids.masked_fill(ids == special, other)
    if _is_token(end) and end < vocabulary:
        ids[:, -1] = end
    # Training gives a mask too; on a skeleton some models look at its numbers.
    mask = None if device.type == "meta" else torch.ones_like(ids)
    try:
        with unchanged(model):
            return model(input_ids=ids, attention_mask=mask)
    except Exception as error:  # of any model's code
        why = " ".join(str(error).split())[:200] or type(error).__name__
        name = getattr(base, "model_type", type(model).__name__)
        raise InputError("model.name", name, f"cannot run on a text ({why}); choose another model") from error


_answers: dict[tuple[str, Hashable], Any] = {}
"""What skeletons answered, by architecture and question: a study forecasts many runs of one model."""

_MOST_ANSWERS = 256


def on_skeleton(model: nn.Module, run: Callable[[], T], question: Hashable) -> T:
    """Call a function that runs a model which may be a skeleton (on ``meta``); return what it returns.

    A skeleton is run once for each question: what it answers depends on its architecture alone, and holds for the
    model with its weights, too. The answer must not be changed.

    The numbers mean nothing there; but shapes, which layers are called, and what depends on what, are the model's. A
    skeleton runs on fake tensors, which compute shapes alone. A model that looks at numbers, which these have not, runs
    on zeros, which takes as long as any pass of it.
    """
    architecture = _architecture(model)
    key = architecture or "", question
    if not any(parameter.is_meta for parameter in model.parameters()):
        return _answers[key] if architecture and key in _answers else run()
    if architecture is None:
        return _run_skeleton(model, run)
    if key not in _answers:
        while len(_answers) >= _MOST_ANSWERS:
            del _answers[next(iter(_answers))]
        _answers[key] = _run_skeleton(model, run)
    answer: T = _answers[key]
    return answer


def _architecture(model: nn.Module) -> str | None:
    """Return a digest of a model's modules and config, as loaded; None without a config: modules do not tell all."""
    if "architecture" in vars(model):
        known: str | None = vars(model)["architecture"]
        return known
    config = getattr(model.encoder if isinstance(model, MeanPoolingClassifier) else model, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        return None
    return hashlib.sha256(f"{model!r}\n{config.to_json_string(use_diff=False)}".encode()).hexdigest()


def _run_skeleton(model: nn.Module, run: Callable[[], T]) -> T:
    with suppress(InputError), FakeTensorMode(allow_non_fake_inputs=True), _weightless(model):
        return run()
    with _weightless(model):
        return run()


@contextmanager
def _weightless(model: nn.Module) -> Iterator[None]:
    """Give a skeleton zeros on the CPU for weights, which take next to no memory, for a moment."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None and value.is_meta:
                    kept.append((table, name, value))
    try:
        for table, name, value in kept:
            if id(value) not in made:
                # Matrices fused in one weight are multiplied by kernels that want whole ones.
                own = value.shape[-2:] if value.dim() > 2 else ()
                one = torch.zeros(own, dtype=value.dtype).expand(value.shape)
                made[id(value)] = nn.Parameter(one, requires_grad=False) if isinstance(value, nn.Parameter) else one
            table[name] = made[id(value)]
        yield
    finally:
        for table, name, value in kept:
            table[name] = value


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what running a model may change in it: plain attributes such as modes, parts, and buffers.

    BigBird, for one, takes another attention for good as soon as it meets a short row.
    """
    kept = [(module, *_state(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, plain, parts, buffers in kept:
            vars(module).update(plain)
            for part, content in parts.items():
                here = vars(module)[part]
                here.clear()
                here.update(content)
            for name, value in buffers.items():
                if not torch.equal(module._buffers[name], value):  # type: ignore[arg-type]
                    module._buffers[name].copy_(value)  # type: ignore[union-attr]


_PARTS = ("_parameters", "_buffers", "_modules")


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    plain = {k: v for k, v in vars(module).items() if v is None or isinstance(v, bool | int | float | str)}
    parts = {part: dict(vars(module)[part]) for part in _PARTS}
    tensors = {name: value for name, value in module._buffers.items() if value is not None}
    # Those of a skeleton have no numbers.
    real = {name: value for name, value in tensors.items() if not (value.is_meta or isinstance(value, FakeTensor))}
    buffers = {name: value.clone() for name, value in real.items()}
    return plain, parts, buffers


def _check_complete(config: Config, missing: set[str], mismatched: set[str], head: str | None) -> None:
    """Refuse a checkpoint that lacks parts of the body, which would then be noise that is never trained."""
    allowed = (head, *_BEFORE_HEADS) if head else ()

    def of_body(names: set[str]) -> list[str]:
        return sorted(name for name in names if not any(part in allowed for part in name.split(".")))

    if unlike := of_body(mismatched):
        remedy = f"the checkpoint's {unlike[0]} has another shape than its config.json says; save both together"
        raise InputError("model.name", config.model.name, remedy)
    lacking = of_body(missing)
    if lacking:
        remedy = (
            f"the checkpoint has no weights for {lacking[0]} ({len(lacking)} lacking); take a model made for the task"
        )
        field, value = ("model.name", config.model.name) if head else ("model.task", config.model.task)
        raise InputError(field, value, remedy)


@torch.no_grad()
def _draw(model: nn.Module, names: set[str], seed: int, std: float) -> None:
    """Fill parameters from the seed alone: not from the global generator, nor from how the checkpoint was read."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name not in names:
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            # Drawn in float32 whatever the dtype, so that runs in different precision start alike.
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def _convert_gguf(folder: Path, gguf: str, target: Path) -> None:
    # The conversion draws a progress bar of its own that no setting turns off.
    with quiet(), redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False
        )
        # transformers does not save a model that it regards as quantised: the weights move to a plain one.
        plain_config = loaded.config
        del plain_config.quantization_config
        plain = type(loaded)(plain_config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        tokenizer.save_pretrained(target)


def _revision(config: Config) -> str:
    return config.model.revision or "main"


@contextmanager
def _loading(config: Config) -> Iterator[None]:
    """Turn what transformers raises about a model that cannot be loaded into the user's words."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its checks and the model's code raise
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = f"cannot be loaded ({why[:300]}); give asset:NAME, a folder, or a hub id within reach"
        if "trust_remote_code" in str(error):
            remedy = "needs the code beside it (auto_map), which is never run; take a model that transformers knows"
        if isinstance(error, pickle.UnpicklingError):
            remedy = "its weights are a pickle that holds code, which is never run; save them as safetensors"
        raise InputError("model.name", config.model.name, remedy) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and talking of what it loads."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    talks = verbosity < logging.ERROR
    if talks:  # else not set again: that empties the caches of all loggers
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if talks:
            transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

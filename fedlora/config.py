"""One typed model of a run.

A run is described by a TOML file. :func:`load_config` reads it, applies overrides and returns a :class:`Config`; every
mistake becomes an :class:`~fedlora.errors.InputError` that names the key, the value and the remedy.
:meth:`Config.to_toml` writes the resolved config back; the result runs again as it is.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from fedlora.errors import InputError
from fedlora.paths import find_path

# Upper bounds lie far above what anybody trains with: they keep slips out, such as a rate of 1e30.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(gt=0, le=1)]
LearningRate = Annotated[float, Field(ge=1e-12, le=1e3)]
Norm = Annotated[float, Field(ge=1e-6, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rank = Positive | Literal["full"]
FileFormat = Literal["csv", "tsv", "jsonl", "json", "parquet"]

NODES = "nodes"
"""As ``data.name``: the training examples lie on the nodes that the run finds, and not here."""
SERVER = "server"
"""As ``data.test``, in the config that a node makes for itself: the test examples are the server's."""

_LONGEST_TEXT = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MIN_NOISE, MAX_NOISE = 0.01, 1e4
"""Noise multipliers: with less a step has epsilon above 4,000; with more, less than accountants resolve."""
MIN_DELTA = 1e-12
"""The tails of noise that is made of numbers of 32 to 64 bits end, at 7 to 10 standard deviations."""
MAX_EPSILON = 1000.0
MAX_CLIP = 1e6

# Integers of thousands of digits and arrays nested as deep are refused by Python, not by the TOML parser.
_NOT_TOML = (ValueError, RecursionError)


class Section(BaseModel):
    """A table of a TOML file: unknown keys and other types are errors, and so are texts that name nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, str_max_length=_LONGEST_TEXT
    )

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        if any(_CONTROL.search(text) for text in _texts(value)):
            raise PydanticCustomError("control_character", "should have no line breaks or other control characters")
        return value


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value; sections check their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


class RunSection(Section):
    """``[run]``: the name of the run (its folder is runs/NAME), its seed and its number of rounds."""

    name: Name = "run"
    seed: Seed = 0
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10


class ModelSection(Section):
    """``[model]``: the frozen base model, from ``asset:NAME``, a hub id or a folder."""

    name: Annotated[str, Field(min_length=1)]
    task: Literal["sequence-classification", "causal-lm"] = "sequence-classification"
    pooling: Literal["default", "mean"] = "default"
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    max_length: Annotated[int, Field(ge=2, le=1_000_000)] = 128
    num_hidden_layers: Positive | None = None
    revision: str | None = None


class PartitionSection(Section):
    """``[data.partition]``: how the training examples are divided among the clients (flwr-datasets' partitioners)."""

    kind: Literal["iid", "dirichlet", "pathological", "shard", "size", "natural"] = "iid"
    clients: Positive | None = None
    alpha: Annotated[float, Field(ge=1e-3, le=1e6)] = 0.5
    classes_per_client: Positive = 2
    shards_per_client: Positive = 2
    size_skew: Literal["linear", "square", "exponential"] = "linear"
    column: str | None = None
    min_examples: Positive = 1


class DataSection(Section):
    """``[data]``: the examples, from ``asset:NAME``, a hub id, or a CSV, TSV, JSONL, Parquet or ``datasets`` path.

    ``validation`` is a split, another source, or a share of the training examples. ``seed`` draws what is held out and
    the subsets (``run.seed`` unless told), so that runs of several seeds can have one test set.
    ``name = "nodes"`` says that real nodes hold the training examples; ``label_names`` names the classes, in order (by
    default those of the training examples, or of the test set with nodes).
    """

    name: Annotated[str, Field(min_length=1)]
    format: FileFormat | None = None
    train: str | None = None
    test: str | None = None
    validation: str | Share | None = None
    public: str | None = None
    text: str = "text"
    label: str = "label"
    label_names: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = None
    prompt: str | None = None
    answer: str | None = None
    seed: Seed | None = None
    max_examples: Positive | None = None
    max_test_examples: Positive | None = None
    partition: PartitionSection = PartitionSection()


class MethodSection(Section):
    """``[method]``: what is trained and how it is averaged; names follow PEFT."""

    name: str
    rank: Positive = 8
    alpha: Annotated[float, Field(ge=1e-4, le=1e6)] | None = None
    target_modules: str | Annotated[list[str], Field(min_length=1)] | None = None
    exclude_modules: str | Annotated[list[str], Field(min_length=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init: Literal["svd", "public", "pooled"] = "svd"
    init_examples: Positive = 500
    init_learning_rate: LearningRate = 1e-4
    init_not_covered: bool = False
    ranks: list[Rank] | dict[str, Rank] | None = None
    device_profile: dict[str, Fraction] | None = None
    extraction: Literal["direct", "svd"] = "direct"
    num_experts_per_tok: Positive | None = None
    norm_topk_prob: bool = True
    router_init: Literal["documents", "public"] = "documents"
    router_documents: Positive = 1000
    router_tuning_steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    router_tuning_learning_rate: LearningRate = 1e-3


class ClientSection(Section):
    """``[client]``: local training."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: LearningRate | None = None
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: Annotated[int, Field(ge=0, le=100_000)] = 0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    max_grad_norm: Norm | None = None
    batch_size: Count = 32
    physical_batch_size: Count | None = None
    local_steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    local_epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None


class PrivacySection(Section):
    """``[privacy]``: differential privacy; names follow Opacus.

    ``max_grad_norm`` has a lower bound: noise in proportion to a norm that float32 hardly holds is rounded to 0.
    ``noise_multiplier = 0`` is training without noise, which has no epsilon. With mode example the values have ranges
    for which epsilon can be computed and means something.
    """

    mode: Literal["none", "example", "client"] = "none"
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: Annotated[float, Field(ge=1e-6)] = 1.0
    accountant: Literal["rdp", "prv", "gdp"] = "rdp"


class ServerSection(Section):
    """``[server]``: sampling of clients, evaluation and patience.

    ``evaluate_clients`` evaluates the final model on every client's own examples, in simulation only: one pass over all
    training examples, which no epsilon covers.
    """

    fraction_train: Fraction = 1.0
    min_replies: Positive = 1
    evaluate_every: Positive = 1
    batch_size: Count = 64
    timeout: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    evaluate_clients: bool = False


class SimulationSection(Section):
    """``[simulation]``: where simulated clients run; with ``workers = 0`` in the run's own process, without Ray."""

    workers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    cpus_per_worker: Annotated[int, Field(ge=1, le=10_000)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, le=100)] = 0.0
    cohort_size: Count | Literal["auto"] = "auto"
    compile: bool = False
    address: str | None = None


class NetworkSection(Section):
    """``[network]``: simulated links that turn the measured bytes into seconds (:mod:`fedlora.communication.links`).

    Rates (10^6 bit/s) and latency (milliseconds, there and back) are medians and replace the profile's; the clients'
    links are drawn by ``seed``, or by ``run.seed`` without it.
    """

    profile: Literal["none", "lte", "broadband", "datacenter"] = "none"
    seed: Seed | None = None
    download_mbps: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    upload_mbps: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    latency_ms: Annotated[float, Field(ge=0, le=1e6)] | None = None


class TrackingSection(Section):
    """``[tracking]``: loggers beside the run folder."""

    tensorboard: bool = False
    wandb: bool = False
    project: str = "fedlora"


class Config(Section):
    """A whole run. Sections and keys are described in the README's reference of the config."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    method: MethodSection
    client: ClientSection = ClientSection()
    privacy: PrivacySection = PrivacySection()
    server: ServerSection = ServerSection()
    simulation: SimulationSection = SimulationSection()
    network: NetworkSection = NetworkSection()
    tracking: TrackingSection = TrackingSection()

    def to_toml(self) -> str:
        """Return the config as TOML; keys without a value are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def from_toml(cls, text: str) -> Config:
        """Undo :meth:`to_toml`; what was checked once is not checked again."""
        return cls.model_validate(tomllib.loads(text))

    def scaling(self) -> float:
        """Return the adapter's factor s = alpha / rank (alpha defaults to the rank, so that s = 1)."""
        return 1.0 if self.method.alpha is None else self.method.alpha / self.method.rank

    def start_reads_examples(self) -> bool:
        """Whether a client's start is made from its own examples, under noise that its ledger is charged for."""
        return self.method.name == "flexmore" and self.method.router_init == "documents"


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override and check a config.

    Parameters
    ----------
    source : str, Path or Mapping
        A TOML file, TOML text (recognised by a line break), or the parsed content.
    overrides : Mapping[str, object], optional
        ``section.key`` to value; a string is parsed as a TOML value where it is one, an empty string removes the key.

    Returns
    -------
    Config

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or a key or value is wrong.
    """
    content = read_toml(source)
    for key, value in (overrides or {}).items():
        override(content, key, value)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise input_error(error) from None
    _check(config, content)
    return config


def unused_keys(config: Config) -> list[str]:
    """Name the keys that were set but that the chosen method or mode does not use."""
    notes: list[str] = []
    given = {
        f"{section}.{key}" for section in type(config).model_fields for key in getattr(config, section).model_fields_set
    }
    given |= {f"data.partition.{key}" for key in config.data.partition.model_fields_set}

    def note(condition: bool, keys: str, why: str) -> None:
        if condition:
            notes.extend(f"{key} is not used: {why}" for key in keys.split() if key in given)

    kind = config.data.partition.kind
    note(
        config.privacy.mode == "none",
        "privacy.target_epsilon privacy.noise_multiplier privacy.target_delta privacy.max_grad_norm privacy.accountant",
        "privacy.mode is none",
    )
    note(config.privacy.mode == "example", "client.max_grad_norm", "under DP each example is clipped instead")
    note(
        config.method.name != "fed-sb",
        "method.init method.init_examples method.init_learning_rate method.init_not_covered",
        f"{config.method.name} has one start",
    )
    note(
        config.method.init == "svd",
        "method.init_examples method.init_learning_rate method.init_not_covered",
        "init svd needs no data",
    )
    experts = config.method.name == "flexmore"
    note(
        not experts,
        "method.ranks method.device_profile method.extraction method.num_experts_per_tok method.norm_topk_prob "
        "method.router_init method.router_documents method.router_tuning_steps method.router_tuning_learning_rate",
        f"{config.method.name} has no experts",
    )
    note(experts, "method.target_modules method.exclude_modules", "flexmore adapts the feed-forward blocks")
    mixed = config.method.ranks is not None or config.method.device_profile is not None
    note(experts and mixed, "method.rank", "every client has a rank of its own")
    note(config.method.router_init == "public", "method.router_documents", "router rows start from public text")
    note(config.method.router_tuning_steps == 0, "method.router_tuning_learning_rate", "the router is not tuned")
    note(config.client.optimizer == "adamw", "client.momentum", "adamw has its own moments")
    note(0 < config.client.weight_decay < 1e-12, "client.weight_decay", "it is so small that no number changes by it")
    rounds = config.run.rounds
    note(config.server.evaluate_every > rounds, "server.evaluate_every", f"of {rounds} rounds the last is evaluated")
    note(config.model.task == "causal-lm", "model.pooling data.label data.label_names", "model.task is causal-lm")
    note(config.model.task != "causal-lm", "data.prompt data.answer", "model.task is not causal-lm")
    note(
        config.network.profile == "none",
        "network.seed network.download_mbps network.upload_mbps network.latency_ms",
        "network.profile is none",
    )
    if config.data.name != NODES:
        note(
            kind == "natural", "data.partition.clients", "the partition is natural: one client per value of its column"
        )
    note(kind != "dirichlet", "data.partition.alpha", f"the partition is {kind}")
    note(kind != "pathological", "data.partition.classes_per_client", f"the partition is {kind}")
    note(kind != "shard", "data.partition.shards_per_client", f"the partition is {kind}")
    note(kind != "size", "data.partition.size_skew", f"the partition is {kind}")
    return notes


def read_toml(source: str | Path | Mapping[str, Any], field: str = "CONFIG") -> dict[str, Any]:
    """Return the content of a TOML file or text, or a copy of parsed content without its empty values.

    Raises
    ------
    InputError
        Named ``field``, if the file cannot be read or is no TOML.
    """
    if isinstance(source, Mapping):
        return _deep_copy(source)
    if isinstance(source, str) and "\n" in source:
        text, shown = source, "(text)"
    else:
        shown = str(source)
        path = find_path(shown, field)
        if path is None or path.is_dir():
            there = "is a folder" if path else "there is no such file"
            raise InputError(field, shown, f"{there}; give the path of a TOML file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(field, shown, f"cannot be read as UTF-8 text ({error}); give a TOML file") from None
    try:
        # Some editors begin a file with a byte-order mark.
        return tomllib.loads(text.removeprefix("\ufeff"))
    except _NOT_TOML as error:
        raise InputError(field, shown, f"is not valid TOML ({error}); mend that line") from None


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items() if item is not None}
    return value


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in parsed content; None or an empty string removes it.

    Raises
    ------
    InputError
        If ``key`` is none, or lies below a value.
    """
    parts = key.split(".")
    if len(parts) < 2 or not all(parts):
        raise InputError("--set", f"{key}={value}", "write section.key=value, for example run.seed=1")
    place = content
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError("--set", f"{key}={value}", f"{part!r} is a value and has no keys below it")
    if value is None or value == "":
        place.pop(parts[-1], None)
    else:
        place[parts[-1]] = _toml_value(value) if isinstance(value, str) else _deep_copy(value)


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except _NOT_TOML:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _known_keys(path: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in path:
        if part.isdecimal() and model is not root:
            continue  # which one of a list of sections
        field = model.model_fields.get(part)
        # A section that may be absent is a union.
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def input_error(error: ValidationError, root: type[BaseModel] = Config, name: str = "CONFIG") -> InputError:
    """Turn pydantic's error about a ``root`` into one line that names the key, the value and the remedy."""
    # Several mistakes may be there; the first is told, since one line is the contract.
    first, *others = error.errors(include_url=False)
    location = _real_path(first["loc"], root)
    # A quoted TOML key may hold anything: nothing at all, or line breaks.
    field = ".".join(part if part and part.isprintable() else repr(part) for part in location) or name
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], root)
        close = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return InputError(field, first["input"], f"there is no such key; {hint}")
    if first["type"] == "missing":
        return InputError(field, None, "is required; add it to the config")
    if first["type"] == "string_pattern_mismatch":
        return InputError(
            field, first["input"], "use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    if first["type"] == "model_type":
        return InputError(field, first["input"], f"is a section; write [{field}] and its keys below")
    # A union has a mistake for each of its members: all are told.
    same = [first] + [other for other in others if _real_path(other["loc"], root) == location]
    expected = " or ".join(dict.fromkeys(mistake["msg"][0].lower() + mistake["msg"][1:] for mistake in same))
    return InputError(field, first["input"], f"{expected}; change the value")


def _real_path(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, ...]:
    """Drop the parts that pydantic adds for the members of a union and of a list."""
    kept: list[str] = []
    for part in map(str, location):
        known = _known_keys(tuple(kept), root)
        if not known:
            break
        kept.append(part)
        if part not in known and not part.isdecimal():
            break
    return tuple(kept)


def _check(config: Config, content: Mapping[str, Any]) -> None:
    """Refuse combinations that no single key shows."""
    privacy, client, data = config.privacy, config.client, config.data
    if privacy.mode == "client":
        raise InputError("privacy.mode", "client", "client-level privacy is not available yet; use example or none")
    if privacy.mode == "example":
        both = privacy.target_epsilon is not None and privacy.noise_multiplier is not None
        neither = privacy.target_epsilon is None and privacy.noise_multiplier is None
        if both:
            given = f"{privacy.target_epsilon} and noise_multiplier = {privacy.noise_multiplier}"
            raise InputError("privacy.target_epsilon", given, "give one of the two; the other follows from it")
        if neither:
            raise InputError("privacy.target_epsilon", None, "is required with mode example (or noise_multiplier)")
        _check_ranges(privacy)
    if client.local_steps is not None and client.local_epochs is not None:
        given = f"{client.local_steps} and local_epochs = {client.local_epochs}"
        raise InputError("client.local_steps", given, "give one of the two")
    if data.label_names is not None and len(set(data.label_names)) < len(data.label_names):
        raise InputError("data.label_names", data.label_names, "names a class twice; remove one of them")
    if data.name == NODES and data.test is None:
        raise InputError("data.test", None, "is required with data.name = nodes: the examples that the server tests on")
    if data.name == NODES and isinstance(data.validation, float):
        remedy = "is a share of the training examples, which nodes keep; name a file"
        raise InputError("data.validation", data.validation, remedy)
    if data.name == NODES and data.partition.clients is None:
        pass  # there are as many clients as nodes
    elif data.partition.kind == "natural":
        if data.partition.column is None:
            raise InputError(
                "data.partition.column", None, "is required with kind natural: the column that names the owner"
            )
    elif data.partition.clients is None:
        raise InputError("data.partition.clients", None, "is required: the number of clients")
    else:
        asked = max(1, round(config.server.fraction_train * data.partition.clients))
        if config.server.min_replies > asked:
            remedy = f"can never be reached: a round asks {asked} clients; lower it or raise server.fraction_train"
            raise InputError("server.min_replies", config.server.min_replies, remedy)
    if (data.prompt is None) != (data.answer is None):
        raise InputError("data.prompt", data.prompt, "give prompt and answer together, or neither for plain text")
    skewed = data.partition.kind in ("dirichlet", "pathological", "shard")
    if config.model.task == "causal-lm" and skewed and data.partition.column is None:
        remedy = f"is required with kind {data.partition.kind} for causal-lm: the column to skew"
        raise InputError("data.partition.column", None, remedy)
    init = config.method.init if config.method.name == "fed-sb" else None
    if init == "pooled" and data.name == NODES:
        raise InputError("method.init", "pooled", "reads the clients' examples, which nodes keep; use svd or public")
    if init == "public" and data.public is None:
        raise InputError("method.init", "public", "needs data.public: examples that the server may read")
    if init == "pooled" and privacy.mode != "none" and not config.method.init_not_covered:
        remedy = (
            "reads private data without noise, so epsilon would not cover it; "
            "use svd, or set method.init_not_covered = true"
        )
        raise InputError("method.init", "pooled", remedy)
    if config.method.name == "flexmore":
        _check_experts(config)


def _check_ranges(privacy: PrivacySection) -> None:
    """Refuse values for which no accountant has an answer, or none that means anything."""
    epsilon, sigma = privacy.target_epsilon, privacy.noise_multiplier
    if epsilon is not None and epsilon > MAX_EPSILON:
        remedy = (
            f"promises nothing, since exp(epsilon) is no number any more; give at most {MAX_EPSILON:g}, or mode none"
        )
        raise InputError("privacy.target_epsilon", epsilon, remedy)
    if sigma is not None and 0 < sigma < MIN_NOISE:
        remedy = f"is too little for any epsilon that means something; give at least {MIN_NOISE:g}, or 0 for no noise"
        raise InputError("privacy.noise_multiplier", sigma, remedy)
    if sigma is not None and sigma > MAX_NOISE:
        remedy = f"leaves nothing to learn from, and less epsilon than can be computed; give at most {MAX_NOISE:g}"
        raise InputError("privacy.noise_multiplier", sigma, remedy)
    if privacy.target_delta < MIN_DELTA:
        remedy = f"is smaller than the tails of computed noise allow to promise; give at least {MIN_DELTA:g}"
        raise InputError("privacy.target_delta", privacy.target_delta, remedy)
    if privacy.max_grad_norm > MAX_CLIP:
        remedy = f"clips nothing, and noise in proportion to it may overflow; give at most {MAX_CLIP:g}"
        raise InputError("privacy.max_grad_norm", privacy.max_grad_norm, remedy)


def _check_experts(config: Config) -> None:
    method = config.method
    if config.model.task != "causal-lm":
        raise InputError("model.task", config.model.task, "flexmore makes a mixture of language models; use causal-lm")
    if method.ranks is not None and method.device_profile is not None:
        raise InputError("method.ranks", method.ranks, "give ranks or device_profile, not both")
    if method.ranks is not None and not method.ranks:
        raise InputError("method.ranks", method.ranks, "is empty; give a rank for every client")
    clients = config.data.partition.clients if config.data.partition.kind != "natural" else None
    if isinstance(method.ranks, list) and clients is not None:
        listed = len(method.ranks)
        # More nodes may come than the run waits for.
        if listed < clients or (listed > clients and config.data.name != NODES):
            raise InputError("method.ranks", method.ranks, f"needs one rank for each of the {clients} clients")
    for rank in method.device_profile or ():
        if rank != "full" and not (rank.isdecimal() and int(rank) > 0):
            remedy = 'has a key that is no rank; write ranks and shares, such as {"4" = 0.5, "full" = 0.5}'
            raise InputError("method.device_profile", rank, remedy)
    if method.device_profile is not None and abs(sum(method.device_profile.values()) - 1) > 1e-6:
        raise InputError("method.device_profile", method.device_profile, "its shares must sum to 1")
    reads_public = {
        "router_init": method.router_init == "public",
        "router_tuning_steps": method.router_tuning_steps > 0,
    }
    for key, reads in reads_public.items():
        if reads and config.data.public is None:
            remedy = "needs data.public: examples that the server may read"
            raise InputError(f"method.{key}", getattr(method, key), remedy)

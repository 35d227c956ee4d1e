"""One typed model of a data owner's node.

A node is described by ``node.toml``, which its owner writes and no server sees. :func:`load_node` reads it; every
mistake becomes an :class:`~fedlora.errors.InputError` that names the key, the value and the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, get_args

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from fedlora.assets import is_asset
from fedlora.config import FileFormat, Fraction, Section, Share, input_error, read_toml
from fedlora.errors import InputError
from fedlora.node.names import NODE_NAME
from fedlora.paths import beside, find_path
from fedlora.registry import ACCOUNTANTS

_FORMATS = get_args(FileFormat)


_HOST_PORT = re.compile(r"([^\s:/]+|\[[0-9a-fA-F:]+\]):(\d{1,5})")


def _address(text: str) -> str:
    found = _HOST_PORT.fullmatch(text)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise PydanticCustomError("address", "should be HOST:PORT, with a port from 1 to 65535")
    return text


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda:\d{1,4}", text) is None:
        raise PydanticCustomError("device", "should be auto, cpu or cuda:NUMBER")
    return text


def _bound(name: str) -> str:
    if not ACCOUNTANTS.get(ACCOUNTANTS.check(name)).is_bound:
        bounds = " or ".join(f"'{other}'" for other in ACCOUNTANTS.names() if ACCOUNTANTS.get(other).is_bound)
        raise PydanticCustomError("no_bound", "{text}", {"text": f"should be {bounds}, which never count too little"})
    return name


class SuperlinkSection(Section):
    """``[superlink]``: the server's address, and how node and server prove their identity."""

    address: Annotated[str, AfterValidator(_address)]
    root_certificates: str | None = None
    private_key: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] = 9094


class NodeDataSection(Section):
    """``[data]``: the owner's file and its columns. Only trained arrays, counts and allowed sums leave the node.

    ``test`` names the examples on which the node evaluates, if ``[policy]`` allows it: another file with the same
    columns, or a share of the rows, which no run trains on. ``unit`` is the column of the persons that the node
    protects, each with all its rows; then runs have to protect persons as well (``privacy.unit``), and every epsilon
    here is that of a person.
    """

    path: Annotated[str, Field(min_length=1)]
    test: Annotated[str, Field(min_length=1)] | Share | None = None
    format: FileFormat | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    unit: Annotated[str, Field(min_length=1)] | None = None


class ModelEntry(Section):
    """One of ``[policy] models``: a model, and its tokenizer with it, as a run's config names it in ``model.name``.

    Either a hub id with ``revision``, the commit, or a folder with ``sha256``, the digest of its files
    (:func:`~fedlora.node.policy.folder_digest`). ``path`` is the folder, if it differs from the name.
    """

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    sha256: str | None = None
    path: Annotated[str, Field(min_length=1)] | None = None


class PolicySection(Section):
    """``[policy]``: what the owner accepts, whatever config a server sends.

    ``max_epsilon`` at ``delta`` is the limit over all runs together. It is computed by an accountant that gives an
    upper bound; gdp, which a run may use, gives none. ``allow_non_private`` accepts runs without privacy, for which
    there is no limit. Set exactly one of the two.

    Only ``models`` and fedlora's own assets are loaded. ``max_describes_per_day`` limits how often servers may ask
    about the node's examples, and ``max_cache_gb`` (10^9 bytes) what their runs may leave on the disk.

    ``max_evaluations_per_day`` limits how often servers may have the node evaluate a model; 0, the default, allows no
    evaluation. The answer holds sums over the test examples, of which there must be at least ``min_test_examples``.
    These sums have no noise, and epsilon does not cover them.

    ``require_secure_aggregation`` refuses runs in which the server would see the node's update.

    ``allow_distributed_noise`` accepts runs with ``privacy.noise = "distributed"``, in which each node adds a share of
    the noise. ``max_epsilon`` then holds if the server follows the protocol and the other nodes add their shares.
    Of such an update ``min_noise_multiplier`` and ``max_sample_rate`` bound what the ledger counts: half the noise
    multiplier of the sum, and rate 1.
    """

    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accountant: Annotated[str, AfterValidator(_bound)] = "rdp"
    min_noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    max_sample_rate: Fraction | None = None
    allow_non_private: bool = False
    models: list[ModelEntry] = Field(default_factory=list)
    max_describes_per_day: Annotated[int, Field(ge=1)] = 100
    max_cache_gb: Annotated[float, Field(gt=0)] = 4.0
    max_evaluations_per_day: Annotated[int, Field(ge=0)] = 0
    min_test_examples: Annotated[int, Field(ge=1)] = 10
    require_secure_aggregation: bool = False
    allow_distributed_noise: bool = False


def counts_updates(policy: PolicySection) -> bool:
    """Whether the owner's accountant bounds the epsilon of noisy updates: Renyi divergences alone are known of them."""
    kind: str = ACCOUNTANTS.made(policy.accountant).kind
    return kind == "rdp"


class WorkerSection(Section):
    """``[worker]``: the process that keeps model and tokens loaded between messages."""

    idle_seconds: Annotated[float, Field(gt=0, le=30 * 86400)] = 600.0
    device: Annotated[str, AfterValidator(_device)] = "auto"
    threads: Annotated[int, Field(ge=1, le=10_000)] | None = None


class StateSection(Section):
    """``[state]``: the folder of the node's ledger, log and socket; and ``cache``, whose content can be made again."""

    directory: Annotated[str, Field(min_length=1)] = "state"
    cache: Annotated[str, Field(min_length=1)] | None = None


class NodeConfig(Section):
    """A node. Paths are absolute once :func:`load_node` has read it."""

    name: Annotated[str, Field(pattern=NODE_NAME, max_length=100)]
    superlink: SuperlinkSection
    data: NodeDataSection
    policy: PolicySection
    worker: WorkerSection = WorkerSection()
    state: StateSection = StateSection()

    @property
    def directory(self) -> Path:
        """The folder of the node's ledger, log and socket."""
        return Path(self.state.directory)

    @property
    def cache(self) -> Path:
        """The folder of tokens and of downloaded models."""
        return Path(self.state.cache) if self.state.cache else self.directory / "cache"

    @property
    def format(self) -> str:
        """The format of the data file: as given, or from its suffix."""
        return self.data.format or Path(self.data.path).suffix.lower()[1:]


def load_node(path: str | Path) -> NodeConfig:
    """Read and check a node.toml.

    Parameters
    ----------
    path : str or Path
        Relative paths in the file are relative to its folder; ``~`` is the home directory.

    Returns
    -------
    NodeConfig

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, a key or value is wrong, or there is no data file.
    """
    file = (find_path(str(path), "NODE") or Path(path)).absolute()
    try:
        node = NodeConfig.model_validate(read_toml(file, "NODE"))
    except ValidationError as error:
        raise input_error(error, NodeConfig, "NODE") from None
    node = _with_absolute_paths(node, file.parent)
    _check(node)
    return node


def _with_absolute_paths(node: NodeConfig, folder: Path) -> NodeConfig:
    changed = {}
    for section, keys in {
        "superlink": ("root_certificates", "private_key"),
        "data": ("path", "test"),
        "state": ("directory", "cache"),
    }.items():
        content = getattr(node, section)
        given = {key: value for key in keys if isinstance(value := getattr(content, key), str)}
        absolute = {key: str(beside(folder, value, f"{section}.{key}")) for key, value in given.items()}
        changed[section] = content.model_copy(update=absolute)
    models = [
        entry.model_copy(update={"path": str(folder / Path(entry.path or entry.name).expanduser())})
        for entry in node.policy.models
    ]
    changed["policy"] = node.policy.model_copy(update={"models": models})
    return node.model_copy(update=changed)


def _check(node: NodeConfig) -> None:
    """Check keys that depend on one another."""
    data, policy = node.data, node.policy
    if (data.prompt is None) != (data.answer is None):
        raise InputError("data.prompt", data.prompt, "give prompt and answer together, or neither for plain text")
    if data.messages is not None and data.prompt is not None:
        raise InputError("data.messages", data.messages, "holds whole conversations; remove prompt and answer, or this")
    if policy.max_epsilon is None and not policy.allow_non_private:
        raise InputError("policy.max_epsilon", None, "is required: the most epsilon that all runs together may spend")
    if policy.max_epsilon is not None and policy.allow_non_private:
        remedy = "no ceiling holds over runs without privacy; remove it, or allow_non_private"
        raise InputError("policy.max_epsilon", policy.max_epsilon, remedy)
    if policy.allow_distributed_noise and not counts_updates(policy):
        remedy = "has no bound for noise that nodes add to sums; use rdp, or remove allow_distributed_noise"
        raise InputError("policy.accountant", policy.accountant, remedy)
    for number, entry in enumerate(policy.models):
        _check_model(entry, f"policy.models.{number}", [other.name for other in policy.models[:number]])
    found = find_path(data.path, "data.path")
    if found is None or not found.is_file():
        raise InputError("data.path", data.path, "there is no such file; give the path of the owner's examples")
    _check_test(node)
    if data.format is None and Path(data.path).suffix.lower()[1:] not in _FORMATS:
        remedy = f"its name does not show its format; set data.format to one of {', '.join(_FORMATS)}"
        raise InputError("data.path", data.path, remedy)


def _check_test(node: NodeConfig) -> None:
    """Check that the test examples exist, and are given if evaluation is allowed."""
    test, allowed = node.data.test, node.policy.max_evaluations_per_day
    if test is None and allowed:
        raise InputError("policy.max_evaluations_per_day", allowed, "needs data.test: what the node evaluates on")
    if not isinstance(test, str):
        return
    found = find_path(test, "data.test")
    if found is None or not found.is_file():
        raise InputError("data.test", test, "there is no such file; give the path of the owner's test examples")
    if node.data.format is None and Path(test).suffix.lower() != Path(node.data.path).suffix.lower():
        raise InputError("data.test", test, "has another format than data.path; give both in one format")


def _check_model(entry: ModelEntry, field: str, before: list[str]) -> None:
    if is_asset(entry.name):
        raise InputError(f"{field}.name", entry.name, "is pinned by fedlora itself; remove the entry")
    if entry.name in before:
        raise InputError(f"{field}.name", entry.name, "is listed twice; keep one")
    if (entry.revision is None) == (entry.sha256 is None):
        remedy = "give revision, a commit on the hub, or sha256, a folder's digest (fedlora digest FOLDER)"
        raise InputError(field, entry.name, remedy)
    if entry.revision is not None and not re.fullmatch("[0-9a-f]{40}", entry.revision):
        remedy = "is no full commit, which has 40 hexadecimal digits; branches and tags may move"
        raise InputError(f"{field}.revision", entry.revision, remedy)
    if entry.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        remedy = "is no SHA-256, which has 64 hexadecimal digits; take it from fedlora digest FOLDER"
        raise InputError(f"{field}.sha256", entry.sha256, remedy)
    if "\0" in entry.name or "\0" in str(entry.path):
        raise InputError(f"{field}.name", entry.name, "is no path; give one without NUL characters")

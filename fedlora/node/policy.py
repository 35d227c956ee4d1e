"""Check a run against the policy of a node's owner, whatever config the server sends."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from fedlora.assets import find_asset, is_asset
from fedlora.config import Config, ModelSection
from fedlora.errors import InputError, PolicyError
from fedlora.node.config import PolicySection, counts_updates
from fedlora.privacy import PrivacyPlan
from fedlora.privacy.mechanisms import mechanism_of

Release = tuple[float, float, int]
"""Noise multiplier, sample rate and number of steps, as a ledger holds them."""


def update_charge(policy: PolicySection, run: Config) -> Release | None:
    """Return what a noisy update of a run adds to the owner's ledger; None where none leaves, or it cannot be counted.

    Notes
    -----
    A run of mode client compares an update with zeros. The ledger compares the owner's file with and without one
    example, or one person. That moves a clipped update by up to two clipping norms, so the noise counts half.
    """
    noise = mechanism_of(run).update_noise(run)
    if noise is None or not counts_updates(policy) or (_shares_noise(run) and not policy.allow_distributed_noise):
        return None
    return noise / 2, 1.0, 1


def _shares_noise(run: Config) -> bool:
    """Whether each client adds a share of a noise that the others complete."""
    return run.privacy.noise == "distributed" and mechanism_of(run).update_noise(run) is not None


def check_policy(policy: PolicySection, run: Config, plan: PrivacyPlan | None, update: Release | None = None) -> None:
    """Refuse a run whose privacy is weaker than the owner accepts. The ledger enforces the ceiling.

    Parameters
    ----------
    policy : PolicySection
    run : Config
    plan : PrivacyPlan, optional
        The DP-SGD of the run for this node's number of examples, if any.
    update : Release, optional
        A noisy update, by :func:`update_charge`.

    Raises
    ------
    PolicyError
        With the owner's key, its value, and the run's value.
    """
    # A start made from the owner's examples releases information about them, as a step does.
    steps = [] if plan is None else [plan.charged(1), *plan.start]
    released = steps if update is None else [*steps, update]
    if not released:
        if policy.allow_non_private:
            return
        if _shares_noise(run):
            raise PolicyError("allow_distributed_noise", False, f"privacy.noise = {run.privacy.noise}")
        raise PolicyError("allow_non_private", False, f"privacy.mode = {run.privacy.mode}")
    noise, rate = min(entry[0] for entry in released), max(entry[1] for entry in released)
    if policy.min_noise_multiplier is not None and noise < policy.min_noise_multiplier:
        raise PolicyError("min_noise_multiplier", policy.min_noise_multiplier, noise)
    if policy.max_grad_norm is not None and plan is not None and plan.max_grad_norm > policy.max_grad_norm:
        raise PolicyError("max_grad_norm", policy.max_grad_norm, plan.max_grad_norm)
    if policy.max_sample_rate is not None and rate > policy.max_sample_rate:
        raise PolicyError("max_sample_rate", policy.max_sample_rate, rate)
    if noise == 0 and not policy.allow_non_private:
        raise PolicyError("allow_non_private", False, "privacy.noise_multiplier = 0")


def admitted_model(policy: PolicySection, model: ModelSection) -> ModelSection:
    """Return a run's model config with the path and the revision that the owner listed.

    Model and tokenizer are the only parts of a run that process the owner's texts, so a server can only choose from the
    owner's list. Fedlora's own assets have pinned checksums and need not be listed.

    Raises
    ------
    PolicyError
        If the owner lists no such model, or another revision of it.
    InputError
        If the folder has changed since its owner listed it.
    """
    if is_asset(model.name):
        find_asset(model.name, "model", "model.name")
        return model.model_copy(update={"revision": None})
    entry = next((entry for entry in policy.models if entry.name == model.name), None)
    if entry is None or model.revision not in (None, entry.revision):
        raise PolicyError("models", len(policy.models), f"model.name = {model.name}, revision = {model.revision}")
    if entry.revision is not None:
        return model.model_copy(update={"revision": entry.revision})
    folder = Path(str(entry.path))
    if not folder.is_dir():
        raise InputError("policy.models", entry.name, f"there is no folder {folder}; give its path")
    if (folder / "adapter_config.json").is_file():
        # transformers would load the base model that the adapter names, which is not pinned.
        raise InputError("policy.models", entry.name, "holds an adapter; list a whole model (fedlora export --merged)")
    found = folder_digest(folder)
    if found != entry.sha256:
        raise InputError("policy.models", entry.name, f"its files have the SHA-256 {found}; see what changed")
    return model.model_copy(update={"name": str(folder)})


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of a folder: of the lines that sha256sum prints for its files, sorted by name.

    Raises
    ------
    InputError
        If it is no folder with files that can be read.
    """
    try:
        files = sorted((str(file.relative_to(folder)), file) for file in folder.rglob("*") if file.is_file())
        if not files:
            raise InputError("FOLDER", str(folder), "holds no files; give the folder of a model")
        stats = ((name, file.resolve(), file.stat()) for name, file in files)
        return _digest(tuple((name, str(path), stat.st_size, stat.st_mtime_ns) for name, path, stat in stats))
    except OSError as error:
        raise InputError("FOLDER", str(folder), f"cannot be read ({error.strerror}); give another") from None


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[str, str, int, int], ...]) -> str:
    """Hash a file once; its size and time of change tell whether to hash it again."""
    lines = []
    for name, path, _, _ in files:
        with open(path, "rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

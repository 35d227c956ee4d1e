"""The model card of an exported run: what was trained, its privacy, bytes and scores; and the upload to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora.assets import find_asset, is_asset
from fedlora.config import Config, load_config
from fedlora.continuing import ADAPTER_FILE
from fedlora.data.files import first_line
from fedlora.errors import InputError
from fedlora.paths import find_path
from fedlora.summaries import format_count

CARD = "README.md"


def write_card(run: Path, target: Path, *, adapter: bool, best: bool = False) -> None:
    """Write the card of a finished run into its exported folder, before what README.md already says there.

    Paths of this machine are left out.

    Parameters
    ----------
    run, target : Path
        The run folder, and the exported one.
    adapter : bool
        Whether the folder holds a PEFT adapter, or a whole model.
    best : bool
        Whether the model is that of the round that validation prefers.
    """
    if not (run / "summary.json").is_file():
        return
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if best:
        summary |= _of_best_round(run, summary)
    config = load_config(run / "config.toml")
    before = target / CARD
    more = f"\n{before.read_text(encoding='utf-8')}" if before.is_file() else ""
    before.write_text(_front_matter(config, summary, adapter) + _text(config, summary) + more, encoding="utf-8")


def _of_best_round(run: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what the summary would say of the best round's model; epsilon stays that of the whole run."""
    chosen = summary["best"]["round"]
    lines = map(json.loads, (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines())
    line = next(line for line in lines if line["round"] == chosen)
    return {
        "final": line["metrics"],
        "rounds": f"{summary['rounds']}; this is round {chosen}, which validation prefers",
    }


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder to a repository of the Hugging Face hub; return its address. A new repository is private.

    An adapter whose base is a folder of this machine loses that path first.

    Raises
    ------
    InputError
        If the hub does not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    _forget_path(folder / ADAPTER_FILE)
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload a model of fedlora")
    except Exception as error:  # whatever the hub client raises
        remedy = f"the hub does not take it ({first_line(error)}); log in with hf auth login. {folder} stays"
        raise InputError("--push-to-hub", repository, remedy) from None
    return f"{api.endpoint}/{repository}"


def _forget_path(file: Path) -> None:
    """Take the base's name out of adapter_config.json where it is a path."""
    if not file.is_file():
        return
    about = json.loads(file.read_text(encoding="utf-8"))
    name = about["base_model_name_or_path"]
    if name is not None and (Path(name).is_absolute() or _public(name, "base_model_name_or_path") is None):
        file.write_text(
            json.dumps(about | {"base_model_name_or_path": None}, indent=2, sort_keys=True), encoding="utf-8"
        )


def _front_matter(config: Config, summary: dict[str, Any], adapter: bool) -> str:
    tags = ["federated-learning", "fedlora", config.method.name]
    tags += ["differential-privacy"] if summary["epsilon"] else []
    lines = [f"library_name: {'peft' if adapter else 'transformers'}", f"tags: [{', '.join(tags)}]"]
    base = _public(config.model.name, "model.name")
    if base is not None and is_asset(base):
        base = find_asset(base).hub
    if base:
        lines.insert(0, f"base_model: {base}")
    return "---\n" + "".join(f"{line}\n" for line in lines) + "---\n\n"


def _text(config: Config, summary: dict[str, Any]) -> str:
    base = _public(config.model.name, "model.name") or "a private model"
    data = _public(config.data.name, "data.name") or "data that their owners keep"
    sent = summary["communication"]
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["final"].items() if isinstance(value, float))
    rows = [
        (
            "base model",
            base + (f", its frozen layers in {config.model.quantization}" if config.model.quantization else ""),
        ),
        ("task", config.model.task),
        ("method", f"{config.method.name}, rank {config.method.rank}"),
        ("data", f"{data}, of {summary['clients']} clients"),
        ("rounds", str(summary["rounds"])),
        ("privacy", _privacy(summary)),
        (
            "sent, all clients and rounds",
            " + ".join(f"{sent[f'{way}_bytes'] / 1e6:.1f} MB {told}" for way, told in _WAYS),
        ),
        ("trained parameters", f"{summary['trainable_parameters']:,}"),
        (f"on {_tested(summary)}", scores or "not measured"),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return f"# A federated {config.method.name} model\n\nTrained with fedlora.\n\n| | |\n|---|---|\n{table}"


def _tested(summary: dict[str, Any]) -> str:
    count = summary.get("test_examples")
    return "the test examples" if count is None else format_count(count, "test example")


_WAYS = (("uplink", "up"), ("downlink", "down"), ("initial", "once"))


def _privacy(summary: dict[str, Any]) -> str:
    epsilon = summary["epsilon"]
    if not epsilon:
        return "none"
    start = "" if epsilon["covers_init"] else "; the start is not covered"
    told = f"epsilon {epsilon['max']:.3g} at delta {epsilon['delta']:.3g} for {epsilon['unit']}"
    return f"{told}, by the accountant {epsilon['accountant']}{start}"


def _public(name: str, field: str) -> str | None:
    """Return the name of an asset or of something on the hub; None for a path."""
    return name if is_asset(name) or find_path(name, field) is None else None

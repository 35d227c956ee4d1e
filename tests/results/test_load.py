"""From a run folder to a model that others can use."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fedlora
from fedlora.adapters import AdaptedModel, adapt
from fedlora.adapters.peft_format import export_peft
from fedlora.assets import fetch
from fedlora.config import Config, load_config
from fedlora.continuing import adapter_config
from fedlora.errors import InputError
from fedlora.models import load_base, load_tokenizer
from fedlora.results.load import export_run
from fedlora.study.plan import folder_digest
from tests import tiny

TEXTS = ["A joy to watch.", "A dull and lifeless mess of a film."]
LABELS = ["fresh", "rotten"]


def finished_run(folder: Path, **model: Any) -> tuple[Config, AdaptedModel]:
    """Leave in a folder what a run of MiniLM leaves, with factors drawn at random."""
    content = {
        "model": {"name": "asset:minilm-l6", "num_hidden_layers": 1, **model},
        "data": {"name": "asset:rotten-tomatoes", "partition": {"clients": 2}},
        "method": {"name": "fed-sb", "rank": 4, "alpha": 8.0},
    }
    config = load_config(content)
    adapted = adapt(load_base(config, LABELS), config, "sb")
    generator = torch.Generator().manual_seed(0)
    adapted.set_shared({name: torch.randn(a.shape, generator=generator) * 0.3 for name, a in adapted.arrays().items()})
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    export_peft(adapted, config, folder / "adapter", LABELS)
    return config, adapted


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_the_loaded_and_the_exported_model_give_the_runs_logits(pooling: str, tmp_path: Path) -> None:
    config, adapted = finished_run(tmp_path / "run", pooling=pooling)
    batch = load_tokenizer(config)(TEXTS, return_tensors="pt", padding=True)
    adapted.model.eval()
    adapted.layout.set_rows([len(TEXTS)])
    with torch.no_grad():
        expected = adapted.logits(batch)
    assert expected.std() > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model, tokenizer = fedlora.load(tmp_path / "run")
    tiny.assert_close(logits(model, tokenizer), expected)
    assert [model.config.id2label[i] for i in range(2)] == LABELS
    target = export_run(tmp_path / "run", merged=True)
    merged = AutoModelForSequenceClassification.from_pretrained(target).eval()
    tiny.assert_close(logits(merged, AutoTokenizer.from_pretrained(target)), expected)
    assert merged.config.id2label == dict(enumerate(LABELS))
    with pytest.raises(InputError, match="exists already; remove it, or choose another folder"):
        export_run(tmp_path / "run", merged=True)


def test_an_exported_adapter_is_the_peft_folder_with_its_tokenizer(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", pooling="default")
    target = export_run(tmp_path / "run", tmp_path / "out")
    assert (target / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert AutoTokenizer.from_pretrained(target)("joy")["input_ids"]


def test_a_config_that_an_editor_saved_with_a_byte_order_mark_is_the_same(tmp_path: Path) -> None:
    config, _ = finished_run(tmp_path / "run")
    digest = folder_digest(tmp_path / "run")
    assert digest is not None
    (tmp_path / "run" / "config.toml").write_text(config.to_toml(), encoding="utf-8-sig")
    assert folder_digest(tmp_path / "run") == digest
    assert fedlora.load(tmp_path / "run")[0].config.num_hidden_layers == 1
    assert adapter_config(str(tmp_path / "run"), tmp_path / "run" / "adapter").run == config.run


def test_a_run_that_was_moved_away_from_its_base_says_so_and_loads_once_the_base_is_named(tmp_path: Path) -> None:
    base = fetch("asset:minilm-l6")
    there = tmp_path / "there" / "minilm"
    there.parent.mkdir()
    there.symlink_to(base)
    finished_run(tmp_path / "run", name=str(there))
    there.unlink()
    with pytest.raises(InputError) as caught:
        fedlora.load(tmp_path / "run")
    remedy = f"its base model is not at {there}; set model.name in its config.toml to where that model is here"
    assert (caught.value.field, caught.value.remedy) == ("FOLDER", remedy)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(there), str(base)))
    assert fedlora.load(tmp_path / "run")[0].config.num_hidden_layers == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        fedlora.load(tmp_path)


def test_nobody_leaves_a_mean(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"^FOLDER = .*/run': holds no finished run of a method that keeps .* apart"):
        fedlora.opt_out(tmp_path / "run", "an owner")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.toml", None),
        ("config.toml", b"[run"),
        ("config.toml", b"[run]\nrounds = 0"),
        ("adapter/adapter_config.json", b"{"),
        ("adapter/adapter_model.safetensors", b"cut"),
        ("adapter/head.safetensors", None),
        ("adapter/labels.json", b"\xff"),
    ],
)
def test_a_damaged_run_is_told_in_one_line(file: str, content: bytes | None, tmp_path: Path) -> None:
    finished_run(tmp_path / "run", pooling="mean")
    path = tmp_path / "run" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"^FOLDER = .*/run': cannot be read .*; run again into another$"):
        export_run(tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("merged", [False, True])
def test_an_output_that_cannot_be_written_is_told_in_one_line(merged: bool, tmp_path: Path) -> None:
    finished_run(tmp_path / "run", pooling="mean")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--output = .*cannot be written .*; choose another folder$"):
        export_run(tmp_path / "run", tmp_path / "file" / "below", merged=merged)


@pytest.mark.slow
def test_a_language_model_generates_what_the_merged_one_generates(tmp_path: Path) -> None:
    content = {
        "model": {"name": "asset:smollm2-135m", "task": "causal-lm", "num_hidden_layers": 2},
        "data": {"name": "asset:20newsgroups", "partition": {"clients": 2}},
        "method": {"name": "fedit"},
    }
    config = load_config(content)
    adapted = adapt(load_base(config, None), config, "lora")
    generator = torch.Generator().manual_seed(0)
    adapted.set_shared({n: torch.randn(a.shape, generator=generator) * 0.05 for n, a in adapted.arrays().items()})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    export_peft(adapted, config, folder / "adapter", None)
    model, tokenizer = fedlora.load(folder)
    merged = AutoModelForCausalLM.from_pretrained(export_run(folder, merged=True))
    prompt = tokenizer("The graphics card", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), merged.generate(**prompt, **options))

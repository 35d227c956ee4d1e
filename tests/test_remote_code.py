"""Code that lies beside a model, a tokenizer, an adapter or a data set is never run, and nobody is asked whether to."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fedlora.config import Config, load_config
from fedlora.errors import InputError
from fedlora.models import load_base, load_tokenizer, model_config
from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]
LOADERS = [model_config, load_tokenizer, lambda config: load_base(config, None)]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answer every question with yes, as somebody in a hurry does; none may be asked."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with code beside it that leaves a file behind once it is run."""
    model = save_llama(tmp_path / "model")
    (model / "custom.py").write_text(
        f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Words\n"
    )
    return model


def config(folder: Path) -> Config:
    return load_config(
        {
            "model": {"name": str(folder), "task": "causal-lm", "max_length": 16},
            "data": {"name": "x", "partition": {"clients": 2}},
            "method": {"name": "fedit"},
        }
    )


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


MAP = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}


@pytest.mark.parametrize("where", ["", "someone/elsewhere--"])
def test_a_model_that_the_library_knows_is_loaded_by_the_librarys_class(
    folder: Path, asked: list[str], where: str
) -> None:
    expected = [load(config(folder)) for load in LOADERS]
    change(folder / "config.json", auto_map={key: where + value for key, value in MAP.items()})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{where}custom.Words"]})
    for load, stock in zip(LOADERS, expected, strict=True):
        assert type(load(config(folder))).__module__ == type(stock).__module__
    assert not asked
    assert not (folder.parent / "was_run").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_a_model_that_needs_its_own_code_is_refused_in_a_line(folder: Path, asked: list[str], load: Any) -> None:
    change(folder / "config.json", auto_map=MAP, model_type="of-its-own", architectures=["Model"])
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "custom.Words"]}, tokenizer_class="Words"
    )
    with pytest.raises(InputError, match=r"model\.name = .*never run; take a model that transformers knows") as error:
        load(config(folder))
    assert "\n" not in str(error.value)
    assert not asked
    assert not (folder.parent / "was_run").exists()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_weights_that_are_a_program_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(folder.parent / "was_run")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.name = .*never run; save them as safetensors"):
        load_base(config(folder), None)
    assert not (folder.parent / "was_run").exists()


def test_a_data_sets_script_is_not_run(tmp_path: Path) -> None:
    script = tmp_path / "reviews" / "reviews.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    for name in (script, script.parent):
        with pytest.raises((RuntimeError, ValueError, OSError)):
            datasets.load_dataset(str(name))
    assert not (tmp_path / "was_run").exists()


def _calls(tree: ast.AST) -> list[ast.Call]:
    """Return the calls of a loader, but those of an own loader to its base class, which pass on what it is given."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loaders = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"]
    return [call for call in loaders if ast.unparse(call.func) != "super().from_pretrained"]


@pytest.mark.parametrize("package", ["fedlora", "clients", "strategies", "experiments"])
def test_every_loader_says_that_no_code_is_run(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            said = {key.arg: key.value.value for key in call.keywords if isinstance(key.value, ast.Constant)}
            assert said.get("trust_remote_code") is False, f"{path.relative_to(ROOT)}:{call.lineno}"


def test_that_check_sees_a_loader_without_it() -> None:
    assert len(_calls(ast.parse("AutoModel.from_pretrained(name)\nload(name)"))) == 1

"""A second federation goes on from what the first one left, and a run folder is read from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import fedlora
from fedlora import simulate
from fedlora.adapters import adapt
from fedlora.adapters.peft_format import export_peft
from fedlora.config import load_config
from fedlora.continuing import _described
from fedlora.data.sources import with_absolute_paths
from fedlora.errors import InputError
from fedlora.models import load_base
from fedlora.results.load import export_run, opt_out
from fedlora.tasks import tasks
from tests.families import family_model
from tests.tiny import save_llama, save_tokenizer

KINDS = ("default", "mean", "causal-lm")

pytestmark = pytest.mark.usefixtures("bare")


def write_texts(path: Path, labels=("no", "yes", "perhaps")) -> None:
    rows = [f"w{5 + i % 7} w{6 + i % 5} w9,{labels[i % len(labels)]},{'ab'[i % 2]}" for i in range(24)]
    path.write_text("\n".join(["text,label,domain", *rows]) + "\n", encoding="utf-8")


def content(kind: str, **model) -> dict:
    causal = kind in ("causal-lm", "flexmore")
    section = {"task": "causal-lm"} if causal else {"pooling": kind}
    return {
        "run": {"rounds": 1},
        "model": {"name": "model", "max_length": 8, **section, **model},
        "data": {"name": "texts.csv", "test": "texts.csv", "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 2},
        "client": {"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 2, "batch_size": 4},
        "simulation": {"workers": 0},
    }


def make_run(here: Path, kind: str, **sections) -> Path:
    """Leave a finished run in ``runs/first``, of paths that are relative to ``here``."""
    if kind in ("causal-lm", "flexmore"):
        save_llama(here / "model")
    else:
        family_model("bert").save_pretrained(here / "model")
        save_tokenizer(here / "model")
    write_texts(here / "texts.csv")
    return simulate({**content(kind), **sections}, output="runs/first").folder.absolute()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def score(folder: Path, when: str) -> float:
    return json.loads((folder / "summary.json").read_text())[when]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_goes_on_from_the_first(here, kind, monkeypatch):
    """From its adapter, its merged model and its folder: the start is as good as the end was, head and all."""
    first = make_run(here, kind)
    assert abs(score(first, "start") - score(first, "final")) > 0.01
    export_run(first, merged=True)
    elsewhere = here.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for part in ("adapter", "merged", "."):
        settings = content(kind, name=str(first / part))
        settings["data"] |= {"name": str(here / "texts.csv"), "test": str(here / "texts.csv")}
        second = simulate(settings, output=f"second-{part}").folder
        assert score(second, "start") == pytest.approx(score(first, "final"), abs=1e-4), part
        model, _ = fedlora.load(second)
        assert model is not None


def test_an_exported_adapter_goes_on_without_its_run(here):
    first = make_run(here, "mean")
    exported = export_run(first, here / "exported")
    shutil.rmtree(first)
    model = load_base(load_config(content("mean", name=str(exported))), ["no", "perhaps", "yes"])
    assert not model.notes
    assert model.classifier.weight.abs().max() > 0


def test_an_adapter_that_names_no_task_gets_the_default_one_of_its_kind(monkeypatch):
    names = {**tasks(), "z-scores": tasks()["regression"]}
    monkeypatch.setattr("fedlora.continuing.tasks", lambda: names)
    about = {"task_type": "SEQ_CLS", "base_model_name_or_path": "base", "task": None}
    assert _described(about)["model"]["task"] == "sequence-classification"
    assert _described(about | {"task_type": "CAUSAL_LM"})["model"]["task"] == "causal-lm"
    assert _described(about | {"task": "regression"})["model"]["task"] == "regression"


def test_other_classes_get_a_new_head_and_a_line(here):
    first = make_run(here, "default")
    write_texts(here / "texts.csv", ("one", "two"))
    told: list[str] = []
    from fedlora.strategies.callbacks import Progress

    simulate(content("default", name="runs/first"), output="second", progress=Progress(on_note=told.append))
    assert told == ["the model's head is of other classes (no, perhaps, yes), so a new one is drawn"]
    assert told[0] in (here / "second" / "run.log").read_text()
    assert first.is_dir()


def test_folders_that_cannot_go_on_say_what_to_do(here):
    first = make_run(here, "default")
    with pytest.raises(InputError, match=r"model\.name.*set model\.task|model\.task"):
        load_base(load_config(content("causal-lm", name=str(first))), None)
    (here / "model").rename(here / "moved")
    with pytest.raises(
        InputError, match=r"^model\.name = .*cannot be merged into its base .*model .*; give a folder of"
    ):
        load_base(load_config(content("default", name=str(first))), ["no", "perhaps", "yes"])
    (here / "moved").rename(here / "model")
    (first / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"^model\.name = .*cannot be merged into its base"):
        load_base(load_config(content("default", name=str(first))), ["no", "perhaps", "yes"])
    (first / "adapter" / "adapter_config.json").write_text("{")
    (first / "config.toml").unlink()
    with pytest.raises(InputError, match=r"^model\.name = .*its files cannot be read"):
        load_base(load_config(content("default", name=str(first / "adapter"))), ["no", "perhaps", "yes"])
    (first / "config.toml").touch()
    shutil.rmtree(first / "adapter")
    with pytest.raises(InputError, match=r"^model\.name = .*is not finished; finish it with --resume"):
        load_base(load_config(content("default", name=str(first))), ["no", "perhaps", "yes"])


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_is_loaded_from_another_folder(here, monkeypatch, moved):
    """Whose model was named by a path relative to where the run was started; the run folder may be moved since."""
    first = make_run(here, "mean")
    expected = fedlora.load(first)[0]
    elsewhere = here.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if moved:
        first = first.rename(elsewhere / "moved")
    ids = torch.tensor([[5, 6, 7]])
    for model in (fedlora.load(first)[0], fedlora.load(export_run(first, merged=True).parent)[0]):
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    base = json.loads((first / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute()
    assert Path(base).is_dir()
    # Its config runs again, from here.
    again = simulate(first / "config.toml", output="again")
    assert (again.folder / "adapter" / "head.safetensors").read_bytes() == (
        first / "adapter" / "head.safetensors"
    ).read_bytes()


def test_a_run_is_resumed_from_another_folder(here, monkeypatch):
    first = make_run(here, "mean")
    elsewhere = here.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (first / "summary.json").unlink()
    from fedlora.results.checkpoint import Checkpoint

    checkpoint = Checkpoint(first / "checkpoint" / "state.sqlite")
    checkpoint["finished"] = False
    checkpoint.commit()
    checkpoint.close()
    assert simulate(content("mean"), output=first, resume=True).summary["rounds"] == 1


def test_a_mixture_goes_on_and_loses_an_owner_from_another_folder(here, monkeypatch):
    experts = {"method": {"name": "flexmore", "rank": 2}}
    first = make_run(here, "flexmore", **experts)
    elsewhere = here.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for part in ("mixture", "."):
        settings = content("causal-lm", name=str(first / part))
        settings["data"] |= {"name": str(here / "texts.csv"), "test": str(here / "texts.csv")}
        second = simulate(settings, output=f"second-{part}").folder
        assert score(second, "start") == pytest.approx(score(first, "final"), abs=1e-4)
        assert fedlora.load(second)[0] is not None
        with pytest.raises(InputError, match=r"^model\.name"):
            simulate({**settings, **experts}, output=f"third-{part}")
    owner = fedlora.load(first)[0].owners[0]
    assert owner not in opt_out(first, owner).owners


@pytest.mark.parametrize(
    ("model_type", "pooling", "options"),
    [
        ("bart", "default", {}),
        ("bart", "mean", {}),
        ("t5", "default", {}),
        ("distilbert", "default", {}),
        ("deberta-v2", "default", {}),
        ("gpt2", "mean", {}),
        ("opt", "mean", {"word_embed_proj_dim": 16}),
        ("modernbert", "default", {}),
    ],
)
def test_an_adapter_of_any_family_goes_on_as_it_was(here, model_type, pooling, options):
    family_model(model_type, **options).save_pretrained("model")
    save_tokenizer(here / "model")
    settings = content(pooling)
    settings["method"] |= {"exclude_modules": r".*layers?\.1\..*|.*\.h\.1\..*|.*block\.1\..*"}
    config = load_config(settings)
    labels = ["no", "perhaps", "yes"]
    adapted = adapt(load_base(config, labels), config, "lora")
    generator = torch.Generator().manual_seed(0)
    adapted.set_shared({n: torch.randn(a.shape, generator=generator) * 0.3 for n, a in adapted.arrays().items()})
    run = here / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(with_absolute_paths(config).to_toml(), encoding="utf-8")
    export_peft(adapted, config, run / "adapter", labels)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]]), "attention_mask": torch.ones(2, 4).long()}
    adapted.layout.set_rows([2])
    with torch.no_grad():
        expected = adapted.logits(batch)
        going_on = load_base(load_config(content(pooling, name="runs/first")), labels)
        torch.testing.assert_close(going_on(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fedlora.load(run)[0](**batch).logits, expected, rtol=1e-3, atol=1e-4)

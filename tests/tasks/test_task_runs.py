"""Every task from a file to a report, on the real MiniLM, with and without privacy."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import fedlora
from fedlora import simulate
from fedlora.config import load_config
from fedlora.data.tokens import FederatedData, prepare_data
from fedlora.models import MeanPoolingClassifier
from fedlora.reporting.report import write_report
from fedlora.reporting.tables import runs_table
from fedlora.tasks import get_task

DATA = Path(__file__).parent / "data"
PRIVATE = {"mode": "example", "noise_multiplier": 0.8, "target_delta": 1e-3}
PAIRS = {"name": "pairs.csv", "text": "premise", "text_pair": "hypothesis"}
LABELS, SCORES = {"name": "labels.csv", "label": "labels"}, {"name": "scores.csv", "label": "stars"}
TAGS = {"name": "tags.jsonl", "text": "words", "label": "tags"}
CASES: dict[str, tuple[str, dict[str, str], str, bool]] = {
    # name: task, keys of data, pooling, whether it is private
    "pairs": ("sequence-classification", PAIRS, "default", True),
    "pairs, open": ("sequence-classification", PAIRS, "mean", False),
    "labels": ("multi-label-classification", LABELS, "default", True),
    "labels, open": ("multi-label-classification", LABELS, "mean", False),
    "scores": ("regression", SCORES, "mean", True),
    "scores, open": ("regression", SCORES, "default", False),
    "tags": ("token-classification", TAGS, "default", True),
    "tags, open": ("token-classification", TAGS, "default", False),
}
LAYERS = 2

pytestmark = pytest.mark.usefixtures("cached", "bare")


def content(case: str) -> dict[str, Any]:
    task, data, pooling, private = CASES[case]
    return {
        "run": {"seed": 1, "rounds": 2},
        "model": {
            "name": "asset:minilm-l6",
            "task": task,
            "pooling": pooling,
            "max_length": 24,
            "num_hidden_layers": LAYERS,
        },
        "data": {**data, "name": str(DATA / data["name"]), "validation": 0.1, "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 4},
        "client": {"batch_size": 8, "local_steps": 2, "learning_rate": 2e-3},
        "simulation": {"workers": 0},
        "server": {"evaluate_clients": True},
        "privacy": PRIVATE if private else {},
    }


@pytest.mark.parametrize("case", CASES)
def test_a_file_becomes_a_model_and_a_report(case: str, tmp_path: Path) -> None:
    task = get_task(CASES[case][0])
    result = simulate(content(case), output=tmp_path / "run")
    final, best = result.summary["final"], result.summary["best"]
    assert set(final) <= {"loss", *task.scores}
    assert {"loss", task.primary} <= set(final)
    assert best is not None
    assert set(best) == {"round", *final}
    assert (result.summary["epsilon"] is not None) == CASES[case][3]
    with (result.folder / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(dict.fromkeys(["client", "examples", "loss", task.client_metric]))
    assert result.summary["fairness"]["metric"] == task.client_metric

    # What is loaded gives what was evaluated, and so does PEFT on the stock model.
    data = prepare_data(load_config(content(case)))
    batch = data.test.batch(np.arange(len(data.test)))
    model, _ = fedlora.load(result.folder)
    logits = run(model, batch)
    assert float(task.loss(logits, batch["labels"]).mean()) == pytest.approx(final["loss"], rel=1e-4)
    if isinstance(model, MeanPoolingClassifier):
        assert (result.folder / "adapter" / "head.safetensors").is_file()
    else:
        assert torch.allclose(run(stock(result.folder, data), batch), logits, atol=1e-4)

    page, comparison = write_report([result.folder], tmp_path / "compared")
    assert comparison.score == task.primary
    assert f"test {comparison.score_title}" in page.read_text()
    line = runs_table(comparison).iloc[0]
    assert {name: float(line[name]) for name in final} == pytest.approx(final)


def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's logits."""
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


def stock(folder: Path, data: FederatedData) -> Any:
    """Load a run's adapter as somebody without fedlora would."""
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    task = get_task(load_config(folder / "config.toml").model.task)
    base = getattr(transformers, task.auto_class).from_pretrained(
        about["base_model_name_or_path"], num_labels=task.outputs(data.label_names), num_hidden_layers=LAYERS
    )
    return PeftModel.from_pretrained(base, str(folder / "adapter"))


def test_an_adapter_without_its_run_goes_on_with_its_task(tmp_path: Path) -> None:
    given = content("scores, open") | {"run": {"rounds": 1}}
    del given["model"]["num_hidden_layers"]  # which an adapter does not know
    first = simulate(given, output=tmp_path / "run")
    (first.folder / "adapter").rename(tmp_path / "alone")
    model = {**given["model"], "name": str(tmp_path / "alone")}
    second = simulate(given | {"model": model}, output=tmp_path / "again")
    # It starts where the first ended, head and all.
    assert second.summary["start"]["loss"] == pytest.approx(first.summary["final"]["loss"], rel=1e-4)


def test_a_pair_is_tokenised_as_the_tokenizer_does() -> None:
    config = load_config(content("pairs"))
    data = prepare_data(config)
    batch = data.train.batch(np.arange(4))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert (data.train.lengths <= 24).all()
    tokenizer = transformers.AutoTokenizer.from_pretrained(fedlora.models.pretrained_source(config))
    texts = [tuple(row.values()) for row in csv.DictReader((DATA / "pairs.csv").open())]
    known = {tuple(tokenizer(a, b)["input_ids"]): tokenizer(a, b)["token_type_ids"] for a, b, _ in texts}
    for row in range(4):
        length = data.train.lengths[row]
        types = batch["token_type_ids"][row]
        assert known[tuple(batch["input_ids"][row, :length].tolist())] == types[:length].tolist()
        assert not types[length:].any()


def test_tags_are_on_the_first_tokens_of_their_words() -> None:
    data = prepare_data(load_config(content("tags")))
    assert data.label_names == ["B-LOC", "B-PER", "I-LOC", "O"]
    batch = data.train.batch(np.arange(len(data.train)))
    for labels in batch["labels"].tolist():
        names = [data.label_names[label] for label in labels if label != -100]
        # "unbelievably" is of several tokens.
        assert names in (["B-PER", "O", "B-LOC", "O", "O"], ["B-PER", "O", "B-LOC", "I-LOC", "O", "O"])
        assert labels[0] == -100
    assert (batch["attention_mask"].sum(1) > (batch["labels"] != -100).sum(1) + 2).all()

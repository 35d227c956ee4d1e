"""A run's answers are scored before its first round and after its last, as anybody scores the model that it exports."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import fedlora
from fedlora.reporting.changes import changes
from fedlora.reporting.comparison import compare
from fedlora.reporting.runs import read_runs
from fedlora.reporting.tables import runs_table
from fedlora.results.folder import RunResult
from fedlora.tasks import get_task
from fedlora.tasks.text_scores import score_texts
from tests.chats import chat, save_chat_llama
from tests.llama_runs import LlamaRuns, lines

NEW = 4
CHOICES = ["w20", "w30 w31", "w21"]
TEST = [(f"w{9 + n}", f"w{20 + n % 2}") for n in range(6)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> LlamaRuns:
    made = LlamaRuns(tmp_path_factory.mktemp("runs"))
    save_chat_llama(made.folder / "chat")
    rows = [(f"w{9 + n % 6}", f"w{20 + n % 2}") for n in range(24)]
    for name, pairs in (("chats", rows), ("asked", TEST)):
        content = [{"m": chat(q, a), "c": CHOICES, "owner": f"o{n % 2}"} for n, (q, a) in enumerate(pairs)]
        (made.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return made


def run(runs: LlamaRuns, evaluation: dict[str, Any], stop: int = 0, **method: Any) -> RunResult:
    folder = runs.folder
    return runs.run(
        stop=stop,
        run={"rounds": 2, "seed": 1},
        model={"name": str(folder / "chat"), "max_length": 16},
        data={
            "name": str(folder / "chats.jsonl"),
            "test": str(folder / "asked.jsonl"),
            "messages": "m",
            "choices": "c",
        },
        method={"name": "fedit", "rank": 2, **method},
        client={"local_steps": 4, "batch_size": 8, "learning_rate": 0.02},
        server={"batch_size": 4},
        evaluation=evaluation,
    )


def test_generated_answers_are_those_of_the_exported_model(runs: LlamaRuns) -> None:
    result = run(runs, {"kind": "generate", "max_new_tokens": NEW})
    start, final = result.summary["start"], result.summary["final"]
    assert {"exact_match", "rougeL", "bleu", "perplexity"} <= set(start) & set(final)
    assert final["exact_match"] > start["exact_match"]
    model, tokenizer = fedlora.load(result.folder)
    answers = []
    for question, _ in TEST:
        inputs = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, return_tensors="pt")
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
        answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    expected = score_texts(answers, [[answer] for _, answer in TEST])
    assert {name: final[name] for name in expected} == pytest.approx(expected)
    # Only the last round's line has them; a report shows them.
    assert ["exact_match" in line["metrics"] for line in lines(result)] == [False, True]
    comparison = compare(read_runs([result.folder]))
    line = runs_table(comparison).iloc[0]
    assert float(line["bleu"]) == pytest.approx(final["bleu"])
    assert float(line["exact_match"]) == pytest.approx(final["exact_match"])
    moved = {each.metric: (each.before.mean, each.after.mean) for each in changes(comparison)}
    assert moved == {name: (start[name], final[name]) for name in final if name != "loss"}


def test_choices_are_those_of_the_exported_model_and_a_stopped_run_makes_the_same(runs: LlamaRuns) -> None:
    whole, resumed = run(runs, {"kind": "choice"}), run(runs, {"kind": "choice"}, stop=1)
    assert resumed.summary["start"] == whole.summary["start"]
    assert resumed.summary["final"] == whole.summary["final"]
    assert set(whole.summary["final"]) <= {"loss", *get_task("causal-lm").scores}
    model, tokenizer = fedlora.load(whole.folder)
    hits = np.zeros(2)
    for question, answer in TEST:
        prompt = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, return_dict=False)
        likely = []
        for choice in CHOICES:
            ids = prompt + tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            likely.append(sum(float(logs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        by_length = [value / len(choice) for value, choice in zip(likely, CHOICES, strict=True)]
        hits += [CHOICES[int(np.argmax(values))] == answer for values in (likely, by_length)]
    final = whole.summary["final"]
    assert [final["choice_accuracy"], final["choice_accuracy_norm"]] == pytest.approx((hits / len(TEST)).tolist())


def test_what_is_not_asked_for_is_not_there(runs: LlamaRuns) -> None:
    result = run(runs, {})
    assert set(result.summary["final"]) == {"loss", "perplexity"}


def test_a_mixture_answers_too(runs: LlamaRuns) -> None:
    result = runs.run(
        run={"rounds": 1},
        model={"name": str(runs.folder / "chat"), "max_length": 16},
        data={
            "name": str(runs.folder / "chats.jsonl"),
            "test": str(runs.folder / "asked.jsonl"),
            "messages": "m",
            "partition": {"kind": "natural", "column": "owner"},
        },
        method={"name": "flexmore", "ranks": [2, 2]},
        evaluation={"kind": "generate", "max_new_tokens": NEW},
    )
    assert {"exact_match", "rougeL", "bleu"} <= set(result.summary["start"]) & set(result.summary["final"])


def test_clients_own_models_are_not_asked(runs: LlamaRuns) -> None:
    result = run(runs, {"kind": "choice"}, name="fedsa-lora")
    assert "evaluation.kind is not used" in (result.folder / "run.log").read_text()
    assert result.summary["start"] == {}

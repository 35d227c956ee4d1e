"""Greedy answers and choices equal those of a model that reads one example at a time, without padding or a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedlora.adapters import AdaptedModel
from fedlora.data.questions import Questions
from fedlora.training.answering import choice_scores, generate
from tests import tiny

NEW = 8


def plainly(adapted: AdaptedModel, prompt: Sequence[int], stop: Sequence[int]) -> list[int]:
    """Continue one prompt, the whole of which is read anew for every token."""
    ids = list(prompt)
    adapted.layout.set_rows([1])
    for _ in range(NEW):
        with torch.no_grad():
            logits = adapted.logits({"input_ids": torch.tensor([ids])})
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_answers_are_those_of_each_prompt_alone(kind: str) -> None:
    adapted = tiny.adapted_model(kind, tiny.settings(kind), torch.float64)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, tiny.VOCABULARY, length).tolist() for length in (5, 1, 12, 3, 9, 7, 2, 3)]
    free = [plainly(adapted, prompt, [2]) for prompt in prompts]
    stop = [2, free[0][3], free[2][1]]  # some answers end early, each at another place
    expected = [plainly(adapted, prompt, stop) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2
    for size in (1, 3, 100):
        assert generate(adapted, prompts, NEW, size, stop=stop, pad_token_id=0) == expected
    # Padding that is the end of the answer, as many tokenizers have it, changes nothing.
    assert generate(adapted, prompts, NEW, 4, stop=stop, pad_token_id=2) == expected
    # The adapters are on.
    adapted.set_shared({name: torch.zeros_like(array) for name, array in adapted.arrays().items()})
    assert generate(adapted, prompts, NEW, 3, stop=stop, pad_token_id=0) != expected


def test_the_models_own_penalties_are_not_applied() -> None:
    adapted = tiny.adapted_model("llama", tiny.settings("llama"), torch.float64)
    prompts = [[5, 6, 7, 8], [9, 10]]
    expected = [plainly(adapted, prompt, [2]) for prompt in prompts]
    adapted.model.generation_config.repetition_penalty = 5.0
    adapted.model.generation_config.no_repeat_ngram_size = 1
    adapted.model.generation_config.do_sample = True
    assert generate(adapted, prompts, NEW, 2, stop=[2], pad_token_id=0) == expected
    # What ends an answer is the model's to say, too.
    adapted.model.generation_config.eos_token_id = [2, expected[0][0]]
    assert generate(adapted, prompts, NEW, 2, stop=[2], pad_token_id=0)[0] == []


def test_choices_are_those_of_the_summed_log_likelihood() -> None:
    config = tiny.settings("llama", server={"batch_size": 4})
    adapted = tiny.adapted_model("llama", config, torch.float64)
    rng = np.random.default_rng(1)
    rows, starts, choices, summed, by_length = [], [], [], [], []
    for _ in range(40):
        prompt = rng.integers(3, tiny.VOCABULARY, rng.integers(1, 6)).tolist()
        options = [rng.integers(3, tiny.VOCABULARY, length).tolist() for length in (1, 2, 4)]
        texts = ["x" * int(rng.integers(1, 20)) for _ in options]
        likely = []
        for option in options:
            ids = [*prompt, *option]
            adapted.layout.set_rows([1])
            with torch.no_grad():
                logs = adapted.logits({"input_ids": torch.tensor([ids])})[0].log_softmax(-1)
            likely.append(sum(float(logs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
            rows.append(ids)
            starts.append(len(prompt))
        choices.append(texts)
        summed.append(int(np.argmax(likely)))
        by_length.append(int(np.argmax([value / len(text) for value, text in zip(likely, texts, strict=True)])))
    assert summed != by_length
    tokens = np.concatenate([np.array(row, np.int32) for row in rows])
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    for right in (summed, by_length, [0] * 40):
        asked = Questions(tokens, offsets, np.array(starts), [], choices, right, [2], 0)
        found = choice_scores(adapted, asked, config)
        assert found["choice_accuracy"] == pytest.approx(np.mean(np.equal(summed, right)))
        assert found["choice_accuracy_norm"] == pytest.approx(np.mean(np.equal(by_length, right)))

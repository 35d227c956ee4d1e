"""Answers of a language model to questions: generated token by token, or chosen by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fedlora.adapters import AdaptedModel
from fedlora.config import Config
from fedlora.data.questions import Questions
from fedlora.data.tokens import TokenTable
from fedlora.models import load_tokenizer, quiet
from fedlora.tasks import get_task
from fedlora.tasks.text_scores import score_texts
from fedlora.timeline import phase
from fedlora.training.evaluation import statistics


def score_answers(adapted: AdaptedModel, questions: Questions, config: Config) -> dict[str, float]:
    """Score a model's answers.

    Parameters
    ----------
    adapted : AdaptedModel
        All rows share its arrays.
    questions : Questions
    config : Config
        Sections model, server (batch_size) and evaluation are used.

    Returns
    -------
    dict
        Of generated answers, the scores of :func:`fedlora.tasks.text_scores.score_texts`. Of choices,
        ``choice_accuracy`` and ``choice_accuracy_norm`` (:func:`choice_scores`).
    """
    if config.evaluation.kind == "choice":
        return choice_scores(adapted, questions, config)
    bounds = zip(questions.offsets[:-1], questions.offsets[1:], strict=True)
    prompts = [questions.tokens[first:last].tolist() for first, last in bounds]
    size, new = config.server.batch_size, config.evaluation.max_new_tokens
    tokens = generate(adapted, prompts, new, size, stop=questions.stop, pad_token_id=questions.pad_token_id)
    tokenizer = load_tokenizer(config)
    answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    return score_texts(answers, questions.references)


def choice_scores(adapted: AdaptedModel, questions: Questions, config: Config) -> dict[str, float]:
    """Let a model choose, of each question's answers, the one that it finds most likely after the prompt.

    Returns
    -------
    dict
        ``choice_accuracy`` by the sum of an answer's token log-likelihoods, and ``choice_accuracy_norm`` by that sum
        over the answer's number of characters: ``acc`` and ``acc_norm`` of lm-evaluation-harness.
    """
    table = TokenTable(
        questions.tokens,
        questions.offsets,
        None,
        questions.starts,
        None,
        questions.pad_token_id,
        get_task(config.model.task),
    )
    losses = statistics(adapted, table, np.arange(len(table)), config.server.batch_size)["loss"]
    hits, first = np.zeros(2), 0
    for choices, right in zip(questions.choices, questions.right, strict=True):
        likely = -losses[first : first + len(choices)]
        lengths = np.array([len(choice) for choice in choices])
        hits += [likely.argmax() == right, (likely / lengths).argmax() == right]
        first += len(choices)
    summed, by_length = (hits / len(questions.right)).tolist()
    return {"choice_accuracy": summed, "choice_accuracy_norm": by_length}


@torch.no_grad()
def generate(
    adapted: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    stop: Sequence[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Let a model continue prompts greedily, in batches that are padded on the left.

    Parameters
    ----------
    adapted : AdaptedModel
    prompts : sequence of sequence of int
        None may be empty.
    max_new_tokens, batch_size : int
    stop : sequence of int
        Tokens that end an answer, beside those that the model's generation config names.
    pad_token_id : int

    Returns
    -------
    list of list of int
        The new tokens in the order of the prompts, without those that end an answer.
    """
    model: Any = adapted.model
    model.eval()
    own = model.generation_config.eos_token_id
    ends = sorted({*stop, *(own if isinstance(own, list) else [] if own is None else [own])})
    # What is not set here comes from the model's own generation config: penalties would make the search another.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad_token_id,
    )
    found: list[list[int]] = [[] for _ in prompts]
    # Rows of like length share a batch, which saves padding.
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    with phase("answers", "generating answers", len(order)) as here:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = max(len(prompts[place]) for place in places)
            rows = [[pad_token_id] * (width - len(prompts[place])) + list(prompts[place]) for place in places]
            masks = [[0] * (width - len(prompts[place])) + [1] * len(prompts[place]) for place in places]
            ids, mask = torch.tensor(rows, device=adapted.device), torch.tensor(masks, device=adapted.device)
            adapted.layout.set_rows([len(places)])
            with quiet():
                new = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:]
            for place, row in zip(places, new.tolist(), strict=True):
                end = next((number for number, token in enumerate(row) if token in ends), len(row))
                found[place] = row[:end]
            here.advance(len(places))
    return found

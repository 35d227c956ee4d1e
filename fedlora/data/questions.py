"""What ``[evaluation]`` asks a language model: the prompts of test examples, with the answers that are right.

They are made on the server from its test examples, and kept in the cache beside the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.assets import build_once
from fedlora.config import Config
from fedlora.data.sources import QUESTIONS, draw_seed
from fedlora.errors import InputError
from fedlora.models import load_tokenizer
from fedlora.tasks import get_task
from fedlora.tasks.chat import ChatError, ChatTemplate, answer_of
from fedlora.tasks.text_scores import load_scorers

if TYPE_CHECKING:
    import datasets

# Part of the name in the cache: raise it when the same config would give other files.
_LAYOUT = 1


@dataclass(frozen=True)
class Questions:
    """Questions to a language model.

    Attributes
    ----------
    tokens, offsets : ndarray
        Row i is ``tokens[offsets[i]:offsets[i + 1]]``, int32: a prompt, or one with one of its choices behind it.
    starts : ndarray
        Number of leading tokens of each row that are its prompt's, int64 [rows].
    references : list of list of str
        The right answers of each prompt; empty where the model chooses.
    choices : list of list of str
        The answers to choose from, whose rows lie one after the other; empty where the model generates.
    right : list of int
        Which choice is right.
    stop : list of int
        Tokens that end an answer.
    pad_token_id : int
    notes : list of str
        What the user should know of them.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    references: list[list[str]]
    choices: list[list[str]]
    right: list[int]
    stop: list[int]
    pad_token_id: int
    notes: list[str] = field(default_factory=list)


def prepare_questions(
    config: Config, pretrained: Any, test: Callable[[], datasets.Dataset | None], folder: Path
) -> Questions:
    """Make a run's questions, or open what an earlier call made.

    Test examples with the same prompt are one question that has several right answers. ``evaluation.max_examples``
    draws that many questions by ``data.seed``. Of a prompt that is too long for ``model.max_length`` the beginning is
    cut off.

    Parameters
    ----------
    config : Config
    pretrained : transformers.PreTrainedConfig
    test : callable
        Returns the test examples; called if the questions are not in the cache.
    folder : Path
        Of the tokens.

    Raises
    ------
    InputError
        If the test examples have no choices, the model has too few positions, or packages are missing.
    """
    kind, most = config.evaluation.kind, config.evaluation.max_examples
    if kind == "generate":
        load_scorers()
    place = folder / "questions" / f"{kind}-{most or 'all'}-{_LAYOUT}"

    def build(target: Path) -> None:
        examples = test()
        assert examples is not None
        _build(config, examples, target)

    build_once(place, build, "data.name", config.data.name)
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "starts")}
    found = Questions(**arrays, **about)
    if kind == "generate":
        _check_positions(config, pretrained, int(np.diff(found.offsets).max()))
    return found


def _check_positions(config: Config, pretrained: Any, longest: int) -> None:
    new = config.evaluation.max_new_tokens
    positions = getattr(pretrained.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest + new:
        remedy = f"the model has {positions} positions, and the longest prompt takes {longest}; lower it"
        raise InputError("evaluation.max_new_tokens", new, remedy)


def _build(config: Config, examples: datasets.Dataset, target: Path) -> None:
    tokenizer, length = load_tokenizer(config), config.model.max_length
    choosing = config.evaluation.kind == "choice"
    try:
        if choosing:
            rows, starts, about = _choices(config, examples, tokenizer)
        else:
            rows, starts, about = _prompts(config, examples, tokenizer)
    except ChatError as error:
        key = "template" if config.data.messages is None else "messages"
        raise InputError(f"data.{key}", getattr(config.data, key), f"a prompt of the test examples {error}") from None
    cut = [max(0, len(row) - length) for row in rows]
    if any(cut):
        share = f"{sum(map(bool, cut)):,} of {len(rows):,} prompts"
        about["notes"] = [f"model.max_length = {length} cuts the beginning of {share}"]
    # Of a choice that is longer than that, the end stays, and what it follows.
    starts = [max(1, start - less) for start, less in zip(starts, cut, strict=True)]
    rows = [row[less:] or [tokenizer.eos_token_id] for row, less in zip(rows, cut, strict=True)]
    about |= {"stop": _stop(config, tokenizer), "pad_token_id": tokenizer.pad_token_id}
    np.save(target / "tokens.npy", np.concatenate([np.array(row, np.int32) for row in rows]))
    np.save(target / "offsets.npy", np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64))
    np.save(target / "starts.npy", np.array(starts, np.int64))
    (target / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _stop(config: Config, tokenizer: Any) -> list[int]:
    """Return the end-of-sequence token, and those with which the chat template ends a turn."""
    ends = ChatTemplate(tokenizer).ends_of_turn() if config.data.templated else set()
    return sorted({tokenizer.eos_token_id, *ends})


def _prompts(
    config: Config, examples: datasets.Dataset, tokenizer: Any
) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    task: Any = get_task(config.model.task)
    references: dict[tuple[int, ...], list[str]] = {}
    columns = examples[:]
    for prompt, answer in zip(task.prompts(tokenizer, columns), _answers(columns), strict=True):
        references.setdefault(tuple(prompt), []).append(answer)
    chosen = _chosen(config, len(references))
    rows = [list(prompt) for prompt in references]
    rows, answers = [rows[i] for i in chosen], [list(references.values())[i] for i in chosen]
    return rows, [len(row) for row in rows], {"references": answers, "choices": [], "right": []}


def _choices(
    config: Config, examples: datasets.Dataset, tokenizer: Any
) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    task: Any = get_task(config.model.task)
    if "choices" not in examples.column_names:
        raise InputError("data.choices", config.data.choices, "the test examples have no such column; name another")
    columns = examples.select(_chosen(config, len(examples)))[:]
    choices = columns["choices"]
    found = task.answered(tokenizer, columns, choices)
    right = [options.index(answer) for options, answer in zip(choices, _answers(columns), strict=True)]
    about = {"references": [], "choices": choices, "right": right}
    return [ids for ids, _ in found], [start for _, start in found], about


def _answers(columns: dict[str, list[Any]]) -> list[str]:
    """Return the right answer of each example."""
    return list(map(answer_of, columns["messages"])) if "messages" in columns else columns["answer"]


def _chosen(config: Config, count: int) -> list[int]:
    """Draw the numbers of the questions that are asked, sorted."""
    most = config.evaluation.max_examples
    if most is None or most >= count:
        return list(range(count))
    order = np.random.default_rng([draw_seed(config), QUESTIONS]).permutation(count)
    return sorted(order[:most].tolist())

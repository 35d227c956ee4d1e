"""Scores of generated answers against references, as papers quote them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from fedlora.errors import InputError


def load_scorers() -> tuple[Any, Any]:
    """Return the modules ``rouge_score.rouge_scorer`` and ``sacrebleu``.

    Raises
    ------
    InputError
        If they are not installed.
    """
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError:
        remedy = "the packages that score texts are missing; pip install 'fedlora[evaluation]'"
        raise InputError("evaluation.kind", "generate", remedy) from None
    return rouge_scorer, sacrebleu


def score_texts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score answers, each against one or several references.

    Returns
    -------
    dict
        ``exact_match``: share of answers that are one of their references once both are normalised
        (:func:`normalised`). ``rougeL``: mean over the answers of the F-measure of the longest common subsequence,
        with the best reference of each; rouge-score without stemming (Lin 2004), whose words are of the letters a to z
        and digits. ``bleu``: of the whole corpus, from 0 to 100; sacrebleu's defaults (Post 2018).

    Raises
    ------
    InputError
        If packages are missing.
    """
    rouge_scorer, sacrebleu = load_scorers()
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    exact = [normalised(answer) in map(normalised, right) for answer, right in zip(answers, references, strict=True)]
    overlap = [
        rouge.score_multi(list(right), answer)["rougeL"].fmeasure
        for answer, right in zip(answers, references, strict=True)
    ]
    # sacrebleu wants one stream for the first references of all answers, one for the second, and so on.
    most = max(map(len, references))
    streams = [[right[n] if n < len(right) else None for right in references] for n in range(most)]
    bleu = sacrebleu.corpus_bleu(list(answers), streams).score
    return {
        "exact_match": sum(exact) / len(exact),
        "rougeL": float(sum(overlap) / len(overlap)),
        "bleu": float(bleu),
    }


def normalised(text: str) -> str:
    """Return a text in NFKC, case-folded, with single spaces and none around it. Punctuation counts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

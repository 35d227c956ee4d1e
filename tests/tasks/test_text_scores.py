"""Scores of generated answers against known values and plain implementations."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.tasks.text_scores import load_scorers, normalised, score_texts


def lcs(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


words = st.lists(st.sampled_from(["cat", "dog", "sat", "mat", "the"]), min_size=1, max_size=8)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_rouge_l_is_the_f_measure_of_the_common_subsequence(pairs: list[tuple[list[str], list[list[str]]]]) -> None:
    def f(answer: list[str], reference: list[str]) -> float:
        return 2 * lcs(answer, reference) / (len(answer) + len(reference))

    expected = sum(max(f(answer, right) for right in rights) for answer, rights in pairs) / len(pairs)
    found = score_texts([" ".join(a) for a, _ in pairs], [[" ".join(right) for right in rights] for _, rights in pairs])
    assert found["rougeL"] == pytest.approx(expected)
    exact = sum(answer in rights for answer, rights in pairs) / len(pairs)
    assert found["exact_match"] == pytest.approx(exact)
    assert found["bleu"] == pytest.approx(100.0) or exact < 1 or all(len(answer) < 4 for answer, _ in pairs)


def test_any_reference_counts() -> None:
    answers = ["It is a big red house near the lake .", "No ."]
    references = [
        ["Something else altogether .", "it is a BIG red house near  the lake ."],
        ["Yes .", "No .", "Never ."],
    ]
    found = score_texts(answers, references)
    assert (found["exact_match"], found["rougeL"]) == (1.0, pytest.approx(1.0))
    # Of n-grams of 1 to 4 words 10 of 12, 7 of 10, 4 of 8 and 3 of 7 are in a reference: letters' case counts here.
    assert found["bleu"] == pytest.approx(100 * (10 / 12 * 7 / 10 * 4 / 8 * 3 / 7) ** 0.25)
    assert score_texts(answers, [right[:1] for right in references])["exact_match"] == 0.0


def test_what_counts_as_the_same() -> None:
    assert normalised("  The\tAnswer\n is ４2 ") == normalised("the answer is 42")
    # Numbers keep their signs and points, which removing punctuation would take.
    assert len({normalised(text) for text in ("3.5", "35", "-35", "3,5")}) == 4


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=r"pip install 'fedlora\[evaluation\]'") as error:
        load_scorers()
    assert error.value.field == "evaluation.kind"

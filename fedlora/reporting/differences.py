"""Differences between two configurations, seed by seed: what they share, such as the split of the data, cancels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from fedlora.reporting.comparison import Comparison, Group, Mean

LEVEL = 0.05
"""A difference is told apart from none where its adjusted p is below this."""


@dataclass(frozen=True)
class Difference:
    """The primary metric of one group minus that of another, on the seeds that both have.

    Attributes
    ----------
    first, second : Group
        Of one level of privacy, tested on the same data; by its mean the first is no worse.
    seeds : list of int
    mean : Mean
        Of the differences by seed. Scores count test examples, so that differences of few seeds can be all alike by
        chance; the variance of rounding to the smallest step between two scores is added to theirs.
    p : float
        Of the two-sided paired t test that the mean difference is 0, with that variance.
    adjusted_p : float
        The same by Holm's method over all pairs of that level and those data (Scandinavian Journal of Statistics 6,
        1979): among many pairs some differ by chance.
    """

    first: Group
    second: Group
    seeds: list[int]
    mean: Mean
    p: float
    adjusted_p: float

    @property
    def settled(self) -> bool:
        """Whether these seeds tell the two groups apart."""
        return self.adjusted_p < LEVEL


def differences(comparison: Comparison) -> list[Difference]:
    """Return all pairs of groups of one level of privacy with two common seeds or more, the best groups first.

    Groups that were tested on different data are no pair. A group with a score that is not finite has no differences.
    """
    found: list[Difference] = []
    data = dict.fromkeys(group.tested_on for group in comparison.groups)
    for level, tested_on in itertools.product(comparison.privacy_levels, data):
        ranked = [group for group in comparison.ranked(level) if group.tested_on == tested_on]
        scores = [_scores(comparison, group) for group in ranked]
        rounding = _rounding([score for own in scores for score in own.values()])
        pairs = []
        for (first, own), (second, others) in itertools.combinations(zip(ranked, scores, strict=True), 2):
            seeds = sorted(own.keys() & others.keys())
            values = [own[seed] - others[seed] for seed in seeds]
            if len(seeds) > 1 and all(map(math.isfinite, values)):
                mean = Mean.of(values, rounding)
                pairs.append((first, second, seeds, mean, _paired_p(mean)))
        adjusted = holm([p for *_, p in pairs])
        found += [Difference(*pair, p) for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def to_best(found: Sequence[Difference]) -> list[Difference]:
    """Return the differences to the best group of each level of privacy and data, in their order."""
    best: dict[object, Group] = {}
    return [
        each for each in found if best.setdefault((each.first.privacy, each.first.tested_on), each.first) is each.first
    ]


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's step-down method: the chance of any false rejection stays below the level."""
    adjusted, largest = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = largest
    return adjusted


def differences_table(found: Sequence[Difference]) -> pd.DataFrame:
    """Return a row for each pair: mean difference, 95 % interval, p values, and whether these settle it."""
    return pd.DataFrame(
        {
            "privacy": each.first.privacy,
            "first": each.first.label,
            "second": each.second.label,
            "n": len(each.seeds),
            "seeds": " ".join(map(str, each.seeds)),
            "difference": each.mean.mean,
            "difference_low": each.mean.low,
            "difference_high": each.mean.high,
            "p": each.p,
            "adjusted_p": each.adjusted_p,
            "settled": each.settled,
        }
        for each in found
    )


def _scores(comparison: Comparison, group: Group) -> dict[int, float]:
    known = {run.config.run.seed: run.scores.get(comparison.score) for run in group.runs}
    return {seed: score for seed, score in known.items() if score is not None}


def _rounding(scores: Sequence[float]) -> float:
    """Return the variance that a difference of two scores has by their rounding to the smallest step between any."""
    ordered = sorted(set(filter(math.isfinite, scores)))
    steps = [high - low for low, high in itertools.pairwise(ordered) if high - low > 1e-9]
    return min(steps, default=0.0) ** 2 / 6


def _paired_p(mean: Mean) -> float:
    """Return p of the t test; 1 where no two scores differ."""
    if not mean.half:
        return 1.0
    deviation = mean.half / stats.t.ppf(0.975, mean.n - 1)
    return float(2 * stats.t.sf(abs(mean.mean) / deviation, mean.n - 1))

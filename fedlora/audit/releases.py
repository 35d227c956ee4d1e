"""What an auditor sees of noisy sums, with and without a canary, and what it makes of them.

Everything is in units of C, the norm that whatever is clipped as one can add. The auditor knows the model, the other
examples and which of them a sum holds. It takes them away, and projects what is left onto the canary's part: a score,
which without noise is 0 without the canary and 1 with it. A canary may be a group of examples that are drawn one by
one: then the score is how many of them a sum holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import binom, binomtest

from fedlora.audit.bounds import Evidence, Releases, Trials, best_threshold

WHOLE = "whole"
TOLERANCE = 1e-3
"""By how much float32 may miss the clipping norm, or the variance of noise, as a share of it."""
FALSE_ALARM = 1e-6
"""Probability with which a sound mechanism fails a check, at most."""
_NORMAL_LIMIT = 4.9
"""A normal number is beyond it with probability FALSE_ALARM."""
FEWEST = 20
"""Of fewer sums with the canary nothing is concluded."""
_SIMULATED, _SIMULATED_NUMBERS = 20_000, 2**22
_KEPT_NUMBERS, _KEPT_SUMS, _MOST_SUMS = 4096, 512, 4096
"""Numbers of a sum that are kept to compare its noise, and about how many sums; and how many at most."""


@dataclass(frozen=True)
class Check:
    """A property that the guarantee rests on.

    Attributes
    ----------
    name : str
    passed : bool
    detail : str
        What was measured.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Exact:
    """Sums without noise, each [D].

    Attributes
    ----------
    ordinary, canary, both : Tensor
        Of the ordinary example alone, of the canary alone, and of the two together.
    """

    ordinary: torch.Tensor
    canary: torch.Tensor
    both: torch.Tensor

    @property
    def beside(self) -> torch.Tensor:
        """What the canary adds beside the ordinary example; in a sound mechanism ``canary``."""
        return self.both - self.ordinary


@dataclass
class Group:
    """Scores and noise of some of the arrays, of all sums so far."""

    scores: list[np.ndarray] = field(default_factory=list)
    squares: list[np.ndarray] = field(default_factory=list)  # of the canary's part
    held: list[np.ndarray] = field(default_factory=list)
    noise: float = 0.0  # its squares, in units of sigma, summed
    numbers: int = 0


class Observations:
    """The noisy sums of an audit.

    Parameters
    ----------
    sigma : float
        The noise multiplier that is claimed.
    sample_rate : float
    steps : int
        Of each trial.
    trials : int
        Every second one, from the second, holds the canary.
    group : int
        Examples of the canary that are drawn one by one, and alike.
    """

    def __init__(self, sigma: float, sample_rate: float, steps: int, trials: int, group: int = 1) -> None:
        self.sigma, self.sample_rate, self.steps, self.trials = sigma, sample_rate, steps, trials
        self.group = group
        self.groups: dict[str, Group] = {}
        self._members: list[np.ndarray] = []
        self._beside: list[np.ndarray] = []
        self._kept: list[torch.Tensor] = []
        self._longest = 0.0
        self._drawn, self._chances = 0, 0

    def add(
        self,
        members: np.ndarray,
        sums: torch.Tensor,
        drawn: tuple[np.ndarray, np.ndarray, int],
        exact: Exact,
        arrays: Sequence[tuple[str, int]],
    ) -> None:
        """Take one step's sums of some trials.

        Parameters
        ----------
        members : ndarray of int [K]
            The trials.
        sums : Tensor [K, D]
            Noisy, in units of C.
        drawn : (ndarray of bool [K], ndarray of int [K], int)
            Which sums hold the ordinary example, and how many of the canary's; and how many draws there were in all.
        exact : Exact
        arrays : sequence of (str, int)
            Kind and size of the arrays that make up a sum, in their order.
        """
        ordinary, held, chances = drawn
        beside, with_canary = (torch.from_numpy(x.astype(np.float32))[:, None].to(sums) for x in (ordinary, held))
        direction = torch.where(beside > 0, exact.beside, exact.canary) / self.group
        left = sums - beside * exact.ordinary
        noise = left - with_canary * direction
        sizes = [size for _, size in arrays]
        parts = zip(arrays, *(x.split(sizes, 1) for x in (left, direction, noise)), strict=True)
        found: dict[str, list[np.ndarray]] = {}
        for (kind, _), seen, toward, rest in parts:
            projected = torch.stack([(seen * toward).sum(1), toward.square().sum(1), rest.square().sum(1)])
            values = projected.double().cpu().numpy()
            for name in (WHOLE, kind):
                found.setdefault(name, []).append(values)
            group = self.groups.setdefault(kind, Group())
            group.numbers += rest.numel()
            group.noise += float(values[2].sum()) / self.sigma**2
        for name, values_of in found.items():
            total, group = np.sum(values_of, axis=0), self.groups.setdefault(name, Group())
            group.scores.append(total[0] / np.maximum(total[1], 1e-300))
            group.squares.append(total[1])
            group.held.append(held)
        self._members.append(members)
        self._beside.append(ordinary)
        self._drawn += int(ordinary.sum() + held.sum())
        self._chances += chances
        longest = max(float(exact.canary.norm()), float(exact.beside.norm()))
        self._longest = max(self._longest, longest / self.group)
        self._keep(members, noise)

    def _keep(self, members: np.ndarray, noise: torch.Tensor) -> None:
        """Keep the noise of the first and the last trials, which no cohort has in common."""
        half = max(1, _KEPT_SUMS // (2 * self.steps))
        chosen = (members < half) | (members >= self.trials - half)
        if chosen.any() and sum(map(len, self._kept)) < _MOST_SUMS:
            self._kept.append(noise[torch.from_numpy(chosen).to(noise.device), :_KEPT_NUMBERS].float().cpu())

    def evidence(self, delta: float) -> dict[str, Evidence]:
        """Return what attacks on the sums prove, by the name of the attack."""
        kinds = [name for name in self.groups if name != WHOLE]
        found: dict[str, Evidence] = {"each sum": self._single(WHOLE)}
        beside = np.concatenate(self._beside)
        if (beside & (np.concatenate(self.groups[WHOLE].held) > 0)).sum() >= FEWEST:
            found["each sum with another example"] = self._single(WHOLE, beside)
        found |= {f"each sum: {name}": self._single(name) for name in kinds if len(kinds) > 1}
        found["all sums of a trial"] = self._whole_trials(delta)
        return found

    def _single(self, name: str, chosen: np.ndarray | None = None) -> Releases:
        """Guess of single sums by the numbers of a group; examples of the canary that were not drawn are added."""
        group = self.groups[name]
        scores, count = np.concatenate(group.scores), np.concatenate(group.held)
        if chosen is not None:
            scores, count = scores[chosen], count[chosen]
        held, half = count > 0, self.group / 2
        scores = scores + np.where(held, self.group - count, 0)
        alarms, misses = int((scores[~held] > half).sum()), int((scores[held] <= half).sum())
        counts = alarms, int((~held).sum()), misses, int(held.sum())
        return Releases(*counts, sample_rate=self.sample_rate, steps=self.steps, group=self.group)

    def _whole_trials(self, delta: float) -> Trials:
        """Guess of each trial by the likelihood ratio of all its sums, which does not know when the canary was drawn.

        The threshold is chosen by trials that the auditor simulates: the real ones have no part in it.
        """
        group = self.groups[WHOLE]
        members, scores = np.concatenate(self._members), np.concatenate(group.scores)
        squares = np.concatenate(group.squares)
        ratios = np.bincount(members, self._log_ratio(scores, squares), self.trials)
        holds = np.arange(self.trials) % 2 == 1
        lengths = math.sqrt(float(np.median(squares)))
        simulated = self._simulate(lengths)
        counts = int((~holds).sum()), int(holds.sum())
        threshold = best_threshold(*simulated, counts, delta)
        over = ratios > threshold
        return Trials(int(over[~holds].sum()), counts[0], int((~over[holds]).sum()), counts[1])

    def _log_ratio(self, scores: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Log of how much likelier scores are with a canary that is drawn with the sample rate than without one."""
        ratios = np.full(scores.shape, -np.inf)
        for drawn in range(self.group + 1):
            gain = drawn * (2 * scores - drawn) * squares / (2 * self.sigma**2)
            ratios = np.logaddexp(ratios, binom.logpmf(drawn, self.group, self.sample_rate) + gain)
        return ratios

    def _simulate(self, length: float) -> tuple[np.ndarray, np.ndarray]:
        """Draw what trials of the claimed mechanism would give, without and with a canary of this length."""
        rng = np.random.default_rng(0)
        count = max(1000, min(_SIMULATED, _SIMULATED_NUMBERS // (self.steps * self.group)))
        found = []
        for rate in (0.0, self.sample_rate):
            total = np.zeros(count)
            for _ in range(self.steps):
                drawn = (rng.random((self.group, count)) < rate).sum(0)
                scores = drawn + rng.standard_normal(count) * self.sigma / length
                total += self._log_ratio(scores, np.full(count, length**2))
            found.append(total)
        return found[0], found[1]

    def checks(self) -> list[Check]:
        """Measure what the guarantee rests on: clipping, the noise's size and independence, and sampling."""
        found = [self._check_sensitivity()]
        for name, group in self.groups.items():
            if name != WHOLE and group.numbers:
                share = group.noise / group.numbers
                limit = TOLERANCE + _NORMAL_LIMIT * math.sqrt(2 / group.numbers)
                detail = f"variance {share:.4f} of the claimed, {group.numbers} numbers"
                found.append(Check(f"noise: {name}", abs(share - 1) <= limit, detail))
        found.append(self._check_independence())
        chance = binomtest(self._drawn, self._chances, self.sample_rate).pvalue
        detail = f"{self._drawn} of {self._chances} draws, sample rate {self.sample_rate:.6g}"
        found.append(Check("sampling", bool(chance > FALSE_ALARM), detail))
        return found

    def _check_sensitivity(self) -> Check:
        of = "the canary" if self.group == 1 else f"each of the canary's {self.group} examples"
        detail = f"{of} changes a sum by {self._longest:.4f} C"
        return Check("sensitivity", self._longest <= 1 + TOLERANCE, detail)

    def _check_independence(self) -> Check:
        """Compare the noise of sums of several steps and trials, each with each."""
        width = min(len(part[0]) for part in self._kept)
        noise = torch.cat([part[:, :width] for part in self._kept]).double()
        unit = noise / noise.norm(dim=1, keepdim=True).clamp(min=1e-300)
        alike = (unit @ unit.T).fill_diagonal_(0).abs()
        pairs = len(noise) * (len(noise) - 1) / 2
        # The tail of a normal number: exp(-x^2 / 2).
        limit = math.sqrt(2 * math.log(max(2.0, pairs) / FALSE_ALARM) / width)
        largest = float(alike.max())
        detail = f"correlation of two sums' noise up to {largest:.3f}, {len(noise)} sums"
        return Check("independence", largest <= min(limit, 0.99), detail)

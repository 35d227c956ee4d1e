"""Privacy random variables (Gopi, Lee, Wutschitz 2021, arXiv 2106.02848): an upper bound, tighter than rdp and slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from opacus.accountants import create_accountant

from fedlora.errors import InputError
from fedlora.privacy.accountants import Accountant, GroupHistory, History
from fedlora.privacy.accountants._groups import GroupStep, composed_epsilon
from fedlora.privacy.accountants.rdp import Rdp

_BINS = 2**18
"""Limit on the bins of all kinds of steps together, which bounds the time of a call."""
_ERROR, _MAX_ERROR = 0.01, 0.1
"""Error of epsilon, which is added to it: by default, and at most. A smaller error takes more bins."""
_MAX_STEPS, _MAX_NOISE = 10**5, 50.0
"""Beyond these Opacus' accountant rounds too much or is too slow."""
_COMPONENTS = 64
"""Gaussians of all kinds of steps together, beyond which a call takes seconds."""
_RDP = Rdp()


class Prv(Accountant):
    """Opacus' accountant on a grid of bounded size; rdp's bound where that is smaller or there is no sound answer."""

    name = "prv"
    is_bound = counts_groups = True

    def epsilon(self, delta: float, history: History) -> float:
        """Return the smaller of both bounds."""
        return min(_on_grid(delta, history), _RDP.epsilon(delta, history))

    def group_epsilon(self, delta: float, history: GroupHistory) -> float:
        """Do so with mixtures of Gaussians, for a unit that is left out and for one that is added."""
        return min(_groups_on_grid(delta, history), _RDP.group_epsilon(delta, history))

    def for_calibration(self, epsilon: float) -> str:
        """Rdp where the error that is added is more than epsilon."""
        return _RDP.name if epsilon <= _ERROR else self.name

    def first_guesses(
        self, epsilon: float, total: Callable[[float], float], sigma_by: Callable[[str, float], float]
    ) -> Iterator[float]:
        """Yield sigmas close to the solution, since each call of ``total`` takes long.

        The rdp accountant's sigma, which costs little, is a few percent more. Between it and a slightly smaller one
        log epsilon is nearly linear in log sigma; the sigma that this gives is tried a little below and above.
        """
        try:
            first = sigma_by(_RDP.name, 0.03)
        except InputError:
            return  # there may be a sigma all the same: prv is the tighter bound
        second = 0.93 * first
        yield from (first, second)
        if not 0 < total(first) < total(second) < math.inf:
            return
        slope = math.log(total(second) / total(first)) / math.log(second / first)
        guess = first * (epsilon / total(first)) ** (1 / slope)
        yield from (guess * (1 - 4e-4), guess * (1 + 4e-4))


def _on_grid(delta: float, history: History) -> float:
    """Ask Opacus' accountant; infinite where it has no sound answer on a grid of bounded size."""
    steps = sum(n for _, _, n in history)
    if steps > _MAX_STEPS or any(sigma > _MAX_NOISE for sigma, _, _ in history):
        return math.inf
    slack = delta / 1000
    single = (_RDP.epsilon(slack / (8 * steps), ((sigma, q, 1),)) for sigma, q, _ in history)
    error = _error(delta, steps, len(history), 3 + max(_RDP.epsilon(slack / 4, history), *single))
    if error > _MAX_ERROR:
        return math.inf
    mechanism = create_accountant("prv")
    mechanism.history = list(history)
    try:
        epsilon = float(mechanism.get_epsilon(delta=delta, eps_error=error))
    except (RuntimeError, ValueError):  # the grid is too coarse for the mean, or too long for delta
        return math.inf
    return math.inf if math.isnan(epsilon) else max(0.0, epsilon)


def _error(delta: float, steps: int, kinds: int, reach: float) -> float:
    """Return the error in epsilon of a grid of bounded size, by the domain and the mesh that Opacus chooses."""
    bins = kinds * 2 * reach * math.sqrt(steps * math.log(12000 / delta) / 2) / _ERROR
    return _ERROR * max(1.0, bins / _BINS)


def _groups_on_grid(delta: float, history: GroupHistory) -> float:
    """Compose the losses of mixtures of Gaussians as Opacus composes those of its own; infinite as there."""
    steps, slack = sum(n for _, _, n, _ in history), delta / 1000
    if steps > _MAX_STEPS or any(sigma > _MAX_NOISE * k for sigma, _, _, k in history):
        return math.inf
    single = (_RDP.group_epsilon(slack / (8 * steps), ((sigma, q, 1, k),)) for sigma, q, _, k in history)
    reach = 3 + max(_RDP.group_epsilon(slack / 4, history), *single)
    error = _error(delta, steps, len(history), reach)
    if error > _MAX_ERROR or sum(1 + k for *_, k in history) > _COMPONENTS:
        return math.inf
    taken = [(GroupStep(sigma, q, k), n) for sigma, q, n, k in history]
    try:
        epsilon = max(composed_epsilon(delta, taken, removes, reach, error) for removes in (True, False))
    except (RuntimeError, ValueError):  # as for single examples
        return math.inf
    return math.inf if math.isnan(epsilon) else max(0.0, epsilon)

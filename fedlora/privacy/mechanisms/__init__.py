"""Privacy mechanisms, one file each: the unit of privacy, who adds the noise, and the metrics of replies."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from fedlora.config import Config
from fedlora.methods import Method
from fedlora.privacy.calibration import PrivacyPlan, ServerPlan
from fedlora.privacy.discrete_gaussian import NoisySum
from fedlora.registry import MECHANISMS


class Mechanism(ABC):
    """A unit of privacy and its protection. Stateless.

    Attributes
    ----------
    name : str
        ``privacy.mode``, and the name of the file.
    unit : str
        The unit of privacy; "" where nothing is protected. :meth:`protects` is what summary.json names.
    noise_by : str
        Who adds the noise, and so keeps the ledger: ``client``, ``server`` or ``nobody``.
    clips_examples : bool
        Whether clients clip each example's gradient. Then an example's gradient must not depend on other examples.
    reply_metrics : mapping of str to callable (float) -> bool
        Metrics in which a reply says what its client spent, each with a check of its value.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    noise_by: ClassVar[Literal["client", "server", "nobody"]]
    clips_examples: ClassVar[bool] = False
    reply_metrics: ClassVar[Mapping[str, Callable[[float], bool]]] = {}

    @property
    def is_private(self) -> bool:
        """Whether anything is protected."""
        return self.noise_by != "nobody"

    def protects(self, config: Config) -> str:
        """Return the unit of privacy of a run."""
        return self.unit

    def describe(self, config: Config) -> str:
        """Say in a sentence what is clipped and noised; "" where nothing is."""
        return ""

    def neighbours(self, config: Config) -> str:
        """Say which inputs epsilon compares."""
        return f"with and without {self.unit} (add or remove)"

    def check(self, config: Config) -> None:
        """Refuse a config that this mechanism cannot protect; none by default.

        Raises
        ------
        InputError
        """
        return

    def check_method(self, method: type[Method], config: Config) -> None:
        """Refuse a method that this mechanism cannot protect, or options of it; none by default.

        Raises
        ------
        InputError
        """
        return

    def plan(self, config: Config, examples: int, units: int | None = None) -> PrivacyPlan | None:
        """Return the privacy plan of a client; None if the client adds no noise.

        Parameters
        ----------
        config : Config
        examples : int
            Of how many examples, or units where steps draw these, a step draws.
        units : int, optional
            How many units they are of, where steps draw single examples of them.

        Raises
        ------
        InputError
            If the budget cannot be kept.
        """
        return None

    def server_plan(self, config: Config, clients: int) -> ServerPlan | None:
        """Return the privacy plan of a run with this number of clients; None if the server adds no noise.

        Raises
        ------
        InputError
            If the budget cannot be kept.
        """
        return None

    def noisy_sum(self, config: Config, size: int, asked: int, promised: int) -> NoisySum | None:
        """Return how clients clip and noise what they send to a secure sum; None where they do not, the default.

        Parameters
        ----------
        config : Config
        size : int
            Numbers of an update.
        asked, promised : int
            Clients that a round asks, and the fewest of them whose sum is made.

        Raises
        ------
        InputError
            If so many updates and their noise do not fit into the sum's residues.
        """
        return None


def get_mechanism(name: str) -> Mechanism:
    """Return the mechanism of a name.

    Raises
    ------
    InputError
        If there is none; it lists the names.
    """
    found: Mechanism = MECHANISMS.made(name)
    return found


def mechanism_of(config: Config) -> Mechanism:
    """Return the mechanism of a run."""
    return get_mechanism(config.privacy.mode)


LOCAL_SPENT: Mapping[str, Callable[[float], bool]] = {
    "noise-multiplier": lambda value: 0 <= value < math.inf,
    "sample-rate": lambda value: 0 < value <= 1,
    "epsilon": lambda value: value >= 0,
    "delta": lambda value: 0 <= value < 1,
}
"""Reply metrics of clients that add the noise themselves."""

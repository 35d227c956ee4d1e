"""A ClientApp that can also train many clients in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.capacity import Capacity

CohortFunction = Callable[[Sequence[Message], Sequence[Context]], Iterable[Message]]


CapacityFunction = Callable[[Message, Context, int], Capacity]
SettingsFunction = Callable[[], Mapping[str, Any]]
Preparation = Callable[[Context, Mapping[Any, Any]], None]


class CohortClientApp(ClientApp):
    """A Flower ClientApp whose training handler takes several clients' messages at once.

    On Flower's own runtimes it is an ordinary ClientApp, which gets one message at a time. :class:`RayGrid`'s workers
    hand it whole cohorts.
    """

    cohort_function: CohortFunction | None = None
    capacity_function: CapacityFunction | None = None
    settings_function: SettingsFunction | None = None
    preparation_function: Preparation | None = None

    def train_cohort(self, function: CohortFunction) -> CohortFunction:
        """Register the handler of training messages; use as a decorator.

        Parameters
        ----------
        function : callable
            Takes messages and contexts of equal number and returns their replies in the same order, or yields them, so
            that the first travel while the others are made; it changes the contexts' states in place.
        """
        self.cohort_function = function

        @self.train()
        def train_one(message: Message, context: Context) -> Message:
            (reply,) = function([message], [context])
            return reply

        return function

    def cohort_capacity(self, function: CapacityFunction) -> CapacityFunction:
        """Register what says how many clients train in one pass here.

        It gets a client's training message, and the number of clients above which the answer makes no difference.
        """
        self.capacity_function = function
        return function

    def chosen_settings(self, function: SettingsFunction) -> SettingsFunction:
        """Register what says, after a training, which keys of the config were chosen or lowered in this process."""
        self.settings_function = function
        return function

    def preparation(self, function: Preparation) -> Preparation:
        """Register what loads, before the first message, what clients will need; it gets a client's context.

        It also gets what the server's process has found out about the model, for a process on the same devices.
        """
        self.preparation_function = function
        return function

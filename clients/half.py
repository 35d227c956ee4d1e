"""The client half of a method. Methods whose clients only train use the common one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.clients.participant import Participant
from fedlora.clients.resources import client_model
from fedlora.config import Config
from fedlora.data.tokens import TokenTable
from fedlora.methods import get_method
from fedlora.ranks import check_client_rank
from fedlora.training import ClientJob, ClientResult, StepRule, train_cohort


def client_half(config: Config) -> ClientHalf:
    """Return the client half of a run's method, around this process' model."""
    kind = get_method(config.method.name).client_half() or ClientHalf
    half: ClientHalf = kind(client_model(config), config)
    return half


class ClientHalf:
    """The common client half: it trains the arrays that it receives, and sends them back.

    A method names another one in :attr:`fedlora.methods.Method.client`.

    Parameters
    ----------
    adapted : AdaptedModel
        The model of this process, shared by the clients that it trains.
    config : Config

    Attributes
    ----------
    rule : StepRule
        Which arrays a local step trains, and how their gradients are changed.
    """

    rule = StepRule()

    def __init__(self, adapted: AdaptedModel, config: Config) -> None:
        self.adapted, self.config = adapted, config

    def group(self, settings: Mapping[str, Any]) -> Hashable:
        """Return what clients of one pass have in common, beside the learning rate: their rank."""
        return settings.get("rank")

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Make the model ready for a message with these settings: of the rank that it says, where it says one.

        Raises
        ------
        InputError
            If the run has no such rank: an owner lends no room for more than the run was described with.
        """
        if "rank" in settings:
            rank = int(settings["rank"])
            check_client_rank(self.config.method, rank)
            self.adapted.set_rank(rank)

    def start(self, client: Participant) -> Arrays:
        """Make the start of the arrays whose role says that the client makes it."""
        raise NotImplementedError("the method's table says that clients make a start; its client half makes none")

    def begin(self, arrays: Arrays) -> Arrays:
        """Turn arrays that came into those that are trained."""
        return arrays

    def train(self, table: TokenTable, jobs: Sequence[ClientJob], config: Config) -> list[ClientResult]:
        """Do what an exchange asks of the clients of one pass: local training, by the config of the exchange."""
        return train_cohort(self.adapted, table, jobs, config, self.rule)

    def finish(self, arrays: Arrays) -> Arrays:
        """Turn arrays that were trained into those that leave."""
        return arrays

    def records(self) -> dict[str, ConfigRecord]:
        """Return what a reply says beside arrays and metrics."""
        return {}

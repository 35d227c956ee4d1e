"""One client with all its examples: the server clips each client's update, and adds noise to their sum."""

from __future__ import annotations

from typing import Any

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import Method
from fedlora.privacy.calibration import ServerPlan, plan_server
from fedlora.privacy.discrete_gaussian import NoisySum
from fedlora.privacy.mechanisms import Mechanism
from fedlora.ranks import has_mixed_ranks
from fedlora.registry import ACCOUNTANTS, AGGREGATORS, CLIENT_SAMPLINGS, SERVER_OPTIMIZERS


class Client(Mechanism):
    """DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): clipped updates of equal weight, and noise on their sum.

    It protects a client from whoever sees the models that the server makes. With ``privacy.noise = "central"`` the
    server adds the noise, and sees every update. Otherwise clients add it under secure sums, and are protected from a
    server that follows the protocol too (:mod:`fedlora.privacy.discrete_gaussian`). With ``privacy.bands`` the noise is
    correlated over rounds (:mod:`fedlora.privacy.banded`).
    """

    name = "client"
    unit = "one client with all its examples"
    noise_by = "server"

    def check(self, config: Config) -> None:
        """Refuse samples of clients whose epsilon the accountants do not know."""
        server, bands = config.server, config.privacy.bands
        rate = config.privacy.group_rate(server.fraction_train)
        if not CLIENT_SAMPLINGS.get(server.sampling).independent and rate < 1:
            whole = f"server.fraction_train = {1 / bands:g}"
            remedy = f'has no accountant for a share of the clients; use "poisson", or {whole}'
            raise InputError("server.sampling", server.sampling, remedy)
        if AGGREGATORS.get(server.aggregator).robust:
            remedy = f"adds noise to a sum, which {server.aggregator} is not; use the mean"
            raise InputError("server.aggregator", server.aggregator, remedy)
        if config.privacy.noise != "central":
            self._check_clients_noise(config)
        if bands > 1:
            self._check_bands(config, bands)

    def _check_bands(self, config: Config, bands: int) -> None:
        """Refuse correlated noise that would not cancel, and clients that would not take turns."""
        privacy, server, rounds = config.privacy, config.server, config.run.rounds
        optimizer = SERVER_OPTIMIZERS.get(server.optimizer)
        sums, most = not optimizer.stateful or optimizer.linear, f"{1 / bands:g}"
        anew = "has each client draw its noise anew, which bands correlate over rounds; use central"
        resized = "changes the size of the noise, so that correlated noise does not cancel; set it to false"
        unsummed = "makes no sum of the rounds' means, in which correlated noise cancels; use fedavg"
        more = "asks more clients than those whose turn it is; set it to 1"
        whole = f"is more than one of the {bands} groups of clients that take turns; set it to {most} at most"
        refused: list[tuple[str, Any, bool, str]] = [
            ("privacy.noise", privacy.noise, privacy.noise != "central", anew),
            ("privacy.adaptive_clipping", True, privacy.adaptive_clipping, resized),
            ("server.optimizer", server.optimizer, not sums, unsummed),
            ("server.over_sampling", server.over_sampling, server.over_sampling > 1, more),
            ("server.fraction_train", server.fraction_train, privacy.group_rate(server.fraction_train) > 1, whole),
            ("run.rounds", rounds, bands > rounds, f"gives some of the {bands} groups of clients no turn; raise it"),
        ]
        for key, value, wrong, remedy in refused:
            if wrong:
                raise InputError(key, value, f"{remedy}, or set privacy.bands = 1")

    def _check_clients_noise(self, config: Config) -> None:
        """Refuse what the accounting of noise that clients add does not cover."""
        privacy, server = config.privacy, config.server
        if not server.secure_aggregation:
            remedy = "is hidden in a sum; set server.secure_aggregation = true, or use central"
            raise InputError("privacy.noise", privacy.noise, remedy)
        if server.fraction_train < 1:
            remedy = f"with privacy.noise = {privacy.noise} does not lower epsilon, since the server knows who is drawn"
            raise InputError("server.fraction_train", server.fraction_train, f"{remedy}; set it to 1")
        if ACCOUNTANTS.made(privacy.accountant).kind != "rdp":
            remedy = "has no bound for sums of discrete noise, whose Renyi divergences alone are known; use rdp"
            raise InputError("privacy.accountant", privacy.accountant, remedy)
        if privacy.adaptive_clipping:
            remedy = f"needs a noisy count, which privacy.noise = {privacy.noise} does not make; set it to false"
            raise InputError("privacy.adaptive_clipping", True, remedy)

    def check_method(self, method: type[Method], config: Config) -> None:
        """Refuse what releases more than a noisy sum of updates."""
        if method.reads_single_updates:
            remedy = f"needs a method whose aggregate is a mean; {method.name} makes more of single clients' updates"
            raise InputError("privacy.mode", self.name, f"{remedy}; choose another method")
        if has_mixed_ranks(config):
            remedy = "needs updates of one shape; leave method.ranks and method.device_profile out"
            raise InputError("privacy.mode", self.name, remedy)
        if method.start_examples(config) and not method.start_exchanges(config):
            remedy = "adds no noise to a start that is made from clients' examples; choose another method.init"
            raise InputError("privacy.mode", self.name, remedy)
        if config.privacy.bands > 1 and (why := _forms_no_sum(method, config)):
            remedy = f"correlates noise that cancels in one sum over the rounds, but {why}; set it to 1"
            raise InputError("privacy.bands", config.privacy.bands, remedy)

    def describe(self, config: Config) -> str:
        """Say what is clipped and noised."""
        privacy = config.privacy
        if privacy.noise != "central":
            how = "all of" if privacy.noise == "local" else "its share of"
            return (
                f"each client clips its update to clipping_norm = {privacy.clipping_norm:g} and adds {how} a discrete "
                "Gaussian noise; the server learns their sum; all clients take part"
            )
        if privacy.bands > 1:
            return (
                f"the server clips each client's update to clipping_norm = {privacy.clipping_norm:g}, and adds to "
                f"their sum Gaussian noise, correlated over {privacy.bands} rounds (banded matrix factorisation); as "
                "many groups of clients take turns, and each client of the round's group takes part with the sample "
                "rate; a step is a client's turn"
            )
        follows = ", which follows the updates" if privacy.adaptive_clipping else ""
        return (
            f"the server clips each client's update to clipping_norm = {privacy.clipping_norm:g}{follows}, and adds "
            "Gaussian noise to their sum; each client takes part with the sample rate"
        )

    def neighbours(self, config: Config) -> str:
        """Say which inputs epsilon compares; a client that adds noise, or has its turn, is there all the same."""
        if config.privacy.noise == "central" and config.privacy.bands == 1:
            return super().neighbours(config)
        return f"{self.unit}, and zeros in place of its update"

    def server_plan(self, config: Config, clients: int) -> ServerPlan:
        """Calibrate the noise of the whole run."""
        return plan_server(config, clients)

    def update_noise(self, config: Config) -> float | None:
        """Return that of the plan, which does not depend on how many clients there are."""
        return None if config.privacy.noise == "central" else self.server_plan(config, 1).noise_multiplier

    def noisy_sum(self, config: Config, size: int, asked: int, promised: int) -> NoisySum | None:
        """Divide the noise by the fewest clients whose sum is made, so that drop-outs never lower it below the plan."""
        if config.privacy.noise == "central":
            return None
        sigma = self.server_plan(config, asked).noise_multiplier
        summands = 1 if config.privacy.noise == "local" else promised
        return NoisySum.of(sigma, config.privacy.clipping_norm, size, asked, summands)


def _forms_no_sum(method: type[Method], config: Config) -> str:
    """Say why the releases of a run do not add up to its model, number by number; "" where they do."""
    if not method.persistent:
        return f"{method.name} changes its coordinates in every round"
    rounds = range(1, config.run.rounds + 1)
    if method.start_exchanges(config) or any(len(method.exchanges(config, r)) > 1 for r in rounds):
        return f"{method.name} makes sums beside that of each round"
    tables = (exchange.roles for r in rounds for exchange in method.exchanges(config, r))
    if len({frozenset(kind for kind, role in roles.items() if role.up != "never") for roles in tables}) > 1:
        return f"{method.name} sums other arrays in other rounds"
    return ""

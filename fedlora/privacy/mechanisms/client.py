"""One client with all its examples: the server clips each client's update, and adds noise to their sum."""

from __future__ import annotations

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import Method
from fedlora.privacy.calibration import ServerPlan, plan_server
from fedlora.privacy.discrete_gaussian import NoisySum
from fedlora.privacy.mechanisms import Mechanism
from fedlora.ranks import has_mixed_ranks
from fedlora.registry import ACCOUNTANTS, AGGREGATORS, CLIENT_SAMPLINGS


class Client(Mechanism):
    """DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): clipped updates of equal weight, and noise on their sum.

    It protects a client from whoever sees the models that the server makes. With ``privacy.noise = "central"`` the
    server adds the noise, and sees every update. Otherwise clients add it under secure sums, and are protected from a
    server that follows the protocol too (:mod:`fedlora.privacy.discrete_gaussian`).
    """

    name = "client"
    unit = "one client with all its examples"
    noise_by = "server"

    def check(self, config: Config) -> None:
        """Refuse samples of clients whose epsilon the accountants do not know."""
        server = config.server
        if not CLIENT_SAMPLINGS.get(server.sampling).independent and server.fraction_train < 1:
            remedy = 'has no accountant for a share of the clients; use "poisson", or server.fraction_train = 1'
            raise InputError("server.sampling", server.sampling, remedy)
        if AGGREGATORS.get(server.aggregator).robust:
            remedy = f"adds noise to a sum, which {server.aggregator} is not; use the mean"
            raise InputError("server.aggregator", server.aggregator, remedy)
        if config.privacy.noise != "central":
            self._check_clients_noise(config)

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

    def describe(self, config: Config) -> str:
        """Say what is clipped and noised."""
        privacy = config.privacy
        if privacy.noise != "central":
            how = "all of" if privacy.noise == "local" else "its share of"
            return (
                f"each client clips its update to clipping_norm = {privacy.clipping_norm:g} and adds {how} a discrete "
                "Gaussian noise; the server learns their sum; all clients take part"
            )
        follows = ", which follows the updates" if privacy.adaptive_clipping else ""
        return (
            f"the server clips each client's update to clipping_norm = {privacy.clipping_norm:g}{follows}, and adds "
            "Gaussian noise to their sum; each client takes part with the sample rate"
        )

    def neighbours(self, config: Config) -> str:
        """Say which inputs epsilon compares; a client that adds noise is there all the same."""
        if config.privacy.noise == "central":
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

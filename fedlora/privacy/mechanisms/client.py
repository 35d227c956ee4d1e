"""One client with all its examples: the server clips each client's update, and adds noise to their sum."""

from __future__ import annotations

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.methods import Method
from fedlora.privacy.calibration import ServerPlan, plan_server
from fedlora.privacy.mechanisms import Mechanism
from fedlora.ranks import has_mixed_ranks
from fedlora.registry import AGGREGATORS, CLIENT_SAMPLINGS


class Client(Mechanism):
    """DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): clipped updates of equal weight, noise at the server.

    It protects a client from whoever sees the models that the server makes. The server itself sees every update.
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
        follows = ", which follows the updates" if privacy.adaptive_clipping else ""
        return (
            f"the server clips each client's update to clipping_norm = {privacy.clipping_norm:g}{follows}, and adds "
            "Gaussian noise to their sum; each client takes part with the sample rate"
        )

    def server_plan(self, config: Config, clients: int) -> ServerPlan:
        """Calibrate the noise of the whole run."""
        return plan_server(config, clients)

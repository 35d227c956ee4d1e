"""Methods of the tests' own, whose arrays travel as no built-in method's do; entry points name them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.roles import TRAINED, Exchange, Role, Roles
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Sizes, drawn_factors

POINTS = {
    "fedlora.methods": {
        name: f"tests.drawn_methods:{kind}"
        for name, kind in (("home-b", "HomeB"), ("own-a", "OwnA"), ("twice", "Twice"))
    }
}


class Drawn(FederatedStrategy):
    """A is drawn, and B starts at 0."""

    title, paper = "A method of a test", "none"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 1e-2, "sgd": 0.1}

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        return drawn_factors(adapted, self.config.run.seed)


def numbers(sizes: Sizes) -> tuple[int, int]:
    """Return the numbers of all As, and of all Bs."""
    return sum(sizes.rank * n for _, n in sizes.layers), sum(sizes.rank * m for m, _ in sizes.layers)


class HomeB(Drawn):
    """B is trained, and stays with each client."""

    name = "home-b"

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        return {"lora_A": TRAINED, "lora_B": Role(trained=True, home=True)}

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        a, b = numbers(sizes)
        return Payload(initial=b, down=a, up=a)


class OwnA(Drawn):
    """Each client is sent a frozen A of its own."""

    name = "own-a"

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        return {"lora_A": Role(down="round"), "lora_B": TRAINED}

    def client_arrays(self, client: int) -> tuple[Hashable, Arrays]:
        return client, {n: a * (client + 1) if n.endswith("lora_A") else a for n, a in self.arrays.items()}

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        a, b = numbers(sizes)
        return Payload(initial=0, down=a + b, up=b)


class Twice(Drawn):
    """A round has two exchanges: one step of B, whose update is sent, then both factors."""

    name = "twice"

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        return {"lora_A": TRAINED, "lora_B": TRAINED}

    @classmethod
    def exchanges(cls, config: Config, server_round: int) -> Sequence[Exchange]:
        first = {"lora_A": Role(down="round"), "lora_B": Role(trained=True, down="round", up="update")}
        return Exchange(first, local_steps=1), Exchange(cls.roles(config, server_round))

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        a, b = numbers(sizes)
        return Payload(initial=0, down=a + b, up=b if contact.exchange == 1 else a + b)

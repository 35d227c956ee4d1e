"""The mixture as the server holds it: public rows and owners' experts as named arrays, ready to evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fedlora.adapters.model import AdaptedModel
from fedlora.adapters.stacked import RowLayout
from fedlora.arrays import Arrays
from fedlora.experts.expert import FULL, Expert
from fedlora.experts.mixture import Mixture

PUBLIC = ""
"""Owner of the public expert's router rows among named arrays."""


class MergedModel(AdaptedModel):
    """A mixture whose state is named arrays, ``OWNER/NAME``.

    Parameters
    ----------
    mixture : Mixture
        Without experts.

    Attributes
    ----------
    experts : dict of str to Expert
        All that were set, sorted by owner; :meth:`show` chooses those in the mixture.
    """

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(mixture, RowLayout(), "mixture", {}, {})
        self.mixture = mixture
        self.experts: dict[str, Expert] = {}

    def set_shared(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set the public expert's rows and, if there are any in ``arrays``, all owners' experts."""
        public = {name: array for name, array in arrays.items() if "/" not in name}
        public |= split_owners(arrays).get(PUBLIC, {})
        self.mixture.set_public_rows(public)
        owners = {owner: part for owner, part in split_owners(arrays).items() if owner != PUBLIC}
        if owners:
            # Sorted: arrays that come from a checkpoint are in no order of their own.
            self.experts = {owner: expert_of(owner, owners[owner]) for owner in sorted(owners)}
            self.show(list(self.experts))

    def show(self, owners: Sequence[str]) -> None:
        """Let the mixture consist of the public expert and these owners'."""
        for owner in self.mixture.owners:
            self.mixture.remove_expert(owner)
        for owner in owners:
            self.mixture.add_expert(self.experts[owner])

    def arrays(self, names: Iterable[str] | None = None, client: int = 0) -> Arrays:
        """Return the experts' arrays, on the CPU."""
        every = {f"{o}/{name}": array for o, expert in self.experts.items() for name, array in expert.arrays.items()}
        return every if names is None else {name: every[name] for name in names}

    def names(self, factors: Iterable[str]) -> tuple[str, ...]:
        """Names of the experts' arrays of these factors."""
        wanted = set(factors)
        return tuple(name for name in self.arrays() if name.rpartition(".")[2] in wanted)

    def parameter(self, name: str) -> nn.Parameter:
        """Return an array of an expert, [1, ...]."""
        return nn.Parameter(self.arrays([name])[name][None], requires_grad=False)


def split_owners(arrays: Mapping[str, torch.Tensor]) -> dict[str, Arrays]:
    """Divide arrays named ``OWNER/NAME`` by owner; names without an owner are left out."""
    owners: dict[str, Arrays] = {}
    for full, array in arrays.items():
        owner, slash, name = full.rpartition("/")
        if slash:
            owners.setdefault(owner, {})[name] = array
    return owners


def expert_of(owner: str, arrays: Arrays, digest: str = "") -> Expert:
    """Make an expert of its arrays; its rank is theirs."""
    a = next((array for name, array in arrays.items() if name.endswith(".lora_A")), None)
    return Expert(owner, FULL if a is None else len(a), arrays, digest)

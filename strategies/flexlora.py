"""FlexLoRA: the mean of the updates, factored anew by SVD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays, leading
from fedlora.config import Config, MethodSection, Positive
from fedlora.data.tokens import FederatedData
from fedlora.errors import InputError
from fedlora.ranks import RankedOptions
from fedlora.strategies.both_factors import BothFactors
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.replies import ReplyError
from fedlora.strategies.updates import Update, Updates, normalised, update_norm


class FlexLoRAOptions(RankedOptions):
    """``[method]`` of a FlexLoRA run."""

    final_rank: Positive | None = Field(
        default=None,
        description="Rank after the last round. The server lowers it from method.rank by the same factor in each "
        "round, and keeps the best approximation at each rank; method.rank throughout by default.",
    )

    @property
    def mixed(self) -> bool:
        """Whether clients have other ranks than the server's arrays."""
        return super().mixed or self.final_rank is not None


class FlexLoRA(BothFactors, RankedStrategy):
    """FlexLoRA: the mean of the updates, truncated to the rank by SVD (Bai et al., arXiv 2402.11505).

    The server factors G = sum p_i s B_i A_i = U S V^T and sends B = U_r S_r / s and A = V_r^T: the best approximation
    of the exact mean at rank r. What is lost is the tail of the singular values.

    Notes
    -----
    No m x n matrix is made: with [s p_1 B_1 ... s p_c B_c] = Q R and [A_1; ...; A_c]^T = Q' R', the SVD is that of
    R R'^T, of at most the sum of the ranks. Where G has fewer directions than the rank, B is 0 there, and A's rows are
    completed from those before, so that they can learn again. A client of a smaller rank is sent the leading rows and
    columns: the best approximation at its rank.

    With ``final_rank`` the rank falls from round to round, like that of LoRA-Squeeze within training (Vulić et al.,
    arXiv 2602.10993): after round t of T it is r (final_rank / r)^(t / T), rounded. The paper's randomised SVD of an
    m x n matrix is not needed: the factors at hand give the exact one.
    """

    name = "flexlora"
    title = "FlexLoRA: the mean of the updates, truncated by SVD"
    paper = "arXiv 2402.11505"
    reads_single_updates = True
    sends = "A and B of the client's rank: r (m + n) each way"
    persistent = False
    color, marker = "sky", "star"
    Options: ClassVar[type[MethodSection]] = FlexLoRAOptions
    options: FlexLoRAOptions
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-2, "sgd": 0.1}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._round = 1

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a final rank above the first."""
        super().check(config)
        options = config.method
        assert isinstance(options, FlexLoRAOptions)
        if options.final_rank is not None and options.final_rank > options.rank:
            remedy = f"is above method.rank = {options.rank}, from which the rank falls; lower it"
            raise InputError("method.final_rank", options.final_rank, remedy)

    def enter(self, server_round: int, exchange: int) -> None:
        """Take on the round's rank."""
        self._round = server_round
        super().enter(server_round, exchange)

    def rank_after(self, server_round: int) -> int:
        """Return the rank of the server's model after a round; 0 is the start."""
        first, last = self.options.rank, self.options.final_rank or self.options.rank
        return round(first * (last / first) ** (server_round / self.config.run.rounds))

    def rank_of(self, client: int) -> int:
        """Return the client's own rank, or the round's where that is smaller."""
        return min(super().rank_of(client), self.rank_after(self._round - 1))

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Return the mean of the heads, and the factors of the mean of the updates; it needs all clients' factors."""
        clients, rank = list(updates), self.rank_after(self._round)
        mean = self.head_mean(clients)
        if mean is None:
            return None
        shares, factors = normalised(clients), [update.arrays for update in clients]
        for name in [name for name in self.arrays if self.kind(name) == "lora_B"]:
            other = name.removesuffix("lora_B") + "lora_A"
            pairs = [(p, arrays[name], arrays[other]) for p, arrays in zip(shares, factors, strict=True)]
            # One s for all clients: it is the same in G and in what is sent.
            mean[name], mean[other] = truncated(pairs, self.arrays[other])
            mean[name][:, rank:] = 0
        return mean

    def export(self, adapted: AdaptedModel, data: FederatedData, folder: Path) -> None:
        """Write the result at the rank that it has."""
        rank = self.rank_after(max(self.replied, default=0))  # the last round may not count
        shapes = adapted.shapes_at(rank)
        arrays = {name: leading(array, shapes[name]) for name, array in adapted.arrays(shapes).items()}
        adapted.set_rank(rank)
        adapted.set_shared(arrays)
        super().export(adapted, data, folder)
        adapted.set_rank(self.options.rank)

    def check_update(self, update: Update) -> None:
        """Refuse factors that are finite, but whose product is not."""
        if not math.isfinite(update_norm(update)):
            raise ReplyError("its update is not finite")


def truncated(
    pairs: Sequence[tuple[float, torch.Tensor, torch.Tensor]], before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U_r S_r [m, r] and V_r^T [r, n] of G = sum p_i B_i A_i.

    Parameters
    ----------
    pairs : sequence of (float, Tensor [m, r_i], Tensor [r_i, n])
        p_i, B_i and A_i of every client.
    before : Tensor [r, n]
        The A of before, whose rank the result has. Its rows complete V_r^T where all ranks together are fewer.
    """
    rank = len(before)
    left = torch.cat([p * b.double() for p, b, _ in pairs], 1)
    right = torch.cat([a.double() for _, _, a in pairs])
    if len(right) < rank:
        left = torch.cat([left, left.new_zeros(len(left), rank)], 1)
        right = torch.cat([right, before.double()])
    (q, r), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r @ r_right.T, full_matrices=False)
    b, a = (q @ u)[:, :rank] * s[:rank], vh[:rank] @ q_right.T
    return b.to(before.dtype), a.to(before.dtype)

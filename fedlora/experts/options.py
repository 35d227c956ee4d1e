"""Options of runs with experts of mixed ranks, read by both halves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlora.config import Config, LearningRate, Positive
from fedlora.ranks import RankedOptions


class ExpertOptions(RankedOptions):
    """``[method]`` of a run with experts."""

    ranks: list[Positive | Literal["full"]] | dict[str, Positive | Literal["full"]] | None = Field(
        default=None,
        description="Rank, or \"full\", of each client's expert: a list in the clients' order, or a table by their "
        "names or numbers; method.rank for all by default.",
    )
    extraction: Literal["direct", "svd"] = Field(
        default="direct",
        description="How an expert gets its rank: trained at it (direct), or trained in full and truncated (svd).",
    )
    num_experts_per_tok: Positive | None = Field(
        default=None, description="Number of experts of the mixture that are active for a token; all by default."
    )
    norm_topk_prob: bool = Field(
        default=True, description="Let the active experts' weights sum to 1 where fewer than all are active."
    )
    router_init: Literal["documents", "public"] = Field(
        default="documents",
        description="How a router row is initialised: from the owner's own documents (under privacy with noise, "
        "which is "
        "charged), or from data.public.",
    )
    router_documents: Positive = Field(
        default=1000, description="Maximum number of documents from which a router row is initialised."
    )
    router_tuning_steps: Annotated[int, Field(ge=0, le=100_000)] = Field(
        default=0, description="Steps in which the server tunes the router on data.public at the end."
    )
    router_tuning_learning_rate: LearningRate = Field(default=1e-3, description="Learning rate of the router's tuning.")


def expert_options(config: Config) -> ExpertOptions:
    """Return the options of a run with experts."""
    assert isinstance(config.method, ExpertOptions)
    return config.method

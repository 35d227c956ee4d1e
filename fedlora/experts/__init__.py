"""Experts of data owners, each of its own rank, and the mixture that they make with the public model."""

from fedlora.experts.expert import FULL, Expert, Rank
from fedlora.experts.mixture import Mixture, MixtureConfig

__all__ = ["FULL", "Expert", "Mixture", "MixtureConfig", "Rank"]

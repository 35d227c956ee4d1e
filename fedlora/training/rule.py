"""What a method may say of local steps: which arrays a step trains, and what becomes of their gradients."""

from __future__ import annotations

import torch


class StepRule:
    """Every step trains all arrays, by their gradients as they are; a subclass says otherwise.

    A client half gives one to :func:`~fedlora.training.cohort.train_cohort`. It has no state: a client's steps must not
    depend on who shares its pass.
    """

    def trains(self, kind: str, step: int) -> bool:
        """Say whether a step trains the arrays of a kind.

        Those that it does not train keep their values and the optimiser's state of them; under DP their gradients are
        neither counted in an example's norm nor released, and no noise is added.

        Parameters
        ----------
        kind : str
            See :mod:`fedlora.roles`.
        step : int
            In the exchange, from 0.
        """
        return True

    def gradient(self, kind: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient that the optimiser steps by: under DP a function of what was noised already.

        Parameters
        ----------
        kind : str
        gradient : Tensor [K, ...]
            Clipped, noised and averaged, of each client of the pass.
        """
        return gradient

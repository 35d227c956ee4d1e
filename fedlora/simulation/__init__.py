"""Simulated clients: a Flower Grid on Ray actors or in one process, and the workers behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.simulation.simulated_grid import SimulatedGrid

if TYPE_CHECKING:
    from fedlora.simulation.local_grid import LocalGrid
    from fedlora.simulation.ray_grid import RayGrid

__all__ = ["CohortClientApp", "LocalGrid", "RayGrid", "SimulatedGrid"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: real nodes use the envelope and the worker without Ray.
    if name == "RayGrid":
        from fedlora.simulation.ray_grid import RayGrid

        return RayGrid
    if name == "LocalGrid":
        from fedlora.simulation.local_grid import LocalGrid

        return LocalGrid
    raise AttributeError(f"module 'fedlora.simulation' has no attribute {name!r}")

"""Simulated clients: a Flower Grid on Ray actors or in one process, and the workers behind it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.simulation.cohort_app import CohortClientApp
    from fedlora.simulation.local_grid import LocalGrid
    from fedlora.simulation.ray_grid import RayGrid
    from fedlora.simulation.simulated_grid import SimulatedGrid

__all__ = ["CLIENT_APP", "CohortClientApp", "LocalGrid", "RayGrid", "SimulatedGrid"]

CLIENT_APP = "fedlora.clients.client_app:app"
"""fedlora's own client half, by its name alone."""

_MODULES = {
    "CohortClientApp": "cohort_app",
    "LocalGrid": "local_grid",
    "RayGrid": "ray_grid",
    "SimulatedGrid": "simulated_grid",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: real nodes use the envelope and the worker without Ray, and Ray starts without torch.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

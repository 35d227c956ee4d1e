"""Simulated clients: a Flower Grid on Ray actors or in one process, and the workers behind it."""

from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.simulation.local_grid import LocalGrid
from fedlora.simulation.ray_grid import RayGrid

__all__ = ["CohortClientApp", "LocalGrid", "RayGrid"]

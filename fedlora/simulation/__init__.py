"""Simulated clients: a Flower Grid on Ray actors, and the workers behind it."""

from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.simulation.ray_grid import RayGrid

__all__ = ["CohortClientApp", "RayGrid"]

"""Figures: how they look, what they show, and, in :mod:`~fedlora.figures.draw` alone, matplotlib."""

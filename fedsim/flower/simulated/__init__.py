"""Flower's own strategies and client apps, unchanged, in virtual time."""

from fedsim.flower.simulated.strategy import App, FlowerApp

__all__ = ["App", "FlowerApp"]

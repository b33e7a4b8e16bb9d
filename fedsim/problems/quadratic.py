"""Quadratic bowls, one per client: every claim about an optimum can be checked against a closed form."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, number, whole
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.vectors import Layout


class Quadratic(Problem):
    """Client ``i`` has ``f_i(x) = 1/2 sum_j a_ij (x_j - b_ij)^2``; the aim is the uniform mean of all ``f_i``.

    ``a_ij ~ U(low, high)`` and ``b_ij ~ spread N(0, 1)``, a key per client, so that client ``i`` is the same
    among however many others. Every client counts as one example, and batches play no part. float64.

    Attributes:
        curvature: ``a``, ``[clients, dimension]``.
        centres: ``b``, ``[clients, dimension]``: the clients' own optima.

    Args:
        dimension: how many parameters.
        low: least curvature.
        high: largest curvature.
        spread: standard deviation of the clients' own optima.
        noise: standard deviation of the normal noise on every item of a gradient; 0 gives exact gradients.

    Raises:
        ConfigError: for arguments out of range.
    """

    def __init__(
        self, dimension: int = 10, low: float = 0.2, high: float = 2.0, spread: float = 3.0, noise: float = 0.0
    ) -> None:
        self.dimension = whole("dimension", dimension, least=1, most=10**7)
        self.low = number("low", low, above=0)
        self.high = number("high", high, above=0)
        if self.high < self.low:
            raise ConfigError(f"high={high}: must be at least low={low}")
        self.spread = number("spread", spread, least=0)
        self.noise = number("noise", noise, least=0)
        self.target_metric = ("distance", "below")
        self.layout = Layout.flat(self.dimension)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw every client's bowl."""
        ids = np.arange(clients)
        self.clients = clients
        self.samples = np.ones(clients, dtype=np.int64)
        share = randomness("curvature", ids).uniform(self.dimension)
        self.curvature: NDArray[np.float64] = self.low + (self.high - self.low) * share
        self.centres: NDArray[np.float64] = self.spread * randomness("centre", ids).normal(self.dimension)

    @property
    def optimum(self) -> NDArray[np.float64]:
        """``[dimension]``: where the mean of all ``f_i`` is least, ``sum_i a_i b_i / sum_i a_i`` item by item."""
        optimum: NDArray[np.float64] = (self.curvature * self.centres).sum(axis=0) / self.curvature.sum(axis=0)
        return optimum

    def initial(self) -> Tensor:
        """Zeros ``[dimension]``."""
        return self.layout.zeros()

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """``a_i (x - b_i)``, plus normal noise keyed by ``noise`` if there is to be any."""
        slope = self.curvature[client] * (x.numpy() - self.centres[client])
        if self.noise:
            slope = slope + self.noise * Randomness(noise)("gradient noise").normal(self.dimension)
        return torch.from_numpy(slope)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """``loss``, the mean of all ``f_i``, and ``distance``, squared, to the optimum."""
        point = x.numpy()
        loss = 0.5 * (self.curvature * (point - self.centres) ** 2).sum(axis=1).mean()
        return {"loss": float(loss), "distance": float(((point - self.optimum) ** 2).sum())}

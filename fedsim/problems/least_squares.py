"""Linear least squares on data drawn client by client: an optimum in closed form, with mini-batches."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, number, one_of, whole
from fedsim.problems.base import WEIGHTINGS, Problem, objective_weights
from fedsim.problems.chain import Chain, Layer
from fedsim.rng import Randomness
from fedsim.vectors import Layout

MOST_ENTRIES = 2**29
"""Most features of all examples together, 4 GB of them."""

LARGEST = 1e6
"""The largest scale of features, measurements and their errors: its powers stay far from what float64 can hold."""


class LeastSquares(Problem):
    """Client ``i`` has ``f_i(x) = 1/(2 n_i) ||y_i - H_i x||^2 + l2/2 ||x||^2``; the aim is ``f = sum_i p_i f_i``.

    Client ``i`` measures ``y_i = H_i x_i + noise N(0, I)``, where ``x_i = x_0 + spread N(0, I)`` and
    ``x_0 ~ N(0, I)`` is common to all. Its ``n_i`` is uniform on ``samples_low .. samples_high``, and the items of
    its ``H_i [n_i, dimension]`` are ``N(mu_i, s_i)`` with ``mu_i ~ U(-shift, shift)`` and
    ``s_i ~ U(variance_low, variance_high)``. All is keyed by the client, so that client ``i`` is the same among
    however many others. By default no client alone could tell ``x_i``; all together must determine the optimum.
    float64.

    Source: the data of RERCE-Fed (arXiv:2409.13451) in its published code, where ``dimension=128``, ``samples_low=51``
    and ``samples_high=90``. The defaults keep that ratio at a sixth of the size, where SGD on batches of 10 examples
    is stable at a learning rate of 0.1; with 128 parameters it takes 0.01.

    Attributes:
        features: ``[n, dimension]``, all examples' rows of ``H``, client by client.
        targets: ``[n]``, their ``y``.
        starts: ``[clients + 1]``: client ``i`` holds the rows ``starts[i]:starts[i + 1]``.
        weights: ``[clients]``: ``p``, in sum 1.
        hessian: ``[dimension, dimension]``, of the aim.
        optimum: ``[dimension]``: where the aim is least.

    Args:
        dimension: how many parameters.
        samples_low: least examples of a client.
        samples_high: most examples of a client.
        shift: the largest mean of a client's features, at most 1e6, as all that follow but ``l2``, which may be 1e9.
        variance_low: least variance of a client's features.
        variance_high: largest variance of a client's features.
        noise: standard deviation of the measurements' error.
        spread: standard deviation of what clients measure about what is common to them; 0 makes it the same for all.
        l2: factor of the penalty ``1/2 ||x||^2``.
        weighting: ``samples`` makes ``p_i = n_i / n``, ``uniform`` makes it ``1 / clients``.

    Raises:
        ConfigError: for arguments out of range; from :meth:`prepare` if the clients' examples together are too many
            to be held, or too few to determine the optimum, or that is too far away to be computed with.
    """

    def __init__(
        self,
        dimension: int = 20,
        samples_low: int = 8,
        samples_high: int = 14,
        shift: float = 0.5,
        variance_low: float = 0.5,
        variance_high: float = 1.5,
        noise: float = 0.01,
        spread: float = 0.0,
        l2: float = 0.0,
        weighting: str = "samples",
    ) -> None:
        self.dimension = whole("dimension", dimension, least=1, most=4096)
        self.samples_low = whole("samples_low", samples_low, least=1, most=10**6)
        self.samples_high = whole("samples_high", samples_high, least=self.samples_low, most=10**6)
        self.shift = number("shift", shift, least=0, most=LARGEST)
        self.variance_low = number("variance_low", variance_low, above=0, most=LARGEST)
        self.variance_high = number("variance_high", variance_high, least=self.variance_low, most=LARGEST)
        self.noise = number("noise", noise, least=0, most=LARGEST)
        self.spread = number("spread", spread, least=0, most=LARGEST)
        self.l2 = number("l2", l2, least=0, most=1e9)
        self.weighting = one_of("weighting", weighting, WEIGHTINGS)
        self.target_metric = ("distance", "below")
        self.layout = Layout.flat(self.dimension)

    # ---- preparation -----------------------------------------------------------------------------

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw every client's examples and find the optimum."""
        ids = np.arange(clients)
        extra = randomness("sample count", ids).integers(self.samples_high - self.samples_low + 1)
        self.clients, self.samples = clients, self.samples_low + extra
        self.starts = np.concatenate([[0], np.cumsum(self.samples)])
        if int(self.starts[-1]) * self.dimension > MOST_ENTRIES:
            raise ConfigError(
                f"problem.dimension={self.dimension}: clients={clients} hold {self.starts[-1]} examples, "
                f"{self.starts[-1] * self.dimension / 2**27:.0f} GB; at most 4 GB can be held"
            )
        self._draw(randomness)
        self.weights = objective_weights(self.samples, self.weighting)
        self._solve()

    def _draw(self, randomness: Randomness) -> None:
        ids = np.arange(self.clients)
        truth = randomness("truth").normal(self.dimension)
        means = self.shift * (2 * randomness("feature mean", ids).uniform() - 1)
        share = randomness("feature variance", ids).uniform()
        deviations = np.sqrt(self.variance_low + (self.variance_high - self.variance_low) * share)
        features = np.empty((int(self.starts[-1]), self.dimension))
        targets = np.empty(len(features))
        for client, count in enumerate(self.samples.tolist()):
            rows = slice(self.starts[client], self.starts[client + 1])
            drawn = randomness("features", client).normal((count, self.dimension))
            features[rows] = means[client] + deviations[client] * drawn
            own = truth + self.spread * randomness("client truth", client).normal(self.dimension)
            error = self.noise * randomness("measurement error", client).normal(count)
            targets[rows] = (features[rows] * own).sum(axis=1) + error
        self.features, self.targets = torch.from_numpy(features), torch.from_numpy(targets)

    def _solve(self) -> None:
        share = torch.from_numpy(np.repeat(self.weights / self.samples, self.samples))
        penalty = self.l2 * torch.eye(self.dimension, dtype=torch.float64)
        self.hessian = (self.features * share[:, None]).T @ self.features + penalty
        curvature = torch.linalg.eigvalsh(self.hessian)
        if curvature[0] <= 1e-12 * curvature[-1]:
            raise ConfigError(
                f"problem.dimension={self.dimension}: the {len(self.targets)} examples of clients={self.clients} do "
                f"not determine the optimum; it takes {self.dimension} that differ, or l2 > 0"
            )
        self.optimum = self.layout.zeros()
        for _ in range(3):  # once would do if it were not for rounding
            slope = self.features.T @ (share * self._residuals(self.optimum)) + self.l2 * self.optimum
            self.optimum = self.optimum - torch.linalg.solve(self.hessian, slope)
        fit = float((share * self._residuals(self.optimum) ** 2).sum())
        distance = float((self.optimum**2).sum())
        self._least = 0.5 * (fit + self.l2 * distance)
        if not math.isfinite(self._least + distance):
            raise ConfigError(
                f"problem.variance_low={self.variance_low}: the optimum is too far away to be computed with; take "
                "variances nearer to 1, or a larger l2"
            )

    def _residuals(self, x: Tensor) -> Tensor:
        return self.features @ x - self.targets

    # ---- what training and records need ----------------------------------------------------------

    def initial(self) -> Tensor:
        """Zeros ``[dimension]``."""
        return self.layout.zeros()

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """One client's ``H_i [n_i, dimension]`` and ``y_i [n_i]``; not to be written to."""
        rows = slice(self.starts[client], self.starts[client + 1])
        return self.features[rows], self.targets[rows]

    def chain(self) -> Chain:
        """One layer of one output without a bias."""
        layer = Layer(self.dimension, 1, weight=0, bias=None)
        return Chain((layer,), "squared", self.features, self.targets, self._rows, self.l2)

    def _rows(self, clients: NDArray[np.int64]) -> Tensor:
        held = [np.arange(self.starts[client], self.starts[client + 1]) for client in clients.tolist()]
        return torch.from_numpy(np.concatenate(held))

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """``H^T (H x - y) / m + l2 x`` over the ``m`` examples of a batch, at ``x [dimension]``; it is exact."""
        features, targets = self.examples(client)
        if batch is not None:
            features, targets = features.index_select(0, batch), targets.index_select(0, batch)
        return features.T @ (features @ x - targets) / max(len(targets), 1) + self.l2 * x

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """``loss``, the aim; ``gap``, how far it is above its least; ``distance``, squared, to the optimum.

        The gap is taken from the distance and the curvature: as a difference of losses it would drown in rounding.
        """
        away = x - self.optimum
        gap = 0.5 * float((self.hessian @ away * away).sum())
        return {"loss": self._least + gap, "gap": gap, "distance": float((away**2).sum())}

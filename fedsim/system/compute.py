"""How long local work takes: a speed per client, and optionally a jitter per task.

A *step* is one local mini-batch step. Each client draws its mean seconds per step once, keyed by
(seed, client); a task's jitter is keyed by (seed, client, that client's own n-th task). Parameters are
in seconds, results in integer nanoseconds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import number, one_of, seconds
from fedsim.rng import Draw, Randomness
from fedsim.system.base import WIDEST, Ids, Nanoseconds, nanoseconds


class Compute(ABC):
    """The compute model: a law of the clients' speeds, and jitter around them.

    Args:
        jitter: coefficient of variation (standard deviation over mean) of a factor with mean 1 that
            multiplies each task's duration; 0 draws nothing.
        jitter_law: ``lognormal``, or ``exponential``: ``1 - jitter + jitter * Exp(1)``, which needs
            ``jitter <= 1`` and at 1 makes task times exponential.

    Raises:
        ConfigError: if ``jitter`` is negative or too large for its law, or the law is unknown.
    """

    seconds_per_step: NDArray[np.float64]
    """Mean seconds of one local step, ``[clients]``; there after :meth:`prepare`."""

    def __init__(self, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        self.jitter_law = one_of("jitter_law", jitter_law, ("lognormal", "exponential"))
        self.jitter = number("jitter", jitter, least=0, most=1 if jitter_law == "exponential" else 100)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw the speeds of clients ``0 .. clients - 1``."""
        self._randomness = randomness
        self.seconds_per_step = self._speeds(clients, randomness("compute.speed", np.arange(clients)))

    def durations(self, clients: Ids, steps: int | NDArray[np.int64], nth: NDArray[np.int64]) -> Nanoseconds:
        """How long the ``nth[i]``-th task of ``clients[i]`` computes for ``steps[i]`` steps: int64 ns ``[k]``.

        No steps take no time.
        """
        seconds = self.seconds_per_step[clients] * steps
        if self.jitter > 0:
            seconds = seconds * self._jitter_factors(self._randomness("compute.jitter", clients, nth))
        return nanoseconds(seconds)

    def expected(self, clients: Ids, steps: int | NDArray[np.int64]) -> Nanoseconds:
        """As :meth:`durations` on average, that is without jitter: int64 ns ``[k]``."""
        return nanoseconds(self.seconds_per_step[clients] * steps)

    def _jitter_factors(self, draw: Draw) -> NDArray[np.float64]:
        if self.jitter_law == "exponential":
            return 1.0 - self.jitter + self.jitter * draw.exponential()
        variance = math.log1p(self.jitter**2)  # of the factor's logarithm
        return np.exp(math.sqrt(variance) * draw.normal() - variance / 2)

    @abstractmethod
    def _speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Seconds per step ``[clients]``; ``draw`` holds one key per client."""


class Constant(Compute):
    """Every client takes ``mean`` seconds per step."""

    def __init__(self, mean: float = 0.1, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        super().__init__(jitter, jitter_law)
        self.mean = seconds("mean", mean, above=0)

    def _speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        return np.full(clients, self.mean)


class Uniform(Compute):
    """Seconds per step uniform between ``low`` and ``high``."""

    def __init__(
        self, low: float = 0.05, high: float = 0.5, jitter: float = 0.0, jitter_law: str = "lognormal"
    ) -> None:
        super().__init__(jitter, jitter_law)
        self.low = seconds("low", low, least=0)
        self.high = seconds("high", high, least=self.low, above=0)

    def _speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        return self.low + (self.high - self.low) * draw.uniform()


class Lognormal(Compute):
    """Seconds per step lognormal with mean ``mean``; ``sigma`` is the standard deviation of their logarithm.

    The median is ``mean * exp(-sigma**2 / 2)``; ``sigma = 0`` is :class:`Constant`.
    """

    def __init__(
        self, mean: float = 0.1, sigma: float = 1.0, jitter: float = 0.0, jitter_law: str = "lognormal"
    ) -> None:
        super().__init__(jitter, jitter_law)
        self.mean = seconds("mean", mean, above=0)
        self.sigma = number("sigma", sigma, least=0, most=WIDEST)

    def _speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        return self.mean * np.exp(self.sigma * draw.normal() - self.sigma**2 / 2)


class Exponential(Compute):
    """Seconds per step exponential with mean ``mean``."""

    def __init__(self, mean: float = 0.1, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        super().__init__(jitter, jitter_law)
        self.mean = seconds("mean", mean, above=0)

    def _speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        return self.mean * draw.exponential()

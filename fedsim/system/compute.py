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
from fedsim.system.base import WIDEST, Ids, Nanoseconds, nanoseconds, positive_normals

LARGEST_JITTER = {"lognormal": 100.0, "exponential": 1.0, "normal": 0.3}
"""The largest coefficient of variation of a task's duration under each law."""


class Compute(ABC):
    """The compute model: a law of the clients' speeds, and jitter around them.

    Args:
        jitter: coefficient of variation (standard deviation over mean) of a factor with mean 1 that
            multiplies each task's duration; 0 draws nothing.
        jitter_law: ``lognormal``; ``exponential``: ``1 - jitter + jitter * Exp(1)``, which needs ``jitter <= 1``
            and at 1 makes task times exponential; or ``normal``, drawn again until above 0, which needs
            ``jitter <= 0.3``: there the cut at 0 raises the mean by less than 0.05 %.

    Raises:
        ConfigError: if ``jitter`` is negative or too large for its law, or the law is unknown.
    """

    seconds_per_step: NDArray[np.float64]
    """Mean seconds of one local step, ``[clients]``; there after :meth:`prepare`."""

    def __init__(self, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        self.jitter_law = one_of("jitter_law", jitter_law, LARGEST_JITTER)
        self.jitter = number("jitter", jitter, least=0, most=LARGEST_JITTER[self.jitter_law])

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw the speeds of clients ``0 .. clients - 1``."""
        self._randomness = randomness
        self.seconds_per_step = self.speeds(clients, randomness("compute.speed", np.arange(clients)))

    def durations(self, clients: Ids, steps: int | NDArray[np.int64], nth: NDArray[np.int64]) -> Nanoseconds:
        """How long the ``nth[i]``-th task of ``clients[i]`` computes for ``steps[i]`` steps: int64 ns ``[k]``.

        No steps take no time.
        """
        seconds = self.seconds_per_step[clients] * steps
        if self.jitter > 0:
            seconds = seconds * self._jitter_factors(self.jitter_draw(clients, nth))
        return nanoseconds(seconds)

    def jitter_draw(self, clients: int | Ids, nth: int | NDArray[np.int64]) -> Draw:
        """The key of the jitter of clients' ``nth`` tasks."""
        return self._randomness("compute.jitter", clients, nth)

    def expected(self, clients: Ids, steps: int | NDArray[np.int64]) -> Nanoseconds:
        """As :meth:`durations` on average, that is without jitter: int64 ns ``[k]``."""
        return nanoseconds(self.seconds_per_step[clients] * steps)

    def _jitter_factors(self, draw: Draw) -> NDArray[np.float64]:
        if self.jitter_law == "exponential":
            return 1.0 - self.jitter + self.jitter * draw.exponential()
        if self.jitter_law == "normal":
            return positive_normals(draw, self.jitter)
        variance = math.log1p(self.jitter**2)  # of the factor's logarithm
        return np.exp(math.sqrt(variance) * draw.normal() - variance / 2)

    @abstractmethod
    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Seconds per step ``[clients]``; ``draw`` holds one key per client, so nobody's speed depends on others."""


class Constant(Compute):
    """Every client takes ``mean`` seconds per step."""

    def __init__(self, mean: float = 0.1, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        super().__init__(jitter, jitter_law)
        self.mean = seconds("mean", mean, above=0)

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """The same for all."""
        return np.full(clients, self.mean)


class Uniform(Compute):
    """Seconds per step uniform between ``low`` and ``high``."""

    def __init__(
        self, low: float = 0.05, high: float = 0.5, jitter: float = 0.0, jitter_law: str = "lognormal"
    ) -> None:
        super().__init__(jitter, jitter_law)
        self.low = seconds("low", low, least=0)
        self.high = seconds("high", high, least=self.low, above=0)

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Between both ends."""
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

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Around the median ``mean * exp(-sigma**2 / 2)``."""
        return self.mean * np.exp(self.sigma * draw.normal() - self.sigma**2 / 2)


class Exponential(Compute):
    """Seconds per step exponential with mean ``mean``; in FedCompass (arXiv:2309.14675), too."""

    def __init__(self, mean: float = 0.1, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        super().__init__(jitter, jitter_law)
        self.mean = seconds("mean", mean, above=0)

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Around the mean."""
        return self.mean * draw.exponential()


class Normal(Compute):
    """Seconds per step normal with mean ``mean`` and standard deviation ``spread * mean``, always above 0.

    FedCompass (arXiv:2309.14675) in the released code of its authors, with spread 0.3 and a normal jitter of 0.05.
    That code draws the speeds of all clients again until every one is above 0; here only a client at or below 0
    draws again, so that its speed depends on nobody else's. The cut at 0 raises the mean by the factor
    ``1 + spread * pdf(1 / spread) / cdf(1 / spread)`` of the standard normal: 1.0005 at 0.3, 1.29 at 1.

    Args:
        mean: seconds per local step, before the cut at 0.
        spread: standard deviation over mean, before the cut at 0; at most 1.
        jitter: as in :class:`Compute`.
        jitter_law: as in :class:`Compute`.

    Raises:
        ConfigError: if an argument is out of range.
    """

    def __init__(
        self, mean: float = 0.1, spread: float = 0.3, jitter: float = 0.05, jitter_law: str = "normal"
    ) -> None:
        super().__init__(jitter, jitter_law)
        self.mean = seconds("mean", mean, above=0)
        self.spread = number("spread", spread, least=0, most=1)

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Above 0."""
        return self.mean * positive_normals(draw, self.spread)


class Linear(Compute):
    """Seconds per step fall linearly from client 0, the slowest, to the last: nothing is drawn.

    Scenario F-X of FedFix (Fraboni et al., arXiv:2206.10189), with X the ``spread``: the last client needs
    ``slowest * (1 - spread / 100)``, a client alone ``slowest``. A client's speed therefore depends on how many
    clients there are.

    Args:
        slowest: seconds per local step of client 0.
        spread: per cent of it that the fastest client saves, below 100; 0 makes all alike.
        jitter: as in :class:`Compute`.
        jitter_law: as in :class:`Compute`.

    Raises:
        ConfigError: if an argument is out of range.
    """

    def __init__(
        self, slowest: float = 0.1, spread: float = 80.0, jitter: float = 0.0, jitter_law: str = "lognormal"
    ) -> None:
        super().__init__(jitter, jitter_law)
        self.slowest = seconds("slowest", slowest, above=0)
        self.spread = number("spread", spread, least=0, below=100)

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """From the slowest down."""
        position = np.arange(clients) / max(1, clients - 1)
        return self.slowest * (1.0 - self.spread / 100 * position)

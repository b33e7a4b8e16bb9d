"""How long messages travel: a latency, then bytes at the client's own bandwidth.

Parameters are megabits (10^6 bits) per second and seconds one way; message sizes are bytes, bandwidths
inside are bytes per second, results integer nanoseconds. The server's own link is never the bottleneck,
so client ids here are ``0 .. clients - 1``; the server has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import number, seconds
from fedsim.kernel import to_ns
from fedsim.rng import Draw, Randomness
from fedsim.system.base import WIDEST, Ids, Nanoseconds, nanoseconds

BYTES_PER_MEGABIT = 125_000

MOBILE_DOWN = (2.4, 4.3, 17.3)
"""Least, median and largest mean download of the 19 phones that :class:`Mobile` is fitted to, in Mbit/s."""

MOBILE_UP = (0.43, 3.3, 6.6)
"""The same of their uploads."""

MOBILE_SIGMA = 0.6
"""Standard deviation of the logarithm, before it is cut to the range."""

SLOWEST = 1e-10
"""Bytes per second below which nothing changes: one byte takes longer than the longest span there is."""

Bytes = int | NDArray[np.int64]
"""A message size in bytes: one for all, or one each ``[k]``."""


class Network(ABC):
    """The network model: a bandwidth per client and direction, and one latency for all.

    Args:
        latency: seconds one way before the first byte arrives.

    Raises:
        ConfigError: if ``latency`` is negative.
    """

    down_bytes_per_second: NDArray[np.float64]
    """Server to client, ``[clients]``; infinity where bytes cost no time. There after :meth:`prepare`."""

    up_bytes_per_second: NDArray[np.float64]
    """Client to server, ``[clients]``."""

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = seconds("latency", latency, least=0)
        self._latency_ns = to_ns(self.latency)

    @property
    def latency_ns(self) -> int:
        """``latency`` in nanoseconds."""
        return self._latency_ns

    @abstractmethod
    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw the bandwidths of clients ``0 .. clients - 1``."""

    def down(self, clients: Ids, nbytes: Bytes) -> Nanoseconds:
        """Time for ``nbytes`` from the server to each client: latency + bytes / bandwidth, int64 ns ``[k]``."""
        return self._latency_ns + _transfer(nbytes, self.down_bytes_per_second[clients])

    def up(self, clients: Ids, nbytes: Bytes) -> Nanoseconds:
        """Time for ``nbytes`` from each client to the server: latency + bytes / bandwidth, int64 ns ``[k]``."""
        return self._latency_ns + _transfer(nbytes, self.up_bytes_per_second[clients])

    def link(self, src: Ids, dst: Ids, nbytes: Bytes) -> Nanoseconds:
        """Time for ``nbytes`` from peer to peer, at the slower of ``src``'s up and ``dst``'s down: int64 ns ``[k]``."""
        slower = np.minimum(self.up_bytes_per_second[src], self.down_bytes_per_second[dst])
        return self._latency_ns + _transfer(nbytes, slower)

    def moved_down(self, clients: Ids, nbytes: Bytes, elapsed: Nanoseconds) -> NDArray[np.int64]:
        """Bytes of a download that are across ``elapsed`` ns after it began: int64 ``[k]``.

        None during the latency, then in proportion to time, rounded down; all of them from its full
        duration on.
        """
        return self._moved(nbytes, elapsed, self.down_bytes_per_second[clients])

    def moved_up(self, clients: Ids, nbytes: Bytes, elapsed: Nanoseconds) -> NDArray[np.int64]:
        """Bytes of an upload that are across ``elapsed`` ns after it began, as :meth:`moved_down`: int64 ``[k]``."""
        return self._moved(nbytes, elapsed, self.up_bytes_per_second[clients])

    def moved_link(self, src: Ids, dst: Ids, nbytes: Bytes, elapsed: Nanoseconds) -> NDArray[np.int64]:
        """Bytes of a message between peers that are across ``elapsed`` ns after it was sent, as :meth:`moved_down`."""
        slower = np.minimum(self.up_bytes_per_second[src], self.down_bytes_per_second[dst])
        return self._moved(nbytes, elapsed, slower)

    def _moved(self, nbytes: Bytes, elapsed: Nanoseconds, rates: NDArray[np.float64]) -> NDArray[np.int64]:
        whole = _transfer(nbytes, rates)
        sent = np.clip(np.asarray(elapsed, dtype=np.int64) - self._latency_ns, 0, whole)
        # Multiplied before divided, so that half of the time is exactly half of the bytes.
        part = np.floor(sent * np.asarray(nbytes, dtype=np.float64) / np.maximum(whole, 1)).astype(np.int64)
        done = np.asarray(elapsed) >= self._latency_ns + whole
        return np.where(done, nbytes, np.minimum(part, nbytes))


def _transfer(nbytes: Bytes, rates: NDArray[np.float64]) -> Nanoseconds:
    return nanoseconds(nbytes / np.maximum(rates, SLOWEST))


class NoNetwork(Network):
    """Messages take no time at all."""

    def __init__(self) -> None:
        super().__init__()

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Give every client infinite bandwidth."""
        self.down_bytes_per_second = np.full(clients, np.inf)
        self.up_bytes_per_second = np.full(clients, np.inf)


class Constant(Network):
    """Every client has the same link: ``down`` and ``up`` in Mbit/s, ``latency`` in seconds one way."""

    def __init__(self, down: float = 20.0, up: float = 5.0, latency: float = 0.05) -> None:
        super().__init__(latency)
        self.down_mbps = number("down", down, above=0)
        self.up_mbps = number("up", up, above=0)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Give every client the same bandwidths."""
        self.down_bytes_per_second = np.full(clients, self.down_mbps * BYTES_PER_MEGABIT)
        self.up_bytes_per_second = np.full(clients, self.up_mbps * BYTES_PER_MEGABIT)


class Lognormal(Network):
    """Lognormal bandwidths with medians ``down`` and ``up`` in Mbit/s, drawn apart from each other.

    ``sigma`` is the standard deviation of their logarithm, ``latency`` is in seconds one way.
    """

    def __init__(self, down: float = 20.0, up: float = 5.0, sigma: float = 1.0, latency: float = 0.05) -> None:
        super().__init__(latency)
        self.down_mbps = number("down", down, above=0)
        self.up_mbps = number("up", up, above=0)
        self.sigma = number("sigma", sigma, least=0, most=WIDEST)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw every client's bandwidths, keyed by (seed, direction, client)."""
        ids = np.arange(clients)
        self.down_bytes_per_second = self._bandwidths(self.down_mbps, randomness("network.down", ids))
        self.up_bytes_per_second = self._bandwidths(self.up_mbps, randomness("network.up", ids))

    def _bandwidths(self, median: float, draw: Draw) -> NDArray[np.float64]:
        return median * BYTES_PER_MEGABIT * np.exp(self.sigma * draw.normal())


class Mobile(Network):
    """Bandwidths of phones on mobile networks, after the 19 users measured for FLASH (arXiv:2006.06983).

    Fitted, to the users' means in that project's file of speeds: the least, median and largest download (2.4, 4.3,
    17.3 Mbit/s) and upload (0.43, 3.3, 6.6). Below the median and above it a client's bandwidth is lognormal around
    the median, cut at the least and at the largest, so these three hold exactly. One ``sigma`` of 0.6 serves both
    directions: the logarithms then deviate by 0.45 down and 0.49 up (users: 0.48 and 0.70, or by their quartiles
    0.49 and 0.46: two users had hardly any upload), and the means are 5.25 and 3.38 Mbit/s (users: 5.85 and 3.67).

    Not modelled: that users' measurements vary (coefficient of variation about 0.37), since here a client's bandwidth
    is fixed; and that down and up correlate (0.45 between the logarithms, of 19 users), since they are drawn apart.
    The file says kb/s, read here as kilobits; FLASH's own code takes it for kilobytes, which is ``scale=8``.

    Args:
        scale: factor on all bandwidths.
        latency: seconds one way before the first byte; not part of the measurements.

    Raises:
        ConfigError: if an argument is out of range.
    """

    def __init__(self, scale: float = 1.0, latency: float = 0.05) -> None:
        super().__init__(latency)
        self.scale = number("scale", scale, above=0)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw every client's bandwidths, keyed by (seed, direction, client)."""
        ids = np.arange(clients)
        unit = self.scale * BYTES_PER_MEGABIT
        self.down_bytes_per_second = unit * _around_median(randomness("network.down", ids), *MOBILE_DOWN)
        self.up_bytes_per_second = unit * _around_median(randomness("network.up", ids), *MOBILE_UP)


def _around_median(draw: Draw, least: float, median: float, most: float) -> NDArray[np.float64]:
    """Lognormal on each side of its median, cut at ``least`` and ``most``: by inverting the distribution function."""
    from scipy.special import ndtr, ndtri  # late: a third of a second that other networks need not pay

    ends = ndtr(np.log(np.array([least, median, most]) / median) / MOBILE_SIGMA)
    quantile = np.interp(draw.uniform(), [0.0, 0.5, 1.0], ends)
    return median * np.exp(MOBILE_SIGMA * np.asarray(ndtri(quantile)))

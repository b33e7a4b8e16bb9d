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
    return nanoseconds(nbytes / rates)


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

"""Devices the tests script by hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.kernel import to_ns
from fedsim.rng import Draw, Randomness
from fedsim.system import availability, compute


class Scripted(availability.Availability):
    """Presence by a script of (seconds, client, online)."""

    def __init__(self, *script: tuple[float, int, bool], absent: tuple[int, ...] = ()) -> None:
        self.script, self.absent = sorted(script), list(absent)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        self._online = np.ones(clients, dtype=np.bool_)
        self._online[self.absent] = False
        self.left = [(to_ns(at), client, online) for at, client, online in self.script]

    def next_change(self) -> int | None:
        return self.left[0][0] if self.left else None

    def advance(self, now: int) -> availability.Change:
        before = self._online.copy()
        while self.left and self.left[0][0] <= now:
            _, client, online = self.left.pop(0)
            self._online[client] = online
        return np.flatnonzero(self._online & ~before), np.flatnonzero(before & ~self._online)


class Given(compute.Compute):
    """Seconds per step as listed."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def _speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        return np.array(self.seconds, dtype=np.float64)

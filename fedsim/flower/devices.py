"""What the engine asks the simulator's device models, answered by what is seen of the real nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.kernel import to_ns
from fedsim.rng import Draw, Randomness
from fedsim.system import Compute, Faults, Network, System
from fedsim.system.availability import Availability, Change
from fedsim.system.base import Ids, Nanoseconds

NEWEST = 0.5
"""Weight of the newest task in what is known of a client's speed."""


LONGEST = 2.0**62
"""What is expected of a task at most (ns): more would overflow."""


class Connected(Availability):
    """Who is there: connected, and ready for a task if it has said when it will be."""

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Nobody is there yet."""
        self.connected = np.zeros(clients, dtype=np.bool_)
        self._ready = np.zeros(clients, dtype=np.int64)
        """From when on each is ready, ns."""
        self._online = np.zeros(clients, dtype=np.bool_)
        self._now = 0

    def rest(self, client: int, now: int, pause: float) -> None:
        """A client has said at ``now`` (ns) that it will be ready in ``pause`` seconds; until then it is away."""
        self._ready[client] = now + to_ns(pause)
        if pause > 0:
            self._online[client] = False

    def next_change(self) -> int | None:
        """When the next client that is connected will be ready (ns)."""
        waiting = self._ready[self.connected & ~self._online]
        waiting = waiting[waiting > self._now]
        return int(waiting.min()) if len(waiting) else None

    def advance(self, now: int) -> Change:
        """Who came and who went until ``now`` (ns)."""
        self._now = now
        there = self.connected & (self._ready <= now)
        before, self._online = self._online, there
        return np.flatnonzero(there & ~before), np.flatnonzero(before & ~there)


class Measured(Compute):
    """How fast each client has been seen to work; NaN where nothing is known."""

    def __init__(self) -> None:
        super().__init__()

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """None known yet."""
        self.overhead = np.full(clients, np.nan)
        """Seconds of a task that were not local work: its way to the node and back."""
        return np.full(clients, np.nan)

    def meet(self, client: int, seconds_per_step: float) -> None:
        """What a client says of its speed when it appears, in seconds per gradient."""
        self.seconds_per_step[client] = seconds_per_step

    def learn(self, client: int, gradients: int, work: float, whole: float) -> None:
        """A task has been done: ``gradients`` took ``work`` seconds, and the task ``whole`` seconds in all."""
        if gradients:
            _mix(self.seconds_per_step, client, work / gradients)
        _mix(self.overhead, client, whole - work)

    def expected(self, clients: Ids, steps: int | NDArray[np.int64]) -> Nanoseconds:
        """Local work and the way there and back, int64 ns ``[k]``; who has not been seen is like the mean client."""
        speed, overhead = _known(self.seconds_per_step)[clients], _known(self.overhead)[clients]
        return np.rint(np.minimum((speed * steps + overhead) * 1e9, LONGEST)).astype(np.int64)


class Unseen(Network):
    """Nobody measures a link: bandwidths are unknown, and what has been sent has left."""

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Nothing is known."""
        self.down_bytes_per_second = np.full(clients, np.nan)
        self.up_bytes_per_second = np.full(clients, np.nan)

    def down(self, clients: Ids, nbytes: int | NDArray[np.int64]) -> Nanoseconds:
        """Part of what :class:`Measured` sees."""
        return np.zeros(len(clients), dtype=np.int64)

    up = down

    def moved_down(self, clients: Ids, nbytes: int | NDArray[np.int64], elapsed: Nanoseconds) -> NDArray[np.int64]:
        """All of it."""
        return np.broadcast_to(np.asarray(nbytes, dtype=np.int64), (len(clients),))


def real_devices(clients: int, randomness: Randomness) -> tuple[System, Connected, Measured]:
    """Models that know nothing yet of ``clients`` clients: all of them, who is there, how fast they are."""
    connected, measured = Connected(), Measured()
    system = System(measured, Unseen(), connected, Faults(on_offline="lose", on_error="drop"))
    system.prepare(clients, randomness)
    return system, connected, measured


def _mix(values: NDArray[np.float64], client: int, newest: float) -> None:
    known = values[client]
    values[client] = newest if np.isnan(known) else NEWEST * newest + (1 - NEWEST) * known


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """With the mean in place of what is not known, and 0 where nothing is."""
    there = values[~np.isnan(values)]
    return np.where(np.isnan(values), there.mean() if len(there) else 0.0, values)

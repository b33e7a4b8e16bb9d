"""The event heap: virtual time in whole nanoseconds, and a fixed order within one instant.

An entry is ``(time, phase, client, task, sequence, event)``: events of one instant run phase by phase,
ties by client and task, then in the order they were scheduled. The kernel knows nothing of learning.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import SimulationError

NS = 1_000_000_000
"""Nanoseconds in a virtual second."""


def to_ns(seconds: float) -> int:
    """Virtual seconds as whole nanoseconds, to the nearest."""
    return round(seconds * NS)


def whole_periods(seconds: float | NDArray[np.float64], period: float) -> NDArray[np.int64]:
    """How many periods each span takes, rounded up, counted in whole nanoseconds.

    As floats 2.1 s are 7.000000000000001 periods of 0.3 s, which rounds up to 8.
    """
    spans = np.rint(np.asarray(seconds) * NS).astype(np.int64)
    periods: NDArray[np.int64] = -(-spans // to_ns(period))
    return periods


class Phase(IntEnum):
    """The order within one instant."""

    ARRIVAL = 0
    MESSAGE = 1
    LOSS = 2
    AVAILABILITY = 3
    TIMER = 4
    SETTLE = 5
    DISPATCH = 6


Entry = tuple[int, int, int, int, int, Any]


class Kernel:
    """A virtual clock over a heap of events.

    Args:
        limit: how many events one instant may hold before it is taken for a livelock.
    """

    def __init__(self, limit: int = 1_000_000) -> None:
        self.now = 0
        self.limit = limit
        self.handled = 0
        """Events handled so far."""
        self._heap: list[Entry] = []
        self._sequence = 0
        self._cancelled: set[int] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._cancelled)

    def schedule(self, time: int, phase: int, event: Any, client: int = -1, task: int = -1) -> int:
        """Put ``event`` at ``time`` (ns) and return a handle to cancel it by.

        Raises:
            ValueError: if ``time`` lies in the past.
        """
        if time < self.now:
            raise ValueError(f"cannot schedule at {time} ns: it is already {self.now} ns")
        self._sequence += 1
        heappush(self._heap, (time, int(phase), client, task, self._sequence, event))
        return self._sequence

    def cancel(self, handle: int) -> None:
        """Take the scheduled event of ``handle`` out; it must not have run yet."""
        self._cancelled.add(handle)

    def next_time(self) -> int | None:
        """When the next event is due, or None when nothing is left to happen."""
        heap, cancelled = self._heap, self._cancelled
        while cancelled and heap and heap[0][4] in cancelled:
            cancelled.remove(heappop(heap)[4])
        return heap[0][0] if heap else None

    def advance(self, time: int) -> None:
        """Move the clock to ``time`` although nothing happens there (the end of a run)."""
        due = self.next_time()
        if time < self.now or (due is not None and due < time):
            raise ValueError(f"cannot move the clock from {self.now} to {time} ns past an event at {due} ns")
        self.now = time

    def run_instant(self, handle: Callable[[Any], None], conclude: Callable[[], bool] = lambda: False) -> None:
        """Run every event of the earliest time, those added to that instant meanwhile included.

        Args:
            handle: called with each event.
            conclude: called when none is left, as long as it has something to do that may bring new ones: what comes
                at the end of every instant need not pass through the heap. Each time counts as an event.

        Raises:
            SimulationError: if nothing is left to happen, or the instant never ends.
        """
        time = self.next_time()
        if time is None:
            raise SimulationError(f"nothing left to happen at {self.now / NS:.6g} s of virtual time")
        self.now = time
        heap, cancelled, last = self._heap, self._cancelled, self.handled + self.limit
        while True:
            if heap and heap[0][0] == time:
                entry = heappop(heap)
                if cancelled and entry[4] in cancelled:
                    cancelled.remove(entry[4])
                    continue
                handle(entry[5])
            elif not conclude():
                break
            self.handled += 1
            if self.handled > last:
                raise SimulationError(
                    f"more than {self.limit} events at {time / NS:.6g} s of virtual time: "
                    "the strategy answers each event with another one and time stands still"
                )

    def snapshot(self) -> dict[str, Any]:
        """Everything the kernel holds, to be given to :meth:`restore`; events are shared, not copied."""
        return {
            "now": self.now,
            "limit": self.limit,
            "handled": self.handled,
            "heap": list(self._heap),
            "sequence": self._sequence,
            "cancelled": set(self._cancelled),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Become what :meth:`snapshot` saw."""
        self.now = snapshot["now"]
        self.limit = snapshot["limit"]
        self.handled = snapshot["handled"]
        self._heap = list(snapshot["heap"])
        self._sequence = snapshot["sequence"]
        self._cancelled = set(snapshot["cancelled"])

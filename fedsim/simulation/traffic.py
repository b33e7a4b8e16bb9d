"""The ledger of bytes that tasks move, kept so that nobody has to look at every open task to know the sum."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedsim.simulation.tasks import LiveTask
from fedsim.system import System


class Traffic:
    """Bytes moved so far by all tasks, down and up.

    A task's share stands still but for the time of its transfers. Only tasks that have some ahead, or are fated to
    stop short, are looked at when somebody asks; all others are in the sums.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.down = self.up = 0
        """Bytes of the tasks that are not moving."""
        self._moving: dict[int, LiveTask] = {}

    def begin(self, task: LiveTask) -> None:
        """A task has taken effect."""
        if task.down_time or task.up_time or task.ended is not None:
            self._moving[task.id] = task
        else:
            self.down += task.down_bytes

    def arrive(self, task: LiveTask) -> None:
        """A result has arrived, whole."""
        if self._moving.pop(task.id, None) is not None:
            self.down += task.down_bytes
        self.up += task.up_bytes

    def cut(self, task: LiveTask, moved: tuple[int, int]) -> None:
        """A task that has not arrived is over: ``moved`` bytes down and up are all there will be."""
        counted = 0 if self._moving.pop(task.id, None) is not None else task.down_bytes
        self.down += moved[0] - counted
        self.up += moved[1]

    def total(self, now: int) -> tuple[int, int]:
        """All bytes moved until ``now`` (ns), down and up, parts of running transfers included."""
        if not self._moving:
            return self.down, self.up
        network, tasks = self.system.network, self._moving.values()
        client, down_bytes, down_time, started, last = np.array(
            [(each.client, each.down_bytes, each.down_time, each.started, each.seen_until(now)) for each in tasks]
        ).T
        up_bytes, up_time, began, arrived = np.array(
            [(each.up_bytes, each.up_time, each.upload_started, each.arrived) for each in tasks]
        ).T
        down = network.moved_down(client, down_bytes, down_time - (started - last))
        up = network.moved_up(client, up_bytes, up_time - (arrived - last))
        up = np.where(last >= arrived, up_bytes, np.where(last > began, up, 0))
        return self.down + int(np.where(last < started, down, down_bytes).sum()), self.up + int(up.sum())

    def snapshot(self) -> tuple[int, int, list[int]]:
        """The sums, and the ids of the tasks that are moving."""
        return self.down, self.up, list(self._moving)

    def restore(self, snapshot: tuple[int, int, list[int]], tasks: Iterable[LiveTask]) -> None:
        """Become what :meth:`snapshot` saw; ``tasks`` are all that were open then."""
        self.down, self.up, ids = snapshot
        moving = set(ids)
        self._moving = {task.id: task for task in tasks if task.id in moving}

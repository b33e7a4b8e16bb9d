"""The kernel's heap on a real clock."""

from __future__ import annotations

from heapq import heapify

from fedsim.kernel import Kernel, Phase


class WallKernel(Kernel):
    """A kernel whose time is told and not jumped to: times are nanoseconds of real time since the start."""

    def catch_up(self, now: int) -> None:
        """Let everything that has fallen due by ``now`` (ns) happen then, in the order of one instant.

        Nobody looks at a real clock all the time, so several times may have passed since somebody did. Timers keep
        the order in which they fell due.
        """
        first = self.next_time()
        if first is None or first >= now:
            return
        for place, (time, phase, client, task, sequence, event) in enumerate(self._heap):
            if time < now:
                # A timer has no client, so its place among others is free to say which fell due before.
                rank = time - now - 1 if phase == Phase.TIMER else client
                self._heap[place] = (now, phase, rank, task, sequence, event)
        heapify(self._heap)

    def pass_to(self, now: int) -> None:
        """Move the clock to ``now`` (ns), at which nothing happens."""
        self.now = max(self.now, now)

"""Whether tasks are worth sending to workers, by what training and the trips have taken so far in a run.

Bits do not depend on who trains, so this may be decided by the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fedsim.training import Work

RECENT = 9
"""Measurements that count, the newest; the least of them is taken: whatever else a machine does adds to them."""

ENOUGH = 3
"""Measurements of each kind before anything is concluded from them: the first ones are slow."""

LONG = 0.02
"""Seconds of training that are worth any trip: what has been measured of trips may be out of date."""


class Trips:
    """Weighs what several workers save against the trip to them."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._rates: dict[str, deque[float]] = {}

    def travelled(self, seconds: float) -> None:
        """A group came back so many seconds later than training took."""
        self._seconds.append(seconds)

    def trained(self, works: Sequence[Work], seconds: float) -> None:
        """Training took so many seconds for a group, wherever."""
        amount = sum(map(_amount, works))
        for job in {work.job for work in works}:
            self._rates.setdefault(job, deque(maxlen=RECENT)).append(seconds / amount)

    def are_worth_it(self, works: Sequence[Work], workers: int) -> bool:
        """Whether workers would be sooner done with tasks that wait together than the driver; so it is if in doubt."""
        rates = {job: self._rates.get(job, ()) for job in {work.job for work in works}}
        if min(map(len, (self._seconds, *rates.values()))) < ENOUGH:
            return True
        known = {job: min(recent) for job, recent in rates.items()}
        alone = sum(known[work.job] * _amount(work) for work in works)
        # One worker saves nothing, but leaves the driver free: it is treated as two are.
        share = 1.0 / max(2, min(workers, len(works)))
        return alone >= LONG or alone * (1.0 - share) > min(self._seconds)


def _amount(work: Work) -> int:
    """What a task is reckoned to take, in local steps: to begin it costs something, too."""
    return work.steps + 1

"""Looking for cyclic garbage seldom while runs go on: they leave next to none, but have thousands of tasks about."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (5000, 20, 20)
"""When to look. The usual thresholds, made for small programs, look through the tasks in flight again and again."""


class Collector:
    """The process's garbage collector, lent to runs: the first of several changes it, the last puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: set[object] = set()
        self._before = self._within = gc.get_threshold()
        self._frozen = False

    @contextmanager
    def seldom(self) -> Iterator[None]:
        """Within the block nothing is looked for more often than :data:`SELDOM` says.

        What was there before the first run is frozen meanwhile, unless the user has frozen something; what is frozen in
        the block is thawed at its end.
        """
        run = object()
        try:
            self._begin(run)
            yield
        finally:  # of an interrupted beginning, too
            self._end(run)

    def _begin(self, run: object) -> None:
        with self._lock:
            if not self._runs:
                self._before = self._within = gc.get_threshold()
                if self._before[0] > 0:  # else the user has turned it off
                    young, middle, old = map(max, self._before, SELDOM)
                    self._within = young, middle, old
                if gc.get_freeze_count() == 0:  # else the user means to keep what is frozen
                    self._frozen = True
                    gc.freeze()
                gc.set_threshold(*self._within)
                self._within = gc.get_threshold()  # later Pythons have no third one
            self._runs.add(run)

    def _end(self, run: object) -> None:
        with self._lock:
            self._runs.discard(run)
            if self._runs:
                return
            if gc.get_threshold() == self._within:  # else somebody has set it meanwhile
                gc.set_threshold(*self._before)
            if self._frozen:
                self._frozen = False
                gc.unfreeze()


COLLECTOR = Collector()
"""The one there is."""

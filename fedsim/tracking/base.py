"""The interface of a tracker, and who calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.checks import said

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

logger = logging.getLogger("fedsim")


class Tracker:
    """Follows a run; this one does nothing, others override what they need. An object serves one run.

    What a tracker raises is logged, and it is told nothing more: it never ends a run.
    """

    def check(self, folder: Path | None) -> None:
        """Called before anything is written; ``folder`` is the run's directory, None if it has none (yet).

        Raises:
            ConfigError: naming ``tracker``, if this tracker cannot work.
        """

    def begin(self, folder: Path | None, config: Mapping[str, Any], first_round: int) -> None:
        """The run begins, or goes on.

        Args:
            folder: its directory; None if it is not written.
            config: what it is, in plain values.
            first_round: 0, or for a run that goes on the first round not told of yet: what was told of it and later
                ones before will come again.
        """

    def evaluated(self, row: Mapping[str, float]) -> None:
        """A row of ``metrics``: ``round, time`` (virtual seconds), ``updates``, bytes, then what was measured.

        The last row may be told twice, the second time with more in it.
        """

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """The run is over; ``summary`` is None if it was stopped or failed."""


class Tracking:
    """Tells a tracker what happens in a run, each row of ``metrics`` once it is there."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._told = 0
        self._last: Any = None
        self._listens = True

    def begin(self, sim: Simulation, folder: Path | None, config: Mapping[str, Any]) -> None:
        """The run is at its beginning, or where its checkpoint left it."""
        log = sim.evaluation.log
        self._told = len(log)
        column = list(log.columns).index("round")
        rounds = [row[column] for row in log.rows() if row is not None]
        self._tell(lambda: self.tracker.begin(folder, config, max(rounds, default=-1) + 1))

    def tick(self, sim: Simulation) -> None:
        """An observer of the simulation: tell of the rows that have come since."""
        log = sim.evaluation.log
        if len(log) == self._told or not self._listens:
            return
        for row in log.rows(self._told):
            self._last = row
            told = {name: value for name, value in zip(log.columns, row or (), strict=False) if value is not None}
            self._tell(lambda told=told: self.tracker.evaluated(told))  # type: ignore[misc]
        self._told = len(log)

    def end(self, sim: Simulation, summary: Mapping[str, Any] | None) -> None:
        """The run is over, its last evaluation made."""
        log = sim.evaluation.log
        if (
            self._told
            and len(log) == self._told
            and self._last is not None
            and log.rows(self._told - 1)[0] != self._last
        ):
            self._told -= 1  # the last row has been replaced by one that says more
        self.tick(sim)
        self._tell(lambda: self.tracker.end(summary))

    def _tell(self, call: Callable[[], None]) -> None:
        if not self._listens:
            return
        try:
            call()
        except Exception as error:  # somebody else's disk, server or library: no reason to lose a run
            self._listens = False
            logger.warning("%s is told nothing more: %s", type(self.tracker).__name__, said(error))

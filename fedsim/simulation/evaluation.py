"""Evaluation of a strategy's views, off the critical path: it costs no virtual time and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsim.checks import SimulationError
from fedsim.record import METRIC_COLUMNS, Log

if TYPE_CHECKING:
    from fedsim.simulation.engine import Simulation


class Evaluation:
    """When to evaluate, and the log of it.

    Args:
        every: rounds between evaluations; 0 never.
    """

    def __init__(self, sim: Simulation, every: int) -> None:
        self.sim = sim
        self.every = every
        self.log = Log(METRIC_COLUMNS)
        self.latest: dict[str, float] = {}
        self._next = 0
        self._taken: tuple[int, int, int] | None = None

    def at_round(self, round: int) -> None:
        """Evaluate if ``round`` has come to the next one that is due."""
        if self.every and round >= self._next:
            self._next = (round // self.every + 1) * self.every
            self._take()

    def final(self) -> None:
        """Evaluate the end of the run, unless that has just been done."""
        moment = (self.sim.kernel.now, self.sim.updates, self.sim.version)
        if self.every and self._taken != moment:
            self._take()

    def reached(self, target: float) -> bool:
        """Whether the newest evaluation meets the target on the problem's target metric."""
        metric = self.sim.problem.target_metric
        if metric is None or not self.latest:
            return False
        name, side = metric
        if name not in self.latest:
            raise SimulationError(
                f"target={target}: the strategy's views give no '{name}'; call the one it is judged by \"global\""
            )
        return self.latest[name] >= target if side == "above" else self.latest[name] <= target

    def snapshot(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, the whole log included: it is short."""
        log = {"columns": self.log.columns, "rows": self.log.rows}
        return {"latest": self.latest, "next": self._next, "taken": self._taken, **log}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Become what :meth:`snapshot` saw."""
        self.latest, self._next, self._taken = snapshot["latest"], snapshot["next"], snapshot["taken"]
        self.log.columns, self.log.rows = snapshot["columns"], snapshot["rows"]

    def _take(self) -> None:
        sim = self.sim
        self.latest = {}
        for view, vector in sim.strategy.views(sim).items():
            prefix = "" if view == "global" else f"{view}_"
            for name, value in sim.problem.evaluate(vector).items():
                self.latest[prefix + name] = float(value)
        for name in self.latest:
            self.log.columns.setdefault(name, "float64")
        self._taken = (sim.kernel.now, sim.updates, sim.version)
        down, up = sim.bytes_moved()
        metrics = [self.latest.get(name) for name in list(self.log.columns)[len(METRIC_COLUMNS) :]]
        self.log.append((sim.version, sim.round, sim.now, sim.updates, sim.samples_done, up, down, *metrics))

"""The live line on a terminal: virtual time, rounds, updates, staleness, metric. Silent in a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

Each = TypeVar("Each")

REFRESH_SECONDS = 0.1
HEADLINES = ["accuracy", "distance", "loss"]


def seconds(value: float) -> str:
    """Virtual seconds for people: ``12.3 s``, ``4.2 min``, ``3.1 h``."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"


def megabytes(value: int) -> str:
    """Bytes for people."""
    return f"{value / 1e6:,.1f} MB"


class Ended(Protocol):
    """What is known of a finished run, whoever ran it."""

    @property
    def path(self) -> Path | None:
        """Its directory."""

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``."""

    @property
    def manifest(self) -> dict[str, Any]:
        """``manifest.json``."""


def ended(run: Ended) -> str:
    """One line about a finished run."""
    summary, manifest = run.summary, run.manifest
    parts = [
        f"stopped by {summary['stopped']} at {seconds(summary['time'])} of {manifest['clock']} time",
        f"{summary['updates']} updates",
        megabytes(summary["down_bytes"] + summary["up_bytes"]),
    ]
    for name in headline(summary["metrics"]):
        value = summary["metrics"][name]
        parts.append(f"{name} not finite" if value is None else f"{name} {value:.4g}")
    for outcome in ("rejected", "failed"):
        if summary["outcomes"].get(outcome):
            parts.append(f"{summary['outcomes'][outcome]} updates {outcome.upper()}, see run.log")
    rate, memory = manifest["tasks_per_second"], manifest["peak_memory_bytes"]
    parts.append(f"took {manifest['wall_seconds']:.1f} s ({rate:,.0f} tasks/s, at most {megabytes(memory)} of memory)")
    return f"{run.path}: " + ", ".join(parts)


class LiveProgress:
    """An observer that shows where a run is, on a terminal only.

    Args:
        title: what to call the run; None shows nothing.
    """

    def __init__(self, title: str | None) -> None:
        self.console = Console(stderr=True)
        self.title = title
        self._shown = 0.0
        self._progress: Progress | None = None

    def __enter__(self) -> LiveProgress:
        if self.title is not None and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task(self.title, total=1.0, state="starting")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, sim: Simulation) -> None:
        """Show the state of a run, at most ten times a second."""
        if self._progress is not None and time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            self.show(done(sim), state(sim))

    @property
    def live(self) -> bool:
        """Whether anything is shown."""
        return self._progress is not None

    def show(self, share: float, state: str) -> None:
        """Show that so much of the run is over, from 0 to 1, and where it is."""
        if self._progress is not None:
            self._progress.update(self._task, completed=share, state=state)

    def through(self, things: Sequence[Each], what: str) -> Iterator[Each]:
        """The things one after another, shown as ``what 3 of 60``."""
        for number, thing in enumerate(things):
            self.show(number / len(things), f"{what} {number + 1} of {len(things)}")
            yield thing

    def say(self, line: str) -> None:
        """Print a line on the standard error stream, above the live one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def done(sim: Simulation) -> float:
    """The share of the run that is over, by the limit that is nearest."""
    moved = sim.tasks.traffic.down + sim.tasks.traffic.up
    reached = {"rounds": sim.round, "time_limit": sim.now, "updates": sim.updates, "bytes": moved}
    return share(reached, vars(sim.limits))


def share(reached: Mapping[str, float], limits: Mapping[str, Any]) -> float:
    """How much of a run is over, from 0 to 1, by the limit that is nearest; limits that are not set are None."""
    return min(1.0, max((reached[key] / limits[key] for key in reached if limits.get(key)), default=0.0))


def state(sim: Simulation) -> str:
    """One line: virtual time, rounds, updates, staleness, rejected updates, newest metric."""
    applied = sim.tasks.outcomes["applied"]
    parts = [seconds(sim.now), f"round {sim.round}", f"{sim.updates} updates"]
    if applied:
        parts.append(f"staleness {sim.staleness_sum / applied:.1f}")
    if sim.tasks.outcomes["rejected"]:
        parts.append(f"[red]{sim.tasks.outcomes['rejected']} rejected[/red]")
    parts += [f"{name} {sim.evaluation.latest[name]:.4g}" for name in headline(sim.evaluation.latest)]
    return " · ".join(parts)


def headline(metrics: dict[str, float]) -> list[str]:
    """The metric to show first, if there is any."""
    return next(([name] for name in HEADLINES if name in metrics), [])

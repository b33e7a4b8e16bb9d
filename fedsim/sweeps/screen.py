"""A whole sweep on one screen: done, running, failed, time left, and where each running member is."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from fedsim.progress import seconds


class Screen:
    """Shown on a terminal only; in a pipe it does nothing.

    Args:
        title: what to call the sweep.
        total: members to run.
        console: where to; the standard error stream unless given.
    """

    def __init__(self, title: str, total: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.shown = self.console.is_terminal and total > 0
        self.title, self.total = title, total
        self.done = self.failed = 0
        self._shares: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Screen:
        if self.shown:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                TaskProgressColumn(),
                TextColumn("{task.fields[state]}"),
            )
            # What goes to a file or to another program must not end up on the terminal.
            beside = sys.stdout.isatty()
            self._progress = Progress(*columns, console=self.console, transient=True, redirect_stdout=beside)
            self._whole = self._progress.add_task(f"[bold]{escape(self.title)}", total=1.0, state=self.line())
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._progress.stop()

    def began(self, name: str) -> None:
        """A member runs."""
        self._shares[name] = 0.0
        if self.shown:
            self._tasks[name] = self._progress.add_task(f"  {escape(name)}", total=1.0, state="starting")
            self._update()

    def progressed(self, name: str, share: float, state: str) -> None:
        """A member is so far; ``share`` from 0 to 1, ``state`` a line in rich's markup."""
        self._shares[name] = share
        if self.shown:
            self._progress.update(self._tasks[name], completed=share, state=state)
            self._update()

    def ended(self, name: str, well: bool) -> None:
        """A member has ended."""
        self._shares.pop(name, None)
        self.done, self.failed = self.done + well, self.failed + (not well)
        if self.shown:
            self._progress.remove_task(self._tasks.pop(name))
            self._update()

    def line(self) -> str:
        """How many members are done, running, failed and waiting, and how long the rest may take."""
        running, over = len(self._shares), self.done + self.failed
        parts = [f"{self.done} of {self.total} done", f"{running} running"]
        if self.failed:
            parts.append(f"[red]{self.failed} failed[/red]")
        parts.append(f"{max(0, self.total - over - running)} waiting")
        left = time_left(time.monotonic() - self._began, over + sum(self._shares.values()), self.total)
        return " · ".join([*parts, *([] if left is None else [f"about {seconds(left)} left"])])

    def _update(self) -> None:
        share = (self.done + self.failed + sum(self._shares.values())) / self.total
        self._progress.update(self._whole, completed=share, state=self.line())


def time_left(elapsed: float, done: float, total: float) -> float | None:
    """Seconds until ``total`` if it goes on as it did for ``elapsed`` seconds up to ``done``; None if nothing did."""
    return elapsed * max(0.0, total - done) / done if done > 0 else None

"""A whole sweep on one screen: done, running, failed, time left, and where each running member is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsim.progress import seconds

BAR = 12
"""Characters of a bar."""
WIDE = 100
"""Characters of a terminal from which on there are bars; a narrower one has better use for the room."""
NARROWEST_NAME = 16


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
            # What goes to a file or to another program must not end up on the terminal.
            beside = sys.stdout.isatty()
            self._progress = _Lines(console=self.console, transient=True, redirect_stdout=beside)
            self._whole = self._progress.add_task(self.title, total=1.0, state=self.line())
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._progress.stop()

    def began(self, name: str) -> None:
        """A member runs."""
        self._shares[name] = 0.0
        if self.shown:
            self._tasks[name] = self._progress.add_task(name, total=1.0, state="starting")
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


class _Lines(Progress):
    """The first task is the whole, which is never cut; the others have a line each, whatever the terminal's width."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown now."""
        tasks = self.tasks
        if tasks:
            whole, *members = tasks
            title = f"[bold]{escape(whole.description)}[/bold]"
            yield Text.from_markup(f"{title} {_percent(whole)} · {whole.fields['state']}")
            yield self._table(members)

    def _table(self, members: Sequence[Task]) -> Table:
        width = self.console.width
        name = min(max((len(task.description) for task in members), default=0), max(NARROWEST_NAME, width // 3))
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=name + 2, no_wrap=True)
        if width >= WIDE:
            table.add_column(width=BAR)
        table.add_column(width=4, justify="right", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for task in members:
            bar = [ProgressBar(total=1.0, completed=task.completed, width=BAR)] if width >= WIDE else []
            text = Text(f"  {shortened(task.description, name)}", style="progress.description")
            table.add_row(text, *bar, _percent(task), Text.from_markup(task.fields["state"]))
        return table


def _percent(task: Task) -> str:
    return f"{task.percentage:.0f}%"


def shortened(name: str, most: int) -> str:
    """A name in at most so many characters, without its middle: what tells members apart is mostly at its end."""
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[head + 1 - most :]}"


def time_left(elapsed: float, done: float, total: float) -> float | None:
    """Seconds until ``total`` if it goes on as it did for ``elapsed`` seconds up to ``done``; None if nothing did."""
    return elapsed * max(0.0, total - done) / done if done > 0 else None

"""A task on the virtual clock: its planned times, what can cut it short, and its row in the records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from torch import Tensor

from fedsim.checks import SimulationError
from fedsim.federation import Task
from fedsim.kernel import NS
from fedsim.record import Row
from fedsim.system import LONGEST, System
from fedsim.training import Result, Work


class Status:
    """Where a task is in its life. Plain strings: a run looks at them often, and an enumeration's are slow to find."""

    REQUESTED: Final = "requested"
    """Dispatched in this instant, not yet in effect."""
    RUNNING: Final = "running"
    LOST: Final = "lost"
    """Over, but the server has not noticed yet."""
    ARRIVED: Final = "arrived"
    """Its result is here, unused so far."""
    DECIDED: Final = "decided"


class Order(NamedTuple):
    """What all tasks of one dispatch share. Times are whole nanoseconds of virtual time."""

    job: str
    tag: Any
    dispatched: int
    local: bool
    held: bool
    deadline: int | None


class LiveTask:
    """One dispatched task. Times are whole nanoseconds of virtual time, sizes bytes.

    What most tasks never come to is an attribute of the class until it happens: a run makes many tasks.
    """

    version = 0
    status: str = Status.REQUESTED
    nth = -1
    gradients = 1
    """How many gradients one local step takes."""
    samples = 0
    """Training examples it works through."""
    work: Work | None = None
    """All that training needs, taken at take-effect; gone once it is trained."""
    result: Result | None = None
    down_bytes = 0
    up_bytes = 0
    down_time = 0
    up_time = 0
    started = 0
    computed = 0
    upload_started = 0
    arrived = 0
    why = ""
    handle: int | None = None
    deadline_handle: int | None = None
    paused_at: int | None = None
    group = 0

    def __init__(self, id: int, client: int, order: Order, steps: int = -1, start: Tensor | None = None) -> None:
        self.id = id
        self.client = client
        self.order = order
        self.steps = steps
        """Local steps; -1 until the job's own count is asked for at take-effect."""
        self.start = start
        """What to start from; None is the model at take-effect."""
        self.ended: int | None = None
        """When it stops short of arriving."""

    def view(self) -> Task:
        """What the strategy sees of it."""
        order = self.order
        seen = self.id, self.client, order.job, order.tag, self.version, self.steps, order.dispatched / NS
        return Task._make(seen)  # in less than half the time that a call with seven arguments takes

    def drop_out(self, fraction: float, now: int) -> None:
        """Its client will be lost when it has done ``fraction`` of its work."""
        self.ended = max(self.started + round(fraction * (self.computed - self.started)), now + 1)
        self.why = "dropped"

    def shift(self, since: int, by: int) -> None:
        """Put off everything planned after ``since`` (the client was away for ``by`` nanoseconds)."""
        for name in ("started", "computed", "upload_started", "arrived", "ended"):
            planned = getattr(self, name)
            if planned is not None and planned > since:
                setattr(self, name, planned + by)

    def seen_until(self, now: int) -> int:
        """The last moment at which the client was really at work on it."""
        if self.ended is not None:
            now = min(now, self.ended)
        return now if self.paused_at is None else min(now, self.paused_at)

    def moved(self, now: int, system: System) -> tuple[int, int]:
        """Bytes that have travelled down and up by ``now``; a cut transfer counts up to the cut."""
        if self.status == Status.REQUESTED:
            return 0, 0
        last = self.seen_until(now)
        if last >= self.arrived:
            return self.down_bytes, self.up_bytes
        client = np.array([self.client])
        down, up = self.down_bytes, 0
        if last < self.started:
            elapsed = np.array([self.down_time - (self.started - last)])
            down = int(system.network.moved_down(client, self.down_bytes, elapsed)[0])
        elif last > self.upload_started:
            elapsed = np.array([self.up_time - (self.arrived - last)])
            up = int(system.network.moved_up(client, self.up_bytes, elapsed)[0])
        return down, up

    def arrived_row(self, outcome: str, applied_version: int | None) -> Row:
        """Its row in ``events`` once it has arrived: it came to all its times, and its bytes moved whole."""
        started, computed, upload_started = self.started / NS, self.computed / NS, self.upload_started / NS
        times = started, computed, upload_started, self.arrived / NS
        return self._row(outcome, applied_version, self.down_bytes, self.up_bytes, times)

    def cut_row(self, now: int, outcome: str, moved: tuple[int, int]) -> Row:
        """Its row in ``events`` if it has not arrived by ``now``; times it never came to are missing."""
        return self._row(outcome, None, *moved, self._times(now))

    def _row(
        self,
        outcome: str,
        applied_version: int | None,
        down_bytes: int,
        up_bytes: int,
        times: tuple[float | None, float | None, float | None, float | None],
    ) -> Row:
        order, version, steps = self.order, self.version, self.steps
        started, computed, upload_started, arrived = times
        return (
            self.id,
            self.client,
            order.job,
            "" if order.tag is None else str(order.tag),
            order.dispatched / NS,
            started,
            computed,
            upload_started,
            arrived,
            version,
            applied_version,
            None if applied_version is None else applied_version - version,
            steps if steps > 0 else 0,
            self.samples,
            down_bytes,
            up_bytes,
            self.group,
            outcome,
        )

    def _times(self, now: int) -> tuple[float | None, float | None, float | None, float | None]:
        """Seconds at which it started, had computed, started its upload and arrived, as far as it came."""
        last = -1 if self.status == Status.REQUESTED else self.seen_until(now)
        whole = self.ended is None
        # A client lost in the moment its work was done has not begun to send.
        sending = self.upload_started <= last if whole else self.upload_started < last
        return (
            self.started / NS if self.started <= last else None,
            self.computed / NS if self.computed <= last else None,
            self.upload_started / NS if sending else None,
            self.arrived / NS if whole and self.arrived <= last else None,
        )


def plan(tasks: Sequence[LiveTask], system: System, now: int) -> None:
    """Set the times of tasks that take effect ``now``: download, local work, upload, and where one drops out.

    Every task ends at least one nanosecond after it began, so that no instant feeds itself.

    Raises:
        SimulationError: for a task that would last beyond the end of the clock.
    """
    if len(tasks) <= system.few:
        for task in tasks:
            _plan_one(task, system, now)
        return
    asked = [(task.client, task.nth, task.steps * task.gradients, task.down_bytes, task.up_bytes) for task in tasks]
    down, compute, up, stage, fraction = system.spans(*(np.array(column) for column in zip(*asked, strict=True)))
    local = np.array([task.order.local for task in tasks])
    if local.any():
        down, up = np.where(local, 0, down), np.where(local, 0, up)
    _check_clock(now, int(max(down.max(), compute.max(), up.max())))
    started = now + down
    computed = started + compute
    arrived = np.maximum(computed + up, now + 1)
    columns = (each.tolist() for each in (down, up, started, computed, arrived))
    for task, down_time, up_time, starts, computes, arrives in zip(tasks, *columns, strict=True):
        task.down_time, task.up_time, task.started, task.arrived = down_time, up_time, starts, arrives
        task.computed = task.upload_started = computes
        task.status = Status.RUNNING
    for lost in np.flatnonzero(stage).tolist():
        tasks[lost].drop_out(fraction[lost].item(), now)


def _plan_one(task: LiveTask, system: System, now: int) -> None:
    """What :func:`plan` does, without arrays."""
    spans = system.spans_of_one(task.client, task.nth, task.steps * task.gradients, task.down_bytes, task.up_bytes)
    down, compute, up, stage, fraction = spans
    if task.order.local:
        down = up = 0
    if now + down + compute + up >= LONGEST:  # what may be beyond the end of the clock is looked at closely
        _check_clock(now, max(down, compute, up))
    computed = now + down + compute
    arrived = computed + up
    task.down_time = down
    task.up_time = up
    task.started = now + down
    task.computed = task.upload_started = computed
    task.arrived = arrived if arrived > now else now + 1
    task.status = Status.RUNNING
    if stage:
        task.drop_out(fraction, now)


def _check_clock(now: int, longest: int) -> None:
    if longest >= LONGEST or now >= LONGEST:
        what = f"it is {now / NS:.6g} s" if now >= LONGEST else f"a task lasts {longest / NS:.6g} s or more"
        raise SimulationError(f"{what}: the clock ends at {LONGEST / NS:.4g} s of virtual time (36 years)")

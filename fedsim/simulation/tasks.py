"""A task on the virtual clock: its planned times, what can cut it short, and its row in the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.checks import SimulationError
from fedsim.federation import Task
from fedsim.kernel import NS
from fedsim.system import LONGEST, Stage, System
from fedsim.training import Result, Work


class Status(Enum):
    """Where a task is in its life."""

    REQUESTED = "requested"
    """Dispatched in this instant, not yet in effect."""
    RUNNING = "running"
    LOST = "lost"
    """Over, but the server has not noticed yet."""
    ARRIVED = "arrived"
    """Its result is here, unused so far."""
    DECIDED = "decided"


@dataclass(slots=True)
class LiveTask:
    """One dispatched task. Times are whole nanoseconds of virtual time, sizes bytes."""

    id: int
    client: int
    job: str
    tag: Any
    dispatched: int
    steps: int
    """Local steps; -1 until the job's own count is asked for at take-effect."""
    start: Tensor | None
    """What to start from; None is the model at take-effect."""
    local: bool
    held: bool
    deadline: int | None
    version: int = 0
    status: Status = Status.REQUESTED
    nth: int = -1
    samples: int = 0
    """Training examples it works through."""
    work: Work | None = None
    """All that training needs, taken at take-effect; gone once it is trained."""
    result: Result | None = None
    down_bytes: int = 0
    up_bytes: int = 0
    down_time: int = 0
    up_time: int = 0
    started: int = 0
    computed: int = 0
    upload_started: int = 0
    arrived: int = 0
    stage: Stage = Stage.NONE
    """Where it is fated to drop out."""
    ended: int | None = None
    """When it stops short of arriving."""
    why: str = ""
    handle: int | None = None
    deadline_handle: int | None = None
    paused_at: int | None = None
    group: int = 0

    def view(self) -> Task:
        """What the strategy sees of it."""
        return Task(self.id, self.client, self.job, self.tag, self.version, self.steps, self.dispatched / NS)

    def shift(self, since: int, by: int) -> None:
        """Put off everything planned after ``since`` (the client was away for ``by`` nanoseconds)."""
        for name in ("started", "computed", "upload_started", "arrived", "ended"):
            planned = getattr(self, name)
            if planned is not None and planned > since:
                setattr(self, name, planned + by)

    def seen_until(self, now: int) -> int:
        """The last moment at which the client was really at work on it."""
        return min(limit for limit in (now, self.ended, self.paused_at) if limit is not None)

    def moved(self, now: int, system: System) -> tuple[int, int]:
        """Bytes that have travelled down and up by ``now``; a cut transfer counts up to the cut."""
        if self.status is Status.REQUESTED:
            return 0, 0
        last = self.seen_until(now)
        client = np.array([self.client])
        down, up = self.down_bytes, 0
        if last < self.started:
            elapsed = np.array([self.down_time - (self.started - last)])
            down = int(system.network.moved_down(client, self.down_bytes, elapsed)[0])
        if last >= self.arrived:
            up = self.up_bytes
        elif last > self.upload_started:
            elapsed = np.array([self.up_time - (self.arrived - last)])
            up = int(system.network.moved_up(client, self.up_bytes, elapsed)[0])
        return down, up

    def row(self, now: int, outcome: str, applied_version: int | None, moved: tuple[int, int]) -> tuple[Any, ...]:
        """Its row in ``events``; times it never came to are missing."""
        last = -1 if self.status is Status.REQUESTED else self.seen_until(now)
        times = [at / NS if at <= last else None for at in (self.started, self.computed)]
        # A client lost in the moment its work was done has not begun to send.
        sending = self.upload_started < last if self.ended is not None else self.upload_started <= last
        times.append(self.upload_started / NS if sending else None)
        arrived = self.arrived / NS if self.ended is None and self.arrived <= last else None
        staleness = None if applied_version is None else applied_version - self.version
        tag = "" if self.tag is None else str(self.tag)
        return (
            self.id,
            self.client,
            self.job,
            tag,
            self.dispatched / NS,
            *times,
            arrived,
            self.version,
            applied_version,
            staleness,
            max(self.steps, 0),
            self.samples,
            *moved,
            self.group,
            outcome,
        )


def plan(tasks: Sequence[LiveTask], system: System, now: int) -> None:
    """Set the times of tasks that take effect ``now``: download, local work, upload, and where one drops out.

    Every task ends at least one nanosecond after it began, so that no instant feeds itself.
    """
    clients = np.array([task.client for task in tasks], dtype=np.int64)
    nth = np.array([task.nth for task in tasks], dtype=np.int64)
    travels = np.array([not task.local for task in tasks])
    down_bytes = np.array([task.down_bytes for task in tasks], dtype=np.int64)
    up_bytes = np.array([task.up_bytes for task in tasks], dtype=np.int64)
    steps = np.array([task.steps for task in tasks], dtype=np.int64)

    down_time = np.where(travels, system.network.down(clients, down_bytes), 0)
    up_time = np.where(travels, system.network.up(clients, up_bytes), 0)
    compute_time = system.compute.durations(clients, steps, nth)
    longest = max(int(each.max()) for each in (down_time, compute_time, up_time))
    if longest >= LONGEST or now >= LONGEST:
        what = f"it is {now / NS:.6g} s" if now >= LONGEST else f"a task lasts {longest / NS:.6g} s or more"
        raise SimulationError(f"{what}: the clock ends at {LONGEST / NS:.4g} s of virtual time (36 years)")
    started = now + down_time
    computed = started + compute_time
    arrived = np.maximum(computed + up_time, now + 1)
    stage, fraction = system.faults.draw(clients, nth)
    ended = np.maximum(started + np.rint(fraction * (computed - started)).astype(np.int64), now + 1)

    for i, task in enumerate(tasks):
        task.down_time, task.up_time = int(down_time[i]), int(up_time[i])
        task.started, task.computed, task.arrived = int(started[i]), int(computed[i]), int(arrived[i])
        task.upload_started = task.computed
        task.stage = Stage(int(stage[i]))
        task.ended = int(ended[i]) if task.stage is not Stage.NONE else None
        task.why = "dropped" if task.stage is not Stage.NONE else ""
        task.status = Status.RUNNING

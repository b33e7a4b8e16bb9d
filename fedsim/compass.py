"""FedCompass's scheduler (Li et al. 2024, arXiv 2309.14675): as many local steps as bring clients back together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from fedsim.checks import ConfigError, number, whole
from fedsim.kernel import NS, to_ns


class Assignment(NamedTuple):
    """What a client is to do."""

    steps: int
    group: int | None
    """None for its first task."""
    latest: float | None
    """If this began a new group: the virtual second at which it is aggregated at the latest."""


class Arrival(NamedTuple):
    """How a client has come back."""

    kind: str
    """``first``, ``late`` or ``on time``."""
    group: int | None
    complete: bool
    """Whether the group it was awaited in waits for nobody any more."""


@dataclass
class Group:
    """Clients that are expected back at one time. Times are whole nanoseconds."""

    expected: int
    latest: int
    running: set[int] = field(default_factory=set)
    arrived: list[int] = field(default_factory=list)
    open: bool = True
    """False once it has been aggregated: then it is only kept until its late clients are back."""


class Compass:
    """The scheduler alone: times in, decisions out. It knows nothing of models, so any rule of aggregation may use it.

    For every task: :meth:`assign`, then :meth:`arrive` or :meth:`lose`. When either makes a group complete, or when
    :meth:`expire` says so at its latest time: :meth:`disband`, and :meth:`assign` for the clients that gives.

    Args:
        least_steps: fewest local steps of a task, and those of a client's first.
        most_steps: most local steps of a task.
        latest_factor: how much longer than expected a group is waited for.
        speed_momentum: weight of the newest observation in a client's seconds per step.
        join_factor: a client may join a group with up to this times ``most_steps``.

    Attributes:
        groups: by number, from 1, in order of creation.
        seconds_per_step: by client, transfers included; measured from assignment to arrival.
    """

    def __init__(
        self,
        least_steps: int = 20,
        most_steps: int = 100,
        latest_factor: float = 1.2,
        speed_momentum: float = 0.9,
        join_factor: float = 1.0,
    ) -> None:
        self.least_steps = whole("least_steps", least_steps, least=1, most=10**9)
        self.most_steps = whole("most_steps", most_steps, least=1, most=10**9)
        if self.most_steps < self.least_steps:
            raise ConfigError(f"most_steps={most_steps}: must be at least least_steps={least_steps}")
        self.latest_factor = number("latest_factor", latest_factor, least=1)
        self.speed_momentum = number("speed_momentum", speed_momentum, above=0, most=1)
        self.join_factor = number("join_factor", join_factor, least=1)
        self.groups: dict[int, Group] = {}
        self.seconds_per_step: dict[int, float] = {}
        self._tasks: dict[int, tuple[int, int, int | None]] = {}
        """By client at work: when it was assigned its task (ns), the steps, the group."""
        self._created = 0

    def is_free(self, client: int) -> bool:
        """Whether a client neither works nor waits for its group."""
        waits = any(client in group.arrived for group in self.groups.values())
        return client not in self._tasks and not waits

    def assign(self, client: int, now: float) -> Assignment:
        """What a free client is to do from ``now`` (virtual seconds) on: join a group, or create one."""
        at, latest = to_ns(now), None
        if client not in self.seconds_per_step:
            steps, g = self.least_steps, None
        else:
            g, steps = self._join(client, at)
            if g is None:
                g, steps = self._create(client, at)
                latest = self.groups[g].latest / NS
            self.groups[g].running.add(client)
        self._tasks[client] = at, steps, g
        return Assignment(steps, g, latest)

    def _join(self, client: int, at: int) -> tuple[int | None, int]:
        """The group in which the client can do the most steps in time; of equals the newest."""
        best, chosen = self.least_steps, None
        most = _floor(self.join_factor * self.most_steps)
        for g, group in self.groups.items():
            steps = _floor((group.expected - at) / NS / self.seconds_per_step[client])
            if group.open and best <= steps <= most:
                best, chosen = steps, g
        return chosen, best

    def _create(self, client: int, at: int) -> tuple[int, int]:
        """A new group, to be back when another will be if that begins anew with the most steps."""
        speed, best = self.seconds_per_step[client], -1
        for group in self.groups.values():
            if group.open and at < group.latest:
                fastest = min(self.seconds_per_step[each] for each in (*group.running, *group.arrived))
                steps = _floor(((group.latest - at) / NS + fastest * self.most_steps) / speed)
                if steps <= self.most_steps:
                    best = max(best, steps)
        steps = self.most_steps if best < 0 else max(best, self.least_steps)
        span = steps * speed * NS
        # Whoever comes at the expected time is on time, though clocks and speeds are rounded: a microsecond at least.
        wait = max(round(self.latest_factor * span), round(span) + 1000)
        self._created += 1
        self.groups[self._created] = Group(at + round(span), at + wait)
        return self._created, steps

    def arrive(self, client: int, now: float) -> Arrival:
        """A client's result is there: learn its speed, and see whether it is on time."""
        at = to_ns(now)
        begun, steps, g = self._tasks.pop(client)
        observed, known = (at - begun) / NS / steps, self.seconds_per_step.get(client)
        beta = self.speed_momentum
        self.seconds_per_step[client] = observed if known is None else (1 - beta) * known + beta * observed
        if g is None:
            return Arrival("first", None, False)
        group = self.groups[g]
        late = not group.open or at > group.latest
        if not late:
            group.arrived.append(client)
        return Arrival("late" if late else "on time", g, self._leave(client, g))

    def lose(self, client: int) -> int | None:
        """A client's task will not be answered: the group that waits for nobody any more, or None."""
        _, _, g = self._tasks.pop(client)
        return g if g is not None and self._leave(client, g) else None

    def _leave(self, client: int, g: int) -> bool:
        """The group waits for the client no more: whether there is something to aggregate and nobody to wait for."""
        group = self.groups[g]
        group.running.discard(client)
        if group.running:
            return False
        if not group.arrived:
            del self.groups[g]
        return bool(group.arrived)

    def expire(self, g: int) -> bool:
        """Whether a group is to be aggregated at its latest time; not if it was before, or nobody has come."""
        group = self.groups.get(g)
        return group is not None and group.open and bool(group.arrived)

    def disband(self, g: int) -> list[int]:
        """A group is aggregated: its clients that have arrived, the fastest first, free now."""
        group = self.groups[g]
        # Stable, so that of equally fast ones the first to come is the first to go.
        members = sorted(group.arrived, key=self.seconds_per_step.__getitem__)
        group.open, group.arrived = False, []
        if not group.running:
            del self.groups[g]
        return members


def _floor(ratio: float) -> int:
    """Rounded down; 99.9999999999, which is 10 s of 0.1 s, is 100."""
    return math.floor(ratio + 1e-9)

"""FedCompass: clients get as many local steps as bring them back together (Li et al. 2024, arXiv 2309.14675).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    exactly Q_i local steps from x; Delta_i = x_Q - x
Server      :class:`Compass` gives every client its Q_i and a group that is expected back at one time.
            c_i = alpha s(u_i) p_i, s(u) = (1 + u)^-1/2, u versions published since the client started, at arrival
            first update of a client:    x <- x + c_i Delta_i at once
            on time for its group:       the client waits; B_g <- B_g + c_i Delta_i
            late:                        B <- B + c_i Delta_i; it gets x and a new group at once
            group g complete, or at its latest time:   x <- x + B_g + B;  B <- 0;  its clients get x and new groups
            version + 1 per change of x. The weights of a group are not made to sum to 1: a small group moves x less.
            +N (``normalise``): B_g and B hold c_i Delta_i / Q_i, and x moves by Q (B_g + B), Q = sum p_i Q_i / sum p_i
            over those in them. +M: with momentum on the server (``server=momentum``).
State       none on clients; (2 + groups) d on the server (x, B, B_g; this file keeps the replies, which are the sums)
Traffic     1 d and one whole number (not counted) down, 1 d up per update
Defaults    Q from 20 to 100 (the paper's figure 1), latest time 1.2 times the expected one, newest speed 0.9 of the
            estimate, alpha = 0.9, s polynomial with a = 1/2, sample weights
Departures  the authors' code (APPFL) differs from its paper and from release to release. Here: first tasks have the
            fewest steps (it: the most in later releases); updates that wait keep their weight and none is overwritten
            (it: weights taken anew at aggregation, a late update lost if its client is on time before the next one);
            no decay of the local rate with the steps done. ``stale_updates=amplify`` is its (1 + u)^+1/2, and
            ``join_factor=1.2`` lets clients join groups with up to 1.2 times the most steps, as its first release did.
            Clients that are lost or away leave their group, which the paper has not; back again they get another.
            ``events`` shows a buffered update's staleness when it is applied, its weight is that of its arrival.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fedsim import (
    ConfigError,
    Federation,
    LocalSGD,
    PlainStep,
    Reply,
    StalenessWeight,
    Strategy,
    Task,
    Timer,
    flag,
    number,
    objective_weights,
    one_of,
    weighted_sum,
    whole,
)

NS = 10**9


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
        at, latest = round(now * NS), None
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
        at = round(now * NS)
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


class Update(NamedTuple):
    """A reply that waits, and its c_i."""

    reply: Reply
    weight: float


class FedCompass(Strategy):
    """Groups of clients come back together; who is late does not wait, and nothing is lost."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        least_steps: int = 20,
        most_steps: int = 100,
        latest_factor: float = 1.2,
        speed_momentum: float = 0.9,
        join_factor: float = 1.0,
        weighting: str = "samples",
        server_lr: float = 0.9,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
        stale_updates: str = "discount",
        normalise: bool = False,
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, server)
        if self.jobs["train"].steps is not None:
            raise ConfigError(f"local.steps={self.jobs['train'].steps}: FedCompass gives the steps; leave it null")
        self.compass = Compass(least_steps, most_steps, latest_factor, speed_momentum, join_factor)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.alpha = number("server_lr", server_lr, above=0)
        self.staleness_weight = StalenessWeight(staleness, staleness_a, staleness_b)
        self.stale_updates = one_of("stale_updates", stale_updates, ("discount", "amplify"))
        self.normalise = flag("normalise", normalise)
        self.on_time: dict[int, list[Update]] = {}
        """B_g by group."""
        self.late: list[Update] = []
        """B."""

    def start(self, fed: Federation) -> None:
        """p_i."""
        self.p = objective_weights(fed.samples, self.weighting).tolist()

    def on_online(self, fed: Federation, client: int) -> None:
        """A client that nobody waits for gets something to do; at time 0 these are the first tasks."""
        if self.compass.is_free(client) and fed.samples[client]:
            self._assign(fed, [client])

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """The first at once, the others into the buffer of their group or of the late."""
        arrival = self.compass.arrive(reply.client, fed.now)
        s = self.staleness_weight(fed.staleness(reply))
        weight = self.alpha * (s if self.stale_updates == "discount" else 1 / s) * self.p[reply.client]
        if arrival.group is None:
            fed.publish(fed.model + self.server(weight * reply["delta"]), used=[reply])
            self._assign(fed, [reply.client])
        elif arrival.kind == "late":
            self.late.append(Update(reply, weight))
            self._assign(fed, [reply.client])
        else:
            self.on_time.setdefault(arrival.group, []).append(Update(reply, weight))
            if arrival.complete:
                self._aggregate(fed, arrival.group)

    def on_timer(self, fed: Federation, timer: Timer) -> None:
        """The latest time of a group."""
        if self.compass.expire(timer.tag[1]):
            self._aggregate(fed, timer.tag[1])

    def on_lost(self, fed: Federation, task: Task, why: str) -> None:
        """Its group need not wait; the client gets another task, when it is back if it is away."""
        complete = self.compass.lose(task.client)
        if complete is not None:
            self._aggregate(fed, complete)
        self._assign(fed, [task.client])

    def _aggregate(self, fed: Federation, group: int) -> None:
        """x <- x + B_g + B; the group's clients get the new x."""
        updates, self.late = self.on_time.pop(group) + self.late, []
        fed.publish(fed.model + self.server(self._sum(updates)), used=[each.reply for each in updates])
        self._assign(fed, self.compass.disband(group))

    def _sum(self, updates: list[Update]) -> Tensor:
        """sum_i c_i Delta_i, or with +N  Q sum_i c_i Delta_i / Q_i."""
        deltas, weights = [each.reply["delta"] for each in updates], [each.weight for each in updates]
        if not self.normalise:
            return weighted_sum(deltas, weights)
        steps = np.array([each.reply.task.steps for each in updates])
        mean_steps = np.average(steps, weights=[self.p[each.reply.client] for each in updates])
        return weighted_sum(deltas, mean_steps * np.array(weights) / steps)

    def _assign(self, fed: Federation, clients: list[int]) -> None:
        """Who is away gets its task when it is back."""
        for client in clients:
            if fed.online[client]:
                steps, group, latest = self.compass.assign(client, fed.now)
                if latest is not None:
                    fed.timer(latest, ("latest", group))
                fed.dispatch(client, steps=steps, tag=f"group={group} steps={steps}")

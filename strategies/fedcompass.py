"""FedCompass: clients get as many local steps as bring them back together (Li et al. 2024, arXiv 2309.14675).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    exactly Q_i local steps from x; Delta_i = x_Q - x
Server      :class:`fedsim.Compass` gives every client its Q_i and a group that is expected back at one time.
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

from typing import NamedTuple

import numpy as np
from torch import Tensor

from fedsim import (
    Compass,
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
)


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
        fed.publish(fed.model + self.server(self.step(updates)), used=[each.reply for each in updates])
        self._assign(fed, self.compass.disband(group))

    def step(self, updates: list[Update]) -> Tensor:
        """What a group and the late add to the model: sum_i c_i Delta_i, or with +N  Q sum_i c_i Delta_i / Q_i."""
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

"""What a strategy is: plain state and event handlers, and helpers for synchronous and asynchronous servers.

A strategy may be saved between any two instants, so it holds values, containers, arrays, detached tensors and objects
of its own module's classes, and no threads, generators, functions or open files. What it changes must lie in the object
itself, not in its class; a set is iterated over in sorted order, for its own is not saved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import number, one_of, optional_seconds, optional_whole, seconds, whole
from fedsim.federation import Federation, Reply, Task, Timer
from fedsim.local import MOST, LocalSGD
from fedsim.problems.base import Problem
from fedsim.server import PlainStep
from fedsim.topology import Ring, Topology

Ids = NDArray[np.int64]
"""Client ids, or a whole number for each, ``[k]``."""

SELECTIONS = ("fixed", "binomial", "online")
"""Whom a round may ask."""


class Strategy:
    """The server's half of a method. Override the handlers you need; each is called at its event.

    Args:
        local: the client's half of the job ``"train"``.
        server: what the server makes of a step; for strategies that publish ``fed.model + self.server(step)``.
    """

    jobs: dict[str, LocalSGD]
    """What clients can be asked to do, by name."""
    everybody: ClassVar[bool] = False
    """Whether all clients make a round, whatever ``cohort`` says, and each model published ends one: peers do."""
    clients_choose_steps: ClassVar[bool] = False
    """Whether a client may make another number of local steps than it is asked for, if it says so beforehand."""
    steps_by: ClassVar[str] = "makes server steps of its own"
    """Why a strategy that takes no ``server`` does not."""
    unsaved: ClassVar[str | None] = None
    """Why a run of this strategy cannot be saved and resumed; None if it can."""

    def __init__(self, local: LocalSGD | None = None, server: PlainStep | None = None) -> None:
        self.jobs = {"train": local if local is not None else LocalSGD()}
        self.server = server if server is not None else PlainStep()

    def check(self, clients: int) -> None:
        """Refuse settings that do not fit a population of ``clients``, before anything is written.

        Raises:
            ConfigError: naming the setting.
        """
        for rule in self.jobs.values():
            rule.check(clients)

    def check_federation(self, fed: Federation) -> None:
        """Refuse a federation that does not fit, before time 0 and before anything is written.

        Raises:
            ConfigError: naming the setting.
        """

    def own_problem(self) -> Problem | None:
        """What is learnt, if the strategy brings that along; None leaves it to whoever puts the run together."""
        return None

    def drive(self, fed: Federation, advance: Callable[[], bool]) -> None:
        """Let the run happen: each call of ``advance`` brings about the next instant, False once the run is over.

        For strategies that wait for replies in their own course; all others answer events.
        """
        while advance():
            pass

    def rounds(self, fed: Federation) -> int:
        """How many rounds are over, where ``everybody`` makes one."""
        return fed.version

    def start(self, fed: Federation) -> None:
        """Time 0, before anything else."""

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """One result has arrived; its client is idle again."""

    def settle(self, fed: Federation) -> None:
        """Once after all arrivals, losses, presence changes and timers of one instant: the place to dispatch."""

    def on_timer(self, fed: Federation, timer: Timer) -> None:
        """A timer has gone off."""

    def on_lost(self, fed: Federation, task: Task, why: str) -> None:
        """A task will not be answered: ``dropped``, ``offline``, ``interrupted``, ``deadline``, ``rejected``
        or ``failed`` (client code raised)."""

    def on_online(self, fed: Federation, client: int) -> None:
        """A client became available; called for every client that is online at time 0."""

    def on_message(self, fed: Federation, src: int, dst: int, payload: Mapping[str, Tensor], tag: Any) -> None:
        """A message of ``fed.send`` has arrived at ``dst``."""

    def on_exchange(self, fed: Federation, vectors: Tensor, tag: Any) -> None:
        """A gossip step of ``fed.exchange`` is complete: ``vectors [clients, d]`` are mixed."""

    def message(self, fed: Federation, task: Task) -> Mapping[str, Tensor]:
        """Extra tensors to send down with a task, asked for when it takes effect."""
        return {}

    def views(self, fed: Federation) -> Mapping[str, Tensor]:
        """What to evaluate, by name: vectors ``[d]``, and stacks of vectors ``[k, d]`` (nodes).

        Metrics of ``"global"`` get plain names, others the view's name as a prefix: ``mean_loss``. A stack's rows are
        evaluated one by one: ``nodes_accuracy`` is their mean, ``nodes_accuracy_std`` and ``nodes_accuracy_worst``
        their standard deviation and the mean of the lowest tenth, and ``consensus`` the mean squared distance of the
        rows from their mean (``<view>_consensus`` for stacks of another name than ``"nodes"``).
        """
        return {"global": fed.model}

    def own_models(self, fed: Federation) -> Mapping[int, Tensor]:
        """The clients' own models ``[d]`` by client, to be evaluated on their own examples.

        Here those that clients keep as their state ``"own"`` (``LocalSGD.keep``).
        """
        return fed.kept("own")


class Round:
    """One synchronous round after another: whom to ask, who has answered, when it is over.

    Args:
        over_selection: ask ``ceil(over_selection * cohort)`` clients and go on with the first ``cohort`` results.
        deadline: seconds after which a round closes with what it has; None waits for everybody asked.
        selection: ``"fixed"`` asks a cohort of fixed size; ``"binomial"`` asks each client with probability
            ``cohort / clients`` and waits for all of them; ``"online"`` asks everybody who is online and idle, and
            waits for all of them.
        stragglers: ``"cancel"`` calls back those still running when a round closes; ``"late"`` lets them finish
            and refuses their results.
    """

    def __init__(
        self,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        self.over_selection = number("over_selection", over_selection, least=1)
        self.deadline = optional_seconds("deadline", deadline, above=0)
        self.selection = one_of("selection", selection, SELECTIONS)
        self.stragglers = one_of("stragglers", stragglers, ("cancel", "late"))
        self.number = 0
        """How many rounds have been begun, those included to which nobody could be asked."""
        self.chance = 1.0
        """How likely each client that was online and idle was to be asked; not kept for cohorts of fixed size."""
        self.waiting: set[int] = set()
        self.replies: list[Reply] = []
        self._quorum = 0
        self._expired = False

    def open(
        self,
        fed: Federation,
        steps: Callable[[Federation, Ids], Ids | None] | None = None,
        start: Tensor | None = None,
        held: bool = False,
    ) -> None:
        """Ask a new cohort; with nobody online and idle nothing is asked and the round stays over.

        Args:
            fed: the federation.
            steps: gives the local steps of each client of a cohort, or None for what the job says.
            start: vector ``[d]`` to start from; default the model.
            held: whether the message alone travels down.
        """
        chosen = self._choose(fed)
        self.number += 1
        self.replies = []
        self._expired = False
        self._quorum = min(fed.cohort, len(chosen)) if self.selection == "fixed" else len(chosen)
        asked = steps(fed, chosen) if steps is not None else None
        self.waiting = set(fed.dispatch(chosen, start, asked, held=held)) if len(chosen) else set()
        if self.waiting and self.deadline is not None:
            fed.timer(fed.now + self.deadline, ("round deadline", self.number))

    def _choose(self, fed: Federation) -> Ids:
        if self.selection == "fixed":
            # 10 * 1.1 is 11.000000000000002: round the product before taking the ceiling.
            return fed.pick(math.ceil(round(self.over_selection * fed.cohort, 9)))
        idle = fed.idle()
        if self.selection == "online":
            return idle
        share = fed.cohort / fed.clients
        for attempt in range(100):  # an empty cohort is drawn again, which makes everybody's chance the greater
            chosen = idle[fed.rng("binomial cohort", self.number, attempt, idle).uniform() < share]
            if len(chosen) or not len(idle):
                break
        self.chance = share / (1.0 - (1.0 - share) ** len(idle)) if len(idle) else share
        return chosen

    def receive(self, fed: Federation, reply: Reply) -> None:
        """Take in a reply; one that belongs to an earlier round is late."""
        if reply.task.id not in self.waiting:
            fed.reject(reply, "late")
            return
        self.waiting.remove(reply.task.id)
        if len(self.replies) < self._quorum:
            self.replies.append(reply)
        else:
            fed.reject(reply, "late")

    def lose(self, task: Task) -> None:
        """A task of this round will not be answered."""
        self.waiting.discard(task.id)

    def expire(self, timer: Timer) -> None:
        """A timer has gone off; if it is this round's deadline the round is over."""
        if timer.tag == ("round deadline", self.number):
            self._expired = True

    @property
    def over(self) -> bool:
        """Whether the round can be closed."""
        return self._expired or not self.waiting or len(self.replies) >= self._quorum

    def close(self, fed: Federation) -> list[Reply]:
        """End the round and return its results in order of arrival."""
        if self.stragglers == "cancel":
            for task in sorted(self.waiting):
                fed.cancel(task)
        self.waiting = set()
        replies, self.replies = self.replies, []
        return replies


class Synchronous(Strategy, ABC):
    """A server that works in rounds: subclasses say how the results of one round become the next model.

    Takes the settings of :class:`Round`, and ``server`` as :class:`Strategy` does.
    """

    rate: float
    """The learning rate of the local steps of the round that is under way; there once it has begun."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, server)
        self.round = Round(over_selection, deadline, selection, stragglers)

    @abstractmethod
    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """The next model ``[d]`` from at least one reply, in order of arrival."""

    def local_steps(self, fed: Federation, clients: Ids) -> Ids | None:
        """Local steps of each client of a new cohort, ``[k]``; None for what the job says."""
        return None

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """Take the reply into the round."""
        self.round.receive(fed, reply)

    def on_lost(self, fed: Federation, task: Task, why: str) -> None:
        """Go on without the task."""
        self.round.lose(task)

    def on_timer(self, fed: Federation, timer: Timer) -> None:
        """Close the round at its deadline."""
        self.round.expire(timer)

    def settle(self, fed: Federation) -> None:
        """Begin the next round when this one is over."""
        if self.round.over:
            replies = self.round.close(fed)
            if replies:
                fed.publish(self.aggregate(fed, replies), used=replies)
            self.rate = self.jobs["train"].rate(fed.round)
            self.round.open(fed, self.local_steps)


class Asynchronous(Strategy):
    """A server that keeps a number of clients at work: whoever finishes is replaced by a random idle client.

    Args:
        local: the client's half.
        concurrency: tasks in flight; None is the run's cohort.
        server: what the server makes of a step.
    """

    def __init__(
        self, local: LocalSGD | None = None, concurrency: int | None = None, server: PlainStep | None = None
    ) -> None:
        super().__init__(local, server)
        self.concurrency = optional_whole("concurrency", concurrency, least=1)

    def settle(self, fed: Federation) -> None:
        """Refill."""
        missing = (self.concurrency or fed.cohort) - fed.in_flight
        if missing > 0:
            chosen = fed.pick(missing)
            if len(chosen):
                fed.dispatch(chosen)


def idle_with_data(fed: Federation) -> Ids:
    """Clients that are online, idle and have examples: whom a server asks that keeps everybody at work."""
    idle = fed.idle()
    return idle[fed.samples[idle] > 0]


class Anarchic(Strategy):
    """Clients that take part when they like, with as many local steps as they like (arXiv 2108.09875).

    A client that is online pauses for a while, takes the model there is then, runs its steps, and begins again.

    Args:
        local: the client's half; its results are made to be mean gradients, ``reply["gradient"] [d]``.
        most_steps: a task runs 1 to so many local steps, all equally likely, drawn by the client; only if
            ``local.steps`` is None, for that says how many.
        pause: mean seconds of the exponential pause before a task; 0 makes none.
        server: what the server makes of a step.
    """

    clients_choose_steps = True

    def __init__(
        self,
        local: LocalSGD | None = None,
        most_steps: int = 20,
        pause: float = 0.0,
        server: PlainStep | None = None,
    ) -> None:
        super().__init__((local if local is not None else LocalSGD()).replace(sends="gradient"), server)
        self.most_steps = whole("most_steps", most_steps, least=1, most=MOST)
        self.pause = seconds("pause", pause, least=0)
        self.turns: NDArray[np.int64]
        """How often each client has begun to take part, ``[clients]``."""
        self.pausing: NDArray[np.bool_]

    def start(self, fed: Federation) -> None:
        """Nobody has begun."""
        self.turns = np.zeros(fed.clients, dtype=np.int64)
        self.pausing = np.zeros(fed.clients, dtype=np.bool_)

    def settle(self, fed: Federation) -> None:
        """Whoever is idle begins its next turn, with a pause if there are to be any."""
        idle = idle_with_data(fed)
        idle = idle[~self.pausing[idle]]
        if not len(idle):
            return
        self.turns[idle] += 1
        if not self.pause:
            self._work(fed, idle)
            return
        self.pausing[idle] = True
        waits = self.pause * fed.rng("pause", idle, self.turns[idle]).exponential()
        for client, wait in zip(idle.tolist(), waits.tolist(), strict=True):
            fed.timer(fed.now + wait, ("pause", client))

    def on_timer(self, fed: Federation, timer: Timer) -> None:
        """A pause is over; a client that has left meanwhile begins anew when it is back."""
        client = timer.tag[1]
        self.pausing[client] = False
        if fed.online[client]:
            self._work(fed, np.array([client]))

    def _work(self, fed: Federation, clients: Ids) -> None:
        steps = None
        if self.jobs["train"].steps is None:
            share = fed.rng("local steps", clients, self.turns[clients]).uniform()
            steps = np.ceil(self.most_steps * share).astype(np.int64)
        fed.dispatch(clients, steps=steps)


class Peers(Strategy):
    """Nodes without a server: each trains a model of its own, then mixes it with its neighbours'; round after round.

    What the federation holds as the model is the nodes' mean. A node that is offline keeps its model, and the weight
    of its edges goes to their other ends.

    Args:
        local: the client's half; its results are made to be models.
        topology: who talks to whom; a ring unless given.

    Attributes:
        models: ``[clients, d]``, the nodes' models.
        replies: what has been trained since the last round ended.
        mixing: whether a gossip step is under way.
        gossip_steps: how many have been begun.
    """

    everybody = True
    steps_by = "has no server"

    def __init__(self, local: LocalSGD | None = None, topology: Topology | None = None) -> None:
        super().__init__((local if local is not None else LocalSGD()).replace(sends="model"))
        self.topology = topology if topology is not None else Ring()
        self.models: Tensor
        self.replies: list[Reply] = []
        self.mixing = False
        self.gossip_steps = 0

    def check(self, clients: int) -> None:
        """Refuse a topology, too, that does not fit."""
        super().check(clients)
        self.topology.check(clients)

    def start(self, fed: Federation) -> None:
        """All nodes start from one model."""
        self.models = fed.model.repeat(fed.clients, 1)

    def settle(self, fed: Federation) -> None:
        """Train; when all are done or lost, mix."""
        if fed.in_flight or self.mixing:
            return
        if self.replies:
            trained = self.models.clone()
            for reply in self.replies:
                trained[reply.client] = reply["model"]
            self.mix(fed, trained)
        else:
            self.train(fed)

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """Keep it until the nodes mix."""
        self.replies.append(reply)

    def on_exchange(self, fed: Federation, vectors: Tensor, tag: Any) -> None:
        """The gossip step is done, and the round with it."""
        self.mixing = False
        self.complete(fed, vectors)

    def train(self, fed: Federation) -> None:
        """Every node that is there works on its own model; nothing travels."""
        nodes = fed.idle()
        if len(nodes):
            fed.dispatch(nodes, start=self.models[nodes], local=True)

    def mix(self, fed: Federation, models: Tensor) -> None:
        """Begin a gossip step of ``models [clients, d]``: ``on_exchange`` gets ``W @ models``."""
        fed.exchange(models, self.topology.mixing_matrix(fed.clients, fed.rng("topology", self.gossip_steps)))
        self.gossip_steps += 1
        self.mixing = True

    def complete(self, fed: Federation, models: Tensor) -> None:
        """The round is over: ``models [clients, d]`` are the nodes' new ones."""
        self.models = models
        fed.publish(models.mean(dim=0), used=self.replies)
        self.replies = []

    def own_models(self, fed: Federation) -> Mapping[int, Tensor]:
        """Each node's model is its own."""
        return dict(enumerate(self.models))

    def views(self, fed: Federation) -> Mapping[str, Tensor]:
        """The mean of the nodes' models, and all of them ``[clients, d]``."""
        return {"global": fed.model, "nodes": self.models}

"""The nodes of a Flower grid as a pool: tasks go out as messages, and whoever is connected is somebody."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim.checks import SimulationError
from fedsim.flower.configuration import Settings
from fedsim.flower.messages import (
    Greeting,
    Introduction,
    Order,
    Report,
    WireError,
    content_of,
    greeting_message,
    tensors,
    work_message,
)
from fedsim.local import MOST, LocalSGD
from fedsim.pool import Pool
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import Result, Work
from fedsim.version import __version__

logger = logging.getLogger("fedsim")

UNAVAILABLE = 5
"""Flower's code for a node that is gone."""

LOST = {3: "dropped", 4: "dropped", UNAVAILABLE: "interrupted"}
"""Why a task is lost, by Flower's code; for all other codes its client code has failed."""

LONGEST_SECONDS = 1e9
"""Of a pause, of a task's work and of a gradient: more makes no sense, and is no number of nanoseconds."""


@dataclass
class Member:
    """A node that has introduced itself, and what has to be told to it."""

    node: int
    client: int
    samples: int
    seconds_per_gradient: float
    pause: float
    next_steps: int
    accepted: list[int] = field(default_factory=list)
    """Tasks whose results have been used, as far as the node may not know it yet."""
    undecided: list[int] = field(default_factory=list)
    commits: int = 0
    """How often it has changed what it keeps, as it says."""


@dataclass(frozen=True)
class Sent:
    """A task that is out."""

    node: int
    work: Work
    accepted: tuple[int, ...]
    """What was told with it."""


@dataclass(slots=True)
class Unusable(Result):
    """A result that must not be used."""

    wrong: str = ""
    """Why."""


@dataclass(frozen=True)
class Answer:
    """What has become of a task."""

    task: int
    result: Result | None = None
    report: Report | None = None
    """What its node says of a result that may be used."""
    lost: str = ""
    """Why there is no result: ``failed``, ``interrupted`` or ``dropped``."""
    said: str = ""
    """What was said about that."""


@dataclass(frozen=True)
class News:
    """What one look at the grid has brought."""

    came: list[Member] = field(default_factory=list)
    went: list[Member] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


class Nodes(Pool):
    """Who is connected, which client each of them is, and the tasks that are out.

    A node is asked who it is when it appears. Its ``partition-id`` says which client it is; one without gets the
    lowest number that nobody has. What does not fit is told once and not asked again.

    Args:
        grid: of the run.
        settings: of the deployment.
        own_data: whether nodes hold data of their own; otherwise they must hold what the partition gives them.
    """

    name = "flower"

    def __init__(self, grid: Grid, settings: Settings, own_data: bool) -> None:
        self.grid, self.settings, self.own_data = grid, settings, own_data
        self.members: dict[int, Member] = {}
        """By client."""
        self.refused: dict[int, str] = {}
        """Nodes that do not fit, and why."""
        self._greeted: dict[str, tuple[int, int]] = {}
        """Node and the client that was offered to it, by the message that asks it who it is."""
        self._sent: dict[str, Sent] = {}
        self._message_of: dict[int, str] = {}
        """The message by which each task that is out went."""
        self._away: dict[int, Member] = {}
        """Members that have gone, by node: one that comes back still holds what has to be told to it."""
        self._said: dict[int, int] = {}
        """How many examples each client has said it holds: it may not change its mind."""

    # ---- the interface of a pool -------------------------------------------------------------------

    def open(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        """Know what results must be made of; the nodes make their own rules from the configuration."""
        self._layout, self._clients = problem.layout, problem.clients
        self._specs = {name: rule.payload_spec(problem.layout) for name, rule in jobs.items()}
        self._measured = {name for name, rule in jobs.items() if rule.measured}
        self._holds: NDArray[np.int64] = problem.samples

    def submit(self, works: Sequence[Work]) -> None:
        """Push a message for each task; :meth:`out` then knows those that could be pushed."""
        for work in works:
            member = self.members[work.client]
            accepted = tuple(member.accepted)
            order = Order(
                work.task, work.client, work.nth, work.job, work.lr, work.steps, accepted, tuple(member.undecided)
            )
            message = work_message(member.node, order, work.start, work.message, self.settings.ttl_seconds)
            pushed = list(self.grid.push_messages([message]))
            if pushed and pushed[0]:
                self._sent[str(pushed[0])] = Sent(member.node, work, accepted)
                self._message_of[work.task] = str(pushed[0])

    def ready(self, tasks: Sequence[int]) -> dict[int, Result]:
        """Nothing: what has come is news, see :meth:`look`."""
        return {}

    def result(self, task: int) -> Result:
        """Nobody may wait for a node.

        Raises:
            SimulationError: always.
        """
        raise SimulationError(f"the result of task {task} is asked for before its node has answered")

    def forget(self, task: int) -> None:
        """Whatever the node says of this task will not be looked at."""
        message = self._message_of.pop(task, None)
        if message is not None:
            del self._sent[message]

    def close(self) -> None:
        """Nobody is asked any more."""
        self._sent.clear()
        self._message_of.clear()
        self._greeted.clear()

    def out(self, task: int) -> bool:
        """Whether a task is at its node."""
        return task in self._message_of

    # ---- what becomes of results ---------------------------------------------------------------------

    def decided(self, client: int, task: int, used: bool) -> None:
        """The server has used the result of a task, or never will; its node is told with the next task."""
        for member in (*filter(None, [self.members.get(client)]), *self._away.values()):
            if member.client == client and task in member.undecided:
                member.undecided.remove(task)
                if used:
                    member.accepted.append(task)

    # ---- looking -------------------------------------------------------------------------------------

    def look(self) -> News:
        """See who is there and what has come; ask newcomers who they are."""
        there = {int(node) for node in self.grid.get_node_ids()}
        went = [member for member in self.members.values() if member.node not in there]
        for member in went:
            self._away[member.node] = self.members.pop(member.client)
            for task in [sent.work.task for sent in self._sent.values() if sent.node == member.node]:
                self.forget(task)
        if went:
            self.refused.clear()  # there is a place again
        came, answers = [], []
        for message in self._pulled():
            to = message.metadata.reply_to_message_id
            if to in self._greeted:
                newcomer = self._meet(self._greeted.pop(to), message, there)
                came += [] if newcomer is None else [newcomer]
            elif to in self._sent:
                sent = self._sent[to]
                self.forget(sent.work.task)
                answers.append(self._answer(sent, message))
        self._greet(there)
        return News(came, went, answers)

    def _pulled(self) -> list[Message]:
        asked = [*self._greeted, *self._sent]
        return list(self.grid.pull_messages(asked)) if asked else []

    def _greet(self, there: set[int]) -> None:
        """Ask everybody who has not been asked, or whose place somebody else has taken meanwhile."""
        asked = {node for node, _ in self._greeted.values()}
        known = {member.node for member in self.members.values()}
        offered = {client for _, client in self._greeted.values()}
        for node in sorted(there - asked - known - set(self.refused)):
            free = (each for each in range(self._clients) if each not in self.members and each not in offered)
            client = next(free, None)
            if client is None:  # all places are taken or offered
                return
            greeting = greeting_message(node, Greeting(client, self._clients), self.settings.ttl_seconds)
            pushed = list(self.grid.push_messages([greeting]))
            if pushed and pushed[0]:
                self._greeted[str(pushed[0])] = (node, client)
                offered.add(client)

    def _meet(self, greeted: tuple[int, int], message: Message, there: set[int]) -> Member | None:
        """A node has said who it is: it becomes a member, or is told off."""
        node, offered = greeted
        if node not in there or (message.has_error() and message.error.code in LOST):
            return None  # if it is still there, it will be asked again
        try:
            self._from(node, message)
            if message.has_error():
                raise WireError(str(message.error.reason or f"error {message.error.code}"))
            said = Introduction.read(content_of(message), "introduction")
            if said.client == offered and offered in self.members:
                return None  # somebody else was quicker: it will be offered another place
            self._check(said)
        except WireError as error:
            self.refused[node] = str(error)
            logger.warning("node %d is not taken: %s", node, error)
            return None
        member = Member(node, said.client, said.samples, said.seconds_per_gradient, said.pause, said.next_steps)
        before = self._away.pop(node, None)
        if before is not None and before.client == said.client:
            member.accepted, member.undecided, member.commits = before.accepted, before.undecided, before.commits
        elif said.client in self._said:
            logger.warning("client %d is another node than before: what it kept between tasks is gone", said.client)
        self.members[said.client], self._said[said.client] = member, said.samples
        logger.info("client %d is node %d, which holds %d examples", said.client, node, said.samples)
        return member

    def _check(self, said: Introduction) -> None:
        clients, client = self._clients, said.client
        if said.clients != clients:
            raise WireError(f"num-partitions={said.clients}: the run has clients={clients}")
        if not 0 <= client < clients:
            raise WireError(f"partition-id={client}: must be from 0 to {clients - 1}")
        if client in self.members:
            raise WireError(f"partition-id={client}: node {self.members[client].node} is this client already")
        if said.parameters != self._layout.size:
            raise WireError(f"its model has {said.parameters} parameters, the server's {self._layout.size}")
        held, most = int(self._holds[client]), self.settings.most_samples
        if not self.own_data and said.samples != held:
            raise WireError(f"client {client} says it holds {said.samples} examples, the partition gives it {held}")
        if not 0 <= said.samples <= most:
            raise WireError(f"client {client} says it holds {said.samples} examples; allowed: 0 to {most}")
        if self._said.get(client, said.samples) != said.samples:
            raise WireError(f"client {client} held {self._said[client]} examples before, {said.samples} now")
        if not 0 <= said.seconds_per_gradient <= LONGEST_SECONDS:
            raise WireError(f"it measured {said.seconds_per_gradient} s per gradient")
        _check_intentions(said)
        if said.fedsim != __version__:
            logger.warning("client %d runs fedsim %s, the server %s", client, said.fedsim[:20], __version__)

    def _from(self, node: int, message: Message) -> None:
        """A node answers for itself only; what Flower says about it comes from the server's own side."""
        if message.has_content() and message.metadata.src_node_id != node:
            raise WireError(f"node {message.metadata.src_node_id} has answered for node {node}")

    def _answer(self, sent: Sent, message: Message) -> Answer:
        task = sent.work.task
        if message.has_error():
            why = LOST.get(message.error.code, "failed")
            return Answer(task, lost=why, said=_one_line(message.error.reason) or f"error {message.error.code}")
        try:
            self._from(sent.node, message)
            content = content_of(message)
            report = Report.read(content, "report")
            self._check_report(report, sent)
            payload = tensors(content, "payload", self._specs[sent.work.job])
        except WireError as error:
            return Answer(task, result=Unusable({}, {}, 0, wrong=str(error)))
        member = self.members[sent.work.client]
        member.accepted = member.accepted[len(sent.accepted) :]  # it knows of these now
        member.undecided.append(task)
        member.next_steps = report.next_steps
        if report.commits < member.commits:
            logger.warning("client %d has lost what it kept between tasks, and begins anew", member.client)
        member.commits = report.commits
        return Answer(task, result=Result(payload, {}, report.steps), report=report)

    def _check_report(self, report: Report, sent: Sent) -> None:
        work, held = sent.work, self._said[sent.work.client]
        if (report.task, report.client) != (work.task, work.client):
            raise WireError(f"it is about task {report.task} of client {report.client}")
        if report.samples != held:
            raise WireError(f"it claims {report.samples} examples, its client holds {held}")
        if work.job in self._measured:
            if not 0 <= report.steps <= MOST:
                raise WireError(f"it claims {report.steps} local steps")
        elif report.steps != work.steps:
            raise WireError(f"it claims {report.steps} local steps, {work.steps} were asked for")
        if not 0 <= report.seconds <= LONGEST_SECONDS:
            raise WireError(f"it claims to have taken {report.seconds} s")
        _check_intentions(report)


def _check_intentions(said: Introduction | Report) -> None:
    if not 0 <= said.pause <= LONGEST_SECONDS or not -1 <= said.next_steps <= MOST:
        raise WireError(f"a pause of {said.pause} s and {said.next_steps} steps make no sense")


def _one_line(text: Any) -> str:
    """The last line of what Flower hands on: of a traceback it is the one that says what was wrong."""
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""

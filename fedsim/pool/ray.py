"""The Ray pool: resident workers on one machine or a cluster, with the same bits as the inline pool.

Workers hold the data, the model code and scratch memory, and nothing that changes. So a worker may come late,
die, or be lost with its machine at any time: its groups are trained again, by whoever is there.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim.checks import ConfigError, SimulationError, optional_number, optional_whole, said
from fedsim.local import LocalSGD
from fedsim.pool.base import Pool, device_setting, group_setting, group_size, kernel_setting
from fedsim.pool.connection import connect, import_ray
from fedsim.pool.crew import Crew, LostNode, Member
from fedsim.pool.inline import InlinePool
from fedsim.pool.lines import Line, Ticket, heard
from fedsim.pool.parcels import Packed, Parcel, shared_tensors
from fedsim.pool.regions import Letter, Region
from fedsim.pool.store import TensorStore
from fedsim.pool.trips import Trips
from fedsim.pool.usercode import pickled_with_user_code
from fedsim.pool.worker import Answer
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import Result, Work, kernel_for, out_of_memory

logger = logging.getLogger("fedsim")

QUEUED = 2
"""Groups handed to a worker at a time: one in training, one on the way."""

RETRIES = 5
"""Failures that a group survives, deaths of its worker say: what fails every time must not be tried for ever."""

SLICE = 2.0
"""Seconds of waiting after which the pool looks whether all nodes are still there."""

SOONEST = 0.0005
"""Seconds before which nobody answers."""

TURN = 0.002
"""Seconds after which the pool looks at Ray, or at the lines, again, as long as it has to hear both."""

PATIENCE = 120.0
"""Seconds without any result after which the log says what is waited for."""


@dataclass(slots=True, eq=False)
class Group:
    """Tasks trained together by one worker."""

    works: list[Work]
    shared: list[Tensor]
    """The tensors that its tasks share, with one another and with other groups."""
    member: Member | None = None
    """Who trains it."""
    actor: Any = None
    """The member's actor at that time."""
    room: int = 1
    """How much of a worker's queue it takes."""
    failures: int = 0
    region: Region | None = None
    """Where its tensors travel, there and back; None if through Ray's object store."""
    sent: float = 0.0
    """When it was handed to a worker that had nothing else to do, on the clock of ``time.perf_counter``; else NaN."""

    def join(self, member: Member) -> None:
        """Take up room in a worker's queue."""
        self.member, self.actor, self.region = member, member.actor, member.lent()
        self.sent = math.nan if member.load else time.perf_counter()
        member.load += self.room

    def leave(self) -> None:
        """Give back the room and the region, unless the worker has been started anew since."""
        if self.member is not None and self.member.actor is self.actor:
            self.member.load -= self.room
            if self.region is not None:
                self.member.regions.append(self.region)
        self.member = self.actor = self.region = None

    def sealed(self, parcels: Sequence[Parcel]) -> Letter | None:
        """A letter about all that training needs, in its region; None if it has none, or that finds no more memory."""
        if self.region is None:
            return None
        try:
            return self.region.seal((parcels, [Packed.of(tensor) for tensor in self.shared]))
        except OSError:
            self.region = None
            return None

    def results(self, answer: Answer) -> list[Result]:
        """What a worker answers, in memory of its own."""
        results = answer.results
        if isinstance(results, Letter):
            assert self.region is not None
            results = self.region.unsealed(results)
        return results.unpacked([work.task for work in self.works])

    def __str__(self) -> str:
        clients, tasks = [work.client for work in self.works], [work.task for work in self.works]
        return f"clients {_listed(clients)}, tasks {_listed(tasks)}"


class RayPool(Pool):
    """Trains in resident Ray actors, one thread each.

    Args:
        workers: how many; None takes the cores of this machine, or of the cluster joined.
        address: of a running cluster to join (``"auto"`` finds it); None starts a Ray of its own and stops it.
        gpus_per_worker: fraction of a GPU each worker reserves; None takes none, or with ``device="cuda"`` all there
            are: a worker per GPU, unless ``workers`` says how many share them.
        group: most tasks to train together; ``"auto"`` cuts what waits evenly among the workers. Never shows in
            the results of a CPU.
        device: ``cpu`` or ``cuda``.
        kernel: what makes the products of linear layers on a CPU: ``native``, ``torch``, or ``auto``, which is
            native where that was built; every worker has to have it then.
    """

    name = "ray"
    trains_beside = True

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        gpus_per_worker: float | None = None,
        group: int | str = "auto",
        device: str = "cpu",
        kernel: str = "auto",
    ) -> None:
        self.workers = optional_whole("workers", workers, least=1, most=4096)
        self.address = address
        self.gpus_per_worker = optional_number("gpus_per_worker", gpus_per_worker, least=0, most=8)
        self.device, self.kernel = device_setting(device), kernel_setting(kernel)
        gpus = self.gpus_per_worker
        if self.device == "cuda" and gpus == 0:
            raise ConfigError(f"gpus_per_worker={gpus_per_worker}: must be > 0 with device=cuda, or null")
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ConfigError(f"gpus_per_worker={gpus_per_worker}: must be a fraction of one GPU or a whole number")
        self.group = group_setting(group)
        self._ray: Any = None
        self._connected = False
        self._crew = Crew(0.0 if gpus is None and self.device == "cpu" else gpus)
        self._store = TensorStore()
        self._own = InlinePool(self.group, kernel=self.kernel)
        """The driver itself, for what is not worth a trip."""
        self._trips = Trips()
        self._waits_since = math.inf
        """Since when the driver has been waiting, on the clock of ``time.perf_counter``."""
        self._handed_out = 0.0
        """When works were last submitted, on the clock of ``time.perf_counter``."""
        self._queue: deque[Group] = deque()
        self._running: dict[Any, Group] = {}
        """By the ticket of the answer, or its reference if it comes through Ray."""
        self._results: dict[int, Result] = {}
        self._due: set[int] = set()
        """Tasks whose result is still to come and will be asked for."""
        self._looked = 0.0
        """When the nodes were last looked at, on the clock of ``time.monotonic``."""
        self._quiet_since = 0.0
        """Since when nothing was heard while somebody waited, on the same clock."""

    def identity(self) -> dict[str, Any]:
        """What of this pool shows in a run's bits: on a GPU also among how many workers tasks are dealt out."""
        return super().identity() | ({} if self.device == "cpu" else {"workers": self.workers})

    @property
    def restarts(self) -> int:
        """How often a worker's process died and came back."""
        return self._crew.restarts

    # ---- start and stop --------------------------------------------------------------------------

    def open(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        """Start or join Ray and start the workers, without waiting for them.

        Raises:
            ConfigError: if there is no cluster at ``address``, or it has too few cores.
        """
        if self._ray is not None:
            raise ConfigError("pool: this pool is in use by another run; give every run its own")
        ray = import_ray()
        code = pickled_with_user_code((problem, dict(jobs), randomness, self.device, kernel_for(self.kernel)))
        self._connected = connect(ray, self.address, self.workers)
        self._ray = ray
        try:
            self._crew.hire(ray, self.workers, ray.put(code))
            if self.device == "cpu":
                self._own.open(problem, jobs, randomness)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers, and Ray if this pool started or joined it."""
        ray, self._ray = self._ray, None
        if ray is None:
            return
        self._crew.dismiss()
        self._queue.clear()
        self._running.clear()
        self._results.clear()
        self._due.clear()
        self._store.clear()
        self._own.close()
        if self._connected:
            ray.shutdown()
            self._connected = False

    # ---- work ------------------------------------------------------------------------------------

    def submit(self, works: Sequence[Work]) -> None:
        """Cut into groups and hand them out, the longest first; what is not worth the trip is trained here and now."""
        if works and self.device == "cpu" and not self._trips.are_worth_it(works, self._crew.joined()):
            self._train(works)
            return
        self._due.update(work.task for work in works)
        size = self._group_size(works)
        ordered = sorted(works, key=lambda work: (-work.steps, work.task))
        # Dealt like cards, so that groups are about equally long.
        count = -(-len(ordered) // size)
        for first in range(count):
            members = ordered[first::count]
            group = Group(members, shared_tensors(members))
            self._store.keep(group.shared)
            self._queue.append(group)
        self._hand_out()
        self._handed_out = time.perf_counter()

    def _train(self, works: Sequence[Work]) -> None:
        """Train tasks in the driver."""
        began = time.perf_counter()
        self._own.submit(works)
        self._trips.trained(works, time.perf_counter() - began)
        self._results.update(self._own.ready([work.task for work in works]))

    def _group_size(self, works: Sequence[Work]) -> int:
        if isinstance(self.group, int):
            return self.group
        return group_size(len(works), len(self._crew.members), works[0].start.nbytes if works else 0)

    def ready(self, tasks: Sequence[int]) -> dict[int, Result]:
        """The results that are there already, once and unchecked; never waits.

        Raises:
            SimulationError: if a group that has come to its end cannot be trained at all.
        """
        # Right after they were handed out there is nothing to see, and a look takes time that workers could use.
        if not self._due.isdisjoint(tasks) and time.perf_counter() - self._handed_out >= SOONEST:
            self._take_in(timeout=0.0)
        return {task: self._results.pop(task) for task in tasks if task in self._results}

    def result(self, task: int) -> Result:
        """Wait for a task's result; it is handed over once and unchecked.

        Raises:
            SimulationError: if a worker ran out of memory or cannot be started, a group failed too often, no node
                is left, or the task was never submitted.
        """
        self._quiet_since = time.monotonic()
        while task not in self._results:
            if task not in self._due:
                raise SimulationError(f"the pool has no result of task {task} to come")
            self._take_in(timeout=SLICE)
            if time.monotonic() - self._looked >= SLICE:
                self._look_after_nodes()
                self._look_after_lines()
        return self._results.pop(task)

    def forget(self, task: int) -> None:
        """Drop the result, or what will come of it."""
        self._due.discard(task)
        self._results.pop(task, None)

    def _hand_out(self) -> None:
        """Give the workers that have joined as much as they may hold."""
        while self._queue:
            member = self._crew.least_loaded()
            if member is None or member.load + self._queue[0].room > QUEUED:
                return
            group = self._queue.popleft()
            group.join(member)
            self._running[self._send(group)] = group

    def _send(self, group: Group) -> Any:
        """Hand a group to its worker; the reference of the answer."""
        places = {id(tensor): place for place, tensor in enumerate(group.shared)}
        parcels = [Parcel.of(work, places) for work in group.works]
        letter, line = group.sealed(parcels), group.member.line if group.member is not None else None
        if line is not None:
            if letter is not None:
                return line.ask(letter)
            line.hang_up()  # a worker that waits at its line hears nothing else
        return group.actor.train.remote(parcels, *self._store.references(group.shared, self._ray.put))

    def _take_in(self, timeout: float) -> None:
        """Take in finished groups and greetings: all that are there, or the first that comes in ``timeout`` seconds."""
        greetings, lines, off_line = self._crew.greetings(), self._crew.lines(), self._crew.off_line()
        called = [reference for reference in self._running if not isinstance(reference, Ticket)]
        awaited = [*called, *greetings, *off_line]
        if not awaited and not lines:
            return
        self._waits_since = time.perf_counter() if timeout else math.inf
        there, finished = self._listened(lines, awaited, timeout)
        if there or finished:
            self._quiet_since = time.monotonic()
        for line in there:
            self._hear(line)
        for reference in finished:
            # What was lost with a node, as another of these told, is waited for no more.
            if reference in self._running:
                self._take(reference)
            elif reference in self._crew.greetings():
                self._crew.welcome(greetings[reference])
            elif reference in self._crew.off_line():
                self._left(off_line[reference])
        self._hand_out()

    def _listened(self, lines: list[Line], awaited: list[Any], timeout: float) -> tuple[list[Line], list[Any]]:
        """The lines and the references of Ray's that there is something to hear of, in so many seconds."""
        if not awaited:
            return heard(lines, timeout), []
        until, asked = time.monotonic() + timeout, any(line.tickets for line in lines)
        while True:
            left = max(0.0, until - time.monotonic())
            span = min(left, TURN) if lines else left
            there = heard(lines, span if asked else 0.0)
            span = 0.0 if asked or there else span
            finished, _ = self._ray.wait(awaited, num_returns=1 if span else len(awaited), timeout=span)
            if there or finished or not left:
                return there, finished

    def _hear(self, line: Line) -> None:
        """Take in what has come through a line."""
        said = line.take()
        if said is not None and said[0] in self._running:
            self._arrived(self._running.pop(said[0]), said[1])

    def _take(self, reference: Any) -> None:
        """Take in one group that Ray says is finished, or see to it that it is trained again."""
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed(reference, error)
            return
        self._arrived(self._running.pop(reference), answer)

    def _arrived(self, group: Group, answer: Answer) -> None:
        results = group.results(answer)
        self._learn(group, answer.seconds)
        group.leave()
        self._store.release(group.shared)
        for work, result in zip(group.works, results, strict=True):
            if work.task in self._due:
                self._due.discard(work.task)
                self._results[work.task] = result

    def _learn(self, group: Group, seconds: float) -> None:
        """Note what training took, and the trip, if the driver waited for it before it can have been over."""
        self._trips.trained(group.works, seconds)
        if self._waits_since <= group.sent + seconds:
            self._trips.travelled(time.perf_counter() - group.sent - seconds)

    # ---- what can go wrong -----------------------------------------------------------------------

    def _left(self, member: Member) -> None:
        """A worker serves its line no more: if it has not been asked to, what it was asked is trained again."""
        line, actor, reference, errors = member.line, member.actor, member.serving, self._ray.exceptions
        assert line is not None
        member.serving = None
        try:
            self._ray.get(reference)
        except errors.RayError as error:
            asked = [ticket for ticket in line.tickets if ticket in self._running]
            if isinstance(error, errors.RayTaskError) and not line.was_open:
                # It could not open the line, but can be called all the same.
                member.disconnect()
                for ticket in reversed(asked):
                    group = self._running.pop(ticket)
                    group.leave()
                    self._queue.appendleft(group)
                return
            for ticket in asked:
                if ticket in self._running:
                    self._failed(ticket, error)
            if isinstance(error, errors.RayActorError):
                self._crew.bury(actor)  # it may have had nothing to do

    def _look_after_lines(self) -> None:
        """Ask Ray who is gone: what a worker has forked may hold its line open when Ray has killed it."""
        serving = self._crew.serving()
        if serving:
            left, _ = self._ray.wait(list(serving), num_returns=len(serving), timeout=0.0)
            for reference in left:
                if reference in self._crew.serving():  # and not replaced since, as another of these was taken care of
                    self._left(serving[reference])

    def _failed(self, reference: Any, error: Exception) -> None:
        """A group's answer is an error of Ray's, or was lost: train the group again, by itself.

        Raises:
            SimulationError: if it failed too often, or for a reason that will be the same every time.
        """
        errors, group = self._ray.exceptions, self._running[reference]
        assert group.member is not None
        who = f"Ray worker {group.member.number}"
        if isinstance(error, (errors.OutOfMemoryError, MemoryError)):
            raise SimulationError(f"{who}: {out_of_memory(len(group.works))} ({group})") from error
        if isinstance(error, errors.RayActorError):
            silent = isinstance(error, errors.ActorUnavailableError)
            self._look_after_nodes(unreachable=group.member.node if silent else "")
            if reference not in self._running:  # it was lost with its node, which is no fault of its own
                return
            self._crew.bury(group.actor)
        del self._running[reference]
        group.region = None  # whoever failed may still write to it
        group.leave()
        group.failures += 1
        cause = getattr(error, "cause", None)
        in_worker = isinstance(error, errors.RayTaskError) and not isinstance(cause, errors.RayError)
        reason = error if cause is None or not in_worker else cause
        why = f"{type(reason).__name__}: {said(reason)}"
        if in_worker or group.failures > RETRIES:
            raise SimulationError(f"{who} failed on {group}: {why}") from error
        logger.warning("%s failed on %s; they are trained again: %s", who, group, why)
        # The groups that shared the worker with it may have been the reason, or it theirs.
        group.room = QUEUED
        self._queue.appendleft(group)

    def _look_after_nodes(self, unreachable: str = "") -> None:
        """Give the tasks of lost nodes to other workers, and say what is waited for when nothing is heard.

        Raises:
            SimulationError: if there is no worker any more and none can come.
        """
        self._looked = time.monotonic()
        for node in self._crew.replace_lost(unreachable):
            self._requeue(node)
        self._hand_out()
        self._crew.check_hope()
        if self._looked - self._quiet_since >= PATIENCE:
            self._quiet_since = self._looked
            what = self._crew.missing() if not self._crew.joined() else f"{self._crew.joined()} Ray workers are at work"
            logger.warning("nothing heard for %.0f s, still waiting: %s", PATIENCE, what)

    def _requeue(self, node: LostNode) -> None:
        """Put the groups of a lost node first in the queue, in their order."""
        lost = {reference: group for reference, group in self._running.items() if group.member in node.members}
        for reference, group in lost.items():
            del self._running[reference]
            group.leave()
        self._queue.extendleft(reversed(lost.values()))
        logger.warning(
            "Ray node %s was lost, %d of %d workers are gone; their tasks (%d) are trained again",
            node.name, len(node.members), len(self._crew.members), sum(len(group.works) for group in lost.values()),
        )  # fmt: skip


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    """Numbers for a message: at most so many."""
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"

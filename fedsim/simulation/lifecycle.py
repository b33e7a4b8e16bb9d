"""The life of tasks: requested, in effect, trained late, arrived or lost, and decided with one outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import SimulationError, TaskError
from fedsim.federation import Clients, Reply
from fedsim.kernel import NS, Phase, to_ns
from fedsim.local import TensorSpec
from fedsim.record import EVENT_COLUMNS, Log
from fedsim.simulation.preparation import Preparation
from fedsim.simulation.states import ClientStates
from fedsim.simulation.tasks import LiveTask, Order, Status, plan
from fedsim.simulation.traffic import Traffic
from fedsim.training import Result
from fedsim.vectors import all_finite

if TYPE_CHECKING:
    import pyarrow as pa

    from fedsim.simulation.engine import Simulation

ARRIVAL = int(Phase.ARRIVAL)
"""Every task needs it, and members of an enumeration are slow to find."""


class Lifecycle:
    """All tasks of a run whose outcome is open, and the log of the others."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.log = Log(EVENT_COLUMNS)
        self.outcomes: Counter[str] = Counter()
        self.states = ClientStates(sim.strategy.jobs, sim.layout)
        self.traffic = Traffic(sim.system)
        self.preparation = Preparation(sim)
        self.of_client: dict[int, LiveTask] = {}
        """The task that keeps each busy client busy."""
        self.busy = np.zeros(sim.clients, dtype=np.bool_)
        self._open: dict[int, LiveTask] = {}
        self.requested: list[LiveTask] = []
        self._waiting: dict[int, LiveTask] = {}
        """In effect and not trained yet."""
        self._next = 0
        self._lost_in_a_row = 0
        self._on_offline = sim.system.faults.offline_policy(sim.system.availability.slotted)

    # ---- dispatch --------------------------------------------------------------------------------

    def request(
        self, clients: Clients, start: Tensor | None, steps: Any, job: str, tag: Any,
        local: bool, held: bool, deadline: float | None,
    ) -> list[int]:  # fmt: skip
        """``Federation.dispatch``: mark clients busy; the batch takes effect at the end of the instant."""
        sim = self.sim
        ids = _ids(clients)
        if job not in sim.strategy.jobs:
            raise ValueError(f"no job '{job}', the strategy has {sorted(sim.strategy.jobs)}")
        self._check_free(ids)
        asked = None if steps is None else _steps(steps, len(ids))
        starts = None if start is None else self._starts(start, len(ids))
        shared = job, tag, sim.kernel.now, local, held, None if deadline is None else to_ns(deadline)
        order, first = Order._make(shared), self._next
        for place, client in enumerate(ids):
            number = first + place
            task = LiveTask(number, client, order)
            if asked is not None:
                task.steps = asked[place]
            if starts is not None:
                task.start = starts[place]
            self._open[number] = self.of_client[client] = task
            self.busy[client] = True
            self.requested.append(task)
        self._next = first + len(ids)
        return list(range(first, self._next))

    def _check_free(self, ids: list[int]) -> None:
        """Refuse clients that there are not, or that have a task already."""
        if len(ids) == 1 and 0 <= ids[0] < self.sim.clients and ids[0] not in self.of_client:
            return
        if ids and not 0 <= min(ids) <= max(ids) < self.sim.clients:
            raise ValueError(f"clients are 0 to {self.sim.clients - 1}, asked for {min(ids)} to {max(ids)}")
        if len(set(ids)) < len(ids) or not self.of_client.keys().isdisjoint(ids):
            counts = Counter(ids)
            twice = min(each for each in ids if self.busy[each] or counts[each] > 1)
            raise ValueError(f"client {twice} has a task already: one live task per client")

    def _starts(self, start: Tensor, count: int) -> Sequence[Tensor]:
        size = self.sim.layout.size
        if tuple(start.shape) not in ((size,), (count, size)):
            raise ValueError(f"start has shape {tuple(start.shape)}, needs [{size}] or [{count}, {size}]")
        kept = start.detach().to(self.sim.layout.dtype).clone()
        return [kept] * count if kept.ndim == 1 else list(kept)

    def take_effect(self) -> None:
        """Start the whole batch of this instant: snapshot, plan, schedule."""
        sim = self.sim
        requested, self.requested = self.requested, []
        online, version, batch = sim.system.availability.online, sim.version, []
        for task in requested:
            if task.status == Status.REQUESTED:  # else it was cancelled in the same instant
                task.version = version
                if online[task.client]:
                    batch.append(task)
                else:
                    self._cut(task, "offline", sim.kernel.now)
        if not batch:
            return
        self.preparation.prepare(batch, self._measure)
        plan(batch, sim.system, sim.kernel.now)
        for task in batch:
            self.traffic.begin(task)
            self._schedule(task)
            if task.ended is not None:
                task.work = task.result = None  # it will drop out, so nobody will see its result
            elif task.result is None:
                self._waiting[task.id] = task

    def _measure(self, task: LiveTask) -> None:
        """Train a task now, for how long it takes depends on the outcome."""
        self._train([task])
        result = self._result(task)
        task.steps = result.steps
        if result.sizes is not None:
            task.samples, task.down_bytes, task.up_bytes = result.sizes
        else:
            rule, held = self.sim.strategy.jobs[task.order.job], self.sim.samples[[task.client]]
            task.samples = rule.examples(np.array([task.steps]), held).item()

    def _schedule(self, task: LiveTask) -> None:
        """Put the task's end into the heap: its arrival, or when the server notices that it is lost."""
        kernel = self.sim.kernel
        if task.ended is None:
            task.handle = kernel.schedule(task.arrived, ARRIVAL, ("arrive", task), task.client, task.id)
        else:
            # The server cannot even reach who is offline, so that loss is noticed at once.
            delay = 0 if task.why == "offline" else self.sim.system.faults.detect_ns
            seen = max(task.ended, kernel.now) + delay
            task.handle = kernel.schedule(seen, Phase.LOSS, ("lose", task), task.client, task.id)
        if task.order.deadline is not None and task.deadline_handle is None:
            at = max(task.order.deadline, kernel.now + 1)
            task.deadline_handle = kernel.schedule(at, Phase.LOSS, ("expire", task), task.client, task.id)

    # ---- training --------------------------------------------------------------------------------

    def _train(self, tasks: Sequence[LiveTask]) -> None:
        """Hand tasks to the pool; what it has done at once is taken in at once."""
        for task in tasks:
            self._waiting.pop(task.id, None)
        self.sim.pool.submit([task.work for task in tasks if task.work is not None])
        self._collect(tasks)

    def _collect(self, tasks: Iterable[LiveTask]) -> None:
        """Take in the results that are there."""
        results = self.sim.pool.ready([task.id for task in tasks])
        for task_id, result in results.items():
            self._keep(self._open[task_id], result)

    def _keep(self, task: LiveTask, result: Result) -> None:
        """Only now is the task's work not needed any more, in case the run is stopped and resumed."""
        task.result, task.group, task.work = result, result.group, None

    def _result(self, task: LiveTask) -> Result:
        """The task's result; the first one that is missing trains all that wait."""
        if task.result is None and task.id in self._waiting:
            self._train(list(self._waiting.values()))
        if task.result is None:
            self.sim.evaluation.catch_up()  # while the workers are busy
            self._keep(task, self.sim.pool.result(task.id))
        assert task.result is not None
        return task.result

    # ---- ends ------------------------------------------------------------------------------------

    def arrive(self, task: LiveTask) -> None:
        """The result is here: free the client, check what came, hand it to the strategy."""
        sim = self.sim
        result = task.result or self._result(task)
        if result.error is not None:
            self._fail(task, result.error)
            return
        task.handle = None
        task.status = Status.ARRIVED
        self._release(task)
        self.traffic.arrive(task)
        sim.updates += 1
        sim.samples_done += task.samples
        self._lost_in_a_row = 0
        known = result is self.preparation.untrained.get(task.order.job)
        wrong = "" if known else self._malformed(result, self.preparation.specs[task.order.job])
        if wrong:
            sim.warn(f"rejected the result of client {task.client}, task {task.id}: {wrong}", "rejected results")
            self._decide(task, "rejected")
            sim.strategy.on_lost(sim, task.view(), "rejected")
            return
        payload = dict(result.payload)  # the strategy's own, and the result may be every task's
        sim.strategy.on_reply(sim, Reply(task.view(), task.arrived / NS, sim.samples.item(task.client), payload))

    def _fail(self, task: LiveTask, error: TaskError) -> None:
        """Client code raised: the end of the run, or, if the faults model says so, of the task before its upload."""
        said = f"{type(self.sim.strategy).__name__}: {error}"
        if error.fatal or self.sim.system.faults.on_error == "fail":
            raise TaskError(said, task.id) from error
        self.sim.warn(f"a task is lost, {said}", "client code that raised")
        error.__cause__ = None  # its traceback holds whole stacks, and they hold it
        task.ended, task.why = task.upload_started, "failed"
        self.lose(task)

    def _malformed(self, result: Result, spec: dict[str, TensorSpec]) -> str:
        payload = result.payload
        if payload.keys() != spec.keys():
            return f"it holds {sorted(payload)}, expected {sorted(spec)}"
        for name, (shape, dtype) in spec.items():
            tensor = payload[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                return f"'{name}' is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}"
            if not (result.finite or all_finite(tensor)):
                return f"'{name}' has non-finite values"
        return ""

    def lose(self, task: LiveTask) -> None:
        """The server notices that a task will not be answered."""
        task.handle = None
        self._release(task)
        outcome = {"interrupted": "interrupted", "deadline": "late", "failed": "failed"}.get(task.why, "dropped")
        self._decide(task, outcome)
        self._count_lost(task)
        self.sim.strategy.on_lost(self.sim, task.view(), task.why)

    def expire(self, task: LiveTask) -> None:
        """The task's own deadline has come."""
        task.deadline_handle = None
        self._stop_work(task, "deadline", self.sim.kernel.now)
        self.lose(task)

    def cancel(self, task_id: int) -> None:
        """``Federation.cancel``."""
        task = self._open.get(task_id)
        if task is None or task.status not in (Status.REQUESTED, Status.RUNNING, Status.LOST):
            raise ValueError(f"task {task_id} is not in flight")
        if task.status == Status.REQUESTED:
            task.version = self.sim.version
        else:
            self._stop_work(task, "cancelled", self.sim.kernel.now)
        self._release(task)
        self._decide(task, "cancelled")
        self._count_lost(task)

    def _count_lost(self, task: LiveTask) -> None:
        """Give up when no client ever finishes: a run that only loses tasks has no end."""
        self._lost_in_a_row += 1
        if self._lost_in_a_row > 10_000 + 100 * self.sim.clients:
            raise SimulationError(
                f"the last {self._lost_in_a_row} tasks were all lost without one result (the last one: "
                f"{task.why or 'cancelled'}): look at faults, availability and deadlines"
            )

    def _cut(self, task: LiveTask, why: str, at: int) -> None:
        """The client stops working on a task; the server will notice in time."""
        requested = task.status == Status.REQUESTED
        self._stop_work(task, why, at)
        task.status = Status.LOST
        if requested:  # never came into effect: nothing was planned, nothing moved
            task.started = task.computed = task.upload_started = task.arrived = at + 1
        self._schedule(task)

    def _stop_work(self, task: LiveTask, why: str, at: int) -> None:
        if task.handle is not None:
            self.sim.kernel.cancel(task.handle)
            task.handle = None
        if task.ended is None or task.ended > at:  # else it was over before, for a reason of its own
            task.ended, task.why = task.seen_until(at), why
        if self._waiting.pop(task.id, None) is None and task.work is not None:
            self.sim.pool.forget(task.id)
        task.work = task.result = None

    def _release(self, task: LiveTask) -> None:
        """The client is idle again."""
        if task.deadline_handle is not None:
            self.sim.kernel.cancel(task.deadline_handle)
            task.deadline_handle = None
        if self.of_client.get(task.client) is task:
            del self.of_client[task.client]
            self.busy[task.client] = False

    # ---- presence --------------------------------------------------------------------------------

    def went_offline(self, clients: NDArray[np.int64]) -> None:
        """Clients have left: their tasks go on, are lost or stand still, as the faults model says."""
        for client in clients.tolist() if self._on_offline != "finish" else ():
            task = self.of_client.get(client)
            now = self.sim.kernel.now
            at_work = task is not None and task.status == Status.RUNNING and (task.ended is None or task.ended > now)
            if task is None or not at_work:  # a task that has dropped out is over, whether noticed or not
                continue
            if self._on_offline == "lose":
                self._cut(task, "interrupted", now)
            elif task.handle is not None:
                self.sim.kernel.cancel(task.handle)
                task.handle = None
                task.paused_at = now

    def came_online(self, clients: NDArray[np.int64]) -> None:
        """Clients are back: what stood still goes on where it was."""
        for client in clients.tolist():
            task = self.of_client.get(client)
            if task is not None and task.paused_at is not None:
                since, task.paused_at = task.paused_at, None
                task.shift(since, self.sim.kernel.now - since)
                self._schedule(task)

    # ---- outcomes --------------------------------------------------------------------------------

    def accept(self, replies: Sequence[Reply], version: int) -> None:
        """A published model was made from these replies: they are applied and their clients' new states kept."""
        for reply in replies:
            task = self._arrived(reply)
            assert task.result is not None
            if task.result.state:
                self.states.commit(task.client, task.result.state)
            self.sim.staleness_sum += version - task.version
            self._decide(task, "applied", version)

    def refuse(self, reply: Reply, why: str) -> None:
        """``Federation.reject``."""
        self._decide(self._arrived(reply), "late" if why == "late" else "rejected")

    def _arrived(self, reply: Reply) -> LiveTask:
        task = self._open.get(reply.task.id)
        if task is None or task.status != Status.ARRIVED:
            raise ValueError(f"the reply of task {reply.task.id} (client {reply.client}) was used or rejected before")
        return task

    def _decide(self, task: LiveTask, outcome: str, applied_version: int | None = None) -> None:
        if task.status == Status.ARRIVED:
            row = task.arrived_row(outcome, applied_version)
        else:
            now = self.sim.kernel.now
            moved = task.moved(now, self.sim.system)
            self.traffic.cut(task, moved)
            row = task.cut_row(now, outcome, moved)
        self.log.put(task.id, row)
        self.outcomes[outcome] += 1
        task.status = Status.DECIDED
        task.result = None
        del self._open[task.id]

    def close(self, failed: int | None) -> None:
        """The run is over: whatever is still open is pending, or failed if it is the task that ended the run."""
        for task in list(self._open.values()):
            self._decide(task, "failed" if task.id == failed else "pending")

    # ---- stop and resume -------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, between two instants; shared with the run, not copied.

        Results that are ready are part of it. Tasks still in training are saved as what they will be trained from.
        """
        self._collect(task for task in self._open.values() if task.work is not None and task.id not in self._waiting)
        closed = self.log.closed()
        return {
            "outcomes": self.outcomes,
            "traffic": self.traffic.snapshot(),
            "busy": list(self.of_client.values()),
            "open": list(self._open.values()),
            "nth": self.preparation.nth,
            "next": self._next,
            "states": self.states.held,
            "lost_in_a_row": self._lost_in_a_row,
            "rows": closed,
            "later_rows": self.log.rows(closed),
        }

    def restore(self, snapshot: dict[str, Any], rows: list[pa.Table]) -> None:
        """Become what :meth:`snapshot` saw; ``rows`` are the log's first ones, which were on disk."""
        self.outcomes = snapshot["outcomes"]
        self.traffic.restore(snapshot["traffic"], snapshot["open"])
        self.of_client = {task.client: task for task in snapshot["busy"]}
        self.busy[list(self.of_client)] = True
        self._open = {task.id: task for task in snapshot["open"]}
        self._waiting = {task.id: task for task in snapshot["open"] if task.work is not None}
        self.preparation.nth, self._next = snapshot["nth"], snapshot["next"]
        self.states.held = snapshot["states"]
        self._lost_in_a_row = snapshot["lost_in_a_row"]
        self.log.load(rows, snapshot["later_rows"])


def _ids(clients: Clients) -> list[int]:
    """One client or several as a list."""
    ids = np.asarray(clients, dtype=np.int64).tolist()
    return ids if isinstance(ids, list) else [ids]


def _steps(steps: Any, count: int) -> list[int]:
    """Local steps asked for, one number or one per client."""
    asked = np.broadcast_to(np.asarray(steps, dtype=np.int64), (count,))
    if count and asked.min() < 0:
        raise ValueError(f"steps={asked.min()}: must be >= 0")
    return [int(each) for each in asked]

"""The life of tasks whose ends are not planned but seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedsim.federation import Clients
from fedsim.flower.nodes import Answer, Unusable
from fedsim.kernel import Phase, to_ns
from fedsim.local import TensorSpec
from fedsim.simulation.lifecycle import Lifecycle
from fedsim.simulation.states import ClientStates, State
from fedsim.simulation.tasks import LiveTask, Status
from fedsim.training import Result

if TYPE_CHECKING:
    from fedsim.flower.deployment import Deployment

NEVER = 2**62
"""The time (ns) of what has not been seen to happen."""


class StatesAtNodes(ClientStates):
    """Clients' own tensors stay with them."""

    def of(self, client: int) -> State:
        """Nothing that the server has."""
        return {}


class RemoteTasks(Lifecycle):
    """All tasks of a deployment: what the simulator plans when a task takes effect, here its node tells."""

    sim: Deployment

    def __init__(self, sim: Deployment) -> None:
        super().__init__(sim)
        self.states = StatesAtNodes(sim.strategy.jobs, sim.layout)

    def request(
        self, clients: Clients, start: Tensor | None, steps: Any, job: str, tag: Any,
        local: bool, held: bool, deadline: float | None,
    ) -> list[int]:  # fmt: skip
        """As in the simulator, but everything travels: what a strategy takes for held by a client, it is sent."""
        return super().request(clients, start, steps, job, tag, False, False, deadline)

    def take_effect(self) -> None:
        """Push the whole batch of this instant."""
        sim = self.sim
        requested, self.requested = self.requested, []
        batch = []
        for task in requested:
            if task.status is Status.REQUESTED:  # else it was cancelled in the same instant
                task.version = sim.version
                if sim.online[task.client]:
                    batch.append(task)
                else:
                    self._cut(task, "offline", sim.kernel.now)
        if not batch:
            return
        self._ask_steps(batch)
        self.preparation.prepare(batch, _as_it_comes)
        for task in batch:
            assert task.work is not None
            task.status = Status.RUNNING
            task.started = task.computed = task.upload_started = task.arrived = NEVER
        sim.pool.submit([task.work for task in batch if task.work is not None])
        for task in batch:
            self._set_out(task)

    def _ask_steps(self, batch: list[LiveTask]) -> None:
        """Where clients choose their steps, those that have said how many will make so many."""
        if self.sim.strategy.clients_choose_steps:
            for task in batch:
                said = self.sim.pool.members[task.client].next_steps
                if said >= 0:
                    task.steps = said

    def _set_out(self, task: LiveTask) -> None:
        now = self.sim.kernel.now
        if not self.sim.pool.out(task.id):  # Flower would not take it
            task.down_bytes = 0
            self._cut(task, "offline", now)
            return
        self.traffic.begin(task)
        if task.order.deadline is not None:
            at = max(task.order.deadline, now + 1)
            task.deadline_handle = self.sim.kernel.schedule(at, Phase.LOSS, ("expire", task), task.client, task.id)

    # ---- ends ------------------------------------------------------------------------------------

    def take_in(self, answer: Answer) -> None:
        """Something has come of a task: put its arrival or its loss into this instant."""
        task = self._open.get(answer.task)
        if task is None or task.status is not Status.RUNNING:
            return  # it was given up
        sim, now = self.sim, self.sim.kernel.now
        if answer.lost:
            what = f"client {task.client} has lost task {task.id}: {answer.said}"
            sim.warn(what, "lost tasks" if answer.lost != "failed" else "client code that raised")
            self._cut(task, answer.lost, now)
            return
        assert answer.result is not None
        self._keep(task, answer.result)
        self._tell_times(task, answer, now)
        task.handle = sim.kernel.schedule(now, Phase.ARRIVAL, ("arrive", task), task.client, task.id)

    def _tell_times(self, task: LiveTask, answer: Answer, now: int) -> None:
        """Two machines' clocks cannot be compared: what was not local work is taken for half on the way there."""
        took = now - task.order.dispatched
        work = 0 if answer.report is None else min(to_ns(answer.report.seconds), took)
        task.started = task.order.dispatched + (took - work) // 2
        task.computed = task.upload_started = task.started + work
        task.arrived = now
        if answer.report is None:
            return
        rule = self.sim.strategy.jobs[task.order.job]
        if rule.measured:
            task.steps = answer.report.steps
            held = np.array([answer.report.samples])
            task.samples = int(rule.examples(np.array([task.steps]), held)[0])
        self.sim.learn(task, answer.report, work, took)

    def lose_node(self, client: int) -> None:
        """A client's node has gone, and its task with it: another node may be this client before anybody has looked."""
        task = self.of_client.get(client)
        if task is not None and task.status is Status.RUNNING:
            self._cut(task, "interrupted", self.sim.kernel.now)

    def _malformed(self, result: Result, spec: dict[str, TensorSpec]) -> str:
        return result.wrong if isinstance(result, Unusable) else super()._malformed(result, spec)

    # ---- outcomes --------------------------------------------------------------------------------

    def _decide(self, task: LiveTask, outcome: str, applied_version: int | None = None) -> None:
        super()._decide(task, outcome, applied_version)
        self.sim.pool.decided(task.client, task.id, outcome == "applied")


def _as_it_comes(task: LiveTask) -> None:
    """How much work a rule turns out to be is seen when its result is there."""

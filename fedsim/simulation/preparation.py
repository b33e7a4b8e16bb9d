"""What tasks need when they take effect: their steps and bytes, and a snapshot of all they are trained from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.local import LocalSGD, TensorSpec
from fedsim.simulation.tasks import LiveTask
from fedsim.strategy import Strategy
from fedsim.training import Result, Work
from fedsim.wire import message_bytes

if TYPE_CHECKING:
    from fedsim.simulation.engine import Simulation

MOST_COUNTS = 10_000
"""Most counts of steps and examples that are remembered."""

COUNTING = ("local_steps", "examples", "batches_per_epoch")
"""What a rule counts its steps and examples with."""

Copies = dict[int, tuple[Tensor, Tensor]]
"""A tensor and its newest copy, by the tensor's identity."""


class Preparation:
    """Prepares the tasks of one batch after the other.

    Whatever is the same for many tasks is worked out once: a run makes many tasks. ``specs`` say what a job's results
    are made of. ``untrained`` are the results of jobs that are known beforehand, for there is nothing to train.
    """

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        layout, jobs = sim.layout, sim.strategy.jobs
        self.specs = {name: rule.payload_spec(layout) for name, rule in jobs.items()}
        self.untrained: dict[str, Result] = {}
        if not sim.problem.trains and layout.size == 0:
            plain = [name for name, rule in jobs.items() if type(rule) is LocalSGD and not rule.keep]
            self.untrained = {name: Result({jobs[name].sends: layout.zeros()}, {}, 0, group=0) for name in plain}
        self._model_bytes = layout.nbytes
        self._up_bytes = {name: message_bytes(spec.values(), layout) for name, spec in self.specs.items()}
        self.nth = np.zeros(sim.clients, dtype=np.int64)
        """How many tasks of each client have taken effect."""
        self._silent = getattr(sim.strategy.message, "__func__", None) is Strategy.message
        """Whether nothing is sent down beside the model."""
        self._plain = {name for name, rule in jobs.items() if _counts_plainly(type(rule))}
        self._counts: dict[tuple[object, ...], tuple[int, int]] = {}
        """Steps and examples of a task, by its rule's settings, its client's examples and the steps asked for."""

    def prepare(self, batch: Sequence[LiveTask], measure: Callable[[LiveTask], None]) -> None:
        """Prepare all tasks that take effect together.

        Args:
            batch: the tasks.
            measure: trains a task at once and sets its steps and sizes; for rules whose work depends on its outcome.
        """
        copies: Copies = {}
        for job, tasks in _by_job(batch).items():
            rule = self.sim.strategy.jobs[job]
            self._count(tasks, rule)
            if rule.gradients_per_step != 1:
                for task in tasks:
                    task.gradients = rule.gradients_per_step
            self._take(tasks, rule, copies, measure)

    def _take(
        self, tasks: Sequence[LiveTask], rule: LocalSGD, copies: Copies, measure: Callable[[LiveTask], None]
    ) -> None:
        """Take the snapshot the tasks of one job are trained from, and count their bytes."""
        sim, job = self.sim, tasks[0].order.job
        untrained = self.untrained.get(job)
        rate = 0.0 if untrained is not None else rule.rate(sim.round)
        for task in tasks:
            client, order = task.client, task.order
            task.nth = nth = self.nth.item(client)
            self.nth[client] = nth + 1
            message = {} if self._silent else self._message(task, copies)
            if not order.local:
                extra = message_bytes(map(_spec, message.values()), sim.layout) if message else 0
                task.down_bytes = extra + (0 if order.held else self._model_bytes)
                task.up_bytes = self._up_bytes[job]
            if untrained is not None:
                task.result = untrained
            else:
                start = sim.current if task.start is None else task.start
                state = {name: each for name, each in sim.tasks.states.of(client).items() if name not in rule.unread}
                task.work = Work(task.id, client, nth, job, start, message, state, rate, task.steps)
            task.start = None
            if rule.measured:
                measure(task)

    def _message(self, task: LiveTask, copies: Copies) -> dict[str, Tensor]:
        told = self.sim.strategy.message(self.sim, task.view())
        return {name: _snapshot(tensor, copies) for name, tensor in told.items()}

    # ---- steps and examples ----------------------------------------------------------------------

    def _count(self, tasks: Sequence[LiveTask], rule: LocalSGD) -> None:
        """Set how many steps each task makes and how many examples it works through.

        A plain rule's counts depend on the client's examples and its own settings only, and most clients hold as many
        examples as another: they are remembered.
        """
        if tasks[0].order.job not in self._plain or isinstance(rule.steps, list) or isinstance(rule.epochs, list):
            self._count_anew(tasks, rule)
            return
        steps, epochs, size, counts, samples = rule.steps, rule.epochs, rule.batch_size, self._counts, self.sim.samples
        for task in tasks:
            key = steps, epochs, size, samples.item(task.client), task.steps
            known = counts.get(key)
            if known is not None:
                task.steps, task.samples = known
            else:
                self._count_anew([task], rule)
                if len(counts) < MOST_COUNTS:
                    counts[key] = task.steps, task.samples

    def _count_anew(self, tasks: Sequence[LiveTask], rule: LocalSGD) -> None:
        samples, asked = self._samples(tasks), np.array([task.steps for task in tasks])
        own = rule.local_steps(np.array([task.client for task in tasks]), samples)
        steps = np.where(samples == 0, 0, np.where(asked < 0, own, asked))
        for task, count, examples in zip(tasks, steps.tolist(), rule.examples(steps, samples).tolist(), strict=True):
            task.steps, task.samples = count, examples

    def _samples(self, tasks: Sequence[LiveTask]) -> NDArray[np.int64]:
        return self.sim.samples[[task.client for task in tasks]]


def _counts_plainly(kind: type[LocalSGD]) -> bool:
    """Whether a rule counts its steps and examples as :class:`LocalSGD` does."""
    return all(getattr(kind, name) is getattr(LocalSGD, name) for name in COUNTING)


def _by_job(batch: Sequence[LiveTask]) -> Mapping[str, Sequence[LiveTask]]:
    if len(batch) == 1:
        return {batch[0].order.job: batch}
    jobs: dict[str, list[LiveTask]] = {}
    for task in batch:
        jobs.setdefault(task.order.job, []).append(task)
    return jobs


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _snapshot(tensor: Tensor, copies: Copies) -> Tensor:
    """A copy that later changes by the strategy cannot reach; tasks of one batch share it.

    A buffer filled anew for every task is one tensor with several contents, so they are compared before sharing.
    """
    known = copies.get(id(tensor))
    if known is None or not torch.equal(known[1], tensor):
        copies[id(tensor)] = known = (tensor, tensor.detach().clone())
    return known[1]

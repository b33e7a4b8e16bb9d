"""The general path: any problem, one client after another, so that no grouping can show in the bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.local import Context, LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Draw, Randomness
from fedsim.training.base import Result, Trainer, Work, failure, moved, unstacked
from fedsim.training.devices import reproducible
from fedsim.training.native import NativeLinear


class SingleContext(Context):
    """A stack of one: the context of a single client's task."""

    def __init__(
        self, work: Work, rule: LocalSGD, problem: Problem, randomness: Randomness, device: torch.device | str = "cpu"
    ) -> None:
        self.start = work.start.to(device, copy=True).unsqueeze(0)
        self.message = {name: tensor.to(device, copy=True).unsqueeze(0) for name, tensor in work.message.items()}
        self.state = {name: tensor.to(device, copy=True).unsqueeze(0) for name, tensor in work.state.items()}
        self.lr = torch.full((1, 1), work.lr, dtype=self.start.dtype, device=device)
        self.steps = np.array([work.steps])
        self.running = 1
        self.clients = np.array([work.client])
        self._work = work
        self._batch_size = rule.batch_size
        self._problem = problem
        self._randomness = randomness

    def batches(self) -> Iterator[Tensor]:
        """Epoch after epoch in a new keyed order, unless a batch holds all; the last one may be smaller."""
        work, samples = self._work, int(self._problem.samples[self._work.client])
        size = samples if self._batch_size is None else self._batch_size
        per_epoch = -(-samples // size) if samples else 0
        order = torch.empty(0, dtype=torch.int64)
        for step in range(work.steps if samples and self._problem.trains else 0):
            epoch, position = divmod(step, per_epoch)
            if per_epoch == 1:
                order = torch.arange(samples)
            elif position == 0:
                key = self._randomness("batches", work.client, work.nth, epoch)
                order = torch.from_numpy(key.permutation(samples))
            self.step = step
            yield order[position * size : (position + 1) * size]

    def grad(self, x: Tensor, batch: Any = None) -> Tensor:
        """One gradient of the client's mean loss. Two calls in one step share their randomness (dropout)."""
        return self._problem.gradient(x[0], self._work.client, batch, self._noise()).unsqueeze(0)

    def descend(self, x: Tensor, batch: Any) -> None:
        """``x <- x - lr * grad(x, batch)`` in place, with the randomness of this step."""
        self._problem.descend(x[0], self._work.client, batch, self._noise(), self.lr[0])

    def _noise(self) -> int:
        return self._randomness("gradient noise", self._work.client, self._work.nth, self.step + 1).torch_seed()

    def rng(self, purpose: str) -> Draw:
        """The keys of this client's task."""
        return self._randomness(purpose, self.clients, np.array([self._work.nth]))


class GeneralTrainer(Trainer):
    """Runs each task's rule by itself.

    Args:
        problem: any.
        jobs: the local rules by name.
        randomness: the run's.
        device: where tasks are trained; works come from main memory, and results go back to it.
        kernel: ``native`` or ``torch``, what makes the products of linear layers where there is a choice.

    Raises:
        ConfigError: if the problem cannot be trained on the device.
    """

    def __init__(
        self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness,
        device: torch.device | str = "cpu", kernel: str = "torch",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        if self.device.type != "cpu":
            self.problem = problem.on(self.device)
        else:
            self.problem = problem.with_linear(NativeLinear) if kernel == "native" else problem
        self.jobs = dict(jobs)
        self.randomness = randomness

    def train(self, group: Sequence[Work]) -> list[Result]:
        """One task after another."""
        with reproducible(self.device):
            return [self._train_one(work, len(group)) for work in group]

    def _train_one(self, work: Work, group: int) -> Result:
        # A copy, so that what a rule writes to itself cannot reach another task: state belongs into the context.
        rule = copy.copy(self.jobs[work.job])
        context = SingleContext(work, rule, self.problem, self.randomness, self.device)
        try:
            payload = unstacked(moved(rule.run(context), "cpu"), "the payload", 1)
            state = unstacked(moved(context.state, "cpu"), "ctx.state", 1)
        except (Exception, SystemExit) as error:
            return failure(rule, work, context.step + 1, group, error)
        return Result(payload[0], state[0], int(context.steps[0]), group)

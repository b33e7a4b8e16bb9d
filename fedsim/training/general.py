"""The general path: any problem, one client after another, so that no grouping can show in the bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.checks import TaskError, said
from fedsim.local import Context, LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Draw, Randomness
from fedsim.training.base import Result, Trainer, Work, out_of_memory


class SingleContext(Context):
    """A stack of one: the context of a single client's task."""

    def __init__(self, work: Work, rule: LocalSGD, problem: Problem, randomness: Randomness) -> None:
        self.start = work.start.clone().unsqueeze(0)
        self.message = {name: tensor.clone().unsqueeze(0) for name, tensor in work.message.items()}
        self.state = {name: tensor.clone().unsqueeze(0) for name, tensor in work.state.items()}
        self.lr = torch.full((1, 1), work.lr, dtype=self.start.dtype)
        self.steps = np.array([work.steps])
        self.active = torch.ones((1, 1), dtype=torch.bool)
        self.all_active = True
        self.clients = np.array([work.client])
        self.step = -1
        self._work = work
        self._batch_size = rule.batch_size
        self._problem = problem
        self._randomness = randomness

    def batches(self) -> Iterator[Tensor]:
        """Epoch after epoch in a new keyed order; the last batch of an epoch may be smaller."""
        work, samples = self._work, int(self._problem.samples[self._work.client])
        size = samples if self._batch_size is None else self._batch_size
        per_epoch = -(-samples // size) if samples else 0
        order = torch.empty(0, dtype=torch.int64)
        for step in range(work.steps if samples and self._problem.trains else 0):
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                key = self._randomness("batches", work.client, work.nth, epoch)
                order = torch.from_numpy(key.permutation(samples))
            self.step = step
            yield order[position * size : (position + 1) * size]

    def grad(self, x: Tensor, batch: Any = None) -> Tensor:
        """One gradient of the client's mean loss. Two calls in one step share their randomness (dropout)."""
        work = self._work
        noise = self._randomness("gradient noise", work.client, work.nth, self.step + 1).torch_seed()
        return self._problem.gradient(x[0], work.client, batch, noise).unsqueeze(0)

    def rng(self, purpose: str) -> Draw:
        """The keys of this client's task."""
        return self._randomness(purpose, self.clients, np.array([self._work.nth]))


class GeneralTrainer(Trainer):
    """Runs each task's rule by itself."""

    def __init__(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        self.problem = problem
        self.jobs = dict(jobs)
        self.randomness = randomness

    def train(self, group: Sequence[Work]) -> list[Result]:
        """One task after another."""
        return [self._train_one(work, len(group)) for work in group]

    def _train_one(self, work: Work, group: int) -> Result:
        # A copy, so that what a rule writes to itself cannot reach another task: state belongs into the context.
        rule = copy.copy(self.jobs[work.job])
        context = SingleContext(work, rule, self.problem, self.randomness)
        try:
            payload = rule.run(context)
            taken: set[int] = set()
            return Result(
                payload=_single(payload, "the payload", taken),
                state=_single(context.state, "ctx.state", taken),
                steps=int(context.steps[0]),
                group=group,
            )
        except (Exception, SystemExit) as error:
            no_memory = _no_memory(error)
            text = f"{out_of_memory(group)} ({said(error)})" if no_memory else said(error)
            failure = TaskError(
                f"{type(rule).__name__} raised {type(error).__name__}: {text} "
                f"(client {work.client}, task {work.task}, job '{work.job}', local step {context.step + 1})",
                work.task,
                fatal=no_memory,
            )
            failure.__cause__ = error
            return Result({}, {}, 0, group, failure)


def _no_memory(error: BaseException) -> bool:
    """Whether an allocation failed. PyTorch's allocator of main memory has no exception class of its own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = said(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def _single(stack: Any, what: str, taken: set[int]) -> dict[str, Tensor]:
    """The one row of a stack's named tensors.

    Raises:
        TypeError: if a rule made something else of it.
    """
    if not isinstance(stack, Mapping):
        raise TypeError(f"{what} must be a dict of tensors, is a {type(stack).__name__}")
    for name, tensor in stack.items():
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != 1:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{what} must hold tensors [n, ...] with n = 1 here, '{name}' is {shape}")
    return {str(name): _own(tensor[0].detach(), taken) for name, tensor in stack.items()}


def _own(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor, copied if another one of the same result lies in its memory."""
    memory = tensor.untyped_storage().data_ptr()
    if memory in taken:
        return tensor.clone()
    taken.add(memory)
    return tensor

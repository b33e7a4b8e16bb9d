"""What training takes and gives: all a result depends on, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.checks import TaskError, said
from fedsim.local import LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.vectors import is_aligned


@dataclass(slots=True)
class Work:
    """One task to train. Tensors are shared with the driver: training must not write to them."""

    task: int
    client: int
    nth: int
    """Which of this client's own tasks this is: the key of its draws."""
    job: str
    start: Tensor
    message: dict[str, Tensor]
    state: dict[str, Tensor]
    lr: float
    steps: int


class Sizes(NamedTuple):
    """What a task works through and moves, where nothing but the work itself can tell."""

    samples: int
    down_bytes: int
    up_bytes: int


@dataclass(slots=True)
class Result:
    """What one task gives back: what travels up, and the client's new state."""

    payload: dict[str, Tensor]
    state: dict[str, Tensor]
    steps: int
    group: int = 1
    """How many tasks were trained together."""
    finite: bool | None = None
    """True if the payload is known to hold finite numbers only; else it has to be looked at."""
    error: TaskError | None = None
    """What client code raised. It counts when the result is due and not before, so that a task nobody waits for any
    more cannot end a run."""
    sizes: Sizes | None = None
    """Of a measured rule's task, if the rule cannot count them; None leaves it to the rule."""


def out_of_memory(tasks: int) -> str:
    """What to say, and what to try, when memory ran out with so many tasks in training together."""
    if tasks == 1:
        return "out of memory: one task alone does not fit"
    return f"out of memory training {tasks} tasks together, try pool.group={tasks // 2}"


class Trainer(ABC):
    """Trains groups of tasks on one worker."""

    @abstractmethod
    def train(self, group: Sequence[Work]) -> list[Result]:
        """The results of a group, in its order; a task whose client code raised has an ``error``."""


class SelfTrained(Problem):
    """A problem whose tasks are worked on in a way of its own."""

    @abstractmethod
    def trainer(self, randomness: Randomness, device: torch.device) -> Trainer:
        """What works on its tasks.

        Raises:
            ConfigError: if that cannot be done on the device.
        """


def stacked_tensors(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors of several tasks as stacks ``[n, ...]``, in memory of their own."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def moved(tensors: Any, device: torch.device | str) -> Any:
    """Named tensors on a device: those that are there already as they are, and whatever else was handed in."""
    if not isinstance(tensors, Mapping):
        return tensors
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in tensors.items()}


def unstacked(stacks: Any, what: str, count: int) -> list[dict[str, Tensor]]:
    """The rows of named stacks ``[count, ...]``, each in memory of its own.

    Raises:
        TypeError: if a rule made something else of it.
    """
    rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in _named_stacks(stacks, what, count).items():
        for row, own in zip(rows, tensor.detach().unbind(), strict=True):
            row[name] = torch.clone(own, memory_format=torch.contiguous_format)
    return rows


def divided(stacks: Any, what: str, count: int) -> list[dict[str, Tensor]]:
    """As :func:`unstacked`, but rows may stay in the stack they were made in: for what is soon used up.

    No two rows share memory, and each lies as it would alone.

    Raises:
        TypeError: if a rule made something else of it.
    """
    named = _named_stacks(stacks, what, count)
    apart = {each.untyped_storage().data_ptr() for each in named.values() if each.ndim == 2 and is_aligned(each)}
    if len(apart) < len(named):
        return unstacked(stacks, what, count)
    rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in named.items():
        for row, own in zip(rows, tensor.detach().unbind(), strict=True):
            row[name] = own
    return rows


def _named_stacks(stacks: Any, what: str, count: int) -> dict[str, Tensor]:
    if not isinstance(stacks, Mapping):
        raise TypeError(f"{what} must be a dict of tensors, is a {type(stacks).__name__}")
    for name, tensor in stacks.items():
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != count:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{what} must hold tensors [n, ...] with n = {count} here, '{name}' is {shape}")
    return {str(name): tensor for name, tensor in stacks.items()}


def finite_rows(stacks: Mapping[str, Tensor], count: int) -> list[bool | None]:
    """For each row of named stacks ``[count, ...]`` True if all its items are finite, None if that is not certain."""
    certain = torch.ones(count, dtype=torch.bool)
    for stack in stacks.values():
        if stack.is_floating_point() and stack.numel():
            certain &= torch.isfinite(stack.detach().reshape(count, -1).sum(1))  # a NaN or an infinity in it would show
    return [True if each else None for each in certain.tolist()]


def failure(rule: LocalSGD, work: Work, step: int, group: int, error: BaseException) -> Result:
    """The result of a task whose client code raised in a local step, counted from 1."""
    fatal = no_memory(error)
    text = f"{out_of_memory(group)} ({said(error)})" if fatal else said(error)
    task_error = TaskError(
        f"{type(rule).__name__} raised {type(error).__name__}: {text} "
        f"(client {work.client}, task {work.task}, job '{work.job}', local step {step})",
        work.task,
        fatal=fatal,
    )
    task_error.__cause__ = error
    return Result({}, {}, 0, group, error=task_error)


def no_memory(error: BaseException) -> bool:
    """Whether an allocation failed. PyTorch's allocator of main memory has no exception class of its own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = said(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)

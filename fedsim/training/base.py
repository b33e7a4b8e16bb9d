"""What training takes and gives: all a result depends on, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsim.checks import TaskError


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


@dataclass(slots=True)
class Result:
    """What one task gives back: what travels up, and the client's new state."""

    payload: dict[str, Tensor]
    state: dict[str, Tensor]
    steps: int
    group: int = 1
    """How many tasks were trained together."""
    error: TaskError | None = None
    """What client code raised. It counts when the result is due and not before, so that a task nobody waits for any
    more cannot end a run."""


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

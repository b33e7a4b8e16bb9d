"""The interface of a pool: work goes in as it comes to wait together, results are asked for when they are due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from fedsim.checks import ConfigError, one_of, whole
from fedsim.local import LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import KERNELS, Result, Work, kernel_for


class Pool(ABC):
    """Trains tasks somewhere."""

    name: str
    trains_beside: ClassVar[bool] = False
    """Whether training goes on beside the driver, which can do something else meanwhile."""
    device: str = "cpu"
    """Where tasks are trained, ``cpu`` or ``cuda``. Works come from main memory, and results go back to it."""
    kernel: str = "auto"
    """What makes the products of linear layers on a CPU."""

    def identity(self) -> dict[str, Any]:
        """What of this pool shows in a run's bits, in plain values: the kernel on a CPU.

        Raises:
            ConfigError: if there is no such kernel.
        """
        if self.device == "cpu":
            return {"kernel": kernel_for(self.kernel)}
        return {"pool": self.name, "device": self.device, "group": getattr(self, "group", None)}

    @abstractmethod
    def open(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        """Hand the workers all that a run's tasks share, as it is now: later changes of a rule reach no task."""

    @abstractmethod
    def submit(self, works: Sequence[Work]) -> None:
        """Train these tasks; they may be cut into groups."""

    @abstractmethod
    def ready(self, tasks: Sequence[int]) -> dict[int, Result]:
        """The results of submitted tasks that are there already, each handed over once; never waits.

        They are unchecked: where client code raised one carries an ``error``.
        """

    @abstractmethod
    def result(self, task: int) -> Result:
        """Wait for a submitted task's result and hand it over, once and unchecked like :meth:`ready`.

        Raises:
            SimulationError: if nothing can train the task.
        """

    @abstractmethod
    def forget(self, task: int) -> None:
        """A submitted task's result will not be asked for."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything that :meth:`open` took."""


FULL_GROUP, FULL_GROUP_BYTES = 10, 2**24
"""A group needs no more tasks to be trained fast, nor more than fit in so many bytes if vectors are small: then what
it costs to hand it out counts."""


def group_size(tasks: int, workers: int, vector_bytes: int) -> int:
    """How many tasks to train together so that no worker stands idle, with vectors of so many bytes."""
    most = max(FULL_GROUP, FULL_GROUP_BYTES // max(vector_bytes, 1))
    return max(1, min(most, -(-tasks // workers)))


def group_setting(value: Any) -> int | str:
    """A pool's ``group``: ``"auto"`` or most tasks to train together.

    Raises:
        ConfigError: if it is neither.
    """
    if isinstance(value, str) and value == "auto":
        return value
    try:
        return whole("group", value, least=1)
    except ConfigError:
        raise ConfigError(f"group={value}: must be auto or a whole number >= 1") from None


def kernel_setting(value: Any) -> str:
    """A pool's ``kernel``.

    Raises:
        ConfigError: if it is none, or not there.
    """
    setting = one_of("kernel", value, KERNELS)
    kernel_for(setting)
    return setting


DEVICES = ("cpu", "cuda")
"""Where training can run."""


def device_setting(value: Any) -> str:
    """A pool's ``device``.

    Raises:
        ConfigError: if it is none.
    """
    return one_of("device", value, DEVICES)


def check_device(device: str) -> None:
    """See that this process has the device.

    Raises:
        ConfigError: if it is a GPU and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no GPU here; use device=cpu")

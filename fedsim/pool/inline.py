"""The inline pool: training in the driver's own process."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from fedsim.checks import ConfigError, SimulationError
from fedsim.local import LocalSGD
from fedsim.pool.base import Pool, check_device, device_setting, group_setting, kernel_setting
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import Result, Trainer, Work, release_freed, trainer_for


class InlinePool(Pool):
    """Trains at once, in this process.

    Args:
        group: most tasks to train together; ``"auto"`` takes all that wait. Never shows in the results of a CPU.
        device: ``cpu`` or ``cuda``.
        kernel: what makes the products of linear layers on a CPU: ``native``, ``torch``, or ``auto``, which is
            native where that was built.

    Raises:
        ConfigError: if a setting is wrong, or there is no GPU or no such kernel.
    """

    name = "inline"

    def __init__(self, group: int | str = "auto", device: str = "cpu", kernel: str = "auto") -> None:
        self.group, self.device = group_setting(group), device_setting(device)
        check_device(self.device)
        self.kernel = kernel_setting(kernel)
        self._trainer: Trainer | None = None
        self._results: dict[int, Result] = {}

    def open(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        """Make the trainer, with copies of the rules as Ray workers would have them.

        Raises:
            ConfigError: if the pool is already in use by another run, or the problem cannot be trained on the device.
        """
        if self._trainer is not None:
            raise ConfigError("pool: this pool is in use by another run; give every run its own")
        try:
            own = copy.deepcopy(dict(jobs))
        except TypeError as error:  # a lock, an open file
            raise ConfigError(f"a local rule must be plain settings: {error}") from None
        self._trainer = trainer_for(problem, own, randomness, self.device, self.kernel)

    def submit(self, works: Sequence[Work]) -> None:
        """Train now, in groups of at most ``group``."""
        assert self._trainer is not None, "submit before open"
        size = self.group if isinstance(self.group, int) else max(len(works), 1)
        for first in range(0, len(works), size):
            group = works[first : first + size]
            for work, result in zip(group, self._trainer.train(group), strict=True):
                self._results[work.task] = result

    def ready(self, tasks: Sequence[int]) -> dict[int, Result]:
        """The results trained at ``submit``."""
        return {task: self._results.pop(task) for task in tasks if task in self._results}

    def result(self, task: int) -> Result:
        """The result trained at ``submit``.

        Raises:
            SimulationError: if the task was never submitted, or its result was handed over or forgotten.
        """
        if task not in self._results:
            raise SimulationError(f"the pool has no result of task {task} to come")
        return self._results.pop(task)

    def forget(self, task: int) -> None:
        """Drop the result if there is one."""
        self._results.pop(task, None)

    def close(self) -> None:
        """Drop the trainer and what was not asked for."""
        self._trainer = None
        self._results.clear()
        release_freed()

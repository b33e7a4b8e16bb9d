"""The inline pool: training in the driver's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsim.checks import ConfigError, optional_whole
from fedsim.local import LocalSGD
from fedsim.pool.base import Pool
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import GeneralTrainer, Result, Trainer, Work


class InlinePool(Pool):
    """Trains at once, in this process.

    Args:
        group: most tasks to train together; None takes all that wait. Never shows in the results.
    """

    name = "inline"

    def __init__(self, group: int | None = None) -> None:
        self.group = optional_whole("group", group, least=1)
        self._trainer: Trainer | None = None
        self._results: dict[int, Result] = {}

    def open(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        """Make the trainer.

        Raises:
            ConfigError: if the pool is already in use by another run.
        """
        if self._trainer is not None:
            raise ConfigError("pool: this pool is in use by another run; give every run its own")
        self._trainer = GeneralTrainer(problem, jobs, randomness)

    def submit(self, works: Sequence[Work]) -> None:
        """Train now, in groups of at most ``group``."""
        assert self._trainer is not None, "submit before open"
        size = self.group or max(len(works), 1)
        for first in range(0, len(works), size):
            group = works[first : first + size]
            for work, result in zip(group, self._trainer.train(group), strict=True):
                self._results[work.task] = result

    def result(self, task: int) -> Result:
        """The result trained at ``submit``."""
        return self._results.pop(task).checked()

    def forget(self, task: int) -> None:
        """Drop the result if there is one."""
        self._results.pop(task, None)

    def close(self) -> None:
        """Drop the trainer and what was not asked for."""
        self._trainer = None
        self._results.clear()

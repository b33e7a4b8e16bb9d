"""Trains one group of tasks."""

from __future__ import annotations

from collections.abc import Mapping

from fedsim.local import LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training.base import Result, Trainer, Work, out_of_memory
from fedsim.training.general import GeneralTrainer
from fedsim.training.stacked import StackedTrainer

__all__ = ["GeneralTrainer", "Result", "StackedTrainer", "Trainer", "Work", "out_of_memory", "trainer_for"]


def trainer_for(problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> Trainer:
    """The fastest trainer there is for a problem: its structure decides, and nothing else."""
    if not problem.trains or problem.chain() is not None:
        return StackedTrainer(problem, jobs, randomness)
    return GeneralTrainer(problem, jobs, randomness)

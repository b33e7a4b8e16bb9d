"""Trains one group of tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsim.local import LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training.base import Result, SelfTrained, Sizes, Trainer, Work, out_of_memory
from fedsim.training.general import GeneralTrainer
from fedsim.training.stacked import StackedTrainer
from fedsim.training.vmapped import VmapTrainer

__all__ = [
    "GeneralTrainer", "Result", "SelfTrained", "Sizes", "StackedTrainer", "Trainer", "VmapTrainer", "Work",
    "out_of_memory", "trainer_for",
]  # fmt: skip


def trainer_for(
    problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness, device: torch.device | str = "cpu"
) -> Trainer:
    """The fastest trainer there is for a problem: its structure and the device decide, and nothing else.

    Raises:
        ConfigError: if the problem cannot be trained on the device.
    """
    device = torch.device(device)
    if isinstance(problem, SelfTrained):
        return problem.trainer(randomness, device)
    if not problem.trains:
        return StackedTrainer(problem, jobs, randomness)
    if problem.chain() is not None:
        return StackedTrainer(problem, jobs, randomness, device)
    if device.type != "cpu" and problem.network() is not None:  # a CPU is slower on stacks than client by client
        stacked = VmapTrainer(problem, jobs, randomness, device)
        if stacked.takes():
            return stacked
    return GeneralTrainer(problem, jobs, randomness, device)

"""Trains one group of tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsim.checks import ConfigError
from fedsim.local import LocalSGD
from fedsim.problems.base import Problem
from fedsim.problems.sequential import Linear
from fedsim.rng import Randomness
from fedsim.training.base import Result, SelfTrained, Sizes, Trainer, Work, out_of_memory
from fedsim.training.general import GeneralTrainer
from fedsim.training.memory import hold_freed, release_freed
from fedsim.training.native import instruction_sets, why_not
from fedsim.training.stacked import StackedTrainer
from fedsim.training.vmapped import VmapTrainer

__all__ = [
    "KERNELS", "GeneralTrainer", "Result", "SelfTrained", "Sizes", "StackedTrainer", "Trainer", "VmapTrainer", "Work",
    "kernel_for", "out_of_memory", "release_freed", "trainer_for",
]  # fmt: skip


KERNELS = ("auto", "native", "torch")
"""What can make the products of linear layers on a CPU."""


def kernel_for(setting: str) -> str:
    """``native`` or ``torch``, for one of :data:`KERNELS`.

    Raises:
        ConfigError: if this machine has no native kernel and it must be that.
    """
    if setting == "native" and not instruction_sets():
        raise ConfigError(f"kernel=native: is not there ({why_not()}); take kernel=auto or kernel=torch")
    return "native" if setting != "torch" and instruction_sets() else "torch"


def trainer_for(
    problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness, device: torch.device | str = "cpu",
    kernel: str = "auto",
) -> Trainer:  # fmt: skip
    """The fastest trainer there is for a problem: its structure, the device and the kernel decide, and nothing else.

    Raises:
        ConfigError: if the problem cannot be trained on the device, or there is no such kernel.
    """
    device = torch.device(device)
    hold_freed()
    if isinstance(problem, SelfTrained):
        return problem.trainer(randomness, device)
    if not problem.trains:
        return StackedTrainer(problem, jobs, randomness)
    if problem.chain() is not None:
        return StackedTrainer(problem, jobs, randomness, device, kernel_for(kernel))
    if device.type != "cpu" and problem.network() is not None:  # a CPU is slower on stacks than client by client
        stacked = VmapTrainer(problem, jobs, randomness, device)
        if stacked.takes():
            return stacked
    chosen = device.type == "cpu" and problem.with_linear(Linear) is not problem
    return GeneralTrainer(problem, jobs, randomness, device, kernel_for(kernel) if chosen else "torch")

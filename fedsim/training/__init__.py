"""Trains one group of tasks."""

from fedsim.training.base import Result, Trainer, Work, out_of_memory
from fedsim.training.general import GeneralTrainer

__all__ = ["GeneralTrainer", "Result", "Trainer", "Work", "out_of_memory"]

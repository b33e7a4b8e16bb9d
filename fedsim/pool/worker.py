"""What runs inside a Ray worker: one thread, a trainer, nothing that changes from task to task."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import TaskError
from fedsim.training import GeneralTrainer, Result, Work


@dataclass(slots=True)
class Parcel:
    """A :class:`Work` whose shared tensors lie in the object store: their places among the references sent along."""

    work: Work
    """The rest of it, with an empty start and no message."""
    start: int
    message: dict[str, int]

    def unpacked(self, tensors: Sequence[Tensor]) -> Work:
        """The work itself."""
        message = {name: tensors[slot] for name, slot in self.message.items()}
        return replace(self.work, start=tensors[self.start], message=message)


@dataclass(slots=True)
class Results:
    """The results of a group, tensors of one name and shape stacked ``[group, ...]``."""

    payload: list[dict[str, NDArray[Any]]]
    state: list[dict[str, NDArray[Any]]]
    steps: list[int]
    group: int
    errors: dict[int, str]
    """What client code said, by position in the group."""

    @classmethod
    def of(cls, results: Sequence[Result]) -> Results:
        """Pack results; neighbours whose tensors agree in names, shapes and dtypes share one stack."""
        return cls(
            payload=_stacked([result.payload for result in results]),
            state=_stacked([result.state for result in results]),
            steps=[result.steps for result in results],
            group=len(results),
            errors={position: str(each.error) for position, each in enumerate(results) if each.error is not None},
        )

    def unpacked(self, tasks: Sequence[int]) -> list[Result]:
        """The results of these tasks, in memory of their own."""
        payload, state = _rows(self.payload, len(self.steps)), _rows(self.state, len(self.steps))
        errors = [TaskError(self.errors[i], task) if i in self.errors else None for i, task in enumerate(tasks)]
        return [
            Result(one_payload, one_state, steps, self.group, error)
            for one_payload, one_state, steps, error in zip(payload, state, self.steps, errors, strict=True)
        ]


class Worker:
    """The actor. It may die at any time: whatever it was asked is asked again, of a fresh one."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._trainer: GeneralTrainer | None = None

    def train(self, parcels: list[Parcel], shared: NDArray[np.uint8], *arrays: NDArray[Any]) -> tuple[int, Results]:
        """Train a group.

        Args:
            parcels: the tasks.
            shared: the pickled problem, jobs and randomness; unpickled once in a worker's life. It comes with
                every call, by reference, because a restarted worker knows nothing.
            arrays: the shared tensors, in the parcels' places.

        Returns:
            This process's id and the results.
        """
        if self._trainer is None:
            self._trainer = GeneralTrainer(*pickle.loads(shared.tobytes()))
        tensors = [torch.tensor(array) for array in arrays]
        return os.getpid(), Results.of(self._trainer.train([parcel.unpacked(tensors) for parcel in parcels]))


def _stacked(rows: Sequence[dict[str, Tensor]]) -> list[dict[str, NDArray[Any]]]:
    """One stack for all rows if they agree, else each row by itself."""
    kinds = {tuple((name, tuple(each.shape), each.dtype) for name, each in row.items()) for row in rows}
    if len(kinds) == 1:
        return [{name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]}]
    return [{name: each.numpy() for name, each in row.items()} for row in rows]


def _rows(packed: Sequence[dict[str, NDArray[Any]]], count: int) -> list[dict[str, Tensor]]:
    owned = [{name: torch.from_numpy(np.array(array)) for name, array in row.items()} for row in packed]
    if len(owned) == count and count != 1:
        return owned
    return [{name: stack[position] for name, stack in owned[0].items()} for position in range(count)]

"""What runs inside a Ray worker: one thread, a trainer, nothing that changes from task to task."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from fedsim.pool.connection import import_ray
from fedsim.pool.parcels import Packed, Parcel, Results
from fedsim.pool.usercode import Bytes, unpickled
from fedsim.training import Trainer, trainer_for


class Place(NamedTuple):
    """Where a worker lives."""

    node: str
    """Ray's id of the machine."""
    process: int


class Worker:
    """The actor. It may die at any time: whatever it was asked is asked again, of a fresh one."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._trainer: Trainer | None = None

    def hello(self) -> Place:
        """Say where this worker has come to be."""
        context: Any = import_ray().get_runtime_context()
        return Place(context.get_node_id(), os.getpid())

    def train(self, parcels: list[Parcel], shared: list[Bytes], *tensors: Packed) -> Results:
        """Train a group.

        Args:
            parcels: the tasks.
            shared: what all tasks share (:func:`trainer_for` takes it), pickled; unpickled once in a worker's life. It
                comes with every call, by reference, because a fresh worker knows nothing.
            tensors: the shared tensors, in the parcels' places.
        """
        if self._trainer is None:
            self._trainer = trainer_for(*unpickled(shared))
        owned = [packed.unpacked() for packed in tensors]
        return Results.of(self._trainer.train([parcel.unpacked(owned) for parcel in parcels]))

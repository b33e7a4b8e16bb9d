"""What runs inside a Ray worker: one thread, a trainer, nothing that changes from task to task."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.pool.connection import import_ray
from fedsim.pool.lines import Ends, serve
from fedsim.pool.parcels import Packed, Parcel, Results
from fedsim.pool.regions import Address, Letter, Region
from fedsim.pool.usercode import Bytes, unpickled
from fedsim.training import trainer_for


class Place(NamedTuple):
    """Where a worker lives."""

    node: str
    """Ray's id of the machine."""
    process: int
    near: bool
    """Whether it reaches the driver's memory."""


class Answer(NamedTuple):
    """What a worker sends back."""

    results: Results | Letter
    """The results, or where they lie in the region that the group came in."""
    seconds: float
    """What training took."""


class Worker:
    """The actor. It may die at any time: whatever it was asked is asked again, of a fresh one.

    Args:
        shared: what all tasks share, pickled: the arguments of :func:`trainer_for`.
        probe: where the driver has a region, if it can have any.
    """

    def __init__(self, shared: list[Bytes], probe: Address | None) -> None:
        torch.set_num_threads(1)
        self._trainer = trainer_for(*unpickled(shared))
        self._near = probe is not None and probe.leads_there()
        self._regions: dict[Address, Region] = {}

    def hello(self) -> Place:
        """Say where this worker has come to be."""
        context: Any = import_ray().get_runtime_context()
        return Place(context.get_node_id(), os.getpid(), self._near)

    def train(self, parcels: list[Parcel], *tensors: Packed) -> Answer:
        """Train a group.

        Args:
            parcels: the tasks.
            tensors: the shared tensors, in the parcels' places.
        """
        return Answer(*self._train(parcels, tensors))

    def serve(self, ends: Ends) -> None:
        """Train the groups of which letters come through a line, until the driver hangs up."""
        serve(ends, self.train_near)

    def train_near(self, letter: Letter) -> Answer:
        """Train a group whose tensors lie in a region, and leave its results there if there is room.

        Args:
            letter: about the arguments of :meth:`train`.
        """
        region = self._regions.get(letter.address)
        if region is None:
            region = self._regions[letter.address] = Region.attach(letter.address)
        parcels, tensors = region.unsealed(letter)
        results, seconds = self._train(parcels, tensors)
        try:
            return Answer(region.seal(results), seconds)
        except OSError:  # no memory left for a larger region
            return Answer(results, seconds)

    def _train(self, parcels: Sequence[Parcel], tensors: Sequence[Packed]) -> tuple[Results, float]:
        """The results, and the seconds that training took."""
        owned: list[Tensor] = [packed.unpacked() for packed in tensors]
        works = [parcel.unpacked(owned) for parcel in parcels]
        began = time.perf_counter()
        trained = self._trainer.train(works)
        return Results.of(trained), time.perf_counter() - began

"""What travels between the driver and a Ray worker: tensors as arrays, works and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import TaskError
from fedsim.training import Result, Work

LARGE = 2**14
"""Bytes from which on a tensor travels by itself: then to stack it with others costs more than it saves."""

_UNKNOWN_TO_NUMPY = {torch.bfloat16: torch.int16}
"""Dtypes that no array can have, and what their bits travel as."""


@dataclass(slots=True, frozen=True)
class Packed:
    """A tensor, or a stack of tensors, as an array, which Ray moves without copying."""

    array: NDArray[Any]
    """The values, or their bits as integers if NumPy lacks ``dtype``."""
    dtype: torch.dtype
    """The tensor's own."""

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        """Pack a tensor of any shape; the array may share its memory."""
        bits = _UNKNOWN_TO_NUMPY.get(tensor.dtype)
        return cls((tensor if bits is None else tensor.view(bits)).numpy(force=True), tensor.dtype)

    def unpacked(self) -> Tensor:
        """The tensor again, bit for bit, in memory of its own."""
        # torch.tensor copies into memory that begins where every new tensor's does. A view into the middle of a
        # stack would not, and how a vector lies can show in the last bit of a sum over it.
        return torch.tensor(self.array).view(self.dtype)

    def row(self, position: int) -> Tensor:
        """One tensor of a stack ``[n, ...]``, as :meth:`unpacked`."""
        return Packed(self.array[position, ...], self.dtype).unpacked()


Row: TypeAlias = dict[str, Packed]
"""Named tensors of one task, or of a group in stacks ``[group, ...]``."""


@dataclass(slots=True)
class Parcel:
    """A :class:`Work` whose shared tensors lie elsewhere."""

    numbers: tuple[int, int, int, str, float, int]
    """Its task, client, nth, job, lr and steps."""
    state: Row
    """The client's own tensors: no other task shares them."""
    start: int
    """The place of the start vector among the tensors sent along."""
    message: dict[str, int]
    """The places of the message's tensors."""

    @classmethod
    def of(cls, work: Work, places: Mapping[int, int]) -> Parcel:
        """Pack a work, given the places of its shared tensors by their identity."""
        return cls(
            numbers=(work.task, work.client, work.nth, work.job, work.lr, work.steps),
            state={name: Packed.of(tensor) for name, tensor in work.state.items()},
            start=places[id(work.start)],
            message={name: places[id(tensor)] for name, tensor in work.message.items()},
        )

    def unpacked(self, tensors: Sequence[Tensor]) -> Work:
        """The work itself, given the shared tensors in their places."""
        message = {name: tensors[place] for name, place in self.message.items()}
        state = {name: packed.unpacked() for name, packed in self.state.items()}
        task, client, nth, job, lr, steps = self.numbers
        return Work(task, client, nth, job, tensors[self.start], message, state, lr, steps)


def shared_tensors(works: Sequence[Work]) -> list[Tensor]:
    """Each start vector and message tensor of a group once, in order of first use."""
    found: dict[int, Tensor] = {}
    for work in works:
        for tensor in (work.start, *work.message.values()):
            found.setdefault(id(tensor), tensor)
    return list(found.values())


@dataclass(slots=True)
class Results:
    """The results of a group, small tensors of one name stacked ``[group, ...]`` where they agree."""

    payload: list[Row]
    """One row of stacks if all tasks agree in names, shapes and dtypes of small tensors, else a row for each task."""
    state: list[Row]
    """As ``payload``."""
    steps: list[int]
    finite: list[bool | None]
    group: int
    errors: dict[int, TaskError]
    """What client code raised, by position in the group."""

    @classmethod
    def of(cls, results: Sequence[Result]) -> Results:
        """Pack the results of a group."""
        return cls(
            payload=_stacked([result.payload for result in results]),
            state=_stacked([result.state for result in results]),
            steps=[result.steps for result in results],
            finite=[result.finite for result in results],
            group=len(results),
            errors={position: each.error for position, each in enumerate(results) if each.error is not None},
        )

    def unpacked(self, tasks: Sequence[int]) -> list[Result]:
        """The results of these tasks, in memory of their own."""
        payload, state = _rows(self.payload, len(tasks)), _rows(self.state, len(tasks))
        return [
            Result(payload[at], state[at], self.steps[at], self.group, self.finite[at], self.errors.get(at))
            for at in range(len(tasks))
        ]


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> list[Row]:
    """One row of stacks if all rows agree and their tensors are small, else each row by itself."""
    kinds = {tuple((name, tuple(each.shape), each.dtype) for name, each in row.items()) for row in rows}
    small = all(each.nbytes < LARGE for row in rows for each in row.values())
    if len(rows) == 1:
        return [{name: Packed.of(each.unsqueeze(0)) for name, each in rows[0].items()}]
    if len(kinds) == 1 and small:
        return [{name: Packed.of(torch.stack([row[name] for row in rows])) for name in rows[0]}]
    return [{name: Packed.of(each) for name, each in row.items()} for row in rows]


def _rows(packed: Sequence[Row], count: int) -> list[dict[str, Tensor]]:
    """The tensors of each of ``count`` tasks, from what :func:`_stacked` made."""
    if len(packed) == 1:
        return [{name: stack.row(position) for name, stack in packed[0].items()} for position in range(count)]
    return [{name: each.unpacked() for name, each in row.items()} for row in packed]

"""Tensors in Ray's object store: each is put there once, shared by reference, and leaves when no group needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim.pool.parcels import Packed


@dataclass(slots=True, eq=False)
class Stored:
    """One tensor in the object store."""

    tensor: Tensor
    """Kept so that no other tensor can take over its identity."""
    reference: Any = None
    """Ray's, once a group that needs it has been handed out."""
    users: int = 0
    """Groups that need it."""


class TensorStore:
    """Counts, for each tensor by its identity, the groups that still need it."""

    def __init__(self) -> None:
        self._stored: dict[int, Stored] = {}

    def __len__(self) -> int:
        """How many tensors lie in the object store."""
        return sum(stored.reference is not None for stored in self._stored.values())

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """One more group needs each of these, or will."""
        for tensor in tensors:
            self._stored.setdefault(id(tensor), Stored(tensor)).users += 1

    def references(self, tensors: Sequence[Tensor], put: Callable[[Packed], Any]) -> list[Any]:
        """Ray's references to kept tensors; what is not in the object store yet is put there, by ``ray.put``."""
        for stored in (self._stored[id(tensor)] for tensor in tensors):
            if stored.reference is None:
                stored.reference = put(Packed.of(stored.tensor))
        return [self._stored[id(tensor)].reference for tensor in tensors]

    def release(self, tensors: Sequence[Tensor]) -> None:
        """One group less needs each of these. Ray frees what nobody refers to any more."""
        for tensor in tensors:
            stored = self._stored[id(tensor)]
            stored.users -= 1
            if not stored.users:
                del self._stored[id(tensor)]

    def clear(self) -> None:
        """Let go of everything."""
        self._stored.clear()

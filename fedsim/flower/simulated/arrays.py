"""Flower's named arrays: what they weigh on the wire, and a whole model of them as one vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from torch import Tensor

from fedsim.vectors import Layout

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}
"""What an array's dtype is in torch, and in a safetensors file."""

NUMPY = "numpy.ndarray"
"""How arrays travel that are arrays, and not somebody's own bytes."""


@dataclass(frozen=True, init=False)
class ByteLayout(Layout):
    """A flat vector of bytes that holds arrays of several dtypes, one after another.

    ``names`` and ``shapes`` are the arrays' own, ``dtypes`` theirs, too; ``dtype`` is ``torch.uint8`` and ``size``
    the number of bytes.
    """

    dtypes: tuple[torch.dtype, ...] = ()

    def __init__(
        self,
        names: tuple[str, ...] = (),
        shapes: tuple[tuple[int, ...], ...] = (),
        dtypes: tuple[torch.dtype, ...] = (),
    ) -> None:
        super().__init__(names, shapes, torch.uint8)
        object.__setattr__(self, "dtypes", dtypes)
        object.__setattr__(self, "size", sum(self.lengths))

    @property
    def lengths(self) -> list[int]:
        """Bytes of each array."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Copies of the arrays in ``vector [size]`` under their names."""
        parts = torch.split(vector, self.lengths)
        arrays = zip(self.names, self.shapes, self.dtypes, parts, strict=True)
        # A view of another dtype needs memory that begins at a multiple of its items, so each part is copied first.
        return {name: part.clone().view(dtype).view(shape) for name, shape, dtype, part in arrays}


def message_bytes(message: Message) -> int:
    """Bytes of a message's arrays, their items times their size: what a transfer is charged for.

    Metrics, settings and headers are free, as the same things are in fedsim's own messages.
    """
    if not message.has_content():
        return 0
    records = message.content.array_records.values()
    return sum(array_bytes(array) for record in records for array in record.values())


def array_bytes(array: Array) -> int:
    """Bytes of one array's items; of somebody's own serialisation all of them."""
    if array.stype != NUMPY:
        return len(array.data)
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def as_vector(record: ArrayRecord) -> tuple[ByteLayout, Tensor]:
    """The arrays of a record as bytes, one after another: the layout, and the vector ``[layout.size]``.

    Arrays that torch has no dtype for, or that are somebody's own serialisation, are kept as the bytes they are.
    """
    names, shapes, dtypes, parts = [], [], [], []
    for name, array in record.items():
        dtype = _DTYPES.get(array.dtype) if array.stype == NUMPY else None
        values = array.numpy() if dtype is not None else np.frombuffer(array.data, dtype=np.uint8)
        names.append(str(name))
        shapes.append(tuple(values.shape))
        dtypes.append(torch.uint8 if dtype is None else dtype)
        parts.append(np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8))
    joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
    return ByteLayout(tuple(names), tuple(shapes), tuple(dtypes)), torch.from_numpy(joined)


def first_arrays(message: Message) -> ArrayRecord | None:
    """The first array record of a message: the model it carries, if any."""
    return next(iter(message.content.array_records.values()), None)


def has_non_finite(record: ArrayRecord) -> bool:
    """Whether an item of a floating-point array is NaN or infinite."""
    arrays = [array.numpy() for array in record.values() if array.stype == NUMPY]
    return not all(np.isfinite(each).all() for each in arrays if each.dtype.kind == "f")

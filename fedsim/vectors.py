"""Flat parameter vectors, their layout, and sums whose order is fixed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

ALIGNED = 64
"""Bytes: a new vector begins at a multiple, and so must every one that is trained, for it can show in the bits."""


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one flat vector of ``size`` items.

    ``nbytes`` is what one vector costs on the wire; it is ``size`` times the item size unless a problem
    that trains nothing declares otherwise.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    declared_bytes: int | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(prod(shape) for shape in self.shapes))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of named tensors, in their order.

        Raises:
            ValueError: if they do not share one floating-point dtype.
        """
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
            raise ValueError(f"a flat vector needs one floating-point dtype, got {sorted(map(str, dtypes))}")
        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        return cls(tuple(tensors), shapes, next(iter(dtypes)))

    @classmethod
    def flat(cls, size: int, dtype: torch.dtype = torch.float64) -> Layout:
        """One unnamed vector ``x`` of ``size`` items."""
        return cls(("x",), ((size,),), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of one vector on the wire."""
        if self.declared_bytes is not None:
            return self.declared_bytes
        return self.size * torch.empty((), dtype=self.dtype).element_size()

    def zeros(self) -> Tensor:
        """A new zero vector ``[size]``."""
        return torch.zeros(self.size, dtype=self.dtype)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of ``vector [size]`` under their names and shapes; writing to them writes to it."""
        parts = torch.split(vector, [prod(shape) for shape in self.shapes])
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One new flat vector from tensors under this layout's names."""
        return torch.cat([tensors[name].detach().reshape(-1).to(self.dtype) for name in self.names])


def aligned_stack(rows: int, like: Tensor) -> Tensor:
    """A new ``[rows, d]`` with each row where a vector alone would begin, for vectors like ``like [..., d]``."""
    size, item = like.shape[-1], like.element_size()
    stride = -(-size * item // ALIGNED) * ALIGNED // item
    return torch.empty((rows, stride), dtype=like.dtype, device=like.device)[:, :size]


def is_aligned(stack: Tensor) -> bool:
    """Whether every row of ``stack [n, d]`` is dense, begins where a vector alone would and shares no memory."""
    step = stack.stride(0) * stack.element_size()
    if len(stack) > 1 and (step % ALIGNED or stack.stride(0) < stack.shape[1]):
        return False
    return stack.stride(1) == 1 and stack.data_ptr() % ALIGNED == 0


def weighted_sum(vectors: Sequence[Tensor], weights: Iterable[float]) -> Tensor:
    """``sum_i weights[i] * vectors[i]``, added strictly from first to last so that the bits are fixed.

    Raises:
        ValueError: if there is nothing to sum, or the two lengths differ.
    """
    factors = [float(weight) for weight in weights]
    if not vectors or len(vectors) != len(factors):
        raise ValueError(f"weighted_sum needs one weight per vector, got {len(factors)} and {len(vectors)}")
    total = torch.zeros_like(vectors[0])
    if not total.numel():  # of runs that train nothing
        return total
    for vector, factor in zip(vectors, factors, strict=True):
        total.add_(vector, alpha=factor)
    return total


def all_finite(tensor: Tensor) -> bool:
    """Whether no item is NaN or infinite (one pass, no copy)."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if math.isfinite(tensor.sum().item()):  # a NaN or an infinity in it would show
        return True
    low, high = torch.aminmax(tensor)  # the sum of finite items may overflow
    return math.isfinite(low.item()) and math.isfinite(high.item())


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """The uniform mean of ``vectors``, in their order."""
    return weighted_sum(vectors, [1.0 / len(vectors)] * len(vectors))

"""What travels and what it costs: the one place where bytes are counted."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch

from fedsim.local import TensorSpec
from fedsim.vectors import Layout


def message_bytes(specs: Iterable[TensorSpec], layout: Layout) -> int:
    """Bytes of a message made of tensors of these shapes and dtypes.

    A vector as long as the model costs what the layout says, so that a problem which trains nothing can
    declare a size; everything else costs its items times their size.
    """
    return sum(_tensor_bytes(spec, layout) for spec in specs)


def _tensor_bytes(spec: TensorSpec, layout: Layout) -> int:
    if spec.dtype == layout.dtype and spec.shape[-1:] == (layout.size,):
        return prod(spec.shape[:-1]) * layout.nbytes
    return prod(spec.shape) * torch.empty((), dtype=spec.dtype).element_size()

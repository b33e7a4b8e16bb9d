"""Linear layers of models that are no chains, a convolution's say: their products in C, and no gradient in between.

The two ways through a layer are those of the chains, and so is what ``products.h`` says of their bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.problems.sequential import Into, Linear, Views
from fedsim.training.native.built import at_its_best, compiled, instruction_sets

BLOCK, ITEM = 16, 4
"""Numbers that C writes at once, and bytes of one."""


class NativeLinear(Linear):
    """``x W^T + b`` in main memory and single precision; batches that it is slower at are left to torch.

    Args:
        weight, bias: the names of ``W [outputs, inputs]`` and ``b [outputs]``, None if there is no ``b``.
        instruction_set: one of those there are; None takes the fastest. It does not show in the bits.
    """

    def __init__(self, weight: str, bias: str | None, instruction_set: str | None = None) -> None:
        super().__init__(weight, bias)
        self._set = instruction_set or instruction_sets()[0]

    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        """The layer's output ``[n, outputs]``, and its input."""
        outputs = len(views[self.weight])
        if not self._is_best(views, x):
            return super().forward(views, x, generator)
        x = _with_dense_rows(x)
        out = x.new_empty(len(x), (-(-outputs // BLOCK) | 1) * BLOCK)
        compiled().forward(self._told(views, x), out.data_ptr())
        return out[:, :outputs], x

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        """The slope ``[n, inputs]`` by the input; the gradients go ``into``."""
        if not self._is_best(views, kept):
            return super().backward(views, kept, slope, into, wanted)
        if slope.dtype != kept.dtype:
            raise TypeError(f"the slope must be {kept.dtype}, is {slope.dtype}")
        slope = _with_dense_rows(slope)
        below = slope.new_empty(kept.shape) if wanted else None
        # What is taken off is a gradient times the rate, so its sign is the other one.
        taken, factor = (True, -into.factor) if into.keep else (False, into.factor)
        compiled().backward(
            self._told(views, kept), (slope.data_ptr(), slope.stride(0)), 0 if below is None else below.data_ptr(),
            (self._places(into.views)[0], taken, factor),
        )  # fmt: skip
        return slope if below is None else below

    def _is_best(self, views: Views, x: Tensor) -> bool:
        """Whether C can do it, and nobody faster. A rule may ask for gradients at whatever it has made."""
        weight = views[self.weight]
        single = weight.dtype == x.dtype == torch.float32 and weight.device.type == x.device.type == "cpu"
        return single and weight.numel() > 0 and at_its_best(len(x), weight.numel())

    def _told(self, views: Views, x: Tensor) -> tuple[Any, ...]:
        """What both ways through need, as C takes it."""
        outputs, inputs = views[self.weight].shape
        begin, weight, bias = self._places(views)
        return self._set, (inputs, outputs, weight, bias), len(x), begin, (x.data_ptr(), x.stride(0))

    def _places(self, views: Views) -> tuple[int, int, int]:
        """Where the layer's parameters begin, and how many numbers behind that ``W`` and ``b`` do; -1 for no ``b``."""
        weight = views[self.weight].data_ptr()
        if self.bias is None:
            return weight, 0, -1
        bias = views[self.bias].data_ptr()
        begin = min(weight, bias)
        return begin, (weight - begin) // ITEM, (bias - begin) // ITEM


def _with_dense_rows(x: Tensor) -> Tensor:
    """``x [n, columns]``, or a copy if C could not go along its rows."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

"""Numbers on a grid: what a vector becomes when it travels as whole numbers of few bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, number
from fedsim.local import TensorSpec
from fedsim.vectors import Layout

DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True)
class Quantiser:
    """Unbiased rounding to multiples of ``step``, which travel as whole numbers of ``bits``.

    With ``q = floor(x / step)`` a number ``x`` becomes ``q + 1`` with probability ``x / step - q``, else ``q``, so that
    its expectation is ``x`` and a multiple of ``step`` stays what it is. Sender and receiver both know ``step``; a
    vector costs ``bits / 8`` bytes per number in the ledger, as any message of that type does.

    Source: the quantised exchange of consensus ADMM in SLIM-KL (arXiv 2309.08201).

    Args:
        step: distance of the grid's points, > 0.
        bits: 8, 16 or 32 of a signed whole number.

    Raises:
        ConfigError: for another ``step`` or ``bits``.
    """

    step: float
    bits: int = 16

    def __post_init__(self) -> None:
        number("step", self.step, above=0)
        if self.bits not in DTYPES:
            raise ConfigError(f"bits={self.bits}: must be 8, 16 or 32")

    @property
    def dtype(self) -> torch.dtype:
        """What codes are made of."""
        return DTYPES[self.bits]

    def spec(self, layout: Layout) -> TensorSpec:
        """A model's codes as they travel."""
        return TensorSpec((layout.size,), self.dtype)

    def codes(self, x: Tensor, uniform: NDArray[np.float64]) -> Tensor:
        """``x / step`` rounded at random to whole numbers.

        Args:
            x: of any shape.
            uniform: keyed numbers in (0, 1) of that shape.

        Raises:
            ValueError: for a number that ``bits`` cannot hold.
        """
        scaled = x.double() / self.step
        low = scaled.floor()
        return self._held(low + (torch.from_numpy(uniform).to(x.device) < scaled - low))

    def nearest(self, x: Tensor) -> Tensor:
        """The codes of an ``x`` that is on the grid but for rounding.

        Raises:
            ValueError: for a number that ``bits`` cannot hold.
        """
        return self._held((x.double() / self.step).round())

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes stand for."""
        return (codes.double() * self.step).to(dtype)

    def _held(self, codes: Tensor) -> Tensor:
        most = torch.iinfo(self.dtype).max
        if codes.numel() and not bool(codes.abs().max() <= most):  # NaN, too
            largest = float(codes.abs().max()) * self.step
            raise ValueError(f"{self.bits} bits in steps of {self.step:g} hold up to {most * self.step:g}: {largest:g}")
        return codes.to(self.dtype)

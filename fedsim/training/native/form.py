"""The fastest form of a chain of linear layers: every step of a client in one go, in C, its matrices in the cache.

What it does stands in ``steps.h``. A client is worked on by itself, so its bits depend on nobody it is trained with;
and every sum has one order that the text fixes, so they do not depend on the instruction set either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedsim.local import Extras
from fedsim.problems.chain import Chain
from fedsim.training.batches import Batch, Steps
from fedsim.training.native.built import at_its_best, compiled, instruction_sets

FEWEST, MOST = 2, 128
"""Clients in a stack."""

NUMBERS = 2_500_000
"""Parameters of a stack, about."""

NOTHING = (0, 0.0, 0.0, 0.0, 0.0, 0)
"""Beside the gradient, as C takes it."""

LOSSES = ("cross_entropy", "binary", "squared")
ACTIVATIONS = (None, "relu", "tanh")
"""As numbered in ``chain.h``."""


class NativeForm:
    """The gradient and plain steps of a chain on stacks of parameter vectors in main memory.

    Args:
        chain: a problem that :meth:`takes` says yes to.
        instruction_set: one of :func:`instruction_sets`; None takes the fastest. It does not show in the bits.
    """

    l2: float

    def __init__(self, chain: Chain, instruction_set: str | None = None) -> None:
        self.l2 = chain.l2
        self._parameters = sum(each.outputs * (each.inputs + (each.bias is not None)) for each in chain.layers)
        self._layers = torch.tensor(
            [
                [each.inputs, each.outputs, each.weight, -1 if each.bias is None else each.bias,
                 ACTIVATIONS.index(each.activation)]
                for each in chain.layers
            ]
        )  # fmt: skip
        self._inputs, self._targets = chain.inputs.contiguous(), chain.targets.contiguous()
        self._train = compiled().train
        self._chain = compiled().chain(
            instruction_set or instruction_sets()[0], self._parameters, self._layers.data_ptr(), len(chain.layers),
            LOSSES.index(chain.loss), self._inputs.data_ptr(), self._targets.data_ptr(), len(self._inputs),
        )  # fmt: skip

    @classmethod
    def takes(cls, chain: Chain) -> bool:
        """Whether a chain can be trained here: single precision, parts that fit together, and the means."""
        classes = chain.loss == "cross_entropy"
        single = chain.inputs.dtype == torch.float32
        single &= chain.targets.dtype == (torch.int64 if classes else torch.float32)
        return bool(instruction_sets()) and single and chain.inputs.device.type == "cpu" and _hangs_together(chain)

    def suits(self, size: int) -> bool:
        """Whether it is at its best with batches of ``size`` examples: of large ones on large layers it is not."""
        return at_its_best(size, self._parameters)

    def lanes(self, size: int) -> int:
        """Most clients in a stack with batches of ``size`` examples."""
        return max(FEWEST, min(MOST, NUMBERS // self._parameters))

    def least_lanes(self, size: int) -> int:
        """1: a client alone gets the same bits as in any company."""
        return 1

    def gradient(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        """Write the gradients at ``x[:k]`` of the mean losses over a batch of ``k`` clients into ``out[:k]``."""
        self._work(Steps.of(batch), x, out=out)
        if self.l2:
            k = len(batch.rows)
            out[:k].add_(x[:k], alpha=self.l2)

    def descend(self, x: Tensor, batch: Batch, lr: Tensor) -> None:
        """``x[:k] <- x[:k] - lr[:k] * gradient`` in place; ``lr [n, 1]``."""
        self._work(Steps.of(batch), x, lr)

    def descend_all(self, x: Tensor, blocks: Iterable[Steps], lr: Tensor, start: Tensor, extras: Extras) -> None:
        """Every client's own steps from ``x [n, d]`` on, in place.

        Args:
            x: where they begin, and end.
            blocks: the steps.
            lr: ``[n, 1]``.
            start: ``[n, d]``, or ``[d]`` for all: where a penalty pulls.
            extras: what goes into a step beside the gradient.
        """
        velocity = self._at_rest(x, extras)
        for steps in blocks:
            self._work(steps, x, lr, start=start, more=_more(extras, velocity))

    def update(self, x: Tensor, blocks: Iterable[Steps], lr: Tensor, start: Tensor, extras: Extras) -> list[bool]:
        """As :meth:`descend_all`, but from ``start`` on, and what ``x`` is filled with is the difference from it.

        Returns:
            Of each client whether all of its difference is finite, ``[n]``.
        """
        velocity, finite = self._at_rest(x, extras), torch.ones(len(x), dtype=torch.bool)
        missing = True
        for steps, first, last in _with_ends(blocks):
            ends = first, last, finite.data_ptr()
            self._work(steps, x, lr, start=start, ends=ends, more=_more(extras, velocity))
            missing = False
        if missing:  # no examples, no steps
            x.zero_()
        flags: list[bool] = finite.tolist()
        return flags

    def _at_rest(self, x: Tensor, extras: Extras) -> Tensor | None:
        """The velocities before the first step, as far apart as the rows of ``x``, if there are any."""
        # How far apart rows are says nothing where there is one only.
        return x.new_zeros(len(x), max(x.stride(0), self._parameters)) if extras.momentum else None

    def _work(
        self, steps: Steps, x: Tensor, lr: Tensor | None = None, out: Tensor | None = None,
        start: Tensor | None = None, ends: tuple[int, int, int] = (0, 0, 0), more: tuple[float, ...] = NOTHING,
    ) -> None:  # fmt: skip
        rows, scale, running = steps.rows.to(torch.int64).contiguous(), steps.scale.contiguous(), steps.running
        clients = rows.shape[1]
        self._check(x, clients)
        rates = None if lr is None else lr[:clients].to(x.dtype).expand(clients, 1).contiguous()
        self._train(
            self._chain, tuple(rows.shape), (rows.data_ptr(), scale.data_ptr(), running.data_ptr()),
            0 if rates is None else rates.data_ptr(), _place(x), _place(out), (*_place(start), *ends), more,
        )  # fmt: skip

    def _check(self, x: Tensor, clients: int) -> None:
        """See that C finds the parameters of so many clients in a stack that a rule may have made.

        Raises:
            ValueError: if it would not.
        """
        wanted = f"float32 [{clients}, {self._parameters}]"
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self._parameters or len(x) < clients:
            raise ValueError(f"parameters must be {wanted}, are {str(x.dtype).removeprefix('torch.')} {list(x.shape)}")
        dense = x.shape[1] == 1 or x.stride(1) == 1
        if not dense or (len(x) > 1 and x.stride(0) < x.shape[1]):
            raise ValueError(f"parameters must be {wanted} with rows that are dense and apart, clone() makes them so")


def _place(stack: Tensor | None) -> tuple[int, int]:
    """Where a stack begins, and how far its rows are apart: 0 for one vector for all."""
    if stack is None:
        return 0, 0
    return stack.data_ptr(), stack.stride(0) if stack.ndim > 1 else 0


def _hangs_together(chain: Chain) -> bool:
    """Whether examples, layers and parameters fit, for C would not notice; torch says what is wrong with others."""
    layers, shape = chain.layers, tuple(chain.inputs.shape)
    numbers = sum(each.outputs * (each.inputs + (each.bias is not None)) for each in layers)
    ends = [each.weight + each.outputs * each.inputs for each in layers]
    ends += [each.bias + each.outputs for each in layers if each.bias is not None]
    widths = [each.inputs for each in layers], [shape[-1], *(each.outputs for each in layers[:-1])]
    whole = max(ends) == numbers and 0 not in widths[0] and layers[-1].outputs > 0
    given = len(shape) == 2 and tuple(chain.targets.shape) == shape[:1]
    return whole and given and widths[0] == widths[1] and (chain.loss == "cross_entropy" or layers[-1].outputs == 1)


def _more(extras: Extras, velocity: Tensor | None) -> tuple[float, ...]:
    if not extras:
        return NOTHING
    clip = math.inf if extras.clip is None else extras.clip
    return 1, clip, extras.weight_decay, extras.prox, extras.momentum, _place(velocity)[0]


def _with_ends(blocks: Iterable[Steps]) -> Iterator[tuple[Steps, bool, bool]]:
    """Each with whether it is the first, and whether the last."""
    rest = iter(blocks)
    here, first = next(rest, None), True
    while here is not None:
        after = next(rest, None)
        yield here, first, after is None
        here, first = after, False

"""Gradients of chains of linear layers for a whole stack of clients, by batched products of matrices, without autograd.

On small models autograd and dispatch cost more than the arithmetic, so the steps of all clients of a group are made by
the same few calls, in buffers that are kept. An example is a column, in which order the products take least time: with
``A_0`` the batch and ``A_l = act_l(W_l A_{l-1} + b_l)``::

    D_L = scale * d loss / d A_L            scale: 1 / examples, 0 for columns that only fill a batch
    D_l = act_l'(A_l) * D_l                 dW_l = D_l A_{l-1}^T    db_l = sum D_l    D_{l-1} = W_l^T D_l

A plain step puts the learning rate into ``scale`` and subtracts ``dW_l`` and ``db_l`` from the parameters as they are
made, so that the gradient is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.problems.chain import Chain
from fedsim.training.batches import Batch
from fedsim.vectors import ALIGNED, aligned_stack

FEWEST, MOST = 2, 128
"""Clients in a stack."""

SHIFTS = (1, 3, 6)
"""Places by which clients are moved on in a trial."""

NUMBERS = 2_500_000
"""Parameters and activations of a stack, about: with more the working set leaves the processor's cache."""


@dataclass(slots=True)
class _Buffers:
    """Room for the activations and slopes of ``k`` clients' batches of one size."""

    activations: list[Tensor]
    """``A_0 .. A_L``, each ``[k, width, size]``; ``A_0`` lies in memory as its examples are gathered."""
    slopes: list[Tensor]
    """``D_1 .. D_L``, each ``[k, width, size]``."""
    inputs: Tensor
    """``A_0`` as ``[k * size, width]``."""
    targets: Tensor
    """``[k * size]``."""
    minus: Tensor
    """``[k, 1, size]``, all -1: what the probabilities of the right answers lose."""


class ClosedForm:
    """The gradient and the plain step of a chain on stacks of parameter vectors.

    Args:
        chain: the problem.
        device: where its examples are kept and stacks must be.
    """

    def __init__(self, chain: Chain, device: torch.device | str = "cpu") -> None:
        self.layers, self.loss, self.l2 = chain.layers, chain.loss, chain.l2
        self.inputs, self.targets = chain.inputs.to(device), chain.targets.to(device)
        self._widths = [self.layers[0].inputs, *(layer.outputs for layer in self.layers)]
        self._parameters = sum(each.outputs * (each.inputs + (each.bias is not None)) for each in self.layers)
        self._arena = self.inputs.new_empty(0)
        self._buffers: dict[tuple[int, int], _Buffers] = {}

    def lanes(self, size: int) -> int:
        """Most clients in a stack with batches of ``size`` examples."""
        return max(FEWEST, min(MOST, NUMBERS // (self._parameters + size * sum(self._widths))))

    def least_lanes(self, size: int) -> int:
        """The smallest stack whose clients get the same bits as in larger ones, by trial on this machine.

        1: a client alone gets the same; 2: it must not be alone; 0: any two sizes may differ, or its place in the stack
        shows (seen with MKL on an EPYC of AMD, at some sizes), so that each client has to be trained by itself.
        """
        most, generator = self.lanes(size), torch.Generator().manual_seed(size)
        x = aligned_stack(most, self.inputs.new_empty(self._parameters)).normal_(0, 0.1, generator=generator)
        rows = torch.randint(len(self.inputs), (most, size), generator=generator)
        scale, lr = torch.full((most, size, 1), 1 / size, dtype=x.dtype), torch.full((most, 1), 0.1, dtype=x.dtype)
        whole = self._trial(x, rows, scale, lr)
        shows = [
            k for k in {1, 2, 3, most - 1} if not self._same(whole, self._trial(x[:k], rows[:k], scale[:k], lr[:k]))
        ]
        if any(not self._same(whole, self._moved_on(by, x, rows, scale, lr)) for by in SHIFTS):
            return 0
        return 1 if not shows else 2 if shows == [1] else 0

    def _moved_on(self, by: int, x: Tensor, rows: Tensor, scale: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`_trial` gives when every client is so many places further on, put back in its place."""
        elsewhere = aligned_stack(len(x), x).copy_(x.roll(by, 0))
        slope, moved = self._trial(elsewhere, rows.roll(by, 0), scale, lr)
        return slope.roll(-by, 0), moved.roll(-by, 0)

    def _same(self, whole: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> bool:
        """Whether the first rows of stacks are those of smaller stacks, bit for bit, NaN or not."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[whole[0].element_size()]
        return all(torch.equal(a[: len(b)].view(bits), b.view(bits)) for a, b in zip(whole, part, strict=True))

    def _trial(self, x: Tensor, rows: Tensor, scale: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """A gradient and a step of a copy of ``x``."""
        batch, moved, slope = Batch(rows, scale), aligned_stack(len(x), x).copy_(x), aligned_stack(len(x), x)
        self.gradient(moved, batch, slope)
        self.descend(moved, batch, lr)
        return slope, moved

    def gradient(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        """Write the gradients at ``x[:k]`` of the mean losses over a batch of ``k`` clients into ``out[:k]``."""
        k = len(batch.rows)
        weights, biases = self._views(x[:k])
        into, into_biases = self._views(out[:k])
        for i, slope, inputs in self._slopes(weights, biases, batch.rows, batch.scale):
            torch.bmm(slope, inputs, out=into[i])
            bias = into_biases[i]
            if bias is not None:
                torch.sum(slope, 2, keepdim=True, out=bias)
        if self.l2:
            out[:k].add_(x[:k], alpha=self.l2)

    def descend(self, x: Tensor, batch: Batch, lr: Tensor) -> None:
        """``x[:k] <- x[:k] - lr[:k] * gradient`` in place, for chains without a penalty; ``lr [n, 1]``."""
        k = len(batch.rows)
        weights, biases = self._views(x[:k])
        for i, slope, inputs in self._slopes(weights, biases, batch.rows, batch.scale * lr[:k].unsqueeze(2)):
            weights[i].baddbmm_(slope, inputs, alpha=-1)
            bias = biases[i]
            if bias is not None:
                bias.sub_(slope.sum(2, keepdim=True))

    def _slopes(
        self, weights: list[Tensor], biases: list[Tensor | None], rows: Tensor, scale: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``i``, ``D_{i + 1} [k, outputs, size]`` and ``A_i^T [k, size, inputs]`` of each layer from last to first.

        A layer's weights are not needed any more when its turn has come: they may be changed then.
        """
        buffers = self._buffers_for(*rows.shape)
        self._forward(buffers, weights, biases, rows)
        self._loss_slope(buffers, scale)
        for i in range(len(self.layers) - 1, -1, -1):
            slope, output = buffers.slopes[i], buffers.activations[i + 1]
            if self.layers[i].activation == "relu":
                torch.ops.aten.threshold_backward.grad_input(slope, output, 0, grad_input=slope)
            elif self.layers[i].activation == "tanh":
                torch.ops.aten.tanh_backward.grad_input(slope, output, grad_input=slope)
            if i:
                torch.bmm(weights[i].transpose(1, 2), slope, out=buffers.slopes[i - 1])
            yield i, slope, buffers.activations[i].transpose(1, 2)

    def _forward(self, buffers: _Buffers, weights: list[Tensor], biases: list[Tensor | None], rows: Tensor) -> None:
        flat = rows.reshape(-1)
        torch.index_select(self.inputs, 0, flat, out=buffers.inputs)
        torch.index_select(self.targets, 0, flat, out=buffers.targets)
        for i, layer in enumerate(self.layers):
            after, bias = buffers.activations[i + 1], biases[i]
            torch.bmm(weights[i], buffers.activations[i], out=after)
            if bias is not None:
                after.add_(bias)  # in one product with it takes longer
            if layer.activation == "relu":
                after.relu_()
            elif layer.activation == "tanh":
                after.tanh_()

    def _loss_slope(self, buffers: _Buffers, scale: Tensor) -> None:
        outputs, slope = buffers.activations[-1], buffers.slopes[-1]
        if self.loss == "cross_entropy":
            torch.softmax(outputs, 1, out=slope)
            slope.scatter_add_(1, buffers.targets.view(len(outputs), 1, -1), buffers.minus)
        elif self.loss == "binary":
            # The sigmoid, but torch's own gives other bits where a vector of the processor is not full.
            torch.tanh(outputs * 0.5, out=slope)
            slope.mul_(0.5).add_(0.5).sub_(buffers.targets.view(outputs.shape))
        else:
            torch.sub(outputs, buffers.targets.view(outputs.shape), out=slope)
        slope.mul_(scale.transpose(1, 2))

    def _views(self, stack: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Each layer's ``W [k, outputs, inputs]`` and ``b [k, outputs, 1]`` in a stack of vectors ``[k, d]``."""
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for layer in self.layers:
            shape = layer.outputs, layer.inputs
            weights.append(stack.narrow(1, layer.weight, layer.outputs * layer.inputs).view(len(stack), *shape))
            bias = layer.bias
            biases.append(None if bias is None else stack.narrow(1, bias, layer.outputs).unsqueeze(2))
        return weights, biases

    def _buffers_for(self, k: int, size: int) -> _Buffers:
        found = self._buffers.get((k, size))
        if found is None:
            found = self._buffers[k, size] = self._carved(k, size)
        return found

    def _carved(self, k: int, size: int) -> _Buffers:
        """Views of one arena that grows with the largest batch: only one batch is at work at a time."""
        widths = self._widths
        wanted = [k * size * width for width in (*widths, *widths[1:])]
        room = [-(-each // ALIGNED) * ALIGNED for each in wanted]
        if sum(room) > len(self._arena):
            self._arena = self._arena.new_empty(sum(room))
            self._buffers.clear()
        parts = [part[:each] for part, each in zip(torch.split(self._arena[: sum(room)], room), wanted, strict=True)]
        inputs, *others = parts
        shaped = [part.view(k, width, size) for part, width in zip(others, (*widths[1:], *widths[1:]), strict=True)]
        activations, slopes = shaped[: len(widths) - 1], shaped[len(widths) - 1 :]
        first = inputs.view(k, size, widths[0]).transpose(1, 2)
        targets, minus = self.targets.new_empty(k * size), self._arena.new_full((k, 1, size), -1.0)
        return _Buffers([first, *activations], slopes, inputs.view(k * size, widths[0]), targets, minus)

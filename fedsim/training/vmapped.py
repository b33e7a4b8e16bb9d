"""Gradients of any torch module for a whole stack of clients at once, by ``torch.func``: what keeps a GPU busy."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedsim.problems.base import Problem
from fedsim.problems.modules import computing_in
from fedsim.problems.network import Network
from fedsim.training.batches import Batch, Rows
from fedsim.training.stacked import StackedTrainer, StackForm

MOST = 128
"""Most clients in a stack."""

NUMBERS = 2**28
"""Parameters in a stack at most, unless one client has more: a gigabyte, of which training takes several."""


class Vmapped:
    """The gradient and the plain step of a torch module on stacks of parameter vectors.

    Args:
        network: the problem.
        device: where its examples are kept and stacks must be.
    """

    l2 = 0.0

    def __init__(self, network: Network, device: torch.device | str) -> None:
        self.layout, self.precision = network.layout, network.precision
        self.inputs, self.targets = network.inputs.to(device), network.targets.to(device)
        self.module = copy.deepcopy(network.module).to(device)
        self._slopes = vmap(grad(self._loss))

    def takes(self) -> bool:
        """Whether the module can be trained as a stack: not if it looks at values (``item``), for example."""
        rows = torch.zeros(2, 2, dtype=torch.int64, device=self.inputs.device)
        x = torch.zeros(2, self.layout.size, dtype=self.layout.dtype, device=self.inputs.device)
        try:
            self.gradient(x, Batch(rows, x.new_ones(2, 2, 1)), torch.empty_like(x))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # modules are the user's, and may raise anything
            return False
        return True

    def lanes(self, size: int) -> int:
        """Most clients in a stack."""
        return max(1, min(MOST, NUMBERS // self.layout.size))

    def least_lanes(self, size: int) -> int:
        """1: how clients are grouped may show in the bits, and is part of what a run on a GPU is."""
        return 1

    def gradient(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        """Write the gradients at ``x[:k]`` of the mean losses over a batch of ``k`` clients into ``out[:k]``."""
        out[: len(batch.rows)].copy_(self._of(x, batch))

    def descend(self, x: Tensor, batch: Batch, lr: Tensor) -> None:
        """``x[:k] <- x[:k] - lr[:k] * gradient`` in place; ``lr [n, 1]``."""
        k = len(batch.rows)
        x[:k].addcmul_(lr[:k], self._of(x, batch), value=-1.0)

    def _of(self, x: Tensor, batch: Batch) -> Tensor:
        """The gradients ``[k, d]``."""
        k, size = batch.rows.shape
        flat = batch.rows.reshape(-1)
        images = self.inputs.index_select(0, flat).view(k, size, *self.inputs.shape[1:])
        labels = self.targets.index_select(0, flat).view(k, size)
        gradients: Tensor = self._slopes(x[:k], images, labels, batch.scale[:, :, 0])
        return gradients

    def _loss(self, x: Tensor, images: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """One client's loss at ``x [d]``, its examples weighted by ``scale [size]``."""
        with computing_in(self.precision, images.device):
            logits = functional_call(self.module, self.layout.split(x), (images,))
        return (cross_entropy(logits.to(x.dtype), labels, reduction="none") * scale).sum()


class VmapTrainer(StackedTrainer):
    """Runs the rules of whole groups on stacks, for problems that are any :class:`Network`."""

    def _form_of(self, problem: Problem) -> tuple[Rows | None, StackForm | None]:
        network = problem.network()
        assert network is not None
        return network.rows, Vmapped(network, self.device)

    def takes(self) -> bool:
        """Whether the problem's module can be trained as a stack."""
        assert isinstance(self.form, Vmapped)
        return self.form.takes()

    def _is_invariant(self) -> bool:
        return False

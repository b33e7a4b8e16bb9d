"""Torch modules whose parameters lie in a flat vector: gradients and plain steps by autograd."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.checks import ConfigError
from fedsim.vectors import ALIGNED, Layout

PRECISIONS = ("float32", "bfloat16")
"""What a forward pass in training may compute in; parameters and their gradients stay as they are."""


_SEEDING = RLock()
"""Torch's generators belong to the process: who seeds them has them alone, in whatever thread another run goes on."""


@contextmanager
def torch_seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's generators, of the CPU and of a GPU if that is the ``device``, seeded within the block only."""
    devices = [] if device is None or device.type == "cpu" else [device]
    with _SEEDING, torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: that would seed every GPU as well, and leave it so.
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


def as_new(x: Tensor) -> Tensor:
    """``x [d]`` itself if it lies in memory as a new vector would, else a copy that does."""
    return x if x.is_contiguous() and x.data_ptr() % ALIGNED == 0 else x.clone(memory_format=torch.contiguous_format)


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A block in which forward passes are made in one of ``PRECISIONS``."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def check_compiler() -> None:
    """See that torch has what it compiles with on a CPU.

    Raises:
        ConfigError: if there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if not any(shutil.which(each) for each in (compiler, "g++", "clang++")):
        raise ConfigError(f"compile=true: needs a C++ compiler, and there is no {compiler} here; use false")


class FlatModule:
    """A module whose trainable parameters are views of a flat vector ``[d]``: of its own ``values``, or of one bound.

    A copied or unpickled one has views of its own.

    Args:
        module: from examples to logits.
        precision: of the forward pass in training, ``float32`` (as the parameters are) or ``bfloat16`` (autocast).
        compile: whether ``torch.compile`` makes the forward pass in training and its gradient.

    Raises:
        ConfigError: if the module has nothing to train, or parameters of several dtypes.
    """

    def __init__(self, module: nn.Module, precision: str = "float32", compile: bool = False) -> None:
        self.module = module.train()
        self.precision, self.compile = precision, compile
        trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        if not trained:
            raise ConfigError(f"model: {type(module).__name__} has no trainable parameters")
        try:
            self.layout = Layout.of(trained)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        self.values = self.layout.join(trained)
        self.parameters = list(trained.values())
        self._bound = torch.empty(0)
        self._views: list[Tensor] = []
        self.bind(self.values)
        self._forward: Any = torch.compile(module, dynamic=True) if compile else module
        self._traced = not compile

    def bind(self, x: Tensor) -> None:
        """Make the parameters views of ``x [d]``, on any device; nothing is copied."""
        if not self._views or x.data_ptr() != self._bound.data_ptr():
            self._bound, self._views = x, list(self.layout.split(x).values())
            for parameter, value in zip(self.parameters, self._views, strict=True):
                parameter.data = value

    def slope(self, images: Tensor, labels: Tensor, noise: int | None = None) -> Tensor:
        """A new gradient ``[d]`` of the mean cross-entropy at what is bound; parameters not used get zeros.

        Args:
            images: examples ``[n, ...]``.
            labels: their classes ``[n]``.
            noise: the seed of what the module draws; None if it draws nothing.
        """
        return torch.cat([part.reshape(-1) for part in self._slopes(images, labels, noise)])

    def gradient(self, x: Tensor, images: Tensor, labels: Tensor, noise: int | None) -> Tensor:
        """As :meth:`slope`, at ``x [d]``, which is bound from now on."""
        self.bind(x)
        return self.slope(images, labels, noise)

    def descend(self, x: Tensor, images: Tensor, labels: Tensor, lr: float, noise: int | None) -> None:
        """``x <- x - lr * gradient`` in place."""
        self.bind(x)
        for view, part in zip(self._views, self._slopes(images, labels, noise), strict=True):
            view.sub_(part, alpha=lr)

    def _trace(self, images: Tensor, labels: Tensor, noise: int | None) -> None:
        """Compile for batches of any size, from one that equals no other size there is.

        Else the sizes met before would decide which code a batch is run by, and show in the bits.
        """
        self._traced = True
        sizes = {*images.shape[1:], *(size for each in self.parameters for size in each.shape)}
        rows = torch.zeros(next(n for n in count(2) if n not in sizes), dtype=torch.int64, device=images.device)
        self._slopes(images[rows], labels[rows], noise)

    def _slopes(self, images: Tensor, labels: Tensor, noise: int | None) -> tuple[Tensor, ...]:
        if not self._traced:
            self._trace(images, labels, noise)
        device = images.device
        drawing: AbstractContextManager[None] = nullcontext() if noise is None else torch_seeded(noise, device)
        with drawing, torch.enable_grad():
            with computing_in(self.precision, device):
                logits = self._forward(images)
            loss = cross_entropy(logits.to(self.layout.dtype), labels)
            return torch.autograd.grad(loss, self.parameters, materialize_grads=True)

    def __getstate__(self) -> tuple[nn.Module, str, bool]:
        return copy.deepcopy(self.module), self.precision, self.compile  # torch gives each copied parameter memory

    def __setstate__(self, state: tuple[nn.Module, str, bool]) -> None:
        FlatModule.__init__(self, *state)

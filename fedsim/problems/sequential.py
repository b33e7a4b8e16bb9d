"""Gradients of sequences of common layers without autograd: convolutions, max-pooling, dropout and linear layers.

Each layer's derivative is written down, which saves three things that autograd cannot: a plain step subtracts a linear
layer's ``D^T A`` from its weights as it is made, so that no gradient is written; images and convolutions are held
channels-last, in which torch's CPU convolutions and poolings are fastest; and the first layer's input has no slope.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fedsim.problems.chain import is_altered, parts_of
from fedsim.vectors import Layout

Kind = TypeVar("Kind", bound=nn.Module)

Views = dict[str, Tensor]
"""The parameters, or their gradients, as views of one flat vector."""


class Into:
    """Where parameters' gradients go: ``vector <- keep * vector + factor * gradient``.

    Args:
        views: of the vector.
        keep: 1, or 0 for a vector that holds nothing yet.
        factor: of the gradient.
    """

    def __init__(self, views: Views, keep: float, factor: float) -> None:
        self.views, self.keep, self.factor = views, keep, factor

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """The gradient of ``name`` is ``left @ right``."""
        self.views[name].addmm_(left, right, beta=self.keep, alpha=self.factor)

    def add(self, name: str, gradient: Tensor) -> None:
        """The gradient of ``name``, in its shape."""
        if self.keep:
            self.views[name].add_(gradient, alpha=self.factor)
        else:
            torch.mul(gradient, self.factor, out=self.views[name])


class Stage(ABC):
    """One layer. It holds nothing of a batch: what a backward pass needs goes from hand to hand."""

    @abstractmethod
    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        """The layer's output, and what its backward pass needs."""

    @abstractmethod
    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        """The loss's slope by the input, from its slope by the output, which may be overwritten.

        Args:
            views: the parameters as in the forward pass; a layer's own may change once their gradient goes ``into``.
            kept: what :meth:`forward` gave.
            slope: of the loss by the output.
            into: where the parameters' gradients go.
            wanted: whether the slope by the input is used; anything may be returned if not.
        """


class Linear(Stage):
    """``x W^T + b``.

    Args:
        weight, bias: the names of ``W [outputs, inputs]`` and ``b [outputs]``, None if there is no ``b``.
    """

    def __init__(self, weight: str, bias: str | None) -> None:
        self.weight, self.bias = weight, bias

    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        """The layer's output ``[n, outputs]``, and its input."""
        # This way round the product takes half the time for small batches.
        if self.bias is None:
            return torch.mm(views[self.weight], x.t()).t(), x
        return torch.addmm(views[self.bias].unsqueeze(1), views[self.weight], x.t()).t(), x

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        """The slope ``[n, inputs]`` by the input; the gradients go ``into``."""
        below = slope @ views[self.weight] if wanted else slope
        into.product(self.weight, slope.t(), kept)
        if self.bias is not None:
            into.add(self.bias, slope.sum(0))
        return below


class _Conv2d(Stage):
    def __init__(self, weight: str, bias: str | None, module: nn.Conv2d) -> None:
        self.weight, self.bias, self.groups = weight, bias, module.groups
        self.how = _numbers(module.stride), _numbers(module.padding), _numbers(module.dilation)

    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        kernel = channels_last(views[self.weight])
        bias = None if self.bias is None else views[self.bias]
        return torch.conv2d(x, kernel, bias, *self.how, self.groups), (x, kernel)

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        x, kernel = kept
        biases = None if self.bias is None else [len(kernel)]
        below, weight, bias = torch.ops.aten.convolution_backward(
            slope, x, kernel, biases, *self.how, False, [0, 0], self.groups, [wanted, True, self.bias is not None]
        )
        into.add(self.weight, weight)
        if self.bias is not None:
            into.add(self.bias, bias)
        return below if wanted else slope


class _MaxPool2d(Stage):
    def __init__(self, module: nn.MaxPool2d) -> None:
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        self.how = (*(_numbers(each) for each in sizes), bool(module.ceil_mode))

    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        output, places = torch.ops.aten.max_pool2d_with_indices(x, *self.how)
        return output, (x, places)

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        x, places = kept
        slope = channels_last(slope)
        below: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(slope, x, *self.how, places)
        return below


class _Relu(Stage):
    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        output = x.relu_() if self.in_place else x.relu()
        return output, output

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        below: Tensor = torch.ops.aten.threshold_backward.grad_input(slope, kept, 0, grad_input=slope)
        return below


class _Tanh(Stage):
    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        output = x.tanh()
        return output, output

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        below: Tensor = torch.ops.aten.tanh_backward.grad_input(slope, kept, grad_input=slope)
        return below


class _Flatten(Stage):
    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        return x.flatten(1), x.shape

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        return slope.reshape(kept)


class _Dropout(Stage):
    def __init__(self, share: float) -> None:
        self.kept = 1.0 - share

    def forward(self, views: Views, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        if not self.kept:  # torch's own draws nothing then
            return torch.zeros_like(x), torch.zeros_like(x)
        # As torch's own dropout draws on a CPU, so that the same seed gives the same noise.
        noise = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(self.kept, generator=generator)
        noise.div_(self.kept)
        return x * noise, noise

    def backward(self, views: Views, kept: Any, slope: Tensor, into: Into, wanted: bool) -> Tensor:
        return slope.mul_(kept)


class Sequential:
    """Gradients and plain steps of a sequence of stages, with a mean cross-entropy at its end.

    Args:
        stages: from examples to logits.
        layout: of the parameters in a flat vector.
    """

    def __init__(self, stages: list[Stage], layout: Layout) -> None:
        self.stages, self.layout = stages, layout
        self._generators: dict[torch.device, torch.Generator] = {}

    def gradient(self, x: Tensor, images: Tensor, labels: Tensor, noise: int | None) -> Tensor:
        """A new gradient ``[d]`` at ``x [d]`` of the mean cross-entropy of ``images [n, ...]`` with ``labels [n]``.

        Args:
            noise: the seed of what the layers draw; None if they draw nothing.
        """
        new = torch.empty_like(x)
        self._run(self.layout.split(x), images, labels, noise, Into(self.layout.split(new), 0.0, 1.0))
        return new

    def descend(self, x: Tensor, images: Tensor, labels: Tensor, lr: float, noise: int | None) -> None:
        """``x <- x - lr * gradient`` in place."""
        views = self.layout.split(x)
        self._run(views, images, labels, noise, Into(views, 1.0, -lr))

    def has_linear(self) -> bool:
        """Whether there are linear layers."""
        return any(isinstance(each, Linear) for each in self.stages)

    def with_linear(self, made: Callable[[str, str | None], Stage]) -> Sequential:
        """The same, with stages for linear layers that ``made`` makes from the names of weight and bias."""
        stages = (made(each.weight, each.bias) if isinstance(each, Linear) else each for each in self.stages)
        return Sequential(list(stages), self.layout)

    def _run(self, views: Views, images: Tensor, labels: Tensor, noise: int | None, into: Into) -> None:
        generator = None if noise is None else self._generator(images.device).manual_seed(noise)
        with torch.no_grad():
            output = channels_last(images) if images.ndim == 4 else images
            kept: list[Any] = []
            for stage in self.stages:
                output, each = stage.forward(views, output, generator)
                kept.append(each)
            slope = torch.softmax(output, 1)
            slope.scatter_add_(1, labels.unsqueeze(1), slope.new_full((len(labels), 1), -1.0))
            slope.div_(len(labels))
            for i in range(len(self.stages) - 1, -1, -1):
                slope = self.stages[i].backward(views, kept.pop(), slope, into, wanted=i > 0)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_generators": {}}  # generators cannot be pickled, and hold nothing between two gradients


def channels_last(x: Tensor) -> Tensor:
    """Images or kernels ``[n, channels, h, w]`` with the channels next to each other in memory."""
    channels, height, width = x.shape[1:]
    if channels == 1:  # torch takes one channel for either order, and would go on in the slower one
        return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _numbers(setting: Any) -> list[int]:
    return [setting, setting] if isinstance(setting, int) else list(setting)


def sequential_of(module: nn.Module, layout: Layout, shape: tuple[int, ...]) -> Sequential | None:
    """The stages of a module that is a sequence of ``Conv2d``, ``MaxPool2d``, ``Linear``, ``ReLU``, ``Tanh``,
    ``Dropout`` and ``Flatten``; None if it is anything else.

    Args:
        module: from examples to logits, in training.
        layout: of its parameters in a flat vector; all of them must be there, each once.
        shape: of one example.
    """
    names, dimensions = set(layout.names), len(shape)
    stages: list[Stage] = []
    for name, part in parts_of(module):
        if is_altered(part) or not part.training:
            return None
        own = {f"{name}.{each}" if name else each for each, _ in part.named_parameters(recurse=False)}
        if not own <= names:  # frozen, or another part's as well
            return None
        names -= own
        if type(part) is nn.Identity or (_is(part, nn.Dropout) and part.p == 0):
            continue
        stage = _stage(f"{name}." if name else "", part, dimensions, stages[-1] if stages else None)
        if stage is None:
            return None
        stages.append(stage)
        dimensions = 1 if isinstance(stage, _Flatten) else dimensions
    return Sequential(stages, layout) if not names and dimensions == 1 else None


def _stage(prefix: str, part: nn.Module, dimensions: int, before: Stage | None) -> Stage | None:
    """The stage of one layer on examples of so many dimensions; None for what has none."""
    if _is(part, nn.Linear) and dimensions == 1:
        return Linear(f"{prefix}weight", None if part.bias is None else f"{prefix}bias")
    if _is(part, nn.Conv2d) and dimensions == 3 and part.padding_mode == "zeros" and not isinstance(part.padding, str):
        return _Conv2d(f"{prefix}weight", None if part.bias is None else f"{prefix}bias", part)
    if _is(part, nn.MaxPool2d) and dimensions == 3 and not part.return_indices:
        return _MaxPool2d(part)
    if _is(part, nn.Flatten) and (part.start_dim, part.end_dim) == (1, -1):
        return _Flatten()
    if _is(part, nn.Dropout):
        return _Dropout(part.p)
    if _is(part, nn.ReLU):
        # In place where nothing else needs what the layer before it made.
        return _Relu(in_place=isinstance(before, (Linear, _Conv2d)))
    return _Tanh() if _is(part, nn.Tanh) else None


def _is(part: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module is just this: what subclasses do is their own affair."""
    return type(part) is kind

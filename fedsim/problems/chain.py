"""Problems that are chains of linear layers: their gradients need no autograd, only products of matrices.

The structure is read from the module or told by the problem; :mod:`fedsim.training.closed_form` or
:mod:`fedsim.training.native` does the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.vectors import Layout

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}
"""What may stand between two layers."""


@dataclass(frozen=True)
class Layer:
    """A linear layer within a flat parameter vector: ``h W^T + b``, then the activation."""

    inputs: int
    outputs: int
    weight: int
    """Where ``W [outputs, inputs]`` begins in the vector."""
    bias: int | None
    """Where ``b [outputs]`` begins; None if there is none."""
    activation: str | None = None
    """``relu``, ``tanh`` or nothing."""


@dataclass(frozen=True)
class Chain:
    """A problem ``f_i(x) = mean over examples of loss(chain(example), target) + l2 / 2 ||x||^2``."""

    layers: tuple[Layer, ...]
    loss: str
    """``cross_entropy`` (targets are classes), ``binary`` (one output, its cross-entropy after a sigmoid; targets 0 or
    1) or ``squared`` (half the squared distance)."""
    inputs: Tensor
    """All examples ``[n, layers[0].inputs]``, of the parameters' dtype."""
    targets: Tensor
    """``[n]``."""
    rows: Callable[[NDArray[np.int64]], Tensor]
    """``[examples]``: where in ``inputs`` the examples that clients ``[k]`` train on lie, client by client."""
    l2: float = 0.0


def layers_of(module: nn.Module, layout: Layout, shape: tuple[int, ...]) -> tuple[Layer, ...] | None:
    """The layers of a module that is a chain of ``Linear``, ``ReLU`` and ``Tanh``; None if it is anything else.

    Args:
        module: from examples to outputs.
        layout: of its parameters in a flat vector; all of them must be there, each once.
        shape: of one example; a module that takes images must flatten them first.
    """
    places = _offsets(layout)
    layers: list[Layer] = []
    parts = list(parts_of(module))
    if len(shape) != 1 and not isinstance(parts[0][1], nn.Flatten):
        return None
    for name, part in parts:
        if is_altered(part):
            return None
        kind = type(part)
        if kind is nn.Linear:
            layer = _linear(name, part, places)
            if layer is None:
                return None
            layers.append(layer)
        elif kind in ACTIVATIONS and layers and layers[-1].activation is None:
            layers[-1] = Layer(**{**vars(layers[-1]), "activation": ACTIVATIONS[kind]})
        elif not _passes_over(part):
            return None
    return tuple(layers) if layers and not places else None


def _offsets(layout: Layout) -> dict[str, int]:
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in layout.shapes]
    return dict(zip(layout.names, np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int).tolist(), strict=True))


def parts_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that are run one after another, with their names; a module of another kind is one part."""
    if type(module) is not nn.Sequential or is_altered(module):
        yield prefix, module
        return
    for name, child in module._modules.items():  # named_children() would pass over a module's second place
        assert child is not None
        yield from parts_of(child, f"{prefix}.{name}" if prefix else name)


def is_altered(module: nn.Module) -> bool:
    """Whether hooks or parametrisations make a module do something else than its class says."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, each, None) for each in hooks) or hasattr(module, "parametrizations"):
        return True
    own = list(module.parameters(recurse=False))
    slopes = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return "forward" in vars(module) or any(getattr(each, name, None) for each in own for name in slopes)


def _passes_over(part: nn.Module) -> bool:
    """Whether a module leaves vectors as they are."""
    if isinstance(part, nn.Flatten):
        return type(part) is nn.Flatten and part.start_dim == 1 and part.end_dim == -1
    return type(part) is nn.Identity


def _linear(name: str, part: nn.Module, places: dict[str, int]) -> Layer | None:
    """The layer, its parameters taken out of ``places``; None if they are not there (frozen, or another's)."""
    assert isinstance(part, nn.Linear)
    weight = places.pop(f"{name}.weight" if name else "weight", None)
    if weight is None:
        return None
    bias = None
    if part.bias is not None:
        bias = places.pop(f"{name}.bias" if name else "bias", None)
        if bias is None:
            return None
    return Layer(part.in_features, part.out_features, weight, bias)

"""Builders of torch modules. Their weights are torch's own initialisation, drawn under the caller's seed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol, runtime_checkable

from torch import nn

from fedsim.checks import ConfigError, whole


@runtime_checkable
class Model(Protocol):
    """Anything that can build a module for examples of one shape."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from examples ``[n, *shape]`` to logits ``[n, classes]``."""
        ...


class Logistic:
    """Multinomial logistic regression: one linear layer."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from examples ``[n, *shape]`` to logits ``[n, classes]``."""
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes))


class Mlp:
    """Fully connected layers with ReLU between them.

    Args:
        hidden: units of the hidden layer, or of each hidden layer in turn.
    """

    def __init__(self, hidden: list[int] | int = 200) -> None:
        widths = list(hidden) if isinstance(hidden, Sequence) and not isinstance(hidden, str) else [hidden]
        if not widths:
            raise ConfigError("hidden=[]: give at least one layer's units, or use model=logistic")
        self.hidden = [whole("hidden", width, least=1) for width in widths]

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from examples ``[n, *shape]`` to logits ``[n, classes]``."""
        layers: list[nn.Module] = [nn.Flatten()]
        width = prod(shape)
        for units in self.hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        return nn.Sequential(*layers, nn.Linear(width, classes))


class Cnn:
    """Two 5x5 convolutions of 32 and 64 channels, each halved by max-pooling, and a layer of 512.

    1,663,370 parameters for 28x28 images of one channel and 10 classes. Source: McMahan et al. 2017
    (arXiv:1602.05629), section 3.
    """

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from images ``[n, channels, height, width]`` to logits ``[n, classes]``.

        Raises:
            ConfigError: if ``shape`` is no image, or one of fewer than 4x4 pixels.
        """
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise ConfigError(f"model=cnn: needs images [channels, height, width] of 4x4 or more, got {list(shape)}")
        channels, height, width = shape
        return nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 512),
            nn.ReLU(),
            nn.Linear(512, classes),
        )

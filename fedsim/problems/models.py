"""Builders of torch modules. Their weights are torch's own initialisation, drawn under the caller's seed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from fedsim.checks import ConfigError, whole
from fedsim.data.sources import Dataset


@runtime_checkable
class Model(Protocol):
    """Anything that can build a module for examples of one shape."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from examples ``[n, *shape]`` to logits ``[n, classes]``."""
        ...


@runtime_checkable
class CheckedModel(Model, Protocol):
    """A model that not all data of a fitting shape suit: it may look at them before it is built."""

    def check(self, data: Dataset) -> None:
        """Refuse data that the module cannot take.

        Raises:
            ConfigError: naming what is wrong with them.
        """
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
        channels, height, width = _image("cnn", shape, least=4)
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


class LeNet:
    """LeNet-5 with ReLU and max-pooling: 5x5 convolutions of 6 and 16 channels, then layers of 120 and 84.

    44,426 parameters for 28x28 images of one channel and 10 classes, 62,006 for 32x32 of three. Source: LeCun et al.
    1998, in the form of NIID-Bench (Li et al. 2022, arXiv:2102.02079), without padding.
    """

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from images ``[n, channels, height, width]`` to logits ``[n, classes]``.

        Raises:
            ConfigError: if ``shape`` is no image, or one of fewer than 16x16 pixels.
        """
        channels, height, width = _image("lenet", shape, least=16)
        left = 16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(left, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )


class ResNet18Gn:
    """ResNet-18 for small images, every BatchNorm replaced by GroupNorm: nothing but parameters is learnt.

    A 3x3 convolution of stride 1 without pooling, then two residual blocks each of 64, 128, 256 and 512 channels.
    11,173,962 parameters for three channels and 10 classes. Source: He et al. 2016 (arXiv:1512.03385), with the stem
    of their section 4.2; GroupNorm: Wu and He 2018 (arXiv:1803.08494), in federated learning Hsieh et al. 2020
    (arXiv:1910.00189).

    Args:
        groups: of channels, normalised together, in every GroupNorm: 1, 2, 4, 8, 16, 32 or 64.
    """

    def __init__(self, groups: int = 2) -> None:
        self.groups = whole("groups", groups, least=1, most=64)
        if 64 % self.groups:
            raise ConfigError(
                f"groups={groups}: must divide the 64 channels of the first layer: 1, 2, 4, 8, 16, 32, 64"
            )

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from images ``[n, channels, height, width]`` to logits ``[n, classes]``.

        Raises:
            ConfigError: if ``shape`` is no image, or one of fewer than 8x8 pixels.
        """
        channels, _, _ = _image("resnet18_gn", shape, least=8)
        layers: list[nn.Module] = [*_normalised(channels, 64, 3, 1, self.groups), nn.ReLU()]
        before = 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [_Residual(before, width, stride, self.groups), _Residual(width, width, 1, self.groups)]
            before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        first = _normalised(channels, width, 3, stride, groups)
        self.body = nn.Sequential(*first, nn.ReLU(), *_normalised(width, width, 3, 1, groups))
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Sequential(*_normalised(channels, width, 1, stride, groups))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, h, w]`` to ``[n, width, h / stride, w / stride]``."""
        return relu(self.body(x) + self.shortcut(x))


def _normalised(channels: int, width: int, size: int, stride: int, groups: int) -> list[nn.Module]:
    """A convolution that keeps height and width but for its stride, and its normalisation, which has the bias."""
    convolution = nn.Conv2d(channels, width, size, stride=stride, padding=size // 2, bias=False)
    return [convolution, nn.GroupNorm(groups, width)]


def _image(name: str, shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    """``shape`` if it is an image of ``least`` by ``least`` pixels or more."""
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ConfigError(
            f"model={name}: needs images [channels, height, width] of {least}x{least} or more, got {list(shape)}"
        )
    channels, height, width = shape
    return channels, height, width


class CharLstm:
    """Next character: an embedding, layers of LSTM, and a linear layer from the last step.

    With ``c`` kinds of characters, ``e`` embedding, ``h`` hidden units and one layer: ``c e + 4 h (e + h + 2) +
    c (h + 1)`` parameters; each further layer has ``4 h (2 h + 2)``. 817,535 at 71 kinds. Source: McMahan et al. 2017
    (arXiv:1602.05629), section 3; torch gives each gate two biases where others have one.

    Args:
        embedding: numbers that stand for a character.
        hidden: units of each LSTM layer.
        layers: LSTM layers on top of each other.
    """

    def __init__(self, embedding: int = 8, hidden: int = 256, layers: int = 2) -> None:
        self.embedding = whole("embedding", embedding, least=1)
        self.hidden = whole("hidden", hidden, least=1)
        self.layers = whole("layers", layers, least=1)

    def check(self, data: Dataset) -> None:
        """Refuse examples that are no codes ``0 .. classes - 1``: others have no embedding.

        Raises:
            ConfigError: naming the first of them.
        """
        _check_window(data.shape)
        for part, x in (("train_x", data.train_x), ("test_x", data.test_x)):
            wrong = (x < 0) | (x >= data.classes) | (x != torch.floor(x))
            if wrong.any():
                raise ConfigError(
                    f"model=charlstm: {part} of {data.name} holds {float(x[wrong][0]):g}; allowed are character codes, "
                    f"whole numbers from 0 to {data.classes - 1}"
                )

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new module from windows ``[n, length]`` of codes ``0 .. classes - 1`` to logits ``[n, classes]``.

        Raises:
            ConfigError: if ``shape`` is not that of a window.
        """
        _check_window(shape)
        return _CharLstm(classes, self.embedding, self.hidden, self.layers)


def _check_window(shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise ConfigError(f"model=charlstm: needs windows [length] of character codes, got {list(shape)}")


class _CharLstm(nn.Module):
    """What :class:`CharLstm` builds."""

    def __init__(self, classes: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.last = nn.Linear(hidden, classes)

    def forward(self, windows: Tensor) -> Tensor:
        steps, _ = self.lstm(self.embedding(windows.long()))  # examples are float32, which codes fit exactly
        logits: Tensor = self.last(steps[:, -1])
        return logits

"""The image models: sizes that are known, forward passes computed a second time, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.nn.functional import conv2d

import fedsim
from fedsim.checks import ConfigError
from fedsim.data import Dataset, Iid
from fedsim.problems.models import Cnn, LeNet, ResNet18Gn
from fedsim.strategies.fedavg import FedAvg


def count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "known"),
    [
        (LeNet(), (1, 28, 28), 44_426),
        (LeNet(), (1, 32, 32), 61_706),
        (LeNet(), (3, 32, 32), 62_006),
        (ResNet18Gn(), (3, 32, 32), 11_173_962),
        (ResNet18Gn(groups=32), (3, 32, 32), 11_173_962),
        (Cnn(), (1, 28, 28), 1_663_370),
    ],
)
def test_models_have_as_many_parameters_as_published(model, shape, known):
    assert count(model.build(shape, 10)) == known


def numpy_lenet(weights: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """LeNet-5 in numpy, in double precision."""
    for kernel, bias in (weights[0:2], weights[2:4]):
        windows = sliding_window_view(x, (5, 5), axis=(2, 3))
        x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, kernel) + bias[:, None, None], 0)
        n, c, h, w = x.shape
        x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
    x = x.reshape(len(x), -1)
    for at in (4, 6, 8):
        x = x @ weights[at].T + weights[at + 1]
        x = x if at == 8 else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 16, 19)])
def test_lenet_agrees_with_numpy(shape):
    torch.manual_seed(3)
    module = LeNet().build(shape, 7)
    x = torch.randn(4, *shape)
    expected = numpy_lenet([each.detach().double().numpy() for each in module.parameters()], x.double().numpy())
    np.testing.assert_allclose(module(x).detach(), expected, atol=1e-5)


class Functional:
    """ResNet-18 written out over a list of weights, in double precision, with a GroupNorm of its own."""

    def __init__(self, weights: list[torch.Tensor], groups: int) -> None:
        self.left, self.groups = list(weights), groups

    def convolved(self, x: torch.Tensor, stride: int) -> torch.Tensor:
        kernel, scale, shift = self.left.pop(0), self.left.pop(0), self.left.pop(0)
        x = conv2d(x, kernel, stride=stride, padding=(kernel.shape[-1] - 1) // 2)
        grouped = x.reshape(len(x), self.groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        x = (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        return x * scale[:, None, None] + shift[:, None, None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolved(x, 1).clamp(min=0)
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and not block else 1
                inner = self.convolved(self.convolved(x, stride).clamp(min=0), 1)
                x = (inner + (self.convolved(x, stride) if stride == 2 else x)).clamp(min=0)
        x = x.mean(dim=(2, 3)) @ self.left.pop(0).T + self.left.pop(0)
        assert not self.left
        return x


@pytest.mark.parametrize("groups", [2, 64])
def test_resnet_agrees_with_a_second_computation(groups):
    torch.manual_seed(4)
    module = ResNet18Gn(groups).build((3, 12, 16), 5)
    with torch.no_grad():
        for each in module.parameters():  # ones and zeros would hide a scale or shift in the wrong place
            if each.ndim == 1:
                each.add_(0.3 * torch.randn_like(each))
    module = module.double()
    x = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = Functional([each.detach() for each in module.parameters()], groups)(x)
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


def test_resnet_halves_the_image_three_times():
    sizes = []
    module = ResNet18Gn().build((1, 28, 28), 10)
    for layer in module:
        layer.register_forward_hook(lambda _, __, made: sizes.append(tuple(made.shape[1:])))
    module(torch.zeros(1, 1, 28, 28))
    assert sizes[0] == (64, 28, 28)  # neither stride nor pooling at the stem
    stages = [(64, 28, 28), (128, 14, 14), (256, 7, 7), (512, 4, 4)]
    assert [size for size in dict.fromkeys(sizes) if len(size) == 3] == [*stages, (512, 1, 1)]
    assert sizes[-1] == (10,)


@pytest.mark.parametrize("model", [LeNet(), ResNet18Gn()])
def test_gradients_reach_every_parameter_and_there_are_no_buffers(model):
    torch.manual_seed(5)
    module = model.build((3, 24, 24), 4)
    nn.functional.cross_entropy(module(torch.randn(6, 3, 24, 24)), torch.arange(6) % 4).backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in module.parameters())
    assert list(module.buffers()) == []


def test_a_resnet_answers_for_an_image_whatever_else_is_in_the_batch():
    torch.manual_seed(6)
    module = ResNet18Gn().build((1, 8, 8), 3).double()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[:2], module(x[:2]), rtol=1e-9, atol=1e-9)


def test_lenet_learns_through_a_whole_run():
    """Bright squares on the left or on the right."""
    generator = torch.Generator().manual_seed(7)
    x, y = 0.5 * torch.randn(120, 1, 16, 16, generator=generator), torch.arange(120) % 2
    x[y == 0, :, 4:12, :8] += 1
    x[y == 1, :, 4:12, 8:] += 1
    problem = fedsim.Classification(Dataset(x[:80], y[:80], x[80:], y[80:], 2), LeNet(), Iid(), validation=0.0)
    strategy = FedAvg(fedsim.LocalSGD(lr=0.1, batch_size=8, epochs=2))
    run = fedsim.simulate(strategy, problem, stop=fedsim.Stop(rounds=15), clients=4, cohort=4, eval_every=15)
    assert run.metrics.accuracy.iloc[-1] >= 0.95


@pytest.mark.parametrize(
    ("model", "shape", "line"),
    [
        (LeNet(), (1, 15, 28), "model=lenet: needs images [channels, height, width] of 16x16 or more, got [1, 15, 28]"),
        (LeNet(), (784,), "model=lenet: needs images [channels, height, width] of 16x16 or more, got [784]"),
        (
            ResNet18Gn(),
            (3, 8, 7),
            "model=resnet18_gn: needs images [channels, height, width] of 8x8 or more, got [3, 8, 7]",
        ),
        (Cnn(), (1, 3, 3), "model=cnn: needs images [channels, height, width] of 4x4 or more, got [1, 3, 3]"),
    ],
)
def test_what_is_no_image_or_too_small_is_refused(model, shape, line):
    with pytest.raises(ConfigError) as error:
        model.build(shape, 10)
    assert str(error.value) == line


@pytest.mark.parametrize("groups", [0, 3, 48, 128, 1.5])
def test_groups_must_divide_every_layer(groups):
    with pytest.raises(ConfigError, match=f"^groups={groups}: "):
        ResNet18Gn(groups)

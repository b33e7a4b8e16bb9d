"""Makes the tensors that all contestants of a workload share: embedded images over and over, keyed by a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from experiments.benchmarks.workloads import CLASSES, Workload
from fedsim.data.sources import Embedded
from fedsim.problems.classification import torch_seeded
from fedsim.problems.models import Cnn, Logistic, Mlp, Model, ResNet18Gn
from fedsim.rng import Randomness

MODELS: dict[str, Model] = {"logistic": Logistic(), "mlp": Mlp(200), "cnn": Cnn(), "resnet18_gn": ResNet18Gn()}


def module_of(workload: Workload) -> nn.Module:
    """The workload's module from fedsim, with the initial weights that all contestants begin with."""
    with torch_seeded(0):
        return MODELS[workload.model].build(workload.shape, CLASSES)


def make(workload: Workload) -> dict[str, NDArray[Any]]:
    """``x [holdings, samples, *shape]``, ``y [holdings, samples]`` and the initial parameters by their names."""
    images = Embedded().load()
    count = workload.holdings * workload.samples
    order = Randomness(0)("benchmark examples").permutation(len(images.train_y))
    rows = torch.from_numpy(np.resize(order, count))
    x = _shaped(images.train_x, workload.shape)[rows]
    arrays = {
        "x": x.reshape(workload.holdings, workload.samples, *workload.shape).numpy(),
        "y": images.train_y[rows].reshape(workload.holdings, workload.samples).numpy(),
    }
    initial = {name: value.detach().numpy() for name, value in module_of(workload).named_parameters()}
    return arrays | initial


def _shaped(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images ``[n, 1, 28, 28]`` with zeros around them and in as many channels as wanted."""
    channels, height, width = shape
    vertical, horizontal = height - images.shape[2], width - images.shape[3]
    framed = pad(images, (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2))
    return framed.expand(-1, channels, -1, -1)


def write(workload: Workload, folder: Path) -> Path:
    """Write them to a file in ``folder``, unpacked, and give its path."""
    path = folder / f"{workload.name.replace(' ', '_')}.npz"
    np.savez(path, **make(workload))  # type: ignore[arg-type]  # the stubs take every keyword for allow_pickle
    return path

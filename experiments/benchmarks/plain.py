"""The hand-written loop: one model reused, clients one after another. Torch and numpy only, no fedsim."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks.workloads import CLASSES, Workload


class Tensors:
    """What all contestants share, from the file that :func:`experiments.benchmarks.tensors.write` wrote.

    Attributes:
        x: float32 ``[holdings, samples, *shape]``.
        y: int64 ``[holdings, samples]``.
        initial: the initial model, by parameter name.
    """

    def __init__(self, path: str | Path) -> None:
        with np.load(path) as file:
            self.x = torch.from_numpy(file["x"])
            self.y = torch.from_numpy(file["y"])
            names = [name for name in file.files if name not in ("x", "y")]
            self.initial = OrderedDict((name, torch.from_numpy(file[name])) for name in names)

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """The examples ``[samples, *shape]`` and labels ``[samples]`` of one client, views of all."""
        held = client % len(self.x)
        return self.x[held], self.y[held]

    def to(self, device: str) -> Tensors:
        """The same on a device; this object."""
        self.x, self.y = self.x.to(device), self.y.to(device)
        self.initial = OrderedDict((name, value.to(device)) for name, value in self.initial.items())
        return self


def build(workload: Workload) -> nn.Module:
    """The workload's module; its weights are not drawn here but loaded from the file.

    Raises:
        ValueError: for a model that has to come from fedsim.
    """
    if workload.model == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))
    if workload.model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, CLASSES))
    if workload.model == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, CLASSES),
        )
    raise ValueError(f"model={workload.model}: must be logistic, mlp or cnn")


def train(module: nn.Module, x: Tensor, y: Tensor, workload: Workload) -> None:
    """One epoch of SGD on one client's examples, in a new random order, in place.

    The step is written out, which is the fastest that can be said in plain PyTorch: torch.optim.SGD takes a fifth to a
    third more processor time on the small models, and functional gradients a few per cent.
    """
    parameters = list(module.parameters())
    order = torch.randperm(len(y), device=y.device)
    for first in range(0, len(y), workload.batch):
        rows = order[first : first + workload.batch]
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(cross_entropy(module(x[rows]), y[rows]))
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-workload.lr)


class NaiveLoop:
    """Synchronous FedAvg as one would write it by hand.

    Args:
        workload: what is trained.
        tensors: on the device where training is to run.
        module: its model, on that device.
    """

    def __init__(self, workload: Workload, tensors: Tensors, module: nn.Module) -> None:
        self.workload, self.tensors, self.module = workload, tensors, module
        self.parameters = list(module.parameters())
        self.current = [tensors.initial[name].clone() for name, _ in module.named_parameters()]
        self._random = random.Random(0)

    def round(self) -> None:
        """One round: the model becomes the mean of what the cohort makes of it; all clients have as many examples."""
        workload = self.workload
        total = [torch.zeros_like(each) for each in self.current]
        for client in self._random.sample(range(workload.clients), workload.cohort):
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.current, strict=True):
                    parameter.copy_(value)
            train(self.module, *self.tensors.of(client), workload)
            with torch.no_grad():
                for part, parameter in zip(total, self.parameters, strict=True):
                    part.add_(parameter, alpha=1 / workload.cohort)
        self.current = total

    def model(self) -> NDArray[np.float32]:
        """The model as one vector ``[d]``, parameters in the module's order."""
        flat: NDArray[np.float32] = torch.cat([part.reshape(-1) for part in self.current]).cpu().numpy()
        return flat

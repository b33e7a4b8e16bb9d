"""No problem at all: for questions about time and bytes alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.checks import whole
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.vectors import Layout


class ScheduleOnly(Problem):
    """Nothing is trained: vectors are empty, but are charged on the wire as a model's would be.

    Args:
        parameters: size of the model to charge for, 4 bytes each.
        samples: training examples each client pretends to hold.

    Raises:
        ConfigError: for arguments out of range.
    """

    trains = False

    def __init__(self, parameters: int = 100_000, samples: int = 60) -> None:
        self.parameters = whole("parameters", parameters, least=1, most=10**12)
        self.samples_each = whole("samples", samples, least=1, most=10**9)
        self.layout = Layout(("x",), ((0,),), torch.float32, declared_bytes=4 * self.parameters)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Give every client the same number of examples; nothing is drawn."""
        self.clients = clients
        self.samples = np.full(clients, self.samples_each, dtype=np.int64)

    def initial(self) -> Tensor:
        """An empty vector ``[0]``."""
        return self.layout.zeros()

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """An empty vector ``[0]``."""
        return self.layout.zeros()

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """No metrics."""
        return {}

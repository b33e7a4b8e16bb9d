"""pfl's simulation as a contestant, one process: ``python -m experiments.benchmarks.pfl_adapter TENSORS WORKLOAD``.

It runs in an environment of its own that has ``pfl`` and torch, and does not import fedsim. pfl goes through a user's
examples in their order and does not shuffle them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks.orders import Orders
from experiments.benchmarks.plain import Tensors, build
from experiments.benchmarks.workloads import Workload, from_json

ROUNDS = 10**9


class Learner(nn.Sequential):
    """The layers of a workload's module with the two methods that pfl wants."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy over a batch."""
        return cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """None are measured."""
        return {}


class Conductor(TrainingProcessCallback):
    """Lets training go on for as many rounds as are ordered.

    Args:
        orders: where it is told.
        workload: what is trained.
        module: whose parameters are the model.
    """

    def __init__(self, orders: Orders, workload: Workload, module: nn.Module) -> None:
        self.orders, self.workload, self.module = orders, workload, module
        self.ordered = self.left = orders.rounds(self.model)

    def model(self) -> NDArray[np.float32]:
        """The model as one vector ``[d]``."""
        with torch.no_grad():
            flat: NDArray[np.float32] = torch.cat([each.reshape(-1) for each in self.module.parameters()]).numpy()
        return flat

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """After each round: go on, or answer and wait for the next order; whether that was the end, and no metrics."""
        self.left -= 1
        if not self.left:
            self.orders.answer(clients=self.ordered * self.workload.cohort)
            self.ordered = self.left = self.orders.rounds(self.model)
        return not self.left, Metrics()


def main(path: str, text: str) -> None:
    torch.set_num_threads(1)
    orders, workload, tensors = Orders(), from_json(text), Tensors(path)
    module = Learner(*build(workload).children())
    module.load_state_dict(tensors.initial)
    sampler = get_user_sampler("minimize_reuse", list(range(workload.clients)))
    users = FederatedDataset(lambda user: Dataset(raw_data=list(tensors.of(user))), sampler)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=ROUNDS,
            evaluation_frequency=ROUNDS,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=users, val_data=users),
        PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch),
        callbacks=[Conductor(orders, workload, module)],
    )
    orders.answer()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What is trained: shapes and counts only, so that contestants in other environments can read them, too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One synchronous FedAvg: a cohort, one epoch of SGD without momentum on each of its clients, the mean by samples.

    Attributes:
        name: what tables call it.
        model: ``"logistic"``, ``"mlp"``, ``"cnn"`` or ``"resnet18_gn"``.
        clients: how many there are.
        cohort: clients in a round.
        samples: examples of each client.
        batch: examples in a mini-batch.
        holdings: how many different sets of examples there are: client ``i`` holds set ``i % holdings``.
        shape: of one example.
        lr: learning rate.
    """

    name: str
    model: str
    clients: int
    cohort: int
    samples: int
    batch: int
    holdings: int
    shape: tuple[int, ...] = (1, 28, 28)
    lr: float = 0.05

    @property
    def local_steps(self) -> int:
        """Local steps of one client in a round."""
        return -(-self.samples // self.batch)

    def whole_batch(self) -> Workload:
        """The same with everybody in the cohort and one step on all examples: no order and no draw can differ."""
        return replace(self, clients=self.cohort, batch=self.samples, holdings=min(self.holdings, self.cohort))

    def to_json(self) -> str:
        """As text that :func:`from_json` reads."""
        return json.dumps(asdict(self))


def from_json(text: str) -> Workload:
    """The workload that :meth:`Workload.to_json` wrote."""
    fields: dict[str, Any] = json.loads(text)
    return Workload(**{**fields, "shape": tuple(fields["shape"])})


CLASSES = 10

WORKLOADS = {
    each.name: each
    for each in (
        Workload("W1a", "mlp", clients=10, cohort=10, samples=600, batch=10, holdings=10),
        Workload("W1b", "mlp", clients=10, cohort=10, samples=600, batch=50, holdings=10),
        # A hundred examples and not six hundred, so that a round takes one or two seconds and not ten.
        Workload("W2a", "cnn", clients=10, cohort=10, samples=100, batch=10, holdings=10),
        Workload("W2b", "cnn", clients=10, cohort=10, samples=100, batch=50, holdings=10),
        Workload("W3", "logistic", clients=10_000, cohort=100, samples=20, batch=20, holdings=10_000),
    )
}
"""On the CPU."""

ASYNCHRONOUS = replace(WORKLOADS["W1a"], name="W1a, 500 clients", clients=500)
"""What FedBuff trains, and FedAvg beside it."""

IN_FLIGHT = 50
"""FedBuff's concurrency."""

GPU_WORKLOADS = {
    each.name: each
    for each in (
        Workload("W2 x 10", "cnn", clients=10, cohort=10, samples=100, batch=10, holdings=10),
        Workload("W2 x 30", "cnn", clients=30, cohort=30, samples=100, batch=10, holdings=30),
        Workload("W2 x 100", "cnn", clients=100, cohort=100, samples=100, batch=10, holdings=100),
        Workload("ResNet-18", "resnet18_gn", 10, 10, samples=100, batch=20, holdings=10, shape=(3, 32, 32)),
    )
}
"""On a GPU: the clients of a cohort are one group."""

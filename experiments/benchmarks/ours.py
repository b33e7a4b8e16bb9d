"""fedsim as a contestant: ``python -m experiments.benchmarks.ours TENSORS WORKLOAD METHOD POOL OUT``.

METHOD is ``fedavg`` or ``fedbuff``; POOL is ``inline``, ``torch`` (inline without
the native kernel), ``cuda`` or ``ray:WORKERS``. Whole rounds of
``fedsim.simulate`` are run, with records in OUT; the observer waits for orders between two rounds.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

import fedsim
from experiments.benchmarks.orders import Orders
from experiments.benchmarks.plain import Tensors
from experiments.benchmarks.tensors import module_of
from experiments.benchmarks.workloads import CLASSES, IN_FLIGHT, Workload, from_json
from fedsim.data.partitions import Indices, Partition, Spread, Table
from fedsim.data.sources import Dataset
from fedsim.pool import InlinePool, Pool
from fedsim.pool.ray import RayPool
from fedsim.rng import Randomness
from fedsim.simulation import Simulation
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Constant, Lognormal


class Holdings(Spread):
    """Client ``i`` holds set ``i % holdings`` of the examples."""

    def __init__(self, workload: Workload) -> None:
        self.sizes = np.full(workload.clients, workload.samples)
        self._each, self._holdings = workload.samples, workload.holdings

    def of(self, client: int) -> Indices:
        """The positions of one client's examples, ``[samples]``."""
        first = client % self._holdings * self._each
        return np.arange(first, first + self._each)


class Held(Partition):
    """The spread that all contestants share."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def spread(self, table: Table, clients: int, randomness: Randomness) -> Spread:
        """Who holds what; nothing is drawn."""
        return Holdings(self.workload)


def problem_of(workload: Workload, tensors: Tensors) -> fedsim.Classification:
    """The workload as fedsim's problem, on the shared tensors."""
    x, y = tensors.x.reshape(-1, *workload.shape), tensors.y.reshape(-1)
    module = module_of(workload)
    module.load_state_dict(OrderedDict(tensors.initial))
    return fedsim.Classification(Dataset(x, y, x[:1], y[:1], CLASSES), module, Held(workload), validation=0.0)


def pool_of(text: str) -> Pool:
    """``inline``, ``torch``, ``cuda``, or ``ray:`` and a number of workers."""
    if text == "torch":
        return InlinePool(kernel="torch")
    if text == "cuda":
        return InlinePool(device="cuda")  # type: ignore[call-arg]
    kind, _, workers = text.partition(":")
    return RayPool(workers=int(workers)) if kind == "ray" else InlinePool()


class Conductor:
    """An observer that lets a run go on for as many rounds as it is told.

    Args:
        orders: where it is told.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._until = 0
        self._updates = 0

    def __call__(self, sim: Simulation) -> None:
        """At the end of an instant: go on, or answer and wait for the next order."""
        if sim.round < self._until:
            return

        def model() -> NDArray[np.float32]:
            flat: NDArray[np.float32] = sim.model.cpu().numpy()
            return flat

        if self._until:
            self.orders.answer(clients=sim.updates - self._updates)
        self._updates = sim.updates
        count = self.orders.rounds(model)
        self._until = sim.round + count
        if not count:
            sim.stop("measured")


def main(path: str, text: str, method: str, pool: str, out: str) -> None:
    orders = Orders()
    workload = from_json(text)
    local = fedsim.LocalSGD(lr=workload.lr, batch_size=workload.batch)
    synchronous = method == "fedavg"
    run = fedsim.simulate(
        FedAvg(local) if synchronous else FedBuff(local, concurrency=IN_FLIGHT),
        problem_of(workload, Tensors(path)),
        fedsim.System(Constant() if synchronous else Lognormal(sigma=1.0)),
        pool_of(pool),
        fedsim.Stop(rounds=10**9),
        clients=workload.clients,
        cohort=workload.cohort,
        eval_every=0,
        out=out,
        observer=Conductor(orders),
    )
    orders.answer(group=run.manifest["group_sizes"]["mean"])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""flwr's simulation engine as a contestant, two Ray actors: ``python -m experiments.benchmarks.flwr_adapter ...``.

It runs in an environment of its own that has ``flwr[simulation]`` and torch, and does not import fedsim. The apps are
written for flwr's Message API. ``run_simulation`` begins the engine that ``flwr run`` begins, too, but in this process,
so that the server can be told round by round what to do.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from functools import lru_cache

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from numpy.typing import NDArray
from torch import nn

from experiments.benchmarks.orders import Orders
from experiments.benchmarks.plain import Tensors, build, train
from experiments.benchmarks.workloads import Workload, from_json

ACTORS = 2


@lru_cache(maxsize=1)
def loaded(path: str, text: str) -> tuple[Workload, Tensors, nn.Module]:
    """What an actor needs, read once in each process."""
    torch.set_num_threads(1)
    workload = from_json(text)
    return workload, Tensors(path), build(workload)


def client_app(path: str, text: str) -> ClientApp:
    """The client's half: one model reused in each actor."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        # Imported by name, for Ray sends a main program's functions with copies of their caches.
        from experiments.benchmarks.flwr_adapter import loaded

        workload, tensors, module = loaded(path, text)
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = tensors.of(int(context.node_config["partition-id"]))
        train(module, x, y, workload)
        content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(orders: Orders, workload: Workload, tensors: Tensors) -> ServerApp:
    """The server's half: FedAvg, as many rounds at a time as are ordered."""
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(OrderedDict(tensors.initial))

        def model() -> NDArray[np.float32]:
            parts = [part.numpy().reshape(-1) for part in arrays.to_torch_state_dict().values()]
            flat: NDArray[np.float32] = np.concatenate(parts)
            return flat

        while count := orders.rounds(model):
            strategy = FedAvg(
                fraction_train=workload.cohort / workload.clients,
                fraction_evaluate=0.0,
                min_train_nodes=workload.cohort,
                min_available_nodes=workload.clients,
            )
            arrays = strategy.start(grid, arrays, num_rounds=count).arrays
            orders.answer(clients=count * workload.cohort)

    return app


def main(path: str, text: str) -> None:
    orders, workload = Orders(), from_json(text)
    run_simulation(
        server_app(orders, workload, Tensors(path)),
        client_app(path, text),
        num_supernodes=workload.clients,
        backend_config={
            "init_args": {"num_cpus": ACTORS, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    orders.answer()


if __name__ == "__main__":
    main(*sys.argv[1:])

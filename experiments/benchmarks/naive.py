"""The naive loop as a contestant: ``python -m experiments.benchmarks.naive TENSORS WORKLOAD DEVICE``."""

from __future__ import annotations

import sys

import torch

from experiments.benchmarks.orders import Orders
from experiments.benchmarks.plain import NaiveLoop, Tensors, build
from experiments.benchmarks.workloads import from_json


def main(path: str, text: str, device: str) -> None:
    orders = Orders()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = from_json(text)
    if workload.model == "resnet18_gn":
        from experiments.benchmarks.tensors import module_of

        module = module_of(workload)
    else:
        module = build(workload)
    loop = NaiveLoop(workload, Tensors(path).to(device), module.to(device))
    while count := orders.rounds(loop.model):
        for _ in range(count):
            loop.round()
        if device == "cuda":
            torch.cuda.synchronize()
        orders.answer(clients=count * workload.cohort)


if __name__ == "__main__":
    main(*sys.argv[1:])

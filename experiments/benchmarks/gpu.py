"""The GPU workloads: groups of clients on one GPU against the sequential loop on the same one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from experiments.benchmarks import tables, training
from experiments.benchmarks.workloads import GPU_WORKLOADS


def measure_gpu(repeats: int, seconds: float, table: Path | None) -> int:
    """Measure them and print the report; the exit status, 0 also if there is no GPU, which is said.

    Args:
        repeats: how often each contestant is measured.
        seconds: about how long the naive loop trains in each repeat.
        table: file for the report; None writes none.
    """
    if not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here, nothing is measured")
        return 0
    report = tables.Report()
    report.add(f"# Benchmarks on a GPU\n\n{tables.machine()}, {torch.cuda.get_device_name()}; medians of {repeats}.")
    for workload in GPU_WORKLOADS.values():
        report.add(f"## {tables.describe(workload)}")
        with tempfile.TemporaryDirectory() as folder:
            measured = training.run_gpu_contest(workload, Path(folder), repeats, seconds)
        report.add(tables.contest_table(workload, measured))
    report.write(table)
    return 0

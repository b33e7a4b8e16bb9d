"""The training contests: every workload, the naive loop against fedsim's pools and whoever else is installed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.benchmarks import tensors
from experiments.benchmarks.contest import Contestant, Measured, contest, interleaved
from experiments.benchmarks.workloads import ASYNCHRONOUS, IN_FLIGHT, Workload

WARM_UP = 2.0
"""Seconds until a contestant has looked at most of its data once and has all libraries it needs."""

RAY_WARM_UP = 8.0
"""Seconds until all of Ray's workers have joined."""

AGREEMENT = 1e-5
"""Largest difference of two models' weights that is rounding."""


def naive(path: Path, workload: Workload, device: str = "cpu") -> Contestant:
    """The hand-written loop."""
    command = [sys.executable, "-m", "experiments.benchmarks.naive", str(path), workload.to_json(), device]
    return Contestant("naive", command, WARM_UP)


def ours(path: Path, workload: Workload, pool: str = "inline", method: str = "fedavg") -> Contestant:
    """fedsim on a pool; its records go beside the tensors."""
    known = {
        "inline": "fedsim inline",
        "torch": "fedsim inline, kernel=torch",
        "cuda": "fedsim",
        "ray:1": "fedsim Ray, 1 worker",
    }
    name = known.get(pool, f"fedsim Ray, {pool.removeprefix('ray:')} workers")
    if method != "fedavg":
        name = f"{name}, {method}"
    out = path.parent / f"{path.stem}-{pool.replace(':', '')}-{method}"
    module = [sys.executable, "-m", "experiments.benchmarks.ours"]
    command = [*module, str(path), workload.to_json(), method, pool, str(out)]
    return Contestant(name, command, RAY_WARM_UP if pool.startswith("ray") else WARM_UP)


def elsewhere(simulator: str, python: str, path: Path, workload: Workload) -> Contestant:
    """Another simulator, ``flwr`` or ``pfl``, by its adapter under its own interpreter."""
    module = f"experiments.benchmarks.{simulator}_adapter"
    return Contestant(simulator, [python, "-m", module, str(path), workload.to_json()], RAY_WARM_UP)


def run_contest(
    workload: Workload,
    folder: Path,
    pools: Sequence[str],
    others: Mapping[str, str],
    repeats: int,
    seconds: float,
) -> Mapping[str, Measured]:
    """One workload: all contestants alive together, measured in turn.

    Args:
        workload: what is trained.
        folder: for tensors and records.
        pools: of fedsim, as :mod:`experiments.benchmarks.ours` reads them.
        others: interpreters of other simulators by name.
        repeats: how often each is measured.
        seconds: about how long the naive loop trains in each repeat.
    """
    path = tensors.write(workload, folder)
    contestants = [naive(path, workload), *(ours(path, workload, pool) for pool in pools)]
    contestants += [elsewhere(name, python, path, workload) for name, python in others.items()]
    with contest(contestants):
        return interleaved(contestants, repeats, seconds)


def run_workers(workload: Workload, folder: Path, repeats: int, seconds: float) -> tuple[Measured, Measured]:
    """One and two of Ray's workers, with nobody else alive: two need both cores of a small machine to themselves.

    Every Ray takes some per cent of a core while it has nothing to do.

    Args:
        workload: what is trained.
        folder: for tensors and records.
        repeats: how often each is measured.
        seconds: about how long each trains in a repeat.
    """
    inner = folder / "workers"
    inner.mkdir(exist_ok=True)
    path = tensors.write(workload, inner)
    contestants = [ours(path, workload, pool) for pool in ("ray:1", "ray:2")]
    with contest(contestants):
        one, two = interleaved(contestants, repeats, seconds).values()
    return one, two


def run_gpu_contest(workload: Workload, folder: Path, repeats: int, seconds: float) -> Mapping[str, Measured]:
    """One workload on one GPU: the sequential loop against fedsim, whose groups are whole cohorts."""
    path = tensors.write(workload, folder)
    with contest([naive(path, workload, "cuda"), ours(path, workload, "cuda")]) as contestants:
        return interleaved(contestants, repeats, seconds)


def run_asynchronous(folder: Path, repeats: int, seconds: float, rounds: int) -> tuple[Mapping[str, Measured], float]:
    """FedBuff beside FedAvg on the same 500 clients, and FedBuff's mean training group.

    Args:
        folder: for tensors and records.
        repeats: how often each is measured.
        seconds: about how long each trains in a repeat.
        rounds: fewest in a repeat: up to 50 tasks are trained before they count, or counted after their block.
    """
    path = tensors.write(ASYNCHRONOUS, folder)
    fedbuff = ours(path, ASYNCHRONOUS, method="fedbuff")
    contestants = [ours(path, ASYNCHRONOUS), fedbuff]
    with contest(contestants):
        # In the first rounds more is trained than received: everybody in flight at once.
        fedbuff.rounds(IN_FLIGHT // ASYNCHRONOUS.cohort)
        measured = interleaved(contestants, repeats, seconds, least=rounds)
        return measured, float(fedbuff.finish()["group"])


def check_agreement(workload: Workload, folder: Path, others: Mapping[str, str]) -> float:
    """Largest difference of a weight between the naive loop's model and any other's after a round.

    Everybody trains, on all examples at once, so that neither order nor choice can differ: it must be rounding.

    Raises:
        RuntimeError: if it is more than ``AGREEMENT``: then they do not do the same work.
    """
    whole = workload.whole_batch()
    inner = folder / "agreement"
    inner.mkdir(exist_ok=True)
    path = tensors.write(whole, inner)
    contestants = [naive(path, whole), ours(path, whole)]
    contestants += [elsewhere(name, python, path, whole) for name, python in others.items()]
    for each in contestants:
        each.warm_up = 0.0
    with contest(contestants):
        models = {each.name: each.model() for each in contestants}
    worst = 0.0
    for name, model in models.items():
        difference = float(np.abs(model - models["naive"]).max())
        if not difference <= AGREEMENT:
            raise RuntimeError(f"{workload.name}: {name} is off the naive loop by {difference:.2g} after one round")
        worst = max(worst, difference)
    return worst

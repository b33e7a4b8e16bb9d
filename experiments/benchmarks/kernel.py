"""Costs without training: client tasks per second of the schedule alone, a million clients, start-up.

Each is measured in a process of its own, which this module is, too:
``python -m experiments.benchmarks.kernel schedule METHOD IN_FLIGHT SECONDS OUT`` or ``... million ROUNDS OUT``.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.contest import ENVIRONMENT, ROOT
from experiments.benchmarks.processes import peak_bytes

CLIENTS = 10_000

SCHEDULES = (("fedavg", 10), ("fedavg", 100), ("fedavg", 1000), ("fedbuff", 10), ("fedbuff", 50), ("fedbuff", 1000))
"""Methods and the tasks they keep in flight, of ``CLIENTS`` clients."""

SETTLING = 5
"""Cohorts of results before the clocks are read."""


def schedule(method: str, in_flight: int, seconds: float, out: str) -> dict[str, float]:
    """Run a schedule for about so many seconds, with records; client tasks per second by wall and processor clock.

    Log-normal speeds and bandwidths, nothing trained, FedBuff with a buffer of 10. What is timed begins after some
    rounds and ends when all tables are on disk. ``bare`` is what :func:`bare` does in the same process.
    """
    import pandas  # noqa: F401 - loading it is start-up, which is measured elsewhere

    import fedsim
    from fedsim.simulation import Simulation
    from fedsim.strategies.fedavg import FedAvg
    from fedsim.strategies.fedbuff import FedBuff
    from fedsim.system import compute, network

    began: list[tuple[float, float, int]] = []

    def watch(sim: Simulation) -> None:
        if not began and sim.updates >= SETTLING * cohort:
            began.append((time.perf_counter(), time.process_time(), sim.updates))
        elif began and time.perf_counter() - began[0][0] > seconds:
            sim.stop("measured")

    strategy = FedAvg() if method == "fedavg" else FedBuff(concurrency=in_flight)
    cohort = in_flight if method == "fedavg" else 10
    run = fedsim.simulate(
        strategy,
        fedsim.ScheduleOnly(),
        fedsim.System(compute.Lognormal(sigma=1.0), network.Lognormal()),
        stop=fedsim.Stop(rounds=10**9),
        clients=CLIENTS,
        cohort=cohort,
        eval_every=0,
        out=out,
        observer=watch,
    )
    wall, cpu, updates = began[0]
    tasks = run.summary["updates"] - updates
    rates = {"wall": tasks / (time.perf_counter() - wall), "cpu": tasks / (time.process_time() - cpu)}
    return {**rates, "bare": bare(in_flight, seconds / 4)}


def bare(in_flight: int, seconds: float) -> float:
    """Client tasks per processor second of the least that a schedule in plain Python can be.

    That is a heap, a client at random and a row of two numbers. It says how fast the machine is at such work.
    """
    generator = random.Random(0)
    spans = [generator.lognormvariate(0.0, 1.0) for _ in range(CLIENTS)]
    heap = [(span, client) for client, span in enumerate(spans[:in_flight])]
    heapq.heapify(heap)
    rows: list[tuple[int, float]] = []
    began = time.process_time()
    while not rows or time.process_time() - began < seconds:
        for _ in range(1000):
            now, client = heapq.heappop(heap)
            rows.append((client, now))
            chosen = generator.randrange(CLIENTS)
            heapq.heappush(heap, (now + spans[chosen], chosen))
    return len(rows) / (time.process_time() - began)


def million(rounds: int, out: str) -> dict[str, float]:
    """``fedsim run experiment=million``: most bytes its process held, and its client tasks per second."""
    from fedsim.cli import main as fedsim_main

    status = fedsim_main(["run", "experiment=million", f"rounds={rounds}", f"out={out}"])
    if status:
        raise SystemExit(status)
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    return {"bytes": peak_bytes(), "tasks": manifest["tasks_per_second"]}


def measured(*arguments: Any) -> dict[str, float]:
    """What one of the functions above gives, from a fresh process.

    Raises:
        RuntimeError: with the end of what it said, if it fails.
    """
    done = _run([sys.executable, "-m", "experiments.benchmarks.kernel", *map(str, arguments)])
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def start_up(folder: Path, repeats: int) -> float:
    """Median seconds of ``fedsim run rounds=1``: the whole command, so somewhat more than to the end of the round."""
    taken = []
    for repeat in range(repeats):
        began = time.perf_counter()
        _run([str(Path(sys.executable).parent / "fedsim"), "run", "rounds=1", f"out={folder / f'start-{repeat}'}"])
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-15:]
        raise RuntimeError("\n".join([f"{' '.join(command)} ended with {done.returncode}; it said:", *said]))
    return done


def main(kind: str, *arguments: str) -> None:
    if kind == "schedule":
        method, in_flight, seconds, out = arguments
        numbers = schedule(method, int(in_flight), float(seconds), out)
    else:
        rounds, out = arguments
        numbers = million(int(rounds), out)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])

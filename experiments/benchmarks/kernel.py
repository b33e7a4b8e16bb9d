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
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.contest import ENVIRONMENT, ROOT
from experiments.benchmarks.processes import peak_bytes

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

CLIENTS = 10_000

SCHEDULES = (("fedavg", 10), ("fedavg", 100), ("fedavg", 1000), ("fedbuff", 10), ("fedbuff", 50), ("fedbuff", 1000))
"""Methods and the tasks they keep in flight, of ``CLIENTS`` clients."""

SETTLING = 5
"""Cohorts of results before the clocks are read."""

SLICE, BETWEEN = 5000, 0.05
"""Tasks of a bare loop at a time, and seconds of a schedule between two such slices."""


class BareLoop:
    """The least that a schedule in plain Python can be: a heap, a client at random and a row of two numbers.

    It says how fast the machine is at such work. What it takes is counted, in slices that the measurement of something
    else can be interleaved with, for machines that are shared change their speed within seconds.
    """

    def __init__(self, in_flight: int) -> None:
        self._generator = random.Random(0)
        self._spans = [self._generator.lognormvariate(0.0, 1.0) for _ in range(CLIENTS)]
        self._heap = [(span, client) for client, span in enumerate(self._spans[:in_flight])]
        heapq.heapify(self._heap)
        self._rows = [(0, 0.0)] * SLICE
        self.tasks = 0
        self.wall = self.cpu = 0.0

    def slice(self) -> None:
        """Some tasks more."""
        wall, cpu = time.perf_counter(), time.process_time()
        heap, spans, rows, chosen_of = self._heap, self._spans, self._rows, self._generator.randrange
        for place in range(SLICE):
            now, client = heapq.heappop(heap)
            rows[place] = client, now
            chosen = chosen_of(CLIENTS)
            heapq.heappush(heap, (now + spans[chosen], chosen))
        self.tasks += SLICE
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def rate(self) -> float:
        """Client tasks per processor second."""
        return self.tasks / self.cpu


class Stopwatch:
    """Times a schedule from its fifth cohort on, with a bare loop in between, and stops it after so many seconds."""

    def __init__(self, bare: BareLoop, settling: int, seconds: float) -> None:
        self.bare, self._settling, self._seconds = bare, settling, seconds
        self._wall = self._cpu = self._next = 0.0
        self._updates = 0

    def __call__(self, sim: Simulation) -> None:
        """Look at a run after an instant."""
        if not self._wall:
            if sim.updates >= self._settling:
                self._updates, self._wall, self._cpu = sim.updates, time.perf_counter(), time.process_time()
                self._next = self._wall
            return
        now = time.perf_counter()
        if now >= self._next:
            self.bare.slice()
            self._next = time.perf_counter() + BETWEEN
        if now - self._wall > self._seconds:
            sim.stop("measured")

    def rates(self, updates: int) -> dict[str, float]:
        """Client tasks per second of both clocks, once there have been so many updates in all, and the bare loop's."""
        wall = time.perf_counter() - self._wall - self.bare.wall
        cpu = time.process_time() - self._cpu - self.bare.cpu
        tasks = updates - self._updates
        return {"wall": tasks / wall, "cpu": tasks / cpu, "bare": self.bare.rate()}


def schedule(method: str, in_flight: int, seconds: float, out: str) -> dict[str, float]:
    """Run a schedule for about so many seconds, with records; client tasks per second by wall and processor clock.

    Log-normal speeds and bandwidths, nothing trained, FedBuff with a buffer of 10. What is timed begins after some
    rounds and ends when all tables are on disk. ``bare`` is what a :class:`BareLoop` did in between.
    """
    import pandas  # noqa: F401 - loading it is start-up, which is measured elsewhere

    import fedsim
    from fedsim.strategies.fedavg import FedAvg
    from fedsim.strategies.fedbuff import FedBuff
    from fedsim.system import compute, network

    strategy = FedAvg() if method == "fedavg" else FedBuff(concurrency=in_flight)
    cohort = in_flight if method == "fedavg" else 10
    watch = Stopwatch(BareLoop(in_flight), SETTLING * cohort, seconds)
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
    return watch.rates(run.summary["updates"])


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

"""The driver's end: contestants in processes of their own, told round by round what to run, and measured."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks.processes import cpu_seconds, memory_bytes, tree

ROOT = Path(__file__).parents[2]

PATIENCE = 600.0
"""Seconds after which a contestant that does not answer is given up."""

PATIENCE_AT_END = 30.0
"""Seconds after which one that does not stop is killed."""

LOOKS = 0.05
"""Seconds between two looks at a contestant's memory."""

Clock = Literal["wall", "cpu"]
"""Seconds of the wall clock, or of all processors together."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


@dataclass(frozen=True)
class Block:
    """What so many rounds cost.

    Attributes:
        wall: seconds of the wall clock.
        cpu: processor seconds of the whole process tree.
        clients: client results in these rounds.
    """

    wall: float
    cpu: float
    clients: int

    def each(self, clock: Clock) -> float:
        """Seconds for one client result."""
        return (self.wall if clock == "wall" else self.cpu) / self.clients


def speed(own: Sequence[Block], others: Sequence[Block], clock: Clock) -> float:
    """How many times as fast as the others' blocks, of the same repeats, one's own are: the median."""
    return statistics.median(other.each(clock) / mine.each(clock) for mine, other in zip(own, others, strict=True))


class Contestant:
    """One process that trains when told to.

    Args:
        name: what tables call it.
        command: of the process; it speaks as :class:`experiments.benchmarks.orders.Orders` does.
        warm_up: seconds it trains before anything is measured, at least one round.

    Raises:
        RuntimeError: from any method, with the end of what the process said, if it has ended or does not answer.
    """

    def __init__(self, name: str, command: Sequence[str], warm_up: float = 0.0) -> None:
        self.name, self.command, self.warm_up = name, list(command), warm_up
        self.first_round = 0.0
        """Seconds from the command to the end of the first round."""
        self.peak = 0
        """Most bytes that were seen in the memory of the process tree."""

    def start(self) -> None:
        """Start the process, run the first round, and on until it is warm."""
        began = time.monotonic()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        environment = {**os.environ, **ENVIRONMENT}
        self._process = subprocess.Popen(
            self.command, stdin=PIPE, stdout=PIPE, stderr=self._said, cwd=ROOT, env=environment
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        self.rounds(1)
        self.first_round = time.monotonic() - began
        while time.monotonic() < began + self.first_round + self.warm_up:
            self.rounds(1)

    def rounds(self, count: int) -> Block:
        """Run so many rounds."""
        cpu, wall = cpu_seconds(tree(self._process.pid)), time.perf_counter()
        self._order(rounds=count)
        facts = self._answer()
        wall = time.perf_counter() - wall
        cpu = cpu_seconds(tree(self._process.pid)) - cpu
        return Block(wall, cpu, int(facts["clients"]))

    def watch(self, count: int) -> None:
        """Run so many rounds and look at the memory meanwhile, which costs time: nothing is measured."""
        self._order(rounds=count)
        while not self._has_answered(LOOKS):
            self.peak = max(self.peak, memory_bytes(tree(self._process.pid)))
        self.peak = max(self.peak, memory_bytes(tree(self._process.pid)))
        self._answer()

    def model(self) -> NDArray[Any]:
        """The model as it is now, one vector ``[d]``."""
        with tempfile.TemporaryDirectory() as folder:
            self._order(save=f"{folder}/model.npy")
            self._answer()
            vector: NDArray[Any] = np.load(f"{folder}/model.npy")
        return vector

    def finish(self) -> dict[str, Any]:
        """Tell it that this was all; what it has to say in the end."""
        self._order(rounds=0)
        return self._answer()

    def close(self) -> None:
        """Make sure that the process is gone, if it was started."""
        if not hasattr(self, "_process"):
            return
        processes = tree(self._process.pid)
        with contextlib.suppress(OSError):
            self._orders.close()  # the end of its orders: it stops by itself
        try:
            self._process.wait(PATIENCE_AT_END)
        except subprocess.TimeoutExpired:
            for process in processes:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            self._process.wait()
        self._answers.close()
        self._said.close()

    def _order(self, **order: Any) -> None:
        try:
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
        except OSError:
            raise self._failure("has ended") from None

    def _has_answered(self, seconds: float) -> bool:
        return bool(select.select([self._answers], [], [], seconds)[0])

    def _answer(self) -> dict[str, Any]:
        if not self._has_answered(PATIENCE):
            raise self._failure(f"does not answer within {PATIENCE:g} s")
        line = self._answers.readline()
        if not line:
            raise self._failure("has ended")
        facts: dict[str, Any] = json.loads(line)
        return facts

    def _failure(self, why: str) -> RuntimeError:
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-15:]
        return RuntimeError("\n".join([f"{self.name} {why}; it said:", *last]))


@contextmanager
def contest(contestants: Sequence[Contestant]) -> Iterator[Sequence[Contestant]]:
    """All contestants, started one after another and warm; gone at the end of the block."""
    try:
        for each in contestants:
            each.start()
        yield contestants
    finally:
        for each in contestants:
            each.close()


@dataclass
class Measured:
    """One contestant's blocks beside those of the first contestant in the same repeats.

    Attributes:
        name: of the contestant.
        first_round: seconds from its command to the end of its first round.
        blocks: its own.
        reference: the first contestant's.
        peak: most bytes that its process tree held.
    """

    name: str
    first_round: float
    blocks: list[Block] = field(default_factory=list)
    reference: list[Block] = field(default_factory=list)
    peak: int = 0

    def speed(self, clock: Clock) -> float:
        """How many times as fast as the first contestant."""
        return speed(self.blocks, self.reference, clock)

    def each(self, clock: Clock) -> float:
        """Median seconds for one client result."""
        return statistics.median(block.each(clock) for block in self.blocks)


def rounds_in(seconds: float, contestant: Contestant) -> int:
    """How many rounds a warm contestant does in about so many seconds, at least one."""
    each = contestant.rounds(1).wall
    if each < 0.2 * seconds:  # one short round alone would say too little
        count = round(0.2 * seconds / each)
        each = contestant.rounds(count).wall / count
    return max(1, round(seconds / each))


def interleaved(contestants: Sequence[Contestant], repeats: int, seconds: float, least: int = 1) -> dict[str, Measured]:
    """Let all train in turn, each about as long as the others, and another one first in each repeat.

    Args:
        contestants: warm; the first is what the others are compared with.
        repeats: how often each is measured.
        seconds: about how long each trains in a repeat.
        least: fewest rounds in a repeat.
    """
    counts = {each.name: max(least, rounds_in(seconds, each)) for each in contestants}
    measured = {each.name: Measured(each.name, each.first_round) for each in contestants}
    for repeat in range(repeats):
        turn = repeat % len(contestants)
        blocks = {each.name: each.rounds(counts[each.name]) for each in (*contestants[turn:], *contestants[:turn])}
        for name, block in blocks.items():
            measured[name].blocks.append(block)
            measured[name].reference.append(blocks[contestants[0].name])
    for each in contestants:
        each.watch(max(1, counts[each.name] // 2))
        measured[each.name].peak = each.peak
    return measured

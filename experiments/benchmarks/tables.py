"""The report: Markdown tables of what was measured, and of the machine it was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.benchmarks.contest import Measured
from experiments.benchmarks.targets import TARGETS
from experiments.benchmarks.workloads import Workload


@dataclass
class Report:
    """What is printed while it is measured, and the results that have targets.

    Attributes:
        sections: paragraphs of Markdown.
        results: by the keys of :data:`experiments.benchmarks.targets.TARGETS`.
    """

    sections: list[str] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)

    def add(self, *paragraphs: str) -> None:
        """Print and keep."""
        for paragraph in paragraphs:
            print(paragraph, end="\n\n", flush=True)
        self.sections += paragraphs

    def write(self, path: Path | None) -> None:
        """Write what was kept to a file, if one is wanted."""
        if path is not None:
            path.write_text("\n\n".join(self.sections) + "\n")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(aligned)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heads), line(rule), *map(line, rows)])


def contest_table(workload: Workload, measured: Mapping[str, Measured]) -> str:
    """What every contestant took for a round; speeds are multiples of the first one's."""
    rows = []
    for each in measured.values():
        seconds = [each.each("wall") * workload.cohort, each.each("cpu") * workload.cohort]
        rows.append(
            [
                each.name,
                *(f"{1000 * number:.1f}" for number in seconds),
                f"{each.speed('wall'):.2f}",
                f"{each.speed('cpu'):.2f}",
                f"{each.peak / 1e6:.0f}",
                f"{each.first_round:.1f}",
            ]
        )
    heads = ["", "wall ms / round", "CPU ms / round", "speed, wall", "speed, CPU", "memory MB", "first round s"]
    return markdown(heads, rows)


def describe(workload: Workload) -> str:
    """The workload in one line."""
    return (
        f"{workload.name}: {workload.model}, {workload.clients:,} clients of {workload.samples} samples, cohort "
        f"{workload.cohort}, batch {workload.batch}, {workload.local_steps} local steps"
    )


def target_table(results: Mapping[str, float]) -> str:
    """Every target that was measured, and how much of it is reached."""
    rows = []
    for target in TARGETS:
        if target.key in results:
            result = results[target.key]
            limit = "at most" if target.most else "at least"
            rows.append(
                [
                    target.what,
                    f"{limit} {target.value:,g} {target.unit}".strip(),
                    _short(result),
                    f"{target.share(result):.0%}",
                ]
            )
    return markdown(["", "target", "measured", "reached"], rows)


def workers_line(workload: Workload, one: Measured, two: Measured) -> str:
    """What a second worker brings, measured apart from the other contestants."""
    each = [f"{1000 * workload.cohort * measured.each('wall'):.1f}" for measured in (one, two)]
    return (
        f"Ray alone, without the other contestants' processes: {each[0]} ms a round with one worker, {each[1]} with "
        f"two, {two.speed('wall'):.2f} times as fast."
    )


def schedule_table(rates: Mapping[tuple[str, int], Sequence[float]]) -> str:
    """Client tasks per second with nothing trained, by processor and wall clock, and their share of a bare loop's."""
    rows = [
        [method, f"{in_flight:,}", f"{cpu:,.0f}", f"{wall:,.0f}", f"{share:.3f}"]
        for (method, in_flight), (cpu, wall, share) in rates.items()
    ]
    return markdown(["", "in flight", "tasks / CPU s", "tasks / wall s", "of a bare loop's"], rows)


def machine() -> str:
    """What the numbers depend on, in one line."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores, load before the start {load:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _processor() -> str:
    """Its name as the system has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, name = line.partition(":")
        if key.strip() == "model name":
            return name.strip()
    return platform.machine()


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.2f}"

"""``python -m experiments.benchmarks``: measure, print a report, and hold the results against the targets."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.benchmarks import kernel, tables, targets, training
from experiments.benchmarks.contest import speed
from experiments.benchmarks.gpu import measure_gpu
from experiments.benchmarks.tables import Report
from experiments.benchmarks.workloads import ASYNCHRONOUS, IN_FLIGHT, WORKLOADS

PARTS = (*WORKLOADS, "async", "kernel", "million", "start")

EXAMPLES = """examples:
  python -m experiments.benchmarks                          everything, about twenty minutes
  python -m experiments.benchmarks --only W1a,W3 --repeats 9
  python -m experiments.benchmarks --short                  fails below 60 % of a target
  python -m experiments.benchmarks --flwr-python /path/to/venv/bin/python
  python -m experiments.benchmarks --device cuda            the GPU workloads instead
"""


@dataclass(frozen=True)
class Effort:
    """How long everything may take.

    Attributes:
        repeats: of every measurement; medians are taken.
        asynchronous_repeats: of FedBuff.
        asynchronous_rounds: fewest of FedBuff in a repeat.
        kernel_repeats: of every schedule.
        seconds: that every contestant trains in each repeat, and that a schedule takes.
        million_rounds: of the run with a million clients; 50 are all of it.
        ray: workloads that Ray takes part in.
        agreement: whether the models of all contestants are compared first.
    """

    repeats: int
    asynchronous_repeats: int
    asynchronous_rounds: int
    kernel_repeats: int
    seconds: float
    million_rounds: int
    ray: tuple[str, ...]
    torch: tuple[str, ...]
    agreement: bool


FULL = Effort(
    repeats=7,
    asynchronous_repeats=5,
    asynchronous_rounds=20,
    kernel_repeats=3,
    seconds=2.0,
    million_rounds=50,
    ray=tuple(WORKLOADS),
    torch=("W1a", "W1b", "W3"),
    agreement=True,
)
SHORT = Effort(
    repeats=3,
    asynchronous_repeats=2,
    asynchronous_rounds=10,
    kernel_repeats=1,
    seconds=0.7,
    million_rounds=2,
    ray=("W1a",),
    torch=(),
    agreement=False,
)


def measure_workload(report: Report, name: str, effort: Effort, others: Mapping[str, str], folder: Path) -> None:
    """The contest of one workload."""
    workload = WORKLOADS[name]
    pools = [
        "inline",
        *(["torch"] if name in effort.torch else []),
        *(["ray:1", "ray:2"] if name in effort.ray else []),
    ]
    report.add(f"## {tables.describe(workload)}")
    if effort.agreement:
        worst = training.check_agreement(workload, folder, others)
        report.add(f"After one round on whole batches all models agree to {worst:.0e}.")
    measured = training.run_contest(workload, folder, pools, others, effort.repeats, effort.seconds)
    report.add(tables.contest_table(workload, measured))
    report.results[name] = measured["fedsim inline"].speed("cpu")
    if f"{name} ray" in targets.KEYS and "ray:2" in pools:
        one, two = training.run_workers(workload, folder, effort.repeats, effort.seconds)
        report.results[f"{name} ray"] = two.speed("wall")
        report.add(tables.workers_line(workload, one, two))


def measure_asynchronous(report: Report, effort: Effort, folder: Path) -> None:
    """FedBuff beside FedAvg."""
    measured, group = training.run_asynchronous(
        folder, effort.asynchronous_repeats, effort.seconds, effort.asynchronous_rounds
    )
    report.add(f"## {tables.describe(ASYNCHRONOUS)}; for FedBuff log-normal speeds, {IN_FLIGHT} in flight")
    report.add(tables.contest_table(ASYNCHRONOUS, measured), f"FedBuff's mean training group: {group:.1f} tasks.")
    report.results["asynchronous"] = speed(
        measured["fedsim inline, fedbuff"].blocks, measured["fedsim inline"].blocks, "cpu"
    )


def measure_kernel(report: Report, effort: Effort, folder: Path) -> None:
    """Schedules without training, interleaved."""
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {each: [] for each in kernel.SCHEDULES}
    for repeat in range(effort.kernel_repeats):
        for method, in_flight in kernel.SCHEDULES:
            out = folder / f"{method}-{in_flight}-{repeat}"
            rates = kernel.measured("schedule", method, in_flight, effort.seconds, out)
            found[method, in_flight].append((rates["cpu"], rates["wall"], rates["cpu"] / rates["bare"]))
    medians = {key: [statistics.median(each) for each in zip(*rates, strict=True)] for key, rates in found.items()}
    report.add(f"## Schedule only: {kernel.CLIENTS:,} clients, nothing trained", tables.schedule_table(medians))
    for (method, in_flight), (cpu, _, share) in medians.items():
        report.results[f"{method} {in_flight}"] = cpu
        if f"{method} {in_flight} bare" in targets.KEYS:
            report.results[f"{method} {in_flight} bare"] = share


def measure_million(report: Report, effort: Effort, folder: Path) -> None:
    """A million clients."""
    numbers = kernel.measured("million", effort.million_rounds, folder / "million")
    gigabytes = numbers["bytes"] / 1e9
    report.add(
        f"## A million clients: {effort.million_rounds} rounds of `fedsim run experiment=million`",
        f"Peak memory {gigabytes:.2f} GB, {numbers['tasks']:,.0f} tasks per second.",
    )
    report.results["million"] = gigabytes


def measure_start(report: Report, effort: Effort, folder: Path) -> None:
    """From the command to the end of a run of one round."""
    seconds = kernel.start_up(folder, effort.repeats)
    report.add(
        "## Start-up", f"`fedsim run rounds=1` on the embedded data takes {seconds:.1f} s from command to prompt."
    )
    report.results["start"] = seconds


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description="Measure fedsim beside a hand-written PyTorch loop on the same tensors, in interleaved repeats.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}, with commas; all unless given")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="repeats to take medians of (7; with --short 3)")
    parser.add_argument("--short", action="store_true", help="four minutes at most; status 1 below 60 %% of a target")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the report to this file, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the GPU workloads instead")
    parser.add_argument("--flwr-python", metavar="PATH", help="an interpreter that has flwr[simulation] and torch")
    parser.add_argument("--pfl-python", metavar="PATH", help="an interpreter that has pfl and torch")
    given = parser.parse_args(arguments)
    given.only = PARTS if given.only is None else tuple(given.only.split(","))
    for part in given.only:
        if part not in PARTS:
            parser.error(f"--only {part}: must be some of {','.join(PARTS)}")
    for python in (given.flwr_python, given.pfl_python):
        if python is not None and not os.access(python, os.X_OK):
            parser.error(f"{python}: must be an interpreter that can be run")
    if given.table is not None and not given.table.absolute().parent.is_dir():
        parser.error(f"--table {given.table}: its folder does not exist")
    if not sys.platform.startswith("linux"):
        parser.error("needs Linux, for the clocks and the memory of other processes")
    return given


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number >= 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; the exit status."""
    given = parsed(arguments)
    if given.device == "cuda":
        return measure_gpu(given.repeats or FULL.repeats, FULL.seconds, given.table)
    effort = SHORT if given.short else FULL
    if given.repeats is not None:
        effort = replace(effort, repeats=given.repeats)
    others = {"flwr": given.flwr_python, "pfl": given.pfl_python}
    began, report = time.monotonic(), Report()
    report.add(f"# Benchmarks\n\n{tables.machine()}; medians of {effort.repeats} interleaved repeats.")
    with tempfile.TemporaryDirectory() as folder:
        measure(report, given.only, effort, {name: path for name, path in others.items() if path}, Path(folder))
    report.add("## Targets", tables.target_table(report.results))
    report.add(f"All of it took {time.monotonic() - began:.0f} s.")
    report.write(given.table)
    missed = targets.missed(report.results) if given.short else []
    for line in missed:
        print(f"below {targets.GATE:.0%} of a target: {line}", file=sys.stderr)
    return 1 if missed else 0


def measure(report: Report, parts: Sequence[str], effort: Effort, others: Mapping[str, str], folder: Path) -> None:
    """The parts that are wanted, in the order of the report."""
    for name in WORKLOADS:
        if name in parts:
            measure_workload(report, name, effort, others, folder)
    if "async" in parts:
        measure_asynchronous(report, effort, folder)
    if "kernel" in parts:
        measure_kernel(report, effort, folder)
    if "million" in parts:
        measure_million(report, effort, folder)
    if "start" in parts:
        measure_start(report, effort, folder)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contestants are sent home first
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))

"""Tables and figure of the comparison with FedCompass: ``python experiments/compass/summary.py grid|final RUNS``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedsim.plots import FONT, GREY, metric_against
from fedsim.report import Question, first_reaching
from fedsim.runs import Interval, RunRecord, load, over_seeds, readable, strategy_name

METHODS = ("fedavg", "fedasync", "fedbuff", "fedcompass")
PARTITIONS = ("AppflClass", "DualDirichlet")
SPEEDS = ("Constant", "Normal", "Exponential")
NAMES = dict(zip(PARTITIONS + SPEEDS, ("class", "dual Dirichlet", "all alike", "normal", "exponential"), strict=True))


def choice(run: RunRecord, name: str) -> str:
    """The class that a run has chosen in a group."""
    return str(run.config[name]["_target_"]).rpartition(".")[2]


def rate(run: RunRecord) -> float:
    """The server's rate; FedAsync's is its mixing weight."""
    strategy = run.config["strategy"]
    return float(strategy["alpha"] if "alpha" in strategy else strategy["server_lr"])


def score(run: RunRecord) -> float:
    """Validation accuracy, averaged over virtual time: high for who learns soon and for who learns much."""
    times, values = run.column("time").astype(float), run.column("val_accuracy").astype(float)
    return float((values[:-1] * np.diff(times)).sum() / (times[-1] - times[0]))


def time_to(run: RunRecord, target: float) -> float:
    """Virtual seconds to the first evaluation with so much validation accuracy; nan if there is none."""
    row = first_reaching(run, Question("accuracy", "val_accuracy", target, chosen=False))
    return math.nan if row is None else float(run.column("time")[row])


def shown(interval: Interval, digits: int) -> str:
    """Mean and half-width; a dash for nothing."""
    if not interval.n:
        return "-"
    half = f" ± {interval.half:.{digits}f}" if interval.n > 1 else ""
    return f"{interval.mean:.{digits}f}{half}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " :-- |" * len(rows[0]), *lines[1:]]) + "\n"


def pick(runs: Sequence[RunRecord], partition: str, speed: str | None, method: str) -> list[RunRecord]:
    """The runs of one cell of the comparison, by seed."""
    found = [
        run
        for run in runs
        if choice(run, "partition") == partition
        and (speed is None or choice(run, "compute") == speed)
        and strategy_name(run) == method
    ]
    return sorted(found, key=lambda run: int(run.seed))


def grid(runs: Sequence[RunRecord]) -> str:
    """Every point of the grid, the chosen one of each method and partition in bold."""
    rows = [["partition", "method", "local.lr", "server rate", "mean val_accuracy", "last val_accuracy"]]
    for partition in PARTITIONS:
        for method in METHODS:
            points = sorted(pick(runs, partition, None, method), key=lambda run: (run.config["local"]["lr"], rate(run)))
            best = max(points, key=score)
            for run in points:
                numbers = [f"{run.config['local']['lr']:g}", f"{rate(run):g}", f"{score(run):.4f}"]
                numbers.append(f"{run.column('val_accuracy')[-1]:.4f}")
                marked = [f"**{each}**" for each in numbers] if run is best else numbers
                rows.append([NAMES[partition], method, *marked])
    seeds = sorted({int(run.seed) for run in runs})
    speeds = sorted({NAMES[choice(run, "compute")] for run in runs})
    heading = f"{len(runs)} runs, seed {seeds}, speeds {speeds}; mean over virtual time; the chosen point in bold\n"
    return f"{heading}\n{table(rows)}"


def final(runs: Sequence[RunRecord], target: float) -> str:
    """A row per partition, law of speeds and method."""
    head = ["partition", "speeds", "method", f"reach {target:g}", "time to it [virtual s]", "share of FedAvg's time"]
    rows = [[*head, "test accuracy at the end", "results received"]]
    for partition in PARTITIONS:
        for speed in SPEEDS:
            reference = {run.seed: time_to(run, target) for run in pick(runs, partition, speed, "fedavg")}
            for method in METHODS:
                cell = pick(runs, partition, speed, method)
                times = {run.seed: time_to(run, target) for run in cell}
                reached = [each for each in times.values() if not math.isnan(each)]
                shares = [each / reference.get(seed, math.nan) for seed, each in times.items()]
                measured: list[tuple[list[float], int]] = [  # and digits
                    (reached, 1),
                    ([each for each in shares if not math.isnan(each)], 2),
                    ([float(run.column("accuracy")[-1]) for run in cell], 4),
                    ([float(run.column("updates")[-1]) for run in cell], 0),
                ]
                numbers = [shown(over_seeds(values), digits) for values, digits in measured]
                row = [NAMES[partition], NAMES[speed], method, f"{len(reached)}/{len(cell)}", *numbers]
                rows += [row] if cell else []
    seeds = sorted({int(run.seed) for run in runs})
    heading = f"{len(runs)} runs, seeds {seeds}; mean ± half-width of the 95 % t-interval; the target is judged on "
    return f"{heading}val_accuracy\n\n{table(rows)}"


def figure(runs: Sequence[RunRecord], target: float) -> Figure:
    """Test accuracy against virtual time, a panel per partition and law of speeds."""
    drawn = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = drawn.subplots(len(PARTITIONS), len(SPEEDS), sharex=True, sharey=True, squeeze=False)
    for i, partition in enumerate(PARTITIONS):
        for j, speed in enumerate(SPEEDS):
            ax, cells = axes[i][j], {each: pick(runs, partition, speed, each) for each in METHODS}
            metric_against({each: cell for each, cell in cells.items() if cell}, "time", "accuracy", ax)
            ax.axhline(target, color=GREY, linestyle=(0, (4, 3)), linewidth=0.7, zorder=1)
            ax.set_title(f"{NAMES[partition]}, {NAMES[speed]}", fontsize=FONT)
            ax.set_ylim(0.35, 0.9)
            ax.label_outer()
    lines = {str(line.get_label()): line for ax in drawn.axes for line in ax.get_lines()}
    present = [lines[each] for each in METHODS if each in lines]
    drawn.legend(handles=present, loc="outside lower center", ncols=len(present), fontsize=FONT, frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("grid", "final"))
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    runs = readable(load(arguments.runs))
    final_ones = arguments.what == "final"
    text = final(runs, arguments.target) if final_ones else grid(runs)
    (arguments.out / ("report.md" if final_ones else "grid.md")).write_text(text, encoding="utf-8")
    if final_ones:
        figure(runs, arguments.target).savefig(arguments.out / "report.png", dpi=150)
    print(text, end="")


if __name__ == "__main__":
    main()

"""The tables and the figure of this experiment from its runs: `python -m experiments.participation.summary --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedsim import plots
from fedsim.runs import Interval, RunRecord, load, over_seeds, readable, strategy_name

METHODS = ("fedau", "average_participating", "average_all", "known_probability")
PATTERNS = ("bernoulli", "markov", "cyclic")
LAST = 100.0  # slots at the end of a run whose evaluations are averaged: single ones jump with who took part last
Point = tuple[float, float]  # local.lr, strategy.server_lr


def level(run: RunRecord, metric: str) -> float:
    """The mean of ``metric`` over the evaluations in the last slots of a run."""
    time, values = run.column("time"), run.column(metric)
    return float(np.mean(values[time > time[-1] - LAST]))


def point(run: RunRecord) -> Point:
    """The rates of a run."""
    return float(run.config["local"]["lr"]), float(run.config["strategy"]["server_lr"])


def table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers_from: int) -> str:
    """Markdown; the columns from ``numbers_from`` on are flush right."""
    rule = [":--" if column < numbers_from else "--:" for column in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def shown(value: Interval, sign: str = "") -> str:
    """Mean and half-width of the interval, if there is one."""
    half = "" if np.isnan(value.half) else f" ± {value.half:.4f}"
    return f"{value.mean:{sign}.4f}{half}"


def chosen(runs: Iterable[RunRecord]) -> tuple[str, dict[str, Point]]:
    """The grid as a table, and each method's point of the highest validation accuracy."""
    levels: dict[str, dict[Point, list[float]]] = {}
    for run in runs:
        levels.setdefault(strategy_name(run), {}).setdefault(point(run), []).append(level(run, "val_accuracy"))
    means = {method: {each: float(np.mean(all)) for each, all in levels[method].items()} for method in METHODS}
    best = {method: max(grid, key=lambda each: grid[each]) for method, grid in means.items()}
    points = sorted({each for grid in means.values() for each in grid}, key=lambda each: (each[1], each[0]))
    lines = []
    for lr, rate in points:
        marks = ["**" if best[method] == (lr, rate) else "" for method in METHODS]
        cells = [f"{means[method].get((lr, rate), np.nan):.4f}" for method in METHODS]
        marked = [f"{mark}{cell}{mark}" for mark, cell in zip(marks, cells, strict=True)]
        lines.append([f"{rate:g}", f"{lr:g}", *marked])
    return table(["strategy.server_lr", "local.lr", *METHODS], lines, 0), best


def grouped(runs: Iterable[RunRecord]) -> dict[str, dict[str, dict[int, RunRecord]]]:
    """Runs by pattern, method and seed. Raises ValueError if a method comes with two settings."""
    found: dict[str, dict[str, dict[int, RunRecord]]] = {}
    for run in runs:
        members = found.setdefault(run.config["availability"]["pattern"], {}).setdefault(strategy_name(run), {})
        if run.seed in members or any(point(other) != point(run) for other in members.values()):
            raise ValueError(f"{run.path}: another run of this pattern, method and seed, or another rate")
        members[run.seed] = run
    return {
        pattern: {method: found[pattern][method] for method in METHODS if method in found[pattern]}
        for pattern in PATTERNS
        if pattern in found
    }


def results(groups: Mapping[str, Mapping[str, Mapping[int, RunRecord]]]) -> str:
    """Test accuracy of every pattern and method, and by how much FedAU is above it on the same seeds."""
    lines = []
    for pattern, methods in groups.items():
        ours = {seed: level(run, "accuracy") for seed, run in methods[METHODS[0]].items()}
        for method, runs in methods.items():
            levels = {seed: level(run, "accuracy") for seed, run in runs.items()}
            both = sorted(ours.keys() & levels.keys())
            ahead = over_seeds([ours[seed] - levels[seed] for seed in both])
            final = over_seeds([float(run.column("accuracy")[-1]) for run in runs.values()])
            lr, rate = point(next(iter(runs.values())))
            cells = [shown(over_seeds(list(levels.values()))), shown(final)]
            cells += ["" if method == METHODS[0] else shown(ahead, "+")]
            lines.append([pattern, method, f"{lr:g}", f"{rate:g}", str(len(runs)), *cells])
    last = f"accuracy, last {LAST:g} slots"
    head = ["pattern", "method", "local.lr", "server_lr", "seeds", last, "final accuracy", "fedau minus this, paired"]
    return table(head, lines, 2)


def figure(groups: Mapping[str, Mapping[str, Mapping[int, RunRecord]]]) -> Figure:
    """A panel per pattern: test accuracy against virtual time."""
    drawing = Figure(figsize=(7.2, 2.7), layout="constrained")
    panels = drawing.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for ax, (pattern, methods) in zip(panels, groups.items(), strict=True):
        plots.metric_against({method: list(runs.values()) for method, runs in methods.items()}, "time", "accuracy", ax)
        ax.set_title(pattern, fontsize=plots.FONT)
        ax.set_xlabel("slot (virtual s)", fontsize=plots.FONT)
        ax.set_ylim(0.4, 0.85)
    for ax in panels[1:]:
        ax.set_ylabel("")
    lines = [line for line in panels[0].get_lines() if not str(line.get_label()).startswith("_")]
    drawing.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=plots.FONT, frameon=False)
    return drawing


def main(arguments: Sequence[str] | None = None) -> None:
    """Write grid.md from the runs of the grid; report.md and report.png from the final runs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("what", choices=("grid", "final"))
    parser.add_argument("runs", help="directory of the sweeps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory to write to")
    given = parser.parse_args(arguments)
    runs = readable(load([given.runs]))
    wall = sum(float(run.manifest["wall_seconds"]) for run in runs)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "grid":
        text, best = chosen(runs)
        seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
        head = f"Validation accuracy, mean over the last {LAST:g} slots, seed {seeds}; each method's best in bold.\n\n"
        (given.out / "grid.md").write_text(head + text)
        for method, (lr, rate) in best.items():
            print(f"{method}: local.lr={lr:g} strategy.server_lr={rate:g}")
    else:
        groups = grouped(runs)
        head = "Test accuracy, mean ± half-width of the 95 % t-interval over seeds.\n\n"
        (given.out / "report.md").write_text(head + results(groups))
        figure(groups).savefig(given.out / "report.png", dpi=200)
        print((given.out / "report.md").read_text())
    print(f"{len(runs)} runs, {wall:.0f} seconds together")


if __name__ == "__main__":
    main()

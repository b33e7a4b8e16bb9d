"""Clients against time and against classes, as shades: who takes part when, and who holds what. One group of runs."""

from __future__ import annotations

import math
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedsim.checks import ConfigError
from fedsim.plots.records import Runs, only_group
from fedsim.plots.style import FONT, SHADES, axes_for, figure_of, thin
from fedsim.runs import Floats, RunRecord

ROWS = 500
"""Most rows of a heat map: beyond, neighbouring clients share one."""
COLUMNS = 40
"""Spans of time in a heat map."""


def participation(runs: Runs, ax: Axes | None = None) -> Axes:
    """Results applied from each client in spans of virtual time, the mean over the runs of one group.

    A result counts where it arrived. The spans are equal and end with the last run. Beyond 500 clients, neighbours
    share a row.

    Raises:
        ConfigError: for several groups.
    """
    members = only_group(runs, "participation")
    end = max(float(run.column("time")[-1]) for run in members)
    counts = np.mean([_applied(run, end) for run in members], axis=0)
    clients = len(members[0].clients)
    drawn = axes_for(ax)
    _shade(drawn, counts, (0.0, end or 1.0, clients - 0.5, -0.5), "results applied")
    clock = members[0].clock
    drawn.set_xlabel(f"{clock} time (s)", fontsize=FONT)
    drawn.set_ylabel("client", fontsize=FONT)
    drawn.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return drawn


def partition(runs: Runs, ax: Axes | None = None) -> Axes:
    """Training examples of each class at each client, in the first run of one group.

    Beyond 500 clients, neighbours share a column.

    Raises:
        ConfigError: for several groups, or if the records know no classes.
    """
    run = only_group(runs, "partition")[0]
    names = [name for name in map(str, run.clients.columns) if re.fullmatch(r"class_\d+", name)]
    if not names:
        raise ConfigError(f"partition: {run.path / 'clients.parquet'} has no classes")
    counts = _in_rows(run.clients[names].to_numpy(dtype=np.float64)).T
    drawn = axes_for(ax)
    _shade(drawn, counts, (-0.5, len(run.clients) - 0.5, len(names) - 0.5, -0.5), "training examples")
    drawn.set_xlabel("client", fontsize=FONT)
    drawn.set_ylabel("class", fontsize=FONT)
    drawn.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawn.yaxis.set_major_locator(MaxNLocator(11, integer=True))
    return drawn


def _applied(run: RunRecord, end: float) -> Floats:
    """``[rows, COLUMNS]``: results applied."""
    events = run.events[run.events["outcome"] == "applied"]
    clients = len(run.clients)
    spans = np.minimum((events["arrived"].to_numpy() / (end or 1.0) * COLUMNS).astype(np.int64), COLUMNS - 1)
    counts = np.zeros((clients, COLUMNS))
    np.add.at(counts, (events["client"].to_numpy(), spans), 1)
    return _in_rows(counts)


def _in_rows(counts: Floats) -> Floats:
    """At most ``ROWS`` rows: sums over neighbouring clients."""
    together = math.ceil(len(counts) / ROWS)
    starts = np.arange(0, len(counts), together)
    summed: Floats = np.add.reduceat(counts, starts, axis=0)
    return summed


def _shade(ax: Axes, counts: Floats, extent: tuple[float, float, float, float], name: str) -> None:
    image = ax.imshow(counts, cmap=SHADES, vmin=0, aspect="auto", interpolation="nearest", extent=extent)
    bar = figure_of(ax).colorbar(image, ax=ax, pad=0.02, fraction=0.08)
    bar.set_label(name, fontsize=FONT)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=bool((counts % 1 == 0).all())))
    bar.ax.tick_params(labelsize=FONT - 1, width=0.6, length=2.5)
    bar.outline.set_linewidth(0.6)
    thin(ax)

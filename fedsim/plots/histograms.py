"""How something is spread: staleness over applied results, accuracy over clients. A line per group."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedsim.checks import ConfigError
from fedsim.plots.records import Runs, as_groups
from fedsim.plots.style import FONT, axes_for, figure_of, key, legend_below, plain, style, tidy
from fedsim.runs import Floats, RunRecord

BINS = 40
"""Most bars of a histogram."""


def staleness(runs: Runs, ax: Axes | None = None) -> Axes:
    """The share of applied results by their staleness in versions, all runs of a group together, a line per group.

    Raises:
        ConfigError: if a run applied no result.
    """
    groups = as_groups(runs)
    values = {label: _staleness(label, members) for label, members in groups.items()}
    drawn = axes_for(ax)
    width = math.ceil((max(each.max() for each in values.values()) + 1) / BINS)
    for index, (label, each) in enumerate(values.items()):
        counts = np.bincount((each // width).astype(np.int64))
        colour, dashes = style(index)
        edges = np.arange(len(counts) + 1) * width - 0.5
        line = (0, dashes) if dashes else "-"
        drawn.stairs(counts / each.size, edges, color=colour, linewidth=1.3, linestyle=line, label=plain(label))
        if len(values) <= 3:  # more would be mud
            drawn.stairs(counts / each.size, edges, color=colour, fill=True, alpha=0.15)
    drawn.set_xlabel("staleness (versions)" + (f", bins of {width}" if width > 1 else ""), fontsize=FONT)
    drawn.set_ylabel("share of applied results", fontsize=FONT)
    tidy(drawn, from_zero=False)
    drawn.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawn.set_ylim(bottom=0)
    _legend(ax, drawn, list(values))
    return drawn


def client_accuracy(runs: Runs, ax: Axes | None = None, metric: str = "accuracy") -> Axes:
    """The share of clients whose final ``metric`` on their own examples is at most so much, a line per group.

    All runs of a group count alike. ``metric`` is a column of ``clients.parquet``: ``accuracy``, ``val_accuracy``, or
    with ``own_`` before it.

    Raises:
        ConfigError: if no client of a run keeps examples of its own.
    """
    groups = as_groups(runs)
    drawn = axes_for(ax)
    for index, (label, members) in enumerate(groups.items()):
        values = np.sort(np.concatenate([_of_clients(run, metric) for run in members]))
        line = key(index, label)
        shares = np.arange(values.size + 1) / values.size
        line.set_data(np.concatenate([values[:1], values]), shares)
        line.set_drawstyle("steps-post")
        drawn.add_line(line)
    drawn.autoscale_view()
    drawn.set_ylim(0, 1.02)
    drawn.set_xlabel(f"final {metric.replace('_', ' ')} on a client's own examples", fontsize=FONT)
    drawn.set_ylabel("share of clients", fontsize=FONT)
    tidy(drawn, from_zero=False)
    _legend(ax, drawn, list(groups))
    return drawn


def _legend(given: Axes | None, drawn: Axes, labels: list[str]) -> None:
    if given is None and len(labels) > 1:
        legend_below(figure_of(drawn), [key(index, label) for index, label in enumerate(labels)])


def _staleness(label: str, members: list[RunRecord]) -> Floats:
    events = [run.events.loc[run.events["outcome"] == "applied", "staleness"] for run in members]
    values = np.concatenate([each.to_numpy(dtype=np.float64) for each in events])
    if not values.size:
        raise ConfigError(f"staleness: no result was applied in {label} ({members[0].path})")
    return values


def _of_clients(run: RunRecord, metric: str) -> Floats:
    values = run.clients[metric].to_numpy(dtype=np.float64) if metric in run.clients else np.zeros(0)
    values = values[~np.isnan(values)]
    if not values.size:
        raise ConfigError(
            f"client_accuracy: no client of {run.path} has {metric} on examples of its own; "
            "run with problem.client_test=0.2 client_eval_every=10"
        )
    return values

"""Curves over groups of runs: the mean over seeds and a band, as step functions, in figures fit for a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedsim.checks import ConfigError, one_of
from fedsim.plots.records import Runs, as_groups
from fedsim.plots.style import FONT, GREY, MEGABYTE, axes_for, figure_of, key, legend_below, new_figure, tidy
from fedsim.runs import Floats, RunRecord, t_interval

POINTS = 80  # of a curve in a panel 2.3 inches wide
LARGEST_DRAWN = 1e60
DEFAULTS = ("accuracy", "distance", "loss")
"""Metrics on test samples, the first that every run has is drawn."""
XAxis = Literal["time", "bytes", "round", "updates"]
X_AXES = ("time", "bytes", "round", "updates")


def carried_forward(at: Floats, values: Floats, grid: Floats) -> Floats:
    """The step function that takes ``values[i]`` from ``at[i]`` on, at the points of ``grid``.

    ``at`` does not decrease; where it repeats, the last value counts. Points before ``at[0]`` give nan.
    """
    index = np.searchsorted(at, grid, side="right") - 1
    return np.where(index >= 0, np.asarray(values, dtype=np.float64)[np.maximum(index, 0)], math.nan)


def curve(
    runs: Sequence[RunRecord], x: XAxis, metric: str, *, most: int | None = None, geometric: bool = False
) -> tuple[Floats, Floats, Floats, Floats]:
    """Grid in seconds, bytes, rounds or results, then mean over ``runs`` and both ends of its 95 % t-interval.

    The ends are nan for one run.

    The grid holds every point where some run has a row, from the latest start to the earliest end of the
    runs, so that each point is a mean over all of them; beyond ``most`` points, that many equidistant ones.
    ``geometric`` takes mean and interval of the logarithms, as a logarithmic axis shows them.
    """
    ats, columns = zip(*(_measured(run, x, metric) for run in runs), strict=True)
    start, end = max(at[0] for at in ats), min(at[-1] for at in ats)
    grid = np.unique(np.concatenate(ats))
    grid = grid[(grid >= start) & (grid <= end)]
    if not grid.size:  # one run ends before another starts: there is no mean to draw
        return grid, grid, grid, grid
    if most is not None and grid.size > most:
        grid = np.linspace(start, end, most)
    rows = np.stack([carried_forward(at, column, grid) for at, column in zip(ats, columns, strict=True)])
    with np.errstate(all="ignore"):  # the logarithm of nought leaves a gap in the line, as it should
        mean, half = t_interval(np.log(rows) if geometric else rows)
        low, high = mean - half, mean + half
        return (grid, np.exp(mean), np.exp(low), np.exp(high)) if geometric else (grid, mean, low, high)


def _measured(run: RunRecord, x: XAxis, metric: str) -> tuple[Floats, Floats]:
    """Where a metric was measured, and what: clients' own examples are not looked at in every evaluation."""
    at, column = np.asarray(run.column(x), dtype=np.float64), run.column(metric)
    there = ~np.isnan(column) if "client_" in metric else np.ones(len(at), dtype=bool)
    return at[there], column[there]


def metric_against(runs_by_group: Mapping[str, Sequence[RunRecord]], x: XAxis, metric: str, ax: Axes) -> Axes:
    """Draw a line per group on ``ax``: the mean of ``metric`` over seeds against ``x``, and its 95 % t-band.

    ``x`` is ``time`` (seconds), ``bytes`` (up plus down, in MB), ``round`` or ``updates``. What falls by
    orders of magnitude gets a logarithmic axis and geometric means, and the axis says so. Colour and line style follow
    the order of the groups, so panels of one figure agree. Raises :class:`ConfigError` for another ``x`` or metric.
    """
    one_of("x", x, X_AXES)
    everything = [run for runs in runs_by_group.values() for run in runs]
    for run in everything:
        if not run.measures(metric):
            raise ConfigError(f"metric={metric}: not in {run.path / 'metrics.parquet'}")
    unit = MEGABYTE if x == "bytes" else 1.0
    logarithmic = "accuracy" not in metric and _spans_magnitudes([run.column(metric) for run in everything])
    alpha = 0.16 if len(runs_by_group) <= 4 else 0.07  # many bands on top of each other hide the lines
    drawn: list[Floats] = [np.zeros(0)]
    for index, (label, runs) in enumerate(runs_by_group.items()):
        grid, *lines = curve(runs, x, metric, most=POINTS, geometric=logarithmic)
        mean, low, high = (_drawable(each) for each in lines)
        # Steps closer together than the line is wide break up its dashes; a line through the same values does not.
        steps = grid.size < POINTS
        line = key(index, label)
        line.set_data(grid / unit, mean)
        line.set_drawstyle("steps-post" if steps else "default")
        ax.add_line(line)
        if len(runs) > 1:
            ax.fill_between(
                grid / unit, low, high, step="post" if steps else None, color=line.get_color(), alpha=alpha, linewidth=0
            )
        drawn.append(mean)
    ax.autoscale_view()
    _scale(ax, metric, np.concatenate(drawn), logarithmic)
    clocks = {run.clock for run in everything}
    names = {"bytes": "traffic, up + down (MB)", "round": "round", "updates": "client results received"}
    names["time"] = f"{clocks.pop()} time (s)" if len(clocks) == 1 else "time (s)"
    ax.set_xlabel(names[x], fontsize=FONT)
    means = " (geometric mean)" if logarithmic and any(len(runs) > 1 for runs in runs_by_group.values()) else ""
    ax.set_ylabel(f"{metric.replace('_', ' ')}{means}", fontsize=FONT)
    tidy(ax)
    return ax


def metric_against_time(runs: Runs, ax: Axes | None = None, metric: str | None = None) -> Axes:
    """``metric`` against virtual seconds; a line per group with its 95 % t-band over seeds.

    ``metric`` is the first of accuracy, distance and loss that all runs have unless given. Without ``ax`` a new
    figure is made, with a legend below. Raises :class:`ConfigError` for an unknown metric.
    """
    return _drawn(runs, "time", ax, metric)


def metric_against_rounds(runs: Runs, ax: Axes | None = None, metric: str | None = None) -> Axes:
    """As :func:`metric_against_time`, against rounds."""
    return _drawn(runs, "round", ax, metric)


def metric_against_updates(runs: Runs, ax: Axes | None = None, metric: str | None = None) -> Axes:
    """As :func:`metric_against_time`, against client results received."""
    return _drawn(runs, "updates", ax, metric)


def metric_against_bytes(runs: Runs, ax: Axes | None = None, metric: str | None = None) -> Axes:
    """As :func:`metric_against_time`, against traffic up plus down, in MB."""
    return _drawn(runs, "bytes", ax, metric)


def consensus(runs: Runs, ax: Axes | None = None) -> Axes:
    """Mean squared distance of the nodes' models from their mean against virtual seconds, a line per group.

    Raises :class:`ConfigError` for runs of methods without peers.
    """
    return _drawn(runs, "time", ax, "consensus")


def default_metric(runs: Sequence[RunRecord]) -> str:
    """The first of ``DEFAULTS`` that every run has.

    Raises:
        ConfigError: if there is none.
    """
    for name in DEFAULTS:
        if all(run.measures(name) for run in runs):
            return name
    raise ConfigError(f"metric: the runs have none of {', '.join(DEFAULTS)} in common; name one")


def _drawn(runs: Runs, x: XAxis, ax: Axes | None, metric: str | None) -> Axes:
    groups = as_groups(runs)
    chosen = metric or default_metric([run for members in groups.values() for run in members])
    drawn = metric_against(groups, x, chosen, axes_for(ax))
    if ax is None and len(groups) > 1:
        legend_below(figure_of(drawn), [key(index, label) for index, label in enumerate(groups)])
    return drawn


def overview(
    runs_by_group: Mapping[str, Sequence[RunRecord]],
    metric: str,
    *,
    targets: Sequence[float] = (),
    judged_on: str | None = None,
) -> Figure:
    """``metric`` against time and against traffic, side by side, with one legend below.

    ``targets`` are thin dashed lines; ``judged_on`` names the column they are judged on if that is not ``metric``.
    The figure is 5.5 inches wide, its height grows with the legend; it belongs to no pyplot state.
    """
    figure = new_figure(5.5, 2.35)
    left, right = figure.subplots(1, 2, sharey=True)
    metric_against(runs_by_group, "time", metric, left)
    metric_against(runs_by_group, "bytes", metric, right)
    right.set_ylabel("")
    handles = [key(index, label) for index, label in enumerate(runs_by_group)]
    for target in targets:
        for ax in (left, right):
            ax.axhline(target, color=GREY, linestyle=(0, (4, 3)), linewidth=0.7, zorder=1)
    if targets:
        judged = f" ({judged_on.replace('_', ' ')})" if judged_on and judged_on != metric else ""
        name = f"target {', '.join(f'{target:g}' for target in targets)}{judged}"
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=0.7, label=name))
    legend_below(figure, handles)
    return figure


def _spans_magnitudes(columns: Sequence[Floats]) -> bool:
    """Whether the values are never negative and differ by a factor of more than 50."""
    values = np.concatenate([np.asarray(column, dtype=np.float64) for column in columns]) if columns else np.zeros(0)
    positive = values[np.isfinite(values) & (values > 0)]
    return bool(positive.size and not (values < 0).any() and positive.max() > 50 * positive.min())


def _drawable(values: Floats) -> Floats:
    """Values with gaps where a run has diverged beyond what an axis can show."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < LARGEST_DRAWN, values, math.nan)


def _scale(ax: Axes, metric: str, means: Floats, logarithmic: bool) -> None:
    """Limits that the means set, so that one wide band does not flatten every curve."""
    finite = means[np.isfinite(means)]
    if logarithmic:
        ax.set_yscale("log", nonpositive="mask")
        finite = finite[finite > 0]
        if finite.size:
            ax.set_ylim(float(finite.min()) / 2, float(finite.max()) * 2)
    elif "accuracy" in metric and finite.size:
        margin = 0.06 * max(float(np.ptp(finite)), 0.05)
        ax.set_ylim(max(0.0, float(finite.min()) - margin), min(1.02, float(finite.max()) + 2 * margin))
    elif finite.size and np.ptp(finite) > 0:
        low, high = float(finite.min()), float(finite.max())
        margin = 0.25 * (high - low)
        ax.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)

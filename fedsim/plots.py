"""Curves over groups of runs: the mean over seeds and a band, as step functions, in figures fit for a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoMinorLocator, MaxNLocator, ScalarFormatter

from fedsim.checks import ConfigError, one_of
from fedsim.runs import Floats, RunRecord, t_interval

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; the darker colours first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 1.5),
    (1.2, 1.2),
    (6, 1.5, 1.2, 1.5),
    (9, 2),
    (3, 1, 1, 1, 1, 1),
    (2, 3),
)
MEGABYTE = 1e6
GREY = "#444444"
FONT = 8.5  # points; the figure is as wide as one column of text, so it is printed at this size
POINTS = 80  # of a curve in a panel 2.3 inches wide
LARGEST_DRAWN = 1e60
XAxis = Literal["time", "bytes", "round"]


def carried_forward(at: Floats, values: Floats, grid: Floats) -> Floats:
    """The step function that takes ``values[i]`` from ``at[i]`` on, at the points of ``grid``.

    ``at`` does not decrease; where it repeats, the last value counts. Points before ``at[0]`` give nan.
    """
    index = np.searchsorted(at, grid, side="right") - 1
    return np.where(index >= 0, np.asarray(values, dtype=np.float64)[np.maximum(index, 0)], math.nan)


def curve(
    runs: Sequence[RunRecord], x: XAxis, metric: str, *, most: int | None = None, geometric: bool = False
) -> tuple[Floats, Floats, Floats, Floats]:
    """Grid in seconds, bytes or rounds, then mean over ``runs`` and both ends of its 95 % t-interval (nan for one run).

    The grid holds every point where some run has a row, from the latest start to the earliest end of the
    runs, so that each point is a mean over all of them; beyond ``most`` points, that many equidistant ones.
    ``geometric`` takes mean and interval of the logarithms, as a logarithmic axis shows them.
    """
    ats = [np.asarray(run.column(x), dtype=np.float64) for run in runs]
    start, end = max(at[0] for at in ats), min(at[-1] for at in ats)
    grid = np.unique(np.concatenate(ats))
    grid = grid[(grid >= start) & (grid <= end)]
    if not grid.size:  # one run ends before another starts: there is no mean to draw
        return grid, grid, grid, grid
    if most is not None and grid.size > most:
        grid = np.linspace(start, end, most)
    rows = np.stack([carried_forward(at, run.column(metric), grid) for at, run in zip(ats, runs, strict=True)])
    with np.errstate(all="ignore"):  # the logarithm of nought leaves a gap in the line, as it should
        mean, half = t_interval(np.log(rows) if geometric else rows)
        low, high = mean - half, mean + half
        return (grid, np.exp(mean), np.exp(low), np.exp(high)) if geometric else (grid, mean, low, high)


def metric_against(runs_by_group: Mapping[str, Sequence[RunRecord]], x: XAxis, metric: str, ax: Axes) -> Axes:
    """Draw a line per group on ``ax``: the mean of ``metric`` over seeds against ``x``, and its 95 % t-band.

    ``x`` is ``time`` (seconds), ``bytes`` (up plus down, in MB) or ``round``. What falls by orders of magnitude
    gets a logarithmic axis and geometric means, and the axis says so. Colour and line style follow the order of
    the groups, so panels of one figure agree. Raises :class:`ConfigError` for another ``x`` or an unknown metric.
    """
    one_of("x", x, ("time", "bytes", "round"))
    everything = [run for runs in runs_by_group.values() for run in runs]
    for run in everything:
        if not run.measures(metric):
            raise ConfigError(f"metric={metric}: not in {run.path / 'metrics.parquet'}")
    unit = MEGABYTE if x == "bytes" else 1.0
    logarithmic = "accuracy" not in metric and _spans_magnitudes([run.column(metric) for run in everything])
    drawn: list[Floats] = [np.zeros(0)]
    for index, (label, runs) in enumerate(runs_by_group.items()):
        grid, *lines = curve(runs, x, metric, most=POINTS, geometric=logarithmic)
        mean, low, high = (_drawable(each) for each in lines)
        # Steps closer together than the line is wide break up its dashes; a line through the same values does not.
        steps = grid.size < POINTS
        line = _key(index, label)
        line.set_data(grid / unit, mean)
        line.set_drawstyle("steps-post" if steps else "default")
        ax.add_line(line)
        if len(runs) > 1:
            ax.fill_between(
                grid / unit, low, high, step="post" if steps else None, color=line.get_color(), alpha=0.16, linewidth=0
            )
        drawn.append(mean)
    ax.autoscale_view()
    _scale(ax, metric, np.concatenate(drawn), logarithmic)
    clocks = {run.clock for run in everything}
    seconds = f"{clocks.pop()} time (s)" if len(clocks) == 1 else "time (s)"
    ax.set_xlabel({"time": seconds, "bytes": "traffic, up + down (MB)", "round": "round"}[x], fontsize=FONT)
    means = " (geometric mean)" if logarithmic and any(len(runs) > 1 for runs in runs_by_group.values()) else ""
    ax.set_ylabel(f"{metric.replace('_', ' ')}{means}", fontsize=FONT)
    _tidy(ax)
    return ax


def overview(
    runs_by_group: Mapping[str, Sequence[RunRecord]],
    metric: str,
    *,
    target: float | None = None,
    judged_on: str | None = None,
) -> Figure:
    """``metric`` against time and against traffic, side by side, with one legend below.

    ``target`` is a thin dashed line; ``judged_on`` names the column it is judged on if that is not ``metric``.
    The figure is 5.5 inches wide, its height grows with the legend; it belongs to no pyplot state.
    """
    longest = max((len(label) for label in runs_by_group), default=0)
    entries = len(runs_by_group) + (target is not None)
    columns = max(1, min(entries, int(96 / (longest + 9))))
    columns = math.ceil(entries / math.ceil(entries / columns)) if entries else 1  # rows of about equal length
    rows = math.ceil(entries / columns)
    # Room between the panels, so that the last tick of one stays clear of the first of the next.
    engine = ConstrainedLayoutEngine(w_pad=0.07, wspace=0.03)
    figure = Figure(figsize=(5.5, 2.35 + 0.17 * rows), layout=engine)
    left, right = figure.subplots(1, 2, sharey=True)
    metric_against(runs_by_group, "time", metric, left)
    metric_against(runs_by_group, "bytes", metric, right)
    right.set_ylabel("")
    handles = [_key(index, label) for index, label in enumerate(runs_by_group)]
    if target is not None:
        for ax in (left, right):
            ax.axhline(target, color=GREY, linestyle=(0, (4, 3)), linewidth=0.7, zorder=1)
        judged = f" ({judged_on.replace('_', ' ')})" if judged_on and judged_on != metric else ""
        name = f"target {target:g}{judged}"
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=0.7, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=FONT - 0.5, frameon=False,
                  handlelength=2.6, columnspacing=1.4, labelspacing=0.3, borderpad=0.1)  # fmt: skip
    return figure


def _style(index: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of the ``index``-th group: both differ between neighbours, and 49 pairs are distinct."""
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], DASHES[(index + turn) % len(DASHES)]


def _key(index: int, label: str) -> Line2D:
    colour, dashes = _style(index)
    style: str | tuple[float, tuple[float, ...]] = (0, dashes) if dashes else "-"
    text = label.replace("$", r"\$")  # a dollar sign would start a formula
    return Line2D([], [], color=colour, linestyle=style, linewidth=1.4, label=text, zorder=3, dash_capstyle="butt")  # type: ignore[arg-type]


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


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_linewidth(0.6)
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=FONT - 1, width=0.6, length=2.5, color=GREY)
    ax.tick_params(which="minor", length=1.5, width=0.4, color=GREY)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-3, 5))
    ax.xaxis.set_major_formatter(formatter)
    ax.xaxis.get_offset_text().set_fontsize(FONT - 1)
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_minor_locator(AutoMinorLocator(2))

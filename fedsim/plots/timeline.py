"""What clients do in the course of virtual time, from the times in ``events``, and when the server's version grows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedsim.plots.records import Runs, only_group
from fedsim.plots.style import FONT, GREY, axes_for, figure_of, legend_below, tidy
from fedsim.runs import Floats, RunRecord

STAGES = {"download": "#56B4E9", "compute": "#0072B2", "wait": "#CC79A7", "upload": "#E69F00"}
"""What a client does with a task, and its colour; it waits if it could not begin to send at once."""
IDLE = "#EEEEEE"
LOST = "#D55E00"
UNUSED = ("late", "rejected")
"""Outcomes of results that arrived in vain."""
CLIENTS = 30
"""Most rows."""
TASKS = 6
"""Tasks of the busiest client drawn, unless a span of time is given."""


def client_timeline(
    runs: Runs, ax: Axes | None = None, *, span: tuple[float, float] | None = None, most: int = CLIENTS
) -> Axes:
    """A row per client: download, compute, upload and idle time, and a cross where the records lose a task.

    The first run of one group. Above the rows, the versions of the server's model: a version is there when the last
    result that it is made of has arrived. A lost task ends somewhere in the stage that begins at its cross; the
    records do not say where. Tasks that the end of the run cut short last until then.

    Args:
        runs: one group.
        ax: where to draw.
        span: virtual seconds to show; from 0 until the busiest client has done six tasks unless given.
        most: rows; of more clients with tasks in the span, as many from the first to the last by number.

    Raises:
        ConfigError: for several groups.
    """
    run = only_group(runs, "client_timeline")[0]
    first, last = span or (0.0, _until(run))
    drawn = axes_for(ax, 2.6)
    pieces, losses = segments(run), lost(run)
    here = pieces[(pieces["end"] > first) & (pieces["begin"] < last)]
    clients = _some(np.unique(here["client"].to_numpy()), most)
    rows = {client: row for row, client in enumerate(clients)}
    drawn.barh(range(len(clients)), last - first, left=first, height=0.72, color=IDLE, zorder=1)
    for stage, colour in STAGES.items():
        mine = here[(here["stage"] == stage) & here["client"].isin(rows)]
        drawn.add_collection(_bars(mine, rows, colour, stage))
    crosses = losses[losses["client"].isin(rows) & losses["time"].between(first, last)]
    heights = [rows[client] for client in crosses["client"]]
    drawn.plot(crosses["time"], heights, "x", color=LOST, markersize=4, markeredgewidth=1.3, zorder=4)
    drawn.set_xlabel(f"{run.clock} time (s)", fontsize=FONT)
    drawn.set_ylabel("client", fontsize=FONT)
    tidy(drawn, from_zero=False)
    drawn.grid(visible=False)
    drawn.set_xlim(first, last)
    _name_versions(drawn, server_versions(run), first, last, len(clients))
    step = max(1, -(-len(clients) // 15))  # names of 15 rows are legible
    drawn.set_yticks(range(0, len(clients), step), [str(client) for client in clients[::step]])
    drawn.tick_params(axis="y", which="minor", left=False)
    if ax is None:
        legend_below(figure_of(drawn), legend([drawn]))
    return drawn


def legend(panels: Iterable[Axes]) -> list[Patch | Line2D]:
    """What the colours on timelines mean, for one legend below them."""
    drawn = {bars.get_label() for panel in panels for bars in panel.collections if bars.get_paths()}
    patches: list[Patch | Line2D] = [Patch(color=STAGES[stage], label=stage) for stage in STAGES if stage in drawn]
    cross = Line2D([], [], color=LOST, marker="x", linestyle="none", markersize=4, markeredgewidth=1.3, label="lost")
    version = Line2D([], [], color=GREY, marker="|", linestyle="none", markersize=6, label="version")
    return [*patches, Patch(color=IDLE, label="idle"), cross, version]


def segments(run: RunRecord) -> pd.DataFrame:
    """``client, task, stage, begin, end`` of every stage that a task of a run came to the end of, times in seconds.

    A task that was under way when the run ended is in its last stage until then.
    """
    events = run.events
    marks = ["dispatched", "started", "computed", "upload_started", "arrived"]
    end = max(float(run.column("time")[-1]), float(events[marks].max().max()))
    times = events[marks].to_numpy(dtype=np.float64, copy=True)
    pending = (events["outcome"] == "pending").to_numpy() & np.isnan(times[:, -1])
    at = (~np.isnan(times)).sum(axis=1)
    times[pending, at[pending]] = end
    found = []
    for number, stage in enumerate(STAGES):
        begin, until = times[:, number], times[:, number + 1]
        there = until > begin  # False where either is missing
        columns = {name: events[name].to_numpy()[there] for name in ("client", "task")}
        found.append(pd.DataFrame({**columns, "stage": stage, "begin": begin[there], "end": until[there]}))
    return pd.concat(found, ignore_index=True)


def lost(run: RunRecord) -> pd.DataFrame:
    """``client, task, time`` of the tasks whose work came to nothing: the last time that the records know of each."""
    events = run.events
    gone = events[events["arrived"].isna() & (events["outcome"] != "pending") | events["outcome"].isin(UNUSED)]
    known = gone[["dispatched", "started", "computed", "upload_started", "arrived"]].max(axis=1)
    return pd.DataFrame({"client": gone["client"], "task": gone["task"], "time": known})


def server_versions(run: RunRecord) -> Floats:
    """Seconds at which version 1, 2, ... was there: the last arrival among the results it is made of."""
    applied = run.events[run.events["outcome"] == "applied"]
    times: Floats = applied.groupby("applied_version")["arrived"].max().sort_index().to_numpy()
    return times


def _until(run: RunRecord) -> float:
    """When the busiest client has done ``TASKS`` tasks; the end of the run if none has done so many."""
    arrived = run.events.dropna(subset=["arrived"]).sort_values("arrived")
    nth = arrived.groupby("client").cumcount()
    there = arrived.loc[nth == TASKS - 1, "arrived"]
    return float(there.min()) if len(there) else float(run.column("time")[-1]) or 1.0


def _some(clients: np.ndarray[tuple[int, ...], np.dtype[np.int64]], most: int) -> list[int]:
    """At most so many, from the first to the last."""
    chosen = np.unique(np.linspace(0, len(clients) - 1, min(most, len(clients))).round().astype(np.int64))
    return [int(clients[index]) for index in chosen]


def _bars(mine: pd.DataFrame, rows: dict[int, int], colour: str, stage: str) -> PolyCollection:
    left, right = mine["begin"].to_numpy(), mine["end"].to_numpy()
    row = np.array([rows[client] for client in mine["client"]], dtype=np.float64)
    corners = [[left, row - 0.36], [left, row + 0.36], [right, row + 0.36], [right, row - 0.36]]
    boxes = np.moveaxis(np.array(corners), -1, 0)  # [bars, corners, x and y]
    bars = PolyCollection(list(boxes), facecolors=colour, edgecolors="none", zorder=2)
    bars.set_label(stage)
    return bars


def _name_versions(ax: Axes, times: Floats, first: float, last: float, rows: int) -> None:
    """A tick above the rows for every version, a line through them for those that are named; sets the y axis."""
    top, tick, text = -0.5 - 0.01 * rows, 0.03 * rows, 0.06 * rows + 0.1
    here = np.flatnonzero((times >= first) & (times <= last))
    ax.vlines(times[here], top - tick, top, color=GREY, linewidth=0.7, zorder=3)
    cell = ax.get_subplotspec()
    inches = figure_of(ax).get_figwidth() / (1 if cell is None else cell.get_gridspec().ncols)
    gap, before = (last - first) / max(2.0, 4 * (inches - 0.6)), -np.inf
    for index in here:
        if times[index] - before >= gap:
            before = times[index]
            ax.vlines(before, top, rows - 0.5, color=GREY, linewidth=0.4, linestyle=(0, (2, 2)), zorder=3)
            ax.text(before, top - 1.2 * tick, f"{index + 1}", fontsize=FONT - 2, color=GREY, ha="center", va="bottom")
    ax.set_ylim(rows - 0.4, top - 1.2 * tick - text)

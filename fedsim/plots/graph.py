"""Who has talked to whom among peers."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from fedsim.checks import ConfigError
from fedsim.plots.records import Runs, only_group
from fedsim.plots.style import COLOURS, FONT, axes_for
from fedsim.runs import Floats, RunRecord

NAMED = 40
"""Most nodes that carry their number."""


def topology(runs: Runs, ax: Axes | None = None) -> Axes:
    """The nodes of the first run of one group on a circle, and a line between those that have exchanged messages.

    The more messages a line stands for, the darker it is.

    Raises:
        ConfigError: for several groups, or if no node has sent another a message.
    """
    run = only_group(runs, "topology")[0]
    pairs, counts = edges(run)
    if not len(pairs):
        raise ConfigError(f"topology: nodes of {run.path} have sent each other nothing (a method without peers)")
    drawn = axes_for(ax, 3.0)
    nodes = len(run.clients)
    angle = np.pi / 2 - 2 * np.pi * np.arange(nodes) / nodes  # node 0 on top, then clockwise
    places = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    shares = counts / counts.max()
    # Thousands of lines would be one black disc.
    crowd = max(0.06, min(1.0, 1.5 * nodes / len(pairs)))
    colours = [(0.27, 0.27, 0.27, crowd * (0.25 + 0.75 * share)) for share in shares]
    drawn.add_collection(LineCollection(list(places[pairs]), colors=colours, linewidths=0.3 + 0.7 * min(1, 60 / nodes)))
    size = max(2.0, min(60.0, 1800 / nodes))
    drawn.scatter(places[:, 0], places[:, 1], s=size, color=COLOURS[0], zorder=3, linewidths=0)
    if nodes <= NAMED:
        for node, (x, y) in enumerate(places):
            drawn.text(1.13 * x, 1.13 * y, str(node), fontsize=FONT - 2, ha="center", va="center")
    drawn.set_aspect("equal")
    drawn.set_axis_off()
    drawn.set_xlim(-1.25, 1.25)
    drawn.set_ylim(-1.25, 1.25)
    return drawn


def edges(run: RunRecord) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], Floats]:
    """Pairs of nodes ``[edges, 2]``, the smaller one first, and how many messages went along each, both ways."""
    links = run.links[(run.links["src"] >= 0) & (run.links["dst"] >= 0)]
    ends = np.sort(links[["src", "dst"]].to_numpy(dtype=np.int64), axis=1)
    pairs, counts = np.unique(ends, axis=0, return_counts=True)
    return pairs.reshape(-1, 2), counts.astype(np.float64)

"""``fedsim plot NAME DIR...``: one figure by its name, in the width of a column of a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.checks import ConfigError, FedsimError, number, one_of
from fedsim.plots import curves, graph, heatmaps, histograms, timeline
from fedsim.plots.records import as_groups, say
from fedsim.plots.style import CHARACTERS, COLUMN, FONT, folded, key, legend_below, new_figure, save, save_all
from fedsim.runs import RunRecord, common_folder, load

Groups = Mapping[str, Sequence[RunRecord]]


@dataclass(frozen=True)
class Kind:
    """A figure that can be asked for by name.

    Attributes:
        draw: the function that draws it on axes.
        about: one line.
        panels: whether it shows one group, so that several get a panel each.
        metric: whether it takes a metric.
        height: of a panel one column wide, in inches.
        least: width of a panel, in inches.
    """

    draw: Callable[..., Axes]
    about: str
    panels: bool = False
    metric: bool = False
    height: float = 2.2
    least: float = 1.6


KINDS = {
    "time": Kind(curves.metric_against_time, "a metric against virtual time", metric=True),
    "rounds": Kind(curves.metric_against_rounds, "a metric against rounds", metric=True),
    "updates": Kind(curves.metric_against_updates, "a metric against client results received", metric=True),
    "bytes": Kind(curves.metric_against_bytes, "a metric against traffic, up plus down", metric=True),
    "staleness": Kind(histograms.staleness, "how stale the applied results were"),
    "timeline": Kind(
        timeline.client_timeline, "what each client does when, and the server's versions", True, False, 3, 2.6
    ),
    "participation": Kind(heatmaps.participation, "results applied from each client in the course of time", True),
    "partition": Kind(heatmaps.partition, "training examples of each class at each client", True),
    "client_accuracy": Kind(histograms.client_accuracy, "final accuracy on the clients' own examples", metric=True),
    "consensus": Kind(curves.consensus, "how far the models of peers are from their mean"),
    "topology": Kind(graph.topology, "which peers have talked to each other", True, False, 2.6),
}
"""All figures by name."""


def main(
    name: str,
    directories: Sequence[str],
    *,
    out: str | None = None,
    metric: str | None = None,
    width: float = COLUMN,
) -> int:
    """Draw the figure ``name`` of the runs in ``directories`` and write it; returns 0.

    Args:
        name: one of ``KINDS``.
        directories: runs, or folders with runs below them.
        out: file that ends with .png, .pdf or .svg; ``figures/NAME.png`` and ``.pdf`` in the folder of the runs unless
            given.
        metric: column to draw, for figures of a metric.
        width: inches.

    Raises:
        ConfigError: for an unknown name or metric, or if the records have nothing to draw.
        FedsimError: if the figure cannot be written.
    """
    one_of("plot", name, KINDS)
    number("width", width, least=1.5, most=30)
    if metric is not None and not KINDS[name].metric:
        raise ConfigError(f"metric={metric}: the figure {name} shows none; leave it out")
    path = Path(out) if out is not None else None
    if path is not None and path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"out={path}: must end with .png, .pdf or .svg")
    folder = common_folder(directories)
    if path is None and folder is None:
        raise ConfigError("out: the runs share no folder to put the figure in; name a file with --out")
    figure = drawing(name, as_groups(load(directories, say)), metric=metric, width=width)
    if path is None:
        assert folder is not None
        print(f"figure: {' '.join(map(str, save_all(figure, folder / 'figures', name)))}")
        return 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise FedsimError(f"out={path}: cannot be written ({error.strerror or error})") from error
    print(f"figure: {path}")
    return 0


def drawing(name: str, groups: Groups, *, metric: str | None = None, width: float = COLUMN) -> Figure:
    """The figure ``name`` of ``groups``, ``width`` inches wide: one panel, or one for each group if it shows one group.

    Raises:
        ConfigError: if the records have nothing to draw.
    """
    kind = KINDS[name]
    options = {"metric": metric} if metric is not None else {}
    if not kind.panels:
        figure = new_figure(width, kind.height)
        kind.draw(groups, figure.subplots(), **options)
        if len(groups) > 1:
            legend_below(figure, [key(index, label) for index, label in enumerate(groups)])
        return figure
    columns = min(len(groups), max(1, int(width / kind.least)))
    word = max(len(word) for label in groups for word in label.split())
    while columns > 1 and _title_inches(width / columns) * CHARACTERS < word:
        columns -= 1
    rows = math.ceil(len(groups) / columns)
    titles = [folded(label, _title_inches(width / columns)) if len(groups) > 1 else "" for label in groups]
    tall = 0.14 * max(title.count("\n") for title in titles)
    figure = new_figure(width, (kind.height * (1 if columns == 1 else 0.75) + tall) * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.remove()
    shown = panels.flat[: len(groups)]
    for place, (panel, label, title) in enumerate(zip(shown, groups, titles, strict=True)):
        kind.draw({label: groups[label]}, panel, **options)
        panel.set_title(title, fontsize=FONT)
        _name_once(panel, place, columns, len(groups))
    legend_below(figure, timeline.legend(shown) if name == "timeline" else [])
    return figure


def _title_inches(panel: float) -> float:
    """Room for a panel's title: as wide as the axes at most, in letters larger than a legend's."""
    return 0.85 * (panel - 0.8)


def _name_once(panel: Axes, place: int, columns: int, count: int) -> None:
    """Names of axes at the edges of the figure only: they are the same in all panels."""
    if place % columns:
        panel.set_ylabel("")
    if place + columns < count:
        panel.set_xlabel("")
    inner = place % columns < columns - 1 and place < count - 1
    for image in panel.images:
        if inner and image.colorbar is not None:
            image.colorbar.set_label("")

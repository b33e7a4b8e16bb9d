"""Figures fit for a paper, each one function ``plots.name(runs, ax=None) -> Axes`` over the records of runs.

``runs`` is a directory, a run, several runs, or a mapping from labels to such; what is several is put into groups that
differ in nothing but the seed. Curves draw a line per group, the other figures one group. Without ``ax`` a new figure
is made, one column of a paper wide: ``plots.staleness("runs/mine").figure.savefig("staleness.pdf")``.
"""

from fedsim.plots.curves import (
    carried_forward,
    consensus,
    curve,
    metric_against,
    metric_against_bytes,
    metric_against_rounds,
    metric_against_time,
    metric_against_updates,
    overview,
)
from fedsim.plots.graph import topology
from fedsim.plots.heatmaps import participation, partition
from fedsim.plots.histograms import client_accuracy, staleness
from fedsim.plots.records import Runs
from fedsim.plots.style import COLOURS, FONT, GREY, MEGABYTE
from fedsim.plots.timeline import client_timeline
from fedsim.runs import Floats

__all__ = [
    "COLOURS",
    "FONT",
    "GREY",
    "MEGABYTE",
    "Floats",
    "Runs",
    "carried_forward",
    "client_accuracy",
    "client_timeline",
    "consensus",
    "curve",
    "metric_against",
    "metric_against_bytes",
    "metric_against_rounds",
    "metric_against_time",
    "metric_against_updates",
    "overview",
    "participation",
    "partition",
    "staleness",
    "topology",
]

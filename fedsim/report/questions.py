"""What a report asks: which metric, judged on what, and which level is to be reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.checks import ConfigError, nearest, number
from fedsim.runs import Floats, RunRecord

DEFAULTS = ("accuracy", "distance", "loss")  # the test metric is the first of these that every run has
Groups = Mapping[str, Sequence[RunRecord]]


@dataclass(frozen=True)
class Question:
    """What is reported: ``metric``, on test samples; model selection and the target look at ``judged_on`` alone.

    ``judged_on`` is the validation column of ``metric``, or ``metric`` itself where there is none.
    """

    metric: str
    judged_on: str
    target: float | None
    chosen: bool  # the target was chosen from the data

    @property
    def rising(self) -> bool:
        """Whether larger is better: true of accuracies, false of all else."""
        return _rising(self.metric)

    @property
    def best_name(self) -> str:
        """The heading of the best value, which says what it was selected by."""
        return f"best {self.metric}" if self.judged_on == self.metric else f"{self.metric} at best {self.judged_on}"

    def met(self, values: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which values meet the target, compared in the precision in which they were stored."""
        if self.target is None:
            return np.zeros(values.shape, dtype=bool)
        return np.asarray(values >= self.target if self.rising else values <= self.target)


def ask(groups: Groups, *, metric: str | None = None, target: float | None = None) -> Question:
    """Choose metric and target where the user has not.

    Target: the argument; else the configured one if all runs share it and it speaks of this metric; else, for
    accuracy, the largest multiple of 0.05 that at least one run of every group reaches, see :func:`_within_reach`.
    Runs that learn nothing are asked for the rounds that all of them have made. Raises :class:`ConfigError`.
    """
    runs = [run for members in groups.values() for run in members]
    common = [name for name in runs[0].metrics.columns if all(run.measures(str(name)) for run in runs)]
    if metric is None:
        metric = next((name for name in DEFAULTS if name in common), None)
        if metric is None and any(run.measures(name) for run in runs for name in DEFAULTS):
            raise ConfigError(f"report: the runs have none of {', '.join(DEFAULTS)} in common; name one with --metric")
        if metric is None:  # nothing was learnt: how long and how many bytes so many rounds took
            rounds = min(float(run.column("round")[-1]) for run in runs)
            wanted = (rounds or None) if target is None else number("target", target)
            return Question("round", "round", wanted, chosen=target is None)
    elif metric not in common:
        raise ConfigError(f"metric={metric}: not in the metrics of every run, {nearest(metric, common)}")
    judged = f"val_{metric}" if f"val_{metric}" in common else metric
    if target is not None:
        return Question(metric, judged, number("target", target), chosen=False)
    configured = {run.config.get("target") for run in runs}
    shared = configured.pop() if len(configured) == 1 else None
    # The configured target speaks of accuracy, or of distance where there is one, and of nothing else.
    if shared is not None and metric.removeprefix("val_") in ("accuracy", "distance"):
        return Question(metric, judged, number("target", shared), chosen=False)
    within = _within_reach(groups, judged) if _rising(metric) else None
    return Question(metric, judged, within, chosen=within is not None)


def _within_reach(groups: Groups, judged: str) -> float | None:
    """The largest multiple of 0.05 that every group reaches and no run has met before its first step; None without one.

    Runs that diverged have no say in what is reached, nor have groups of nothing else.
    """
    sound = [[run for run in members if not _diverged(run, judged)] for members in groups.values()]
    tops = [max(float(np.nanmax(run.column(judged))) for run in members) for members in sound if members]
    starts = [_start(run, judged) for members in groups.values() for run in members]
    met = max((start for start in starts if np.isfinite(start)), default=-np.inf)
    for twentieth in range(20, 0, -1):  # n / 20 is the double nearest to the multiple of 0.05, n * 0.05 is not
        if tops and min(tops) >= twentieth / 20 > met:
            return twentieth / 20
    return None


def _diverged(run: RunRecord, judged: str) -> bool:
    """Whether a run ends with a value that is not finite or worse than at the start, or with a loss that is not finite.

    The accuracy of a model of NaN is a number, and may be as good as the first model's.
    """
    losses = [name for name in ("loss", "val_loss") if run.measures(name)]
    last = [float(run.column(name)[-1]) for name in (judged, *losses)]
    return not np.isfinite(last).all() or last[0] < _start(run, judged)


def _start(run: RunRecord, judged: str) -> float:
    """The value before the first result had come; NaN if nobody looked."""
    return float(run.column(judged)[0]) if run.column("up_bytes")[0] == 0 else np.nan


def first_reaching(run: RunRecord, question: Question) -> int | None:
    """The first row of the metrics that meets the target, or None."""
    rows = np.flatnonzero(question.met(run.column(question.judged_on)))
    return int(rows[0]) if rows.size else None


def best_row(run: RunRecord, question: Question) -> int:
    """The first row with the best value of the column that judges; rows without a value never are."""
    values = run.column(question.judged_on)
    return int(np.nanargmax(values) if question.rising else np.nanargmin(values))


def _rising(metric: str) -> bool:
    return "accuracy" in metric or metric == "round"

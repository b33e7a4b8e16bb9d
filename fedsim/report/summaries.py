"""What a report says of a group of runs, by itself and beside a baseline: means and 95 % t-intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsim.checks import ConfigError, nearest
from fedsim.report.questions import Groups, Question, best_row, first_reaching
from fedsim.runs import Interval, RunRecord, distinctions, over_seeds


@dataclass(frozen=True)
class Row:
    """One group. Times in seconds, traffic in bytes; the last three are over the ``reached`` seeds alone."""

    label: str
    seeds: int
    final: Interval
    best: Interval
    reached: int
    time: Interval
    rounds: Interval
    bytes: Interval


def summarise(label: str, runs: Sequence[RunRecord], question: Question) -> Row:
    """Means and 95 % t-intervals over the seeds of one group."""
    at = [(run, first_reaching(run, question)) for run in runs]
    reached = [(run, row) for run, row in at if row is not None]
    return Row(
        label,
        len(runs),
        final=over_seeds([float(run.column(question.metric)[-1]) for run in runs]),
        best=over_seeds([float(run.column(question.metric)[best_row(run, question)]) for run in runs]),
        reached=len(reached),
        time=over_seeds([float(run.column("time")[row]) for run, row in reached]),
        rounds=over_seeds([float(run.column("round")[row]) for run, row in reached]),
        bytes=over_seeds([float(run.column("bytes")[row]) for run, row in reached]),
    )


@dataclass(frozen=True)
class Paired:
    """A group beside its baseline: the mean over seeds of its number less the baseline's at the same seed.

    Each interval has its own number of pairs: times, rounds and bytes only where both reached the target.
    """

    label: str
    baseline: str
    final: Interval
    best: Interval
    time: Interval
    rounds: Interval
    bytes: Interval


def paired(
    label: str, runs: Sequence[RunRecord], baseline: str, others: Sequence[RunRecord], question: Question
) -> Paired:
    """Differences of ``runs`` from ``others`` with the same seeds, mean and 95 % t-interval of the pairs."""
    by_seed = {run.seed: run for run in others}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]

    def over_pairs(of: Callable[[RunRecord], float | None]) -> Interval:
        both = [(of(run), of(other)) for run, other in pairs]
        return over_seeds([mine - its for mine, its in both if mine is not None and its is not None])

    def at_target(column: str) -> Interval:
        def value(run: RunRecord) -> float | None:
            row = first_reaching(run, question)
            return None if row is None else float(run.column(column)[row])

        return over_pairs(value)

    return Paired(
        label,
        baseline,
        final=over_pairs(lambda run: float(run.column(question.metric)[-1])),
        best=over_pairs(lambda run: float(run.column(question.metric)[best_row(run, question)])),
        time=at_target("time"),
        rounds=at_target("round"),
        bytes=at_target("bytes"),
    )


def partners(groups: Groups, baseline: str) -> dict[str, str]:
    """The baseline's group for every other group, by label.

    ``baseline`` is a group's label, or the name of a strategy: then a group is held against the one of that strategy
    that agrees with it in everything but the strategy; a group without one is left out.

    Raises:
        ConfigError: if no group goes by that name, or several do.
    """
    if baseline in groups:
        return {label: baseline for label in groups if label != baseline}
    parts = distinctions(groups)
    named = [label for label in groups if parts[label].get("strategy") == baseline]
    if not named:
        known = dict.fromkeys([*groups, *(each["strategy"] for each in parts.values() if "strategy" in each)])
        raise ConfigError(f"baseline={baseline}: no such group, {nearest(baseline, known)}")
    found: dict[str, str] = {}
    for label in groups:
        beside = [each for each in named if _besides_strategy(parts[each]) == _besides_strategy(parts[label])]
        if len(beside) > 1:
            raise ConfigError(f"baseline={baseline}: is several groups ({'; '.join(beside)}), give the label of one")
        if beside and label not in named:
            found[label] = beside[0]
    return found


def unpaired(groups: Groups, baseline: str) -> list[str]:
    """A line for every group that cannot be held against the baseline, and why; as :func:`partners` raises."""
    beside = partners(groups, baseline)
    lines = []
    for label, other in beside.items():
        if not {run.seed for run in groups[label]} & {run.seed for run in groups[other]}:
            lines.append(f"group {label}: has no seed in common with {other}, so there are no differences")
    if baseline not in groups:
        held = {*beside, *beside.values()}
        named = {label for label, parts in distinctions(groups).items() if parts.get("strategy") == baseline}
        lone = [label for label in groups if label not in held | named]
        lines += [
            f"group {label}: no {baseline} agrees with it in all else, so there are no differences" for label in lone
        ]
    return lines or ([] if beside else [f"baseline={baseline}: there is no other group beside it"])


def _besides_strategy(parts: dict[str, str]) -> dict[str, str]:
    return {key: shown for key, shown in parts.items() if key.partition(".")[0] != "strategy"}


@dataclass(frozen=True)
class Findings:
    """All that a report says: a list of rows for every question (one for each target), and of pairs if asked for."""

    groups: Groups
    questions: list[Question]
    rows: list[list[Row]]
    pairs: list[list[Paired]]

    @property
    def question(self) -> Question:
        """The first question; all have the same metric."""
        return self.questions[0]

    @property
    def clock(self) -> str:
        """``virtual`` or ``wall``; empty if the runs do not agree."""
        clocks = {run.clock for members in self.groups.values() for run in members}
        return clocks.pop() if len(clocks) == 1 else ""


def find(groups: Groups, questions: list[Question], baseline: str | None = None) -> Findings:
    """Answer the questions.

    Raises:
        ConfigError: if no group is the baseline.
    """
    beside = {} if baseline is None else partners(groups, baseline)
    rows = [[summarise(label, runs, question) for label, runs in groups.items()] for question in questions]
    pairs = [
        [paired(label, groups[label], other, groups[other], question) for label, other in beside.items()]
        for question in questions
    ]
    return Findings(groups, questions, rows, pairs if beside else [])

"""``fedsim report``: a table and a figure that say which group of runs reaches a target first, in time and in bytes."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim import plots
from fedsim.checks import ConfigError, FedsimError, nearest, number, one_of
from fedsim.runs import Floats, Interval, RunRecord, common_folder, group, load, over_seeds, readable, strategy_name

FORMATS = ("rich", "markdown", "csv")
DEFAULTS = ("accuracy", "distance", "loss")  # the test metric is the first of these that every run has
NONE = "-"
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


def main(
    directories: list[str],
    *,
    format: str = "rich",
    out: str | None = None,
    target: float | None = None,
    metric: str | None = None,
) -> int:
    """Print a table of the runs in ``directories``, write it and a figure to ``out``; returns 0.

    ``out`` defaults to the first directory if that holds runs, else to the folder that holds all of the
    arguments; where there is none, nothing is written. Raises :class:`ConfigError` if there is nothing to report.
    """
    one_of("format", format, FORMATS)
    runs = readable(load(directories))
    if not runs:
        raise ConfigError(f"report {' '.join(directories)}: no finished run found (a run has a manifest.json)")
    groups = group(runs)
    question = ask(groups, metric=metric, target=target)
    rows = [summarise(label, members, question) for label, members in groups.items()]
    heading = title(groups, question)
    clock = _clock(groups)
    if format == "rich":
        _print_rich(rows, question, heading, clock)
    else:
        text = as_csv(rows, question) if format == "csv" else as_markdown(rows, question, heading, clock)
        sys.stdout.write(_printable(text))
    folder = Path(out) if out is not None else common_folder(directories)
    if folder is None:
        line = "no figure: the runs share no folder to put it in, name one with --out"
    else:
        figure = plots.overview(
            groups,
            question.metric,
            targets=[] if question.target is None else [question.target],
            judged_on=question.judged_on,
        )
        save(folder, figure, as_csv(rows, question), as_markdown(rows, question, heading, clock))
        line = f"figure: {folder / 'report.png'} (also report.pdf, report.csv, report.md)"
    # A table that goes to a file or to another program stays a table.
    print(_printable(line), file=sys.stdout if format == "rich" else sys.stderr)
    return 0


def ask(groups: Groups, *, metric: str | None = None, target: float | None = None) -> Question:
    """Choose metric and target where the user has not.

    Target: the argument; else the configured one if all runs share it and it speaks of this metric; else, for
    accuracy, the largest multiple of 0.05 that at least one run of every group reaches. Runs that learn nothing
    are asked for the rounds that all of them have made. Raises :class:`ConfigError`.
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
    if _rising(metric):
        tops = [max(float(np.nanmax(run.column(judged))) for run in members) for members in groups.values()]
        for twentieth in range(20, 0, -1):  # n / 20 is the double nearest to the multiple of 0.05, n * 0.05 is not
            if min(tops) >= twentieth / 20:
                return Question(metric, judged, twentieth / 20, chosen=True)
    return Question(metric, judged, None, chosen=False)


def first_reaching(run: RunRecord, question: Question) -> int | None:
    """The first row of the metrics that meets the target, or None."""
    rows = np.flatnonzero(question.met(run.column(question.judged_on)))
    return int(rows[0]) if rows.size else None


def best_row(run: RunRecord, question: Question) -> int:
    """The first row with the best value of the column that judges; rows without a value never are."""
    values = run.column(question.judged_on)
    return int(np.nanargmax(values) if question.rising else np.nanargmin(values))


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


def title(groups: Groups, question: Question) -> str:
    """One line: whose metric it is, what the numbers are and where the target comes from."""
    names = {strategy_name(run) for members in groups.values() for run in members}
    whose = f"{names.pop()}: " if len(names) == 1 and names != {""} and list(groups) != list(names) else ""
    text = f"{whose}{question.metric}, mean ± half-width of the 95 % t-interval over seeds; "
    if question.target is None:
        return f"{text}no target"
    sign = ">=" if question.rising else "<="
    chosen = " (target chosen from the data)" if question.chosen else ""
    return f"{text}target {question.judged_on} {sign} {question.target:g}{chosen}"


def headings(question: Question, clock: str) -> list[str]:
    """The columns of the readable tables; those of the target only where there is one."""
    columns = ["group", "seeds", f"final {question.metric}", question.best_name]
    if question.target is not None:
        seconds = f"{clock} s" if clock else "s"
        columns += [f"time to target [{seconds}]", "rounds to target", "traffic to target [MB]", "reached"]
    return columns


def cells(row: Row, question: Question) -> list[str]:
    """One line of the readable tables."""
    show = _as_fraction if "accuracy" in question.metric else _as_significant
    texts = [row.label, str(row.seeds), _with_half(row.final, show), _with_half(row.best, show)]
    if question.target is not None:
        megabytes = Interval(row.bytes.mean / plots.MEGABYTE, row.bytes.half / plots.MEGABYTE, row.bytes.n)
        texts += [_with_half(row.time, _as_seconds), _with_half(row.rounds, _as_count)]
        texts += [_with_half(megabytes, _as_megabytes), f"{row.reached}/{row.seeds}"]
    return texts


def as_markdown(rows: Sequence[Row], question: Question, heading: str, clock: str) -> str:
    """A table with aligned pipes under its heading; ends with a newline."""
    lines = [headings(question, clock), *(cells(row, question) for row in rows)]
    lines = [[text.replace("|", r"\|") for text in line] for line in lines]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    table = [padded[0], rule, *padded[1:]]
    return "\n".join([heading, "", *(f"| {' | '.join(line)} |" for line in table)]) + "\n"


def as_csv(rows: Sequence[Row], question: Question) -> str:
    """Raw numbers: seconds, bytes, means and half-widths in columns of their own; empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ("final", "best", "time", "rounds", "bytes")
    head = ["group", "seeds", "metric", "final", "final_half_width", "best", "best_half_width", "best_selected_by"]
    head += ["target", "target_judged_on", "target_chosen_from_data", "reached"]
    writer.writerow(head + [each for name in names[2:] for each in (name, f"{name}_half_width")])
    for row in rows:
        numbers = {name: [_raw(each) for each in getattr(row, name)[:2]] for name in names}
        aim = [question.target, question.judged_on, str(question.chosen).lower(), row.reached]
        aim = [""] * len(aim) if question.target is None else aim
        writer.writerow(
            [row.label, row.seeds, question.metric, *numbers["final"], *numbers["best"], question.judged_on, *aim]
            + [each for name in names[2:] for each in numbers[name]]
        )
    return stream.getvalue()


def save(folder: Path, figure: Figure, table_csv: str, table_markdown: str) -> None:
    """Write ``report.png``, ``.pdf``, ``.csv`` and ``.md`` to ``folder``, each whole or not at all.

    No dates are written into them: the same runs give the same files. Raises :class:`FedsimError` if it cannot.
    """

    def picture(kind: str) -> Callable[[Path], None]:
        # Type 42 keeps text in the PDF searchable and editable, which journals ask for.
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        return lambda path: figure.savefig(path, format=kind, dpi=300, metadata=metadata)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            _replace(folder / "report.png", picture("png"))
            _replace(folder / "report.pdf", picture("pdf"))
        _replace(folder / "report.csv", lambda path: _write_text(path, table_csv))
        _replace(folder / "report.md", lambda path: _write_text(path, table_markdown))
    except OSError as error:
        raise FedsimError(f"out={folder}: cannot be written ({error.strerror or error})") from error


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _print_rich(rows: Sequence[Row], question: Question, heading: str, clock: str) -> None:
    terminal = sys.stdout.isatty()
    # Rich takes a pipe for 80 columns wide and would fold the table there.
    console = Console(file=sys.stdout, width=None if terminal else 10_000, no_color=not terminal, highlight=False)
    table = Table(box=box.SIMPLE_HEAD if terminal else box.ASCII2, header_style="bold")
    widest = max(len(row.label) for row in rows)
    for index, name in enumerate(headings(question, clock)):
        table.add_column(
            Text(name), justify="right" if index else "left", overflow="fold", min_width=0 if index else min(widest, 24)
        )
    for row in rows:
        table.add_row(*(Text(_printable(text)) for text in cells(row, question)))  # Text: brackets are no markup
    console.print(Text(_printable(heading)), soft_wrap=True)
    console.print(table)


def _printable(text: str) -> str:
    """The text, with ± spelt out where the output cannot show it."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return text.replace("±", "+/-").encode("ascii", "backslashreplace").decode("ascii")
    return text


def _clock(groups: Groups) -> str:
    clocks = {run.clock for members in groups.values() for run in members}
    return clocks.pop() if len(clocks) == 1 else ""


def _rising(metric: str) -> bool:
    return "accuracy" in metric or metric == "round"


def _raw(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _with_half(value: Interval, show: Callable[[float, float], tuple[str, str]]) -> str:
    if value.n == 0:
        return NONE
    mean, half = show(value.mean, value.half)
    return mean if math.isnan(value.half) else f"{mean} ± {half}"


def _fixed(mean: float, half: float, decimals: int) -> tuple[str, str]:
    return f"{mean:.{decimals}f}", f"{half:.{decimals}f}"


def _as_fraction(mean: float, half: float) -> tuple[str, str]:
    return _fixed(mean, half, 4)


def _as_significant(mean: float, half: float) -> tuple[str, str]:
    return f"{mean:.4g}", f"{half:.2g}"


def _as_count(mean: float, half: float) -> tuple[str, str]:
    return (f"{mean:.0f}", "") if math.isnan(half) else _fixed(mean, half, 1)


def _as_seconds(mean: float, half: float) -> tuple[str, str]:
    """Three significant digits or all whole seconds, whichever is more."""
    return _fixed(mean, half, _decimals(mean, 3))


def _as_megabytes(mean: float, half: float) -> tuple[str, str]:
    """One decimal; more for what is too little to show in it."""
    return _fixed(mean, half, max(1, _decimals(mean, 2)) if abs(mean) < 0.1 else 1)


def _decimals(value: float, significant: int) -> int:
    if not math.isfinite(value) or value == 0:
        return 0
    return min(9, max(0, significant - 1 - math.floor(math.log10(abs(value)))))

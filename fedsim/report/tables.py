"""Tables: what a report says, for a terminal, for Markdown, for a page, and as raw numbers in CSV."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim.plots import MEGABYTE
from fedsim.report.questions import Groups, Question
from fedsim.report.summaries import Findings, Row
from fedsim.runs import Interval, distinctions, strategy_name

NONE = "-"


@dataclass(frozen=True)
class Sheet:
    """A table of texts under one line; the first column is to the left, the others to the right."""

    heading: str
    columns: list[str]
    lines: list[list[str]]


def title(groups: Groups, *questions: Question) -> str:
    """One line: whose metric it is, what the numbers are, where the target comes from, and what tells groups apart."""
    question = questions[0]
    names = {strategy_name(run) for members in groups.values() for run in members}
    whose = f"{names.pop()}: " if len(names) == 1 and names != {""} and list(groups) != list(names) else ""
    text = f"{whose}{question.metric}, mean ± half-width of the 95 % t-interval over seeds; "
    differ = list(dict.fromkeys(entry for parts in distinctions(groups).values() for entry in parts))
    apart = f"; groups differ in {', '.join(differ)}" if differ else ""
    if question.target is None:
        return f"{text}no target{apart}"
    sign = ">=" if question.rising else "<="
    chosen = " (target chosen from the data)" if question.chosen else ""
    levels = ", ".join(f"{each.target:g}" for each in questions)
    return f"{text}target {question.judged_on} {sign} {levels}{chosen}{apart}"


def headings(question: Question, clock: str) -> list[str]:
    """The columns of the readable tables; those of the target only where there is one."""
    columns = ["group", "seeds", f"final {question.metric}", question.best_name]
    if question.target is not None:
        seconds = f"{clock} s" if clock else "s"
        columns += [f"time to target [{seconds}]", "rounds to target", "traffic to target [MB]", "reached"]
    return columns


def cells(row: Row, question: Question) -> list[str]:
    """One line of the readable tables."""
    texts = [row.label, str(row.seeds), _with_half(row.final, _shown(question)), _with_half(row.best, _shown(question))]
    return texts if question.target is None else [*texts, *_to_target(row), f"{row.reached}/{row.seeds}"]


def sheets(findings: Findings) -> list[Sheet]:
    """The readable tables: groups, what it took to reach each of several targets, differences from a baseline."""
    questions, clock = findings.questions, findings.clock
    heading = title(findings.groups, *questions)
    if len(questions) == 1:
        lines = [cells(row, questions[0]) for row in findings.rows[0]]
        found = [Sheet(heading, headings(questions[0], clock), lines)]
    else:
        plain = replace(questions[0], target=None)
        first = Sheet(heading, headings(plain, clock), [cells(row, plain) for row in findings.rows[0]])
        columns = ["group", "target", *headings(questions[0], clock)[4:]]
        lines = [
            [row.label, f"{question.target:g}", *_to_target(row), f"{row.reached}/{row.seeds}"]
            for rows in zip(*findings.rows, strict=True)
            for question, row in zip(questions, rows, strict=True)
        ]
        found = [first, Sheet("to each target, over the seeds that reached it", columns, lines)]
    return [*found, *([_paired_sheet(findings)] if findings.pairs else [])]


def _paired_sheet(findings: Findings) -> Sheet:
    several = len(findings.questions) > 1
    columns = [name for name in headings(findings.question, findings.clock) if name not in ("seeds", "reached")]
    columns = ["group", "baseline", *(["target"] if several else []), *columns[1:]]
    lines = []
    for pairs in zip(*findings.pairs, strict=True):
        for question, pair in zip(findings.questions, pairs, strict=True):
            fraction = 4 if "accuracy" in question.metric else None
            texts = [_difference(pair.final, decimals=fraction), _difference(pair.best, decimals=fraction)]
            if question.target is not None:
                texts += [_difference(pair.time), _difference(pair.rounds), _difference(pair.bytes, MEGABYTE)]
            target = [f"{question.target:g}"] if several else []
            lines.append([pair.label, pair.baseline, *target, *texts])
    heading = "group less baseline, by seed: mean ± half-width of the 95 % t-interval (pairs of seeds)"
    return Sheet(heading, columns, lines)


def _shown(question: Question) -> Callable[[float, float], tuple[str, str]]:
    return _as_fraction if "accuracy" in question.metric else _as_significant


def _to_target(row: Row) -> list[str]:
    megabytes = Interval(row.bytes.mean / MEGABYTE, row.bytes.half / MEGABYTE, row.bytes.n)
    return [
        _with_half(row.time, _as_seconds), _with_half(row.rounds, _as_count), _with_half(megabytes, _as_megabytes)
    ]  # fmt: skip


def _difference(value: Interval, unit: float = 1.0, decimals: int | None = None) -> str:
    """With its sign; unless told, so many decimals that the larger of mean and half-width shows three digits."""
    if not value.n:
        return NONE
    mean, half = value.mean / unit, value.half / unit
    if decimals is None:
        decimals = _decimals(max(abs(mean), 0.0 if math.isnan(half) else half), 3)
    width = "" if math.isnan(half) else f" ± {half:.{decimals}f}"
    return f"{mean:+.{decimals}f}{width} ({value.n})"


def as_markdown(tables: Sequence[Sheet]) -> str:
    """Tables with aligned pipes, each under its heading; ends with a newline."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Sheet) -> str:
    lines = [[text.replace("|", r"\|") for text in line] for line in [table.columns, *table.lines]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    rows = [padded[0], rule, *padded[1:]]
    return "\n".join([table.heading, "", *(f"| {' | '.join(line)} |" for line in rows)]) + "\n"


def as_csv(findings: Findings) -> str:
    """Raw numbers: seconds, bytes, means and half-widths in columns of their own; empty where there is none.

    A row per group and target; with a baseline, the columns of the differences follow.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ("final", "best", "time", "rounds", "bytes")
    head = ["group", "seeds", "metric", "final", "final_half_width", "best", "best_half_width", "best_selected_by"]
    head += ["target", "target_judged_on", "target_chosen_from_data", "reached"]
    head += [each for name in names[2:] for each in (name, f"{name}_half_width")]
    if findings.pairs:
        parts = ("difference", "difference_half_width", "pairs")
        head += ["baseline", *(f"{name}_{part}" for name in names for part in parts)]
    writer.writerow(head)
    for number, (question, rows) in enumerate(zip(findings.questions, findings.rows, strict=True)):
        pairs = {pair.label: pair for pair in findings.pairs[number]} if findings.pairs else {}
        for row in rows:
            numbers = {name: [_raw(each) for each in getattr(row, name)[:2]] for name in names}
            aim = [question.target, question.judged_on, str(question.chosen).lower(), row.reached]
            aim = [""] * len(aim) if question.target is None else aim
            line = [row.label, row.seeds, question.metric, *numbers["final"], *numbers["best"], question.judged_on]
            line += [*aim, *(each for name in names[2:] for each in numbers[name])]
            pair = pairs.get(row.label)
            if pair is not None:
                of = [getattr(pair, name) for name in names]
                line += [pair.baseline, *(each for one in of for each in (_raw(one.mean), _raw(one.half), one.n))]
            writer.writerow([*line, *[""] * (len(head) - len(line))])
    return stream.getvalue()


def print_rich(tables: Sequence[Sheet]) -> None:
    """Tables for a terminal; in a pipe as wide as they are."""
    terminal = sys.stdout.isatty()
    # Rich takes a pipe for 80 columns wide and would fold the table there.
    console = Console(file=sys.stdout, width=None if terminal else 10_000, no_color=not terminal, highlight=False)
    for sheet in tables:
        table = Table(box=box.SIMPLE_HEAD if terminal else box.ASCII2, header_style="bold")
        widest = max(len(line[0]) for line in sheet.lines)
        for index, name in enumerate(sheet.columns):
            justify: Literal["left", "right"] = "right" if index else "left"
            least = 0 if index else min(widest, 24)
            table.add_column(Text(name), justify=justify, overflow="fold", min_width=least)
        for line in sheet.lines:
            table.add_row(*(Text(printable(text)) for text in line))  # Text: brackets are no markup
        console.print(Text(printable(sheet.heading)), soft_wrap=True)
        console.print(table)


def printable(text: str) -> str:
    """The text, with ± spelt out where the output cannot show it."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return text.replace("±", "+/-").encode("ascii", "backslashreplace").decode("ascii")
    return text


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

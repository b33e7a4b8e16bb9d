"""``fedsim report``: tables and a figure that say which group of runs reaches a target first, in time and in bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from fedsim import plots
from fedsim.checks import ConfigError, FedsimError, number, one_of
from fedsim.plots.style import save_all
from fedsim.report.questions import ask
from fedsim.report.summaries import find, unpaired
from fedsim.report.tables import as_csv, as_markdown, print_rich, printable, sheets
from fedsim.runs import common_folder, group, load, readable, say

FORMATS = ("rich", "markdown", "csv")


def main(
    directories: list[str],
    *,
    format: str = "rich",
    out: str | None = None,
    target: float | Sequence[float] | None = None,
    metric: str | None = None,
    baseline: str | None = None,
    html: bool = False,
) -> int:
    """Print tables of the runs in ``directories``, write them and a figure to ``out``; returns 0.

    Args:
        directories: runs, or folders with runs below them.
        format: ``rich``, ``markdown`` or ``csv``.
        out: folder; unless given the first directory if that holds runs, else the folder that holds all of the
            arguments; where there is none, nothing is written.
        target: one level to reach, or several.
        metric: column to report.
        baseline: label of a group, or a strategy's name: what the others are held against, seed by seed.
        html: write ``report.html`` too, a page with everything in it.

    Raises:
        ConfigError: if there is nothing to report.
        FedsimError: if something cannot be written.
    """
    one_of("format", format, FORMATS)
    folder = Path(out) if out is not None else common_folder(directories)
    if html and folder is None:
        raise ConfigError("html: the runs share no folder to put the page in, name one with --out")
    notes: list[str] = []

    def warn(line: str) -> None:
        notes.append(line)
        say(line)

    runs = readable(load(directories, warn), warn)
    if not runs:
        raise ConfigError(f"report {' '.join(directories)}: no finished run found (a run has a manifest.json)")
    groups = group(runs, warn)
    levels = [target] if target is None or isinstance(target, (int, float)) else list(target)
    first = ask(groups, metric=metric, target=levels[0])
    rest = [replace(first, target=number("target", level)) for level in levels[1:]]
    findings = find(groups, [first, *rest], baseline)
    for line in [] if baseline is None else unpaired(groups, baseline):
        warn(line)
    tables = sheets(findings)
    if format == "rich":
        print_rich(tables)
    else:
        sys.stdout.write(printable(as_csv(findings) if format == "csv" else as_markdown(tables)))
    if folder is None:
        line = "no figure: the runs share no folder to put it in, name one with --out"
    else:
        aims = [question.target for question in findings.questions if question.target is not None]
        figure = plots.overview(groups, first.metric, targets=aims, judged_on=first.judged_on)
        _save(folder, figure, as_csv(findings), as_markdown(tables))
        line = f"figure: {folder / 'report.png'} (also report.pdf, report.csv, report.md)"
        if html:
            from fedsim.report.page import page  # draws every figure there is

            _write(folder / "report.html", page(findings, tables, notes, figure))
            line = f"page: {folder / 'report.html'}\n{line}"
    # A table that goes to a file or to another program stays a table.
    print(printable(line), file=sys.stdout if format == "rich" else sys.stderr)
    return 0


def levels(texts: Sequence[str] | None) -> list[float] | None:
    """The targets of a command line: ``["0.6", "0.7"]`` or ``["0.6,0.7"]``.

    Raises:
        ConfigError: if one is no number.
    """
    words = [word for text in texts or () for word in text.split(",")]
    found: list[float] = []
    for word in words:
        try:
            found.append(float(word))
        except ValueError:
            raise ConfigError(f"target={word}: must be a number, or several with commas between them") from None
    return list(dict.fromkeys(found)) or None


def _save(folder: Path, figure: Figure, table_csv: str, table_markdown: str) -> None:
    """Write ``report.png``, ``.pdf``, ``.csv`` and ``.md`` to ``folder``, each whole or not at all."""
    save_all(figure, folder, "report")
    _write(folder / "report.csv", table_csv)
    _write(folder / "report.md", table_markdown)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise FedsimError(f"out={path.parent}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)

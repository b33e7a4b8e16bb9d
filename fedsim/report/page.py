"""The report as one HTML page with everything in it: tables, warnings, figures, what the groups differ in, the runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from matplotlib.figure import Figure

from fedsim.checks import FedsimError
from fedsim.plots.command import KINDS, drawing
from fedsim.report.summaries import Findings
from fedsim.report.tables import Sheet
from fedsim.runs import RunRecord, configuration_differences
from fedsim.version import __version__

WIDTH = 5.5
"""Inches of a figure."""
DPI = 200
PANELS = 9
"""Most groups in a figure that has a panel for each."""
NAMED = 4
"""Most groups that are named in the heading."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p, li { max-width: 50rem; } .quiet { color: #5a6370; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; color: #5a6370; padding-bottom: .4rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1.5px solid #1b1f24; font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody tr + tr td { border-top: 1px solid #e4e7eb; }
.left th, .left td { text-align: left; }
.warnings { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem 1rem .5rem 1.8rem; margin: .8rem 0; }
figure { margin: 1.4rem 0; } figure img { max-width: 100%; width: 44rem; height: auto; }
figcaption { color: #5a6370; font-size: .9rem; }
code { font-size: .85em; }
"""


def page(findings: Findings, tables: Sequence[Sheet], notes: Sequence[str], overview: Figure) -> str:
    """The page as text; it asks for nothing from anywhere else.

    Args:
        findings: what the tables were made of.
        tables: as they are printed.
        notes: warnings, a line each.
        overview: the report's own figure; those of :data:`fedsim.plots.command.KINDS` for which there are records
            follow.
    """
    groups = findings.groups
    runs = [run for members in groups.values() for run in members]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''} in {len(groups)} group{'s' if len(groups) > 1 else ''}"
    # Labels have commas in them; a heading of more than a few would be a page by itself.
    name = " · ".join(groups) if len(groups) <= NAMED else f"{len(groups)} groups"
    body = [f"<h1>{escape(name)}</h1>", f'<p class="quiet">{count}; fedsim {escape(__version__)}</p>']
    if notes:
        body += [
            "<h2>Warnings</h2>",
            f'<ul class="warnings">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>',
        ]
    body.append("<h2>Results</h2>")
    body += [_table(table.columns, table.lines, table.heading) for table in tables]
    body += ["<h2>Figures</h2>", _figure(overview, f"{findings.question.metric}, mean and 95 % band over seeds")]
    body += list(_figures(findings))
    body.append("<h2>What the groups differ in</h2>")
    differences = configuration_differences(groups)
    if differences:
        lines = [[key, *values] for key, values in differences.items()]
        body.append(_table(["setting", *groups], lines, "runs of one group differ in nothing but the seed", left=True))
    else:
        body.append("<p>There is one group: its runs differ in nothing but the seed.</p>")
    body += ["<h2>Runs</h2>", _runs(groups.items())]
    head = f'<meta charset="utf-8"><title>fedsim report: {escape(name)}</title><style>{STYLE}</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    inner = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}{viewport}</head>\n<body>\n{inner}\n</body>\n</html>\n'


def _figures(findings: Findings) -> Iterable[str]:
    """Every figure that the records of these runs hold something for."""
    for name, kind in KINDS.items():
        if name in ("time", "bytes"):  # the overview has them
            continue
        groups = dict(islice(findings.groups.items(), PANELS)) if kind.panels else findings.groups
        metric = findings.question.metric if name in ("rounds", "updates") else None
        try:
            figure = drawing(name, groups, metric=metric, width=WIDTH)
        except FedsimError:  # nothing to draw: no peers, no classes, no examples kept apart
            continue
        first = f" (the first {PANELS} groups)" if len(groups) < len(findings.groups) else ""
        yield _figure(figure, f"{name}: {kind.about}{first}")


def _figure(figure: Figure, caption: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    picture = base64.b64encode(stream.getvalue()).decode("ascii")
    source = f"data:image/png;base64,{picture}"
    text = escape(caption)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _runs(groups: Iterable[tuple[str, Sequence[RunRecord]]]) -> str:
    columns = ["run", "group", "seed", "model", "events", "code", "wall [s]"]
    lines = []
    for label, members in groups:
        for run in members:
            hashes = [str(run.manifest.get(f"{name}_sha256", "-"))[:12] for name in ("model", "events", "code")]
            lines.append([str(run.path), label, str(run.seed), *hashes, str(run.manifest.get("wall_seconds", "-"))])
    return _table(columns, lines, "hashes by their first twelve digits", left=True)


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]], caption: str, left: bool = False) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>" for line in lines)
    kind = ' class="left"' if left else ""
    inner = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="wide"><table{kind}>{inner}</table></div>'

"""What finished runs say: which group of them reaches a target first, in time, rounds and bytes.

``questions`` (which metric, which target), ``summaries`` (means and differences over seeds), ``tables``, ``page``
(HTML) and ``command`` (``fedsim report``).
"""

from fedsim.report.command import main
from fedsim.report.questions import Groups, Question, ask, best_row, first_reaching
from fedsim.report.summaries import Findings, Paired, Row, find, paired, partners, summarise, unpaired
from fedsim.report.tables import as_csv, as_markdown, cells, headings, sheets, title

__all__ = [
    "Findings",
    "Groups",
    "Paired",
    "Question",
    "Row",
    "as_csv",
    "as_markdown",
    "ask",
    "best_row",
    "cells",
    "find",
    "first_reaching",
    "headings",
    "main",
    "paired",
    "partners",
    "sheets",
    "summarise",
    "title",
    "unpaired",
]

"""What may be handed to a figure: directories, records of runs, or what ``fedsim.simulate`` gave, as groups of runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from fedsim.checks import ConfigError
from fedsim.recording import Run
from fedsim.runs import RunRecord, group, load, readable

One = str | os.PathLike[str] | RunRecord | Run
Runs = One | Iterable[One] | Mapping[str, One | Iterable[One]]
"""A directory (a run, or a folder with runs below it), a run, several of them, or labels with such."""


def say(line: str) -> None:
    """Print one line on the standard error stream."""
    print(f"fedsim plot: {line}", file=sys.stderr)


def as_groups(runs: Runs) -> dict[str, list[RunRecord]]:
    """Groups by label; a mapping's labels stay, all else is put into groups that differ in nothing but the seed.

    A run that was never written says little about its configuration, so each stands for itself unless a mapping puts
    it with others.

    Raises:
        ConfigError: if there is no finished run.
    """
    if isinstance(runs, Mapping):
        groups = {str(label): [*chain(*_records(given))] for label, given in runs.items()}
    else:
        written, held = _records(runs)
        groups = group(readable(written, say), say)
        for record in held:
            label, count = str(record.manifest.get("strategy", "run")), 2
            while label in groups:
                label, count = f"{label.removesuffix(f' #{count - 1}')} #{count}", count + 1
            groups[label] = [record]
    groups = {label: records for label, records in groups.items() if records}
    if not groups:
        raise ConfigError("plot: no finished run found (a run has a manifest.json)")
    return groups


def only_group(runs: Runs, figure: str) -> list[RunRecord]:
    """The runs of the one group that ``figure`` shows.

    Raises:
        ConfigError: if there are several.
    """
    groups = as_groups(runs)
    if len(groups) > 1:
        raise ConfigError(
            f"{figure}: draws one group of runs, got {len(groups)} ({', '.join(groups)}); draw each on axes of its own"
        )
    return next(iter(groups.values()))


def _records(runs: One | Iterable[One]) -> tuple[list[RunRecord], list[RunRecord]]:
    """Records of runs on disk, and of runs in memory."""
    several = [runs] if isinstance(runs, (str, os.PathLike, RunRecord, Run)) else list(runs)
    written: list[RunRecord] = []
    held: list[RunRecord] = []
    for one in several:
        if isinstance(one, RunRecord):
            written.append(one)
        elif isinstance(one, Run):
            (held if one.path is None else written).append(_of(one))
        else:
            written.extend(load([one], say))
    return written, held


def _of(run: Run) -> RunRecord:
    if run.path is not None:
        return load([run.path], say)[0]
    record = RunRecord(Path("run in memory"), {"seed": run.manifest.get("seed")}, run.manifest)
    tables = {"metrics": run.metrics, "events": run.events, "clients": run.clients, "links": run.links}
    record.__dict__.update(tables)  # where the tables that a record reads from disk end up
    return record

"""A run that another process writes, seen from outside: its warnings, how far it is, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.checks import FedsimError
from fedsim.progress import headline, seconds, share
from fedsim.record import MARKER

LOUD = (" WARNING ", " ERROR ")
"""What marks the lines of ``run.log`` that are passed on."""


@dataclass(frozen=True)
class EndedRun:
    """How a finished run ended, as its directory says."""

    path: Path
    summary: dict[str, Any]
    manifest: dict[str, Any]


def read_ended(path: Path) -> EndedRun:
    """The end of the run in ``path``.

    Raises:
        FedsimError: if it has not ended, or what it left is damaged.
    """
    try:
        found = [json.loads((path / name).read_text()) for name in ("summary.json", "manifest.json")]
    except (OSError, ValueError) as error:
        raise FedsimError(f"{path}: the run has left no readable summary and manifest ({error})") from None
    return EndedRun(path, *found)


class FollowedRun:
    """Follows a run by the files it writes.

    Args:
        path: its directory, which may not be there yet.
        config: resolved, for its limits.
        say: is told its warnings.
        show: is told the share of the run that is over, from 0 to 1, and where it is; None if nobody looks.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
        show: Callable[[float, str], None] | None,
    ) -> None:
        self.path, self.config, self.say, self.show = path, config, say, show
        self._read = 0
        self._before = _marker(path)
        self._parts: list[tuple[str, int]] = []

    @property
    def begun(self) -> bool:
        """Whether the run writes there, and not one that it has yet to replace."""
        return _marker(self.path) not in (None, self._before)

    def look(self) -> None:
        """Tell what is new."""
        if not self.begun:
            return
        for line in self._new_lines():
            for mark in LOUD:
                _, found, text = line.partition(mark)
                if found:
                    self.say(text)
        if self.show is not None:
            self._show(self.show)

    def _new_lines(self) -> list[str]:
        """Whole lines of ``run.log`` since the last look."""
        try:
            with (self.path / "run.log").open("rb") as log:
                log.seek(self._read)
                text = log.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode(errors="replace").splitlines()

    def _show(self, show: Callable[[float, str], None]) -> None:
        table = self.path / "metrics.parquet"
        try:
            parts = sorted((part.name, part.stat().st_mtime_ns) for part in table.iterdir())
        except OSError:
            return
        if not parts or parts == self._parts:
            return
        self._parts = parts
        import pandas as pd

        try:
            metrics = pd.read_parquet(table)
        except (OSError, ValueError):  # it is being written
            return
        if len(metrics):
            row = {str(name): value for name, value in metrics.iloc[-1].items()}
            show(done(row, self.config), state(row))


def _marker(path: Path) -> tuple[int, int] | None:
    """What tells a run's directory from the one before in its place; None if there is none."""
    try:
        found = (path / MARKER).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def done(row: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """The share of a run that is over, by the limit that is nearest; from a row of ``metrics``."""
    moved = row["down_bytes"] + row["up_bytes"]
    reached = {"rounds": row["round"], "time_limit": row["time"], "updates": row["updates"], "bytes": moved}
    return share(reached, config)


def state(row: Mapping[str, Any]) -> str:
    """One line: seconds, rounds, updates, newest metric; from a row of ``metrics``."""
    parts = [seconds(row["time"]), f"round {row['round']:.0f}", f"{row['updates']:.0f} updates"]
    parts += [f"{name} {row[name]:.4g}" for name in headline(dict(row))]
    return " · ".join(parts)

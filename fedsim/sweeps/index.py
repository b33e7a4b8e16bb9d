"""One tidy table over all members of a sweep: ``index.parquet`` and ``index.csv``, whole at any time."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedsim.config import GROUPS
from fedsim.identity import NOT_IDENTITY, config_sha256
from fedsim.record import MARKER
from fedsim.recording import IDENTITY, is_complete

if TYPE_CHECKING:
    import pyarrow as pa

FIRST = ("member", "status", "seed", "strategy")
"""Columns before the settings."""

OUTCOME = ("stopped_by", "virtual_seconds", "rounds_done", "updates_done", "up_bytes", "down_bytes", "wall_seconds")
"""Columns after them, none called as a setting is; those of the final metrics follow, such as ``final_accuracy``."""

HASHES = ("config_sha256", "code_sha256", "model_sha256", "events_sha256")
LAST = (*HASHES, "path")

FINAL = "final_"
WRITE_SECONDS = 1.0
"""Between two times that the table is written."""


class Index:
    """The members of a sweep: a row for each, and for each run that lies in the folder already.

    Args:
        folder: of the sweep.
        overrides: as on the command line: each that is part of what a run is gets a column.
    """

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder = folder
        self.settings = list(dict.fromkeys([*_settings_before(folder / "index.csv"), *_settings(overrides)]))
        self._rows: dict[str, dict[str, Any]] = {}
        self._written = 0.0

    def add(self, name: str, config: Mapping[str, Any], choices: Mapping[str, str], status: str) -> None:
        """A member with its resolved configuration; ``status`` is waiting, running, complete, failed or stopped."""
        values = {key: _value(key, config, choices) for key in self.settings}
        first = {"member": name, "status": status, "seed": config.get("seed"), "strategy": choices.get("strategy")}
        path = {"config_sha256": config_sha256(config), "path": str(self.folder / name)}
        self._rows[name] = {**values, **first, **path, **_outcome(self.folder / name, status)}

    def judge(self, name: str, objective: float) -> None:
        """What a search judges a member by."""
        self._rows[name]["objective"] = objective

    def set(self, name: str, status: str) -> None:
        """A member has begun or ended."""
        self._rows[name] |= {"status": status, **_outcome(self.folder / name, status)}
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write both files, each whole or not at all; runs in the folder that are no members have rows too."""
        import pyarrow.csv
        import pyarrow.parquet

        for name, config, choices in _runs_in(self.folder):
            if name not in self._rows:
                self.add(name, config, choices, "complete" if is_complete(self.folder / name) else "stopped")
        table = self._table()
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, write in (("parquet", pyarrow.parquet.write_table), ("csv", pyarrow.csv.write_csv)):
            draft = self.folder / f".index.{kind}.{os.getpid()}.draft"
            write(table, draft)
            os.replace(draft, self.folder / f"index.{kind}")
        self._written = time.monotonic()

    def _table(self) -> pa.Table:
        import pyarrow as pa

        rows = list(self._rows.values())
        metrics = dict.fromkeys(key for row in rows for key in row if key.startswith(FINAL))
        judged = ["objective"] if any("objective" in row for row in rows) else []
        names = dict.fromkeys([*FIRST, *self.settings, *judged, *OUTCOME, *metrics, *LAST])
        return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> list[Any]:
    """Numbers where all are, else texts."""
    plain = [value for value in values if value is not None]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in plain):
        whole = all(isinstance(value, int) for value in plain)
        return values if whole else [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _settings(overrides: Sequence[str]) -> list[str]:
    keys = [one.partition("=")[0].lstrip("+~") for one in overrides]
    return [key for key in keys if key.partition(".")[0] not in NOT_IDENTITY and not key.startswith("hydra")]


def _settings_before(path: Path) -> list[str]:
    """The settings of the index that an earlier sweep has left."""
    try:
        with open(path, newline="") as file:
            columns = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    known = {*FIRST, "objective", *OUTCOME, *LAST}
    return [name for name in columns if name not in known and not name.startswith(FINAL)]


def _value(key: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> Any:
    if key in GROUPS:
        return choices.get(key)
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _outcome(path: Path, status: str) -> dict[str, Any]:
    """What a member's directory says once it is complete."""
    if status != "complete":
        return {}
    try:
        summary, manifest = (json.loads((path / f"{name}.json").read_text()) for name in ("summary", "manifest"))
        values = (summary["stopped"], *(summary[key] for key in ("time", "round", "updates", "up_bytes", "down_bytes")))
        metrics = {f"{FINAL}{name}": value for name, value in summary["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # somebody has taken it away meanwhile
        return {}
    hashes = {name: manifest.get(name) for name in HASHES}
    return {**dict(zip(OUTCOME, (*values, manifest.get("wall_seconds")), strict=True)), **metrics, **hashes}


def _runs_in(folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Name, configuration and choices of the runs that have begun in a folder."""
    for marker in sorted(folder.glob(f"*/{MARKER}")):
        path = marker.parent
        for identity in (path / "manifest.json", path / "checkpoint" / IDENTITY):
            try:
                config = yaml.safe_load((path / "config.yaml").read_text())
                yield path.name, dict(config), dict(json.loads(identity.read_text())["choices"])
            except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
                continue
            break

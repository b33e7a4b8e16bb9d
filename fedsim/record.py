"""Columnar logs of a run and the directory they are written to.

A table is a directory of part files, each renamed into place when complete: pandas reads the directory as
one table, and a killed run leaves readable ones. Hashes are over column values in row order, not over files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fedsim.checks import ConfigError, FedsimError, said

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

EVENT_COLUMNS = {
    "task": "int64",
    "client": "int64",
    "job": "string",
    "tag": "string",
    "dispatched": "float64",
    "started": "float64",
    "computed": "float64",
    "upload_started": "float64",
    "arrived": "float64",
    "version": "int64",
    "applied_version": "int64",
    "staleness": "int64",
    "steps": "int64",
    "samples": "int64",
    "down_bytes": "int64",
    "up_bytes": "int64",
    "group": "int64",
    "outcome": "string",
}
"""Columns of ``events``: a row per task. Times are virtual seconds, missing where the task never came to it;
``applied_version`` is the version an applied result was applied to, so ``staleness = applied_version - version``."""

LINK_COLUMNS = {
    "src": "int64",
    "dst": "int64",
    "sent": "float64",
    "arrived": "float64",
    "bytes": "int64",
    "tag": "string",
}
"""Columns of ``links``: a row per message between nodes, and per directed edge of a gossip step."""

METRIC_COLUMNS = {
    "version": "int64",
    "round": "int64",
    "time": "float64",
    "updates": "int64",
    "samples": "int64",
    "up_bytes": "int64",
    "down_bytes": "int64",
}
"""The first columns of ``metrics``; a float64 column per metric follows."""

NOT_HASHED = ("group",)
"""How a task was executed is no part of what happened."""


class Log:
    """Rows of named, typed columns, kept in order; a row may be closed after later ones.

    Args:
        columns: names and types (``int64``, ``float64`` or ``string``); None in a row is a missing value.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)
        self.rows: list[tuple[Any, ...] | None] = []
        self._closed = 0

    def columns_at(self, name: str) -> int:
        """The position of a column in a row."""
        return list(self.columns).index(name)

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a closed row at the end."""
        self.rows.append(row)

    def put(self, index: int, row: tuple[Any, ...]) -> None:
        """Close row ``index``; rows before it may still be open."""
        if index >= len(self.rows):
            self.rows.extend([None] * (index + 1 - len(self.rows)))
        self.rows[index] = row

    def closed(self) -> int:
        """How many rows from the first on are closed."""
        while self._closed < len(self.rows) and self.rows[self._closed] is not None:
            self._closed += 1
        return self._closed

    def table(self, first: int = 0, last: int | None = None) -> pa.Table:
        """Rows ``first .. last - 1`` as an arrow table; all of them must be closed."""
        import pyarrow as pa

        width = len(self.columns)  # a column may have come after a row
        rows = [(*row, *[None] * (width - len(row))) for row in self.rows[first:last] if row is not None]
        columns = list(zip(*rows, strict=True)) if rows else [()] * width
        types = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
        arrays = [
            pa.array(column, type=types[kind]) for column, kind in zip(columns, self.columns.values(), strict=True)
        ]
        return pa.table(arrays, names=list(self.columns))

    def frame(self) -> pd.DataFrame:
        """All rows as pandas gives them back from the parquet files."""
        frame: pd.DataFrame = self.table().to_pandas()
        return frame

    def sha256(self) -> str:
        """Hash over the values, column by column in row order, without the columns of ``NOT_HASHED``."""
        total = hashlib.sha256()
        for position, (name, kind) in enumerate(self.columns.items()):
            if name in NOT_HASHED:
                continue
            values = [row[position] for row in self.rows if row is not None]
            total.update(f"{name}:{kind}:{len(values)}\n".encode())
            if kind == "string":
                total.update("\n".join(map(str, values)).encode())
            else:
                missing = np.array([value is None for value in values], dtype=np.bool_)
                filled = [0 if value is None else value for value in values]
                total.update(missing.tobytes())
                total.update(np.array(filled, dtype=kind).astype(f"<{kind[0]}8").tobytes())
        return total.hexdigest()


class RunDirectory:
    """One run's directory, locked as long as the run writes there; made by :meth:`create` or :meth:`reopen`."""

    FLUSH_SECONDS = 2.0

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock
        self._written: dict[str, int] = {}
        self._parts: dict[str, int] = {}

    @classmethod
    def create(cls, path: str | Path, overwrite: bool = False) -> RunDirectory:
        """A new directory, with its parents.

        Args:
            path: where.
            overwrite: replace a directory that holds a run.

        Raises:
            ConfigError: if ``path`` exists and may not be replaced.
        """
        path = Path(os.path.normpath(path))
        check_free(path, overwrite)
        aside = path.with_name(f".{path.name}.{os.getpid()}.old")
        try:
            if path.exists() and any(path.iterdir()):
                path.rename(aside)  # so that two runs cannot both take it, and no half of it is ever seen
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / MARKER, "x")  # noqa: SIM115 - held as long as the run writes here
            lock.write("A run of fedsim; overwrite=true may replace this directory.\n")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if aside.exists() and not path.exists():
                aside.rename(path)
            raise ConfigError(f"out={path}: cannot be written: {error.strerror or error}") from None
        shutil.rmtree(aside, ignore_errors=True)
        return cls(path, lock)

    @classmethod
    def reopen(cls, path: str | Path) -> RunDirectory:
        """The directory of a run that was stopped, to go on writing to it.

        Raises:
            ConfigError: if it is no run's, or another process writes to it.
        """
        path = Path(os.path.normpath(path))
        try:
            lock = open(path / MARKER, "r+")  # noqa: SIM115 - held as long as the run writes here
        except OSError:
            raise ConfigError(f"{path}: is not a run's directory (it has no {MARKER})") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ConfigError(f"{path}: is being written by another run") from None
        return cls(path, lock)

    def close(self) -> None:
        """Writing is over: the directory may be replaced."""
        self._lock.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a file, complete or not at all."""
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        draft = target.with_name(f".{target.name}.draft")
        draft.write_text(text)
        os.replace(draft, target)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, complete or not at all."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def flush(self, name: str, log: Log) -> None:
        """Write the closed rows of ``log`` not yet written as a new part of the table ``name``."""
        import pyarrow.parquet as pq

        folder = self.path / f"{name}.parquet"
        folder.mkdir(exist_ok=True)
        first, last = self._written.get(name, 0), log.closed()
        part = self._parts.get(name, 0)
        if last == first and part:  # an empty table still gets one part
            return
        draft = folder / f".part-{part:06d}.draft"
        pq.write_table(log.table(first, last), draft)
        with open(draft, "rb+") as written:
            os.fsync(written.fileno())  # a checkpoint counts on it, also after a power failure
        os.replace(draft, folder / f"part-{part:06d}.parquet")
        self._written[name], self._parts[name] = last, part + 1

    @property
    def parts(self) -> dict[str, int]:
        """How many parts of each table that grows have been written."""
        return dict(self._parts)

    def cut_back(self, parts: Mapping[str, int], rows: Mapping[str, int]) -> None:
        """Delete every draft and all parts of the tables that grow but the first ``parts[name]``, with ``rows[name]``
        rows, of each; what is flushed from now on follows these."""
        for name in GROWING:
            for part in (self.path / f"{name}.parquet").glob("*"):
                number = part.stem.rpartition("-")[2]
                if part.name.startswith(".") or not number.isdigit() or int(number) >= parts.get(name, 0):
                    part.unlink()
        self._parts, self._written = dict(parts), dict(rows)

    def read_back(self, name: str, parts: int, count: int) -> list[tuple[Any, ...] | None]:
        """The ``count`` rows in the first ``parts`` parts of a table, for a log to begin with.

        Raises:
            FedsimError: if they are not there.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows: list[tuple[Any, ...] | None] = []
        for number in range(parts):
            path = self.path / f"{name}.parquet" / f"part-{number:06d}.parquet"
            try:
                table = pq.read_table(path)
            except (OSError, pa.ArrowException) as error:
                raise FedsimError(f"{path}: is damaged, and the checkpoint counts on it ({said(error)})") from None
            rows.extend(zip(*(column.to_pylist() for column in table.columns), strict=True))
        if len(rows) != count:
            raise FedsimError(f"{self.path / name}.parquet: holds {len(rows)} rows, the checkpoint was made at {count}")
        return rows

    def write_log(self, name: str, log: Log) -> None:
        """Write a whole log as a table of one part, in place of what was there."""
        self._replace(name, log.table())

    def write_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write columns as a table of one part."""
        import pyarrow as pa

        self._replace(name, pa.table({key: np.asarray(values) for key, values in columns.items()}))

    def _replace(self, name: str, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        folder = self.path / f"{name}.parquet"
        folder.mkdir(exist_ok=True)
        draft = folder / ".part-000000.draft"
        pq.write_table(table, draft)
        os.replace(draft, folder / "part-000000.parquet")


MARKER = ".fedsim-run"
"""The file that makes a directory a run's, and is locked while the run writes there."""

GROWING = ("events", "links")
"""Tables that get part after part; the others are written whole."""

RUN_FILES = (
    MARKER, "config.yaml", "manifest.json", "summary.json", "run.log", "model.safetensors", "checkpoint",
    *(f"{table}.parquet" for table in ("metrics", "events", "clients", "links")),
    *(f"report.{kind}" for kind in ("png", "pdf", "csv", "md")),
)  # fmt: skip
"""All that a run's directory may hold, drafts of these apart."""


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a path that exists, unless it is an empty folder, or a run and nothing else that may be overwritten.

    Raises:
        ConfigError: naming ``out``.
    """
    path = Path(os.path.normpath(path))
    if path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"out={path}: is the working directory or above it, give the run one of its own")
    try:
        if not path.exists() and not path.is_symlink():
            return
        if path.is_symlink() or not path.is_dir():
            raise ConfigError(f"out={path}: is not a directory, give one that does not exist yet")
        if not any(path.iterdir()):
            return
        if not overwrite:
            raise ConfigError(f"out={path}: exists already, give another directory or overwrite=true")
        why = _not_only_a_run(path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be used: {error.strerror}") from None
    if why:
        raise ConfigError(f"out={path}: {why}, so overwrite=true will not delete it")


def _not_only_a_run(path: Path) -> str:
    """Why a directory may not be deleted: it is no run's, holds something else, or is being written to."""
    if not (path / MARKER).is_file():
        return f"is not a run's directory (it has no {MARKER})"
    ours = {*RUN_FILES, *(f".{name}.draft" for name in RUN_FILES), ".model.draft"}
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ours)
    for table in path.glob("*.parquet"):
        parts = re.compile(r"part-\d{6}\.parquet|\.part-\d{6}\.draft")
        foreign += [f"{table.name}/{entry.name}" for entry in table.iterdir() if not parts.fullmatch(entry.name)]
    if foreign:
        return f"is not only a run's directory (it holds {foreign[0]})"
    with open(path / MARKER) as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "is being written by another run"
    return ""

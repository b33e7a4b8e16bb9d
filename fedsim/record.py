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
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
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

Row = tuple[Any, ...]

NOT_HASHED = ("group",)
"""How a task was executed is no part of what happened."""


BLOCK = 1024
"""Rows in a block of a log: few enough that they lie in a processor's cache when they become columns."""


class Log:
    """Rows of named, typed columns, kept in order; a row may be closed after later ones.

    Rows lie in blocks. Once every row of a block is closed the block becomes arrow columns, which take less than half
    the memory of tuples and are hashed and written without a look at single values; however long one row stays open,
    it keeps only its own block from that.

    Args:
        columns: names and types (``int64``, ``float64`` or ``string``); None in a row is a missing value. More may
            be added in the course of a run: rows put before are missing there.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)
        self._blocks: list[list[Row | None] | pa.RecordBatch] = []
        self._open: list[int] = []
        """Rows of each block that are not closed, those to come included."""
        self._count = 0
        self._closed = 0

    def __len__(self) -> int:
        return self._count

    def append(self, row: Row) -> None:
        """Add a closed row at the end."""
        self.put(self._count, row)

    def put(self, index: int, row: Row) -> None:
        """Close row ``index``, which is open; rows before it may still be."""
        block, place = divmod(index, BLOCK)
        if index >= self._count:
            self._count = index + 1
            while len(self._blocks) <= block:
                self._blocks.append([None] * BLOCK)
                self._open.append(BLOCK)
                self._pack(len(self._blocks) - 2)
        self._blocks[block][place] = row
        self._open[block] = left = self._open[block] - 1
        if not left:
            self._pack(block)

    def pop(self) -> None:
        """Take back the row that was appended last."""
        self._count -= 1
        block, place = divmod(self._count, BLOCK)
        self._blocks[block][place] = None
        self._open[block] += 1

    def closed(self) -> int:
        """How many rows from the first on are closed."""
        while self._closed < self._count:
            block, place = divmod(self._closed, BLOCK)
            if not self._open[block]:
                self._closed = (block + 1) * BLOCK
            elif self._blocks[block][place] is not None:
                self._closed += 1
            else:
                break
        return min(self._closed, self._count)

    def rows(self, first: int = 0) -> list[Row | None]:
        """The rows from ``first`` on, None for an open one."""
        rows: list[Row | None] = []
        for block in range(first // BLOCK, len(self._blocks)):
            held = self._blocks[block]
            rows.extend(held if isinstance(held, list) else _rows(held))
        return rows[first % BLOCK : first % BLOCK + self._count - first]

    def load(self, tables: Iterable[pa.Table], rows: Iterable[Row | None] = ()) -> None:
        """Become a log of the rows in ``tables`` and then ``rows``."""
        self._blocks, self._open, self._count, self._closed = [], [], 0, 0
        closed = (row for table in tables for batch in table.to_batches(BLOCK) for row in _rows(batch))
        for index, row in enumerate(chain(closed, rows)):
            if row is not None:
                self.put(index, row)

    def table(self, first: int = 0, last: int | None = None) -> pa.Table:
        """Rows ``first .. last - 1`` as an arrow table, open ones left out."""
        import pyarrow as pa

        last = self._count if last is None else last
        batches, schema = [], self._schema()
        for block in range(first // BLOCK, -(-last // BLOCK)):
            held, start = self._blocks[block], block * BLOCK
            part = slice(max(first - start, 0), min(last - start, BLOCK))
            if isinstance(held, list):
                batches.append(self._batch(held[part]))
            else:
                batches.append(_widened(held.slice(part.start, part.stop - part.start), schema))
        return pa.Table.from_batches(batches, schema)

    def frame(self) -> pd.DataFrame:
        """All rows as pandas gives them back from the parquet files."""
        frame: pd.DataFrame = self.table().to_pandas()
        return frame

    def sha256(self) -> str:
        """Hash over the values, column by column in row order, without the columns of ``NOT_HASHED``."""
        import pyarrow.compute as pc

        total, table = hashlib.sha256(), self.table()
        for name, kind in self.columns.items():
            if name in NOT_HASHED:
                continue
            column = table.column(name)
            total.update(f"{name}:{kind}:{len(table)}\n".encode())
            if kind == "string":
                for number, chunk in enumerate(column.chunks):
                    total.update(b"\n" * bool(number) + _lines(chunk))
            else:
                total.update(pc.is_null(column).to_numpy().tobytes())
                total.update(pc.fill_null(column, 0).to_numpy().astype(f"<{kind[0]}8", copy=False).tobytes())
        return total.hexdigest()

    def _pack(self, block: int) -> None:
        """Make a block columns once all of it is closed; the last one stays rows, for its end may be taken back."""
        if 0 <= block < len(self._blocks) - 1 and not self._open[block]:
            self._blocks[block] = self._batch(self._blocks[block])

    def _batch(self, rows: Iterable[Row | None]) -> pa.RecordBatch:
        import pyarrow as pa

        width = len(self.columns)  # a column may have come after a row
        filled = [row if len(row) == width else (*row, *[None] * (width - len(row))) for row in rows if row is not None]
        columns = zip(*filled, strict=True) if filled else [()] * width
        schema = self._schema()
        arrays = [_array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        types = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
        return pa.schema([(name, types[kind]) for name, kind in self.columns.items()])


def _array(values: Sequence[Any], type: pa.DataType) -> pa.Array:
    """Values as an arrow array; many columns hold one value over and over, and arrow looks at each by itself."""
    import pyarrow as pa

    count, floats = len(values), pa.types.is_floating(type)
    if count and not floats and values[0] == values[-1] and values.count(values[0]) == count:  # -0.0 == 0.0
        return pa.repeat(pa.scalar(values[0], type=type), count)
    if not pa.types.is_string(type):
        try:
            packed = struct.pack(f"{count}{'d' if floats else 'q'}", *values)
        except struct.error:  # one is missing
            return pa.array(values, type=type)
        return pa.Array.from_buffers(type, count, [None, pa.py_buffer(packed)])
    return pa.array(values, type=type)


def _write(table: pa.Table, path: Path) -> None:
    """Write a parquet file. To look for repeated values among times and ids takes as long again, for there are few."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    few = [field.name for field in table.schema if not pa.types.is_floating(field.type) and field.name != "task"]
    pq.write_table(table, path, use_dictionary=few)


def _widened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A block with the columns that have come since."""
    import pyarrow as pa

    if batch.num_columns == len(schema):
        return batch
    later = [pa.nulls(len(batch), field.type) for field in list(schema)[batch.num_columns :]]
    return pa.RecordBatch.from_arrays([*batch.columns, *later], schema=schema)


def _lines(texts: pa.Array) -> bytes:
    """Texts one after the other with line ends between them; ``None`` for a missing one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), pc.fill_null(texts, "None"))
    joined: bytes = pc.binary_join(whole, "\n")[0].as_buffer().to_pybytes()
    return joined


def _rows(batch: pa.RecordBatch) -> list[Row]:
    return list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


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
        folder = self.path / f"{name}.parquet"
        folder.mkdir(exist_ok=True)
        first, last = self._written.get(name, 0), log.closed()
        part = self._parts.get(name, 0)
        if last == first and part:  # an empty table still gets one part
            return
        draft = folder / f".part-{part:06d}.draft"
        _write(log.table(first, last), draft)
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

    def read_back(self, name: str, parts: int, count: int) -> list[pa.Table]:
        """The first ``parts`` parts of a table, ``count`` rows together, for a log to begin with.

        Raises:
            FedsimError: if they are not there.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for number in range(parts):
            path = self.path / f"{name}.parquet" / f"part-{number:06d}.parquet"
            try:
                tables.append(pq.read_table(path))
            except (OSError, pa.ArrowException) as error:
                raise FedsimError(f"{path}: is damaged, and the checkpoint counts on it ({said(error)})") from None
        held = sum(len(table) for table in tables)
        if held != count:
            raise FedsimError(f"{self.path / name}.parquet: holds {held} rows, the checkpoint was made at {count}")
        return tables

    def write_log(self, name: str, log: Log) -> None:
        """Write a whole log as a table of one part, in place of what was there."""
        self._replace(name, log.table())

    def write_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write columns as a table of one part."""
        import pyarrow as pa

        self._replace(name, pa.table({key: np.asarray(values) for key, values in columns.items()}))

    def _replace(self, name: str, table: pa.Table) -> None:
        folder = self.path / f"{name}.parquet"
        folder.mkdir(exist_ok=True)
        draft = folder / ".part-000000.draft"
        _write(table, draft)
        os.replace(draft, folder / "part-000000.parquet")


MARKER = ".fedsim-run"
"""The file that makes a directory a run's, and is locked while the run writes there."""

GROWING = ("events", "links")
"""Tables that get part after part; the others are written whole."""

RUN_FILES = (
    MARKER, "config.yaml", "manifest.json", "summary.json", "run.log", "model.safetensors", "checkpoint", "logs",
    *(f"{table}.parquet" for table in ("metrics", "events", "clients", "links")),
    *(f"report.{kind}" for kind in ("png", "pdf", "csv", "md", "html")), "figures", "tensorboard",
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

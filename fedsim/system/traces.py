"""Traces: speeds, links and presence of real devices, from files.

A trace is a folder with two tables:

* ``devices.parquet``, a row per device, ascending in ``device`` (any whole numbers): ``seconds_per_step`` (s),
  ``down`` and ``up`` (Mbit/s), ``period`` (s). What was not measured is no column.
* ``presence.parquet``, there if ``period`` is: a row ``device, online, offline`` (s) per span ``[online, offline)``,
  in order of device and time, not overlapping, within ``[0, period]``. After its ``period`` a device's presence
  begins anew; a device without a row is never online, and there is one row at least.

Other columns are not looked at. Each client is one of the devices, drawn uniformly with replacement and keyed by
(seed, client) under one purpose: its speed, link and presence are the same device's. ``fedsim traces`` makes such
folders out of FedScale's and FLASH's files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import LONGEST_SECONDS, ConfigError, flag, said
from fedsim.rng import Draw, Randomness
from fedsim.system.availability import Availability, Change, States, Switching
from fedsim.system.base import SHORTEST, Ids, Nanoseconds, nanoseconds
from fedsim.system.compute import Compute
from fedsim.system.network import BYTES_PER_MEGABIT, Network

if TYPE_CHECKING:
    import pyarrow as pa

DEVICES, PRESENCE = "devices.parquet", "presence.parquet"

LEAST = {"seconds_per_step": SHORTEST, "down": 1e-9, "up": 1e-9, "period": SHORTEST}
"""Columns that ``devices.parquet`` may have, and their least values; the largest is ``LONGEST_SECONDS`` for each."""


# ---- the files -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Presence:
    """When devices come and go, as the switches of one period of each: every second one turns it on.

    Attributes:
        first: int64 ``[devices + 1]``, where each device's switches begin in the arrays below.
        times: int64 ns ``[switches]``, ascending for each device, in ``[0, period)``.
        turns_on: ``[switches]``, whether the device comes.
        gaps: int64 ns ``[switches]``, until the device's next switch, over the end of its period for its last.
        period: int64 ns ``[devices]``.
        always: ``[devices]``, whether a device without switches is online.
    """

    first: NDArray[np.int64]
    times: Nanoseconds
    turns_on: NDArray[np.bool_]
    gaps: Nanoseconds
    period: Nanoseconds
    always: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace, checked.

    Attributes:
        devices: how many there are.
        columns: float64 ``[devices]`` by name, those of ``LEAST`` that the trace has.
        presence: None if the trace has none.
        sha256: hash of the files.
    """

    devices: int
    columns: Mapping[str, NDArray[np.float64]]
    presence: Presence | None
    sha256: str

    def of_clients(self, clients: int, randomness: Randomness) -> NDArray[np.int64]:
        """The rows of the devices that clients ``0 .. clients - 1`` are: int64 ``[clients]``."""
        return randomness("trace.device", np.arange(clients)).integers(self.devices)


def load_trace(path: str | None) -> Trace:
    """The trace in a folder; read once, however many models use it.

    Raises:
        ConfigError: if there is none, or it is not as the module describes.
    """
    if path is None:
        raise ConfigError("path=null: give the folder of a trace; `fedsim traces --help` says how to make one")
    return _trace(path, _sha256(_read(path)))


def _read(path: str) -> dict[str, bytes]:
    """The bytes of the tables that are there."""
    where, folder = f"path={path}", Path(path)
    if not (folder / DEVICES).is_file():
        raise ConfigError(f"{where}: must be the folder of a trace, there is no {DEVICES} in it")
    try:
        return {name: (folder / name).read_bytes() for name in (DEVICES, PRESENCE) if (folder / name).exists()}
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None


def _sha256(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in files.values())).hexdigest()


@lru_cache(maxsize=4)
def _trace(path: str, sha256: str) -> Trace:
    files = _read(path)
    if _sha256(files) != sha256:  # read again in the course of a run, or when it is resumed
        raise ConfigError(f"path={path}: the trace is another one than when the run began")
    where = f"path={path}: {DEVICES}"
    table = _table(where, files[DEVICES])
    ids = _column(where, table, "device", whole=True)
    if not len(ids):
        raise ConfigError(f"{where}: holds no device")
    _refuse_rows(where, "device", ids, np.append(False, ids[1:] <= ids[:-1]), "ascending numbers")
    columns = {name: _column(where, table, name) for name in LEAST if name in table.column_names}
    for name, values in columns.items():
        wrong = (values < LEAST[name]) | (values > LONGEST_SECONDS)
        _refuse_rows(where, name, values, wrong, f">= {LEAST[name]:g} and <= {LONGEST_SECONDS:g}")
    if ("period" in columns) != (PRESENCE in files):
        raise ConfigError(f"{where}: a column period and a file {PRESENCE} go together")
    presence = None
    if PRESENCE in files:
        where = f"path={path}: {PRESENCE}"
        presence = _presence(where, _table(where, files[PRESENCE]), ids, columns["period"])
    return Trace(len(ids), columns, presence, sha256)


def _table(where: str, content: bytes) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{where}: cannot be read as parquet ({said(error)})") from None


def _column(where: str, table: pa.Table, name: str, whole: bool = False) -> NDArray[Any]:
    """A column as float64, or as int64 if it must be ``whole`` numbers."""
    import pyarrow as pa

    if name not in table.column_names:
        raise ConfigError(f"{where}: has no column {name} (it has {', '.join(table.column_names) or 'none'})")
    column = table.column(name)
    integer = pa.types.is_integer(column.type)
    if not (integer or (pa.types.is_floating(column.type) and not whole)) or column.null_count:
        raise ConfigError(f"{where}: {name} must be {'whole ' if whole else ''}numbers, none missing: {column.type}")
    read: NDArray[Any] = column.to_numpy()
    if whole:
        _refuse_rows(where, name, read, read > np.iinfo(np.int64).max, "whole numbers below 2^63")
    values: NDArray[Any] = np.asarray(read, dtype=np.int64 if whole else np.float64)
    _refuse_rows(where, name, values, ~np.isfinite(values), "finite numbers")
    return values


def _refuse_rows(where: str, name: str, values: NDArray[Any], wrong: NDArray[np.bool_], allowed: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise ConfigError(f"{where}: {name} is {values[rows[0]]} in row {rows[0]}; allowed: {allowed}")


def _presence(where: str, table: pa.Table, ids: NDArray[np.int64], period: NDArray[np.float64]) -> Presence:
    device = _column(where, table, "device", whole=True)
    online, offline = (_column(where, table, name) for name in ("online", "offline"))
    if not len(device):
        raise ConfigError(f"{where}: holds no span, so that no device would ever be online")
    row = np.minimum(np.searchsorted(ids, device), len(ids) - 1)
    _refuse_rows(where, "device", device, ids[row] != device, f"those of {DEVICES}")
    _refuse_rows(where, "device", device, np.append(False, device[1:] < device[:-1])[: len(device)], "ascending order")
    _refuse_rows(where, "online", online, online < 0, ">= 0")
    _refuse_rows(where, "offline", offline, offline <= online, "later than online")
    _refuse_rows(where, "offline", offline, offline > period[row], "at most the device's period")
    overlaps = (device[1:] == device[:-1]) & (online[1:] < offline[:-1])
    _refuse_rows(where, "online", online, np.append(False, overlaps)[: len(online)], "not before the last span's end")
    return _switches(row, nanoseconds(online), nanoseconds(offline), nanoseconds(period))


def _switches(device: NDArray[np.int64], online: Nanoseconds, offline: Nanoseconds, period: Nanoseconds) -> Presence:
    """The switches of spans ``[online, offline)`` of the devices ``device``, in order."""
    kept = online < offline  # a span may vanish when it is rounded
    device, online, offline = device[kept], online[kept], offline[kept]
    always = np.zeros(len(period), dtype=np.bool_)
    always[device] = True
    who = np.concatenate([device, device])
    times = np.concatenate([online, offline % period[device]])
    turns_on = np.repeat([True, False], len(device))
    order = np.lexsort((times, who))
    who, times, turns_on = who[order], times[order], turns_on[order]
    # Where one span ends and the next begins nobody switches; the end of the period is its beginning, too.
    meets = (who[1:] == who[:-1]) & (times[1:] == times[:-1])
    real = ~(np.append(False, meets) | np.append(meets, False))[: len(who)]
    who, times, turns_on = who[real], times[real], turns_on[real]
    first = np.searchsorted(who, np.arange(len(period) + 1))
    following = np.arange(1, len(who) + 1)
    last = first[who + 1] == following
    following[last] = first[who[last]]
    gaps = times[following] - times + np.where(last, period[who], 0)
    return Presence(first, times, turns_on, gaps, period, always)


def write_trace(
    out: Path, columns: Mapping[str, NDArray[Any]], presence: Mapping[str, NDArray[Any]] | None, overwrite: bool = False
) -> None:
    """Write a trace, whole or not at all.

    Args:
        out: the folder to make.
        columns: of ``devices.parquet`` without ``device``, each ``[devices]``: devices are numbered from 0.
        presence: columns of ``presence.parquet``, or None.
        overwrite: replace a trace that is there.

    Raises:
        ConfigError: if ``out`` exists and is no trace or may not be overwritten, or what was to be written is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_out(out, overwrite)
    count = len(next(iter(columns.values())))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".draft", dir=out.parent))
        aside = draft.with_suffix(".old")
        try:
            pq.write_table(pa.table({"device": np.arange(count), **columns}), draft / DEVICES)
            if presence is not None:
                pq.write_table(pa.table(dict(presence)), draft / PRESENCE)
            _check_draft(draft, out)
            draft.chmod(0o755)  # a temporary folder is private
            if out.exists():
                os.replace(out, aside)
            os.replace(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written: {error.strerror}") from None


def _check_draft(draft: Path, out: Path) -> None:
    try:
        load_trace(str(draft))
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"path={draft}", f"--out={out}")) from None


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that a trace may not be written to.

    Raises:
        ConfigError: if it exists and is no trace, or is one that may not be overwritten.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir() or {each.name for each in out.iterdir()} - {DEVICES, PRESENCE}:
        raise ConfigError(f"--out={out}: exists and is no trace; give a new folder")
    if not overwrite:
        raise ConfigError(f"--out={out}: exists; give a new folder, or add --overwrite")


# ---- the models ----------------------------------------------------------------------------------


def _measured(trace: Trace, path: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in trace.columns]
    if missing:
        there = ", ".join(trace.columns) or "nothing"
        raise ConfigError(f"path={path}: this trace has no {' or '.join(missing)} (it has {there})")


class TraceCompute(Compute):
    """Seconds per step of a trace's devices.

    Args:
        path: the trace's folder, with a column ``seconds_per_step``.
        jitter: as in :class:`Compute`.
        jitter_law: as in :class:`Compute`.

    Raises:
        ConfigError: if the trace cannot be read or has no such column.
    """

    def __init__(self, path: str | None = None, jitter: float = 0.0, jitter_law: str = "lognormal") -> None:
        super().__init__(jitter, jitter_law)
        self._trace = load_trace(path)
        self.path, self.sha256 = str(path), self._trace.sha256
        _measured(self._trace, self.path, ("seconds_per_step",))

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        """Those of the devices that the clients are."""
        return self._trace.columns["seconds_per_step"][self._trace.of_clients(clients, self._randomness)]


class TraceNetwork(Network):
    """Bandwidths of a trace's devices, in Mbit/s.

    Args:
        path: the trace's folder, with columns ``down`` and ``up``.
        latency: seconds one way, for all.

    Raises:
        ConfigError: if the trace cannot be read or has no such columns.
    """

    def __init__(self, path: str | None = None, latency: float = 0.05) -> None:
        super().__init__(latency)
        self._trace = load_trace(path)
        self.path, self.sha256 = str(path), self._trace.sha256
        _measured(self._trace, self.path, ("down", "up"))

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Give every client its device's bandwidths."""
        rows = self._trace.of_clients(clients, randomness)
        self.down_bytes_per_second = self._trace.columns["down"][rows] * BYTES_PER_MEGABIT
        self.up_bytes_per_second = self._trace.columns["up"][rows] * BYTES_PER_MEGABIT


class TraceAvailability(Availability):
    """Presence of a trace's devices, over and over: a client is online in its device's spans.

    Args:
        path: the trace's folder, with presence.
        shift: whether each client begins at a random point of its device's period, keyed by (seed, client).
            Otherwise time 0 is the beginning of every device's period, so that a time of day is one for all.

    Raises:
        ConfigError: if the trace cannot be read or has no presence; from :meth:`advance` if its files have changed
            since.
    """

    def __init__(self, path: str | None = None, shift: bool = False) -> None:
        trace = load_trace(path)
        self.path, self.sha256 = str(path), trace.sha256
        self.shift = flag("shift", shift)
        if trace.presence is None:
            raise ConfigError(
                f"path={path}: this trace has no presence (it has {', '.join(trace.columns) or 'nothing'})"
            )

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Set the states at time 0."""
        trace = _again(self.path, self.sha256)
        presence = _presence_of(trace)
        devices = trace.of_clients(clients, randomness)
        start = np.zeros(clients, dtype=np.int64)
        if self.shift:
            period = presence.period[devices]
            start = np.floor(randomness("trace.shift", np.arange(clients)).uniform() * period).astype(np.int64)
        self._online = presence.always[devices]
        self._switching = np.flatnonzero(presence.first[devices + 1] > presence.first[devices])
        self._replay = _Replay(self.path, self.sha256, devices[self._switching], start[self._switching])
        if len(self._switching):
            self._replay.prepare(len(self._switching), randomness)
            self._online[self._switching] = self._replay.online

    def next_change(self) -> int | None:
        """The next switch; None if no client ever switches."""
        return self._replay.next_change() if len(self._switching) else None

    def advance(self, now: int) -> Change:
        """Make all switches up to and including ``now``."""
        if not len(self._switching):
            return self._switching, self._switching
        came, went = (self._switching[each] for each in self._replay.advance(now))
        self._online[came], self._online[went] = True, False
        return came, went


def _again(path: str, sha256: str) -> Trace:
    """The trace that presence was made of; its constructor's caller knows the key, here nobody else does.

    Raises:
        ConfigError: if it is another one now, or none.
    """
    try:
        return _trace(path, sha256)
    except ConfigError as error:
        raise ConfigError(f"availability.{error}") from None


def _presence_of(trace: Trace) -> Presence:
    assert trace.presence is not None
    return trace.presence


class _Replay(Switching):
    """The clients that do switch, each by its device's own list.

    It holds arrays over clients only. The switches themselves stay with the loaded trace: they would be saved with
    every checkpoint otherwise.

    Args:
        path: the trace's folder.
        sha256: hash of its files.
        devices: int64 ``[clients]``, rows of devices that have switches.
        start: int64 ns ``[clients]``, where in its device's period each client is at time 0.
    """

    def __init__(self, path: str, sha256: str, devices: NDArray[np.int64], start: Nanoseconds) -> None:
        self.path, self.sha256 = path, sha256
        self._devices, self._start = devices, start

    def _first(self, ids: Ids) -> tuple[States, Nanoseconds]:
        presence = _presence_of(_again(self.path, self.sha256))
        first, end = presence.first[self._devices], presence.first[self._devices + 1]
        coming = _later(presence.times, first, end, self._start)
        wraps = coming == end
        coming = np.where(wraps, first, coming)
        self._coming = coming - first  # which of its device's switches is the client's first one
        wait = presence.times[coming] + np.where(wraps, presence.period[self._devices], 0) - self._start
        return ~presence.turns_on[coming], wait

    def _spans(self, ids: Ids, interval: NDArray[np.int64], online: States) -> Nanoseconds:
        presence = _presence_of(_again(self.path, self.sha256))
        first = presence.first[self._devices[ids]]
        count = presence.first[self._devices[ids] + 1] - first
        return presence.gaps[first + (self._coming[ids] + interval - 1) % count]


def _later(times: Nanoseconds, first: Ids, end: Ids, than: Nanoseconds) -> Ids:
    """The first index in ``[first, end)`` at which ascending ``times`` are later than ``than``, else ``end``: ``[k]``.

    Bisection of all ``k`` ranges at once.
    """
    low, high = first.copy(), end.copy()
    while (low < high).any():
        middle = (low + high) // 2
        later = (low == high) | (times[np.minimum(middle, len(times) - 1)] > than)
        low, high = np.where(later, low, middle + 1), np.where(later & (low < high), middle, high)
    return low

"""``fedsim traces``: other simulators' device files as traces of our own (:mod:`fedsim.system.traces`).

FedScale (arXiv:2105.11367; github.com/SymbioticLab/FedScale, ``benchmark/dataset/data/device_info``), both pickles:

* ``client_device_capacity``: ``{id: {"computation": ms, "communication": kbit/s}}``. Milliseconds are those of the
  inference of one sample; FedScale takes training for 3 times that, and so do we. There is one bandwidth for both
  directions. FedScale's clock divides kilobits of 1024 bits by it, ours are of 1000.
* ``client_behave_trace``: ``{id: {"active": [s], "inactive": [s], "finish_time": s, ...}}``: a device is there from
  ``active[i]`` to ``inactive[i]``, and all over again after ``finish_time``.

FLASH (Yang et al. 2021, arXiv:2006.06983; github.com/PKU-Chengxu/FLASH), both JSON:

* ``models/speed_distri.json``: ``{id: {"down_u": kB/s, "down_sigma": ..., "up_u": kB/s, "up_sigma": ...}}``. FLASH
  divides bytes / 1024 by them, so they are taken for kilobytes; only the means are used.
* ``data/state_traces.json``: ``{id: {"messages": "2020-01-29 12:00:00\\tscreen_lock\\n...", ...}}``. A device is
  there while it is locked, on Wi-Fi and charged, and its trace repeats from its last message on. Time 0 is FLASH's
  2020-01-02 00:00:00 for all. As there, a span that is still open at the end is none, and a device whose messages
  cannot be read or that is never there is left out.

The two files of a pair are of different devices. They are put together in order; where there are more spans than
speeds, the speeds begin anew, and speeds that are left over are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, number, said, whole
from fedsim.system.traces import check_out, write_trace
from fedsim.unpickling import load_plain

BACKWARD = 3.0
"""Time of a training step over that of inference, as FedScale takes it."""

FLASH_START = datetime(2020, 1, 2)

Span = tuple[float, float]
"""Seconds: from, to."""


@dataclass
class Spans:
    """Presence of devices as it is gathered.

    Attributes:
        periods: s, one per device.
        rows: ``(device, online, offline)``.
        left_out: how many devices have no usable record.
    """

    periods: list[float] = field(default_factory=list)
    rows: list[tuple[int, float, float]] = field(default_factory=list)
    left_out: int = 0

    def add(self, spans: Sequence[Span], period: float) -> None:
        """Append a device that is online in ``spans`` (s, in any order), cut to ``[0, period]`` and united."""
        device = len(self.periods)
        self.periods.append(period)
        united: list[Span] = []
        for online, offline in sorted((max(a, 0.0), min(b, period)) for a, b in spans):
            if offline <= online:
                continue
            if united and online <= united[-1][1]:
                united[-1] = (united[-1][0], max(offline, united[-1][1]))
            else:
                united.append((online, offline))
        self.rows += [(device, *span) for span in united]


# ---- FedScale ------------------------------------------------------------------------------------


def fedscale(
    capacity: str | None, behaviour: str | None, out: str, unpickle: bool, batch_size: int, overwrite: bool
) -> int:
    """Convert FedScale's files.

    Args:
        capacity: the file of speeds, or None.
        behaviour: the file of presence, or None.
        out: folder of the trace to make.
        unpickle: allow that they are unpickled, by a reader that runs nothing.
        batch_size: samples per step, for seconds per step.
        overwrite: replace a trace that is there.

    Raises:
        ConfigError: if a file is not as described, or it is not allowed to read it.
    """
    _some("--capacity", capacity, "--behaviour", behaviour)
    batch = whole("--batch-size", batch_size, least=1)
    check_out(Path(out), overwrite)
    if not unpickle:
        raise ConfigError(
            f"{capacity or behaviour}: FedScale's files are pickles, and a pickle can run any code; if you trust where "
            "they come from, add --unpickle (even then only plain data are read, and all else is refused)"
        )
    columns: dict[str, NDArray[np.float64]] = {}
    if capacity is not None:
        speeds = _entries("--capacity", capacity, load_plain("--capacity", capacity))
        milliseconds = _positive("--capacity", capacity, speeds, "computation")
        bandwidth = _positive("--capacity", capacity, speeds, "communication") / 1000
        columns = {"seconds_per_step": BACKWARD * batch * milliseconds / 1000, "down": bandwidth, "up": bandwidth}
    spans = None
    if behaviour is not None:
        spans = Spans()
        for name, entry in _entries("--behaviour", behaviour, load_plain("--behaviour", behaviour)).items():
            where = f"--behaviour={behaviour}: entry {name}"
            active, inactive = (_seconds(f"{where}: {each}", entry.get(each)) for each in ("active", "inactive"))
            if len(active) != len(inactive):
                raise ConfigError(f"{where}: active has {len(active)} times, inactive {len(inactive)}")
            period = number(f"{where}: finish_time", entry.get("finish_time"), above=0)
            spans.add(list(zip(active, inactive, strict=True)), period)
    return _write(out, columns, spans, overwrite)


def _seconds(where: str, values: Any) -> list[float]:
    try:
        times = [float(each) for each in values]
    except (TypeError, ValueError):
        times = [np.nan]
    if not np.isfinite(times).all():
        raise ConfigError(f"{where}: must be a list of seconds")
    return times


# ---- FLASH ---------------------------------------------------------------------------------------


def flash(speeds: str | None, states: str | None, out: str, overwrite: bool) -> int:
    """Convert FLASH's files.

    Args:
        speeds: the file of bandwidths, or None.
        states: the file of presence, or None.
        out: folder of the trace to make.
        overwrite: replace a trace that is there.

    Raises:
        ConfigError: if a file is not as described.
    """
    _some("--speeds", speeds, "--states", states)
    check_out(Path(out), overwrite)
    columns: dict[str, NDArray[np.float64]] = {}
    if speeds is not None:
        entries = _entries("--speeds", speeds, _json("--speeds", speeds))
        megabits = 8 / 1000  # in a kilobyte
        columns = {name: _positive("--speeds", speeds, entries, f"{name}_u") * megabits for name in ("down", "up")}
    spans = None
    if states is not None:
        spans = Spans()
        for entry in _entries("--states", states, _json("--states", states)).values():
            found = _ready(str(entry.get("messages", "")))
            if found is None:
                spans.left_out += 1
            else:
                spans.add(*found)
        if not spans.periods:
            raise ConfigError(f"--states={states}: none of its {spans.left_out} devices has messages that can be read")
    return _write(out, columns, spans, overwrite)


def _ready(messages: str) -> tuple[list[Span], float] | None:
    """When a device was locked, on Wi-Fi and charged, and its period, in seconds; None if it is to be left out."""
    state = {"locked": False, "wifi": False, "charged": False}
    since: float | None = None
    spans: list[Span] = []
    times: list[float] = []
    for line in messages.split("\n"):
        if not line.strip():
            continue
        parsed = _message(line)
        if parsed is None:
            return None
        at, change = parsed
        times.append(at)
        state |= change
        ready = all(state.values())
        if ready and since is None:
            since = at
        elif not ready and since is not None:
            spans.append((since, at))
            since = None
    if not spans or times[-1] - times[0] <= 0:
        return None
    begin, period = times[0], times[-1] - times[0]
    united = Spans()
    united.add([(online - begin, offline - begin) for online, offline in spans], period)
    wrapped: list[Span] = []
    for _, online, offline in united.rows:  # time 0 is somewhere in the period
        first = (online + begin) % period
        last = first + offline - online
        wrapped += [(first, last)] if last <= period else [(first, period), (0.0, last - period)]
    return (wrapped, period) if wrapped else None


CHANGES = {
    "screen_lock": {"locked": True},
    "screen_unlock": {"locked": False},
    "wifi": {"wifi": True},
    **{name: {"wifi": False} for name in ("unknown", "2g", "3g", "4g", "5g")},
    "battery_charged_on": {"charged": True},
    "battery_charged_off": {"charged": False},
    "screen_on": {},
    "screen_off": {},
}
"""What each state that FLASH records changes; battery levels, such as ``87.0%``, change nothing."""


def _message(line: str) -> tuple[float, Mapping[str, bool]] | None:
    """The seconds since ``FLASH_START`` and the change that a line tells; None if it cannot be read."""
    when, _, what = (part.strip() for part in line.strip().partition("\t"))
    change = {} if what.endswith("%") else CHANGES.get(what.lower())
    try:
        at = datetime.fromisoformat(when)
    except ValueError:
        return None
    if change is None or at.tzinfo is not None:
        return None
    return (at - FLASH_START).total_seconds(), change


# ---- both ----------------------------------------------------------------------------------------


def _some(*pairs: str | None) -> None:
    if pairs[1] is None and pairs[3] is None:
        raise ConfigError(f"{pairs[0]}, {pairs[2]}: give at least one of the two files")


def _json(key: str, path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}={path}: cannot be read as JSON ({said(error)})") from None


def _entries(key: str, path: str, content: Any) -> dict[Any, dict[str, Any]]:
    """What a file says about each device."""
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{key}={path}: must hold a dict with an entry per device")
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{key}={path}: entry {name} must be a dict")
    return content


def _positive(key: str, path: str, entries: Mapping[Any, dict[str, Any]], name: str) -> NDArray[np.float64]:
    values = [number(f"{key}={path}: entry {one}: {name}", each.get(name), above=0) for one, each in entries.items()]
    return np.array(values)


def _write(out: str, columns: Mapping[str, NDArray[np.float64]], spans: Spans | None, overwrite: bool) -> int:
    """Write the trace, and say what is in it and how to use it."""
    held = dict(columns)
    presence: dict[str, NDArray[Any]] | None = None
    if spans is not None:
        held = {name: np.resize(values, len(spans.periods)) for name, values in columns.items()}
        held["period"] = np.array(spans.periods)
        device, online, offline = np.array(spans.rows, dtype=np.float64).reshape(-1, 3).T
        presence = {"device": device.astype(np.int64), "online": online, "offline": offline}
    write_trace(Path(out), held, presence, overwrite)
    print(f"{out}: {len(next(iter(held.values())))} devices with {', '.join(held)}")
    groups = [group for name, group in (("seconds_per_step", "compute"), ("down", "network")) if name in held]
    if spans is not None and presence is not None:
        length = presence["offline"] - presence["online"]
        share = np.bincount(presence["device"], length, len(spans.periods)) / held["period"]
        print(f"{len(spans.rows)} spans; a device is online {share.mean():.1%} of the time", end="")
        print(f"; {spans.left_out} devices left out, they have no usable record" if spans.left_out else "")
        groups.append("availability")
    print("use it: fedsim run " + " ".join(f"{group}=trace {group}.path={out}" for group in groups))
    return 0

"""Checks of what a user hands in: one clear line naming the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any


class FedsimError(Exception):
    """Something went wrong that a user can act on; its text is one line."""


class ConfigError(FedsimError, ValueError):
    """The configuration or an argument is wrong. The command line ends with status 2."""


class SimulationError(FedsimError, RuntimeError):
    """A run cannot go on: nothing left to happen, a livelock, client code that raised."""


class TaskError(SimulationError):
    """A client's local code raised.

    Args:
        task: the task's id.
        fatal: whether it ends the run whatever the faults model says: it is this machine's failure, not the client's.
    """

    def __init__(self, text: str, task: int, fatal: bool = False) -> None:
        super().__init__(text)
        self.task = task
        self.fatal = fatal

    def __reduce__(self) -> tuple[type[TaskError], tuple[str, int, bool]]:
        return type(self), (str(self), self.task, self.fatal)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; it has, at the end of an instant.

    Args:
        text: one line.
        signal: its number.
    """

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal


def said(error: BaseException) -> str:
    """The first line of what somebody's exception says, without colours; its class if it says nothing."""
    try:
        text = str(error)
    except Exception:  # user code may raise anything, even here
        text = ""
    first = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().partition("\n")[0]
    return first or type(error).__name__


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence such as ``did you mean 'fedavg'?`` or the list of what is allowed."""
    names = sorted(str(each) for each in allowed)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    listed = ", ".join(names) if names else "nothing"
    return f"did you mean '{close[0]}'? (allowed: {listed})" if close else f"allowed: {listed}"


def one_of(key: str, value: Any, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of the names in ``allowed``."""
    names = list(allowed)
    if value not in names:
        raise ConfigError(f"{key}={value}: unknown name, {nearest(str(value), names)}")
    return str(value)


def number(
    key: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value`` as a finite float with ``least <= value <= most`` and ``above < value < below``."""
    allowed = _bounds(least, most, above, below)
    if not isinstance(value, (bool, int, float)) and hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key}={value}: must be a number {allowed}")
    try:
        checked = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        checked = math.inf
    if not math.isfinite(checked):
        raise ConfigError(f"{key}={checked}: must be a finite number {allowed}")
    if not (least <= checked <= most and above < checked < below):
        raise ConfigError(f"{key}={value}: must be a number {allowed}")
    return checked


LONGEST_SECONDS = 1e9
"""The longest span of virtual time that can be asked for: 31 years."""


def seconds(key: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return ``value`` as a span of virtual time in seconds, at most ``LONGEST_SECONDS``."""
    return number(key, value, least=least, above=above, most=LONGEST_SECONDS)


def optional_seconds(key: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float | None:
    """As :func:`seconds`, with ``None`` let through."""
    return None if value is None else seconds(key, value, least=least, above=above)


LARGEST = 10**15
"""The largest whole number that makes sense for anything here, exact as a float."""


def whole(key: str, value: Any, *, least: int = 0, most: int = LARGEST) -> int:
    """Return ``value`` as an int with ``least <= value <= most``; 3.0 counts as 3."""
    try:
        checked = number(key, value)
    except ConfigError:
        checked = math.nan
    allowed = f">= {least}" if most == LARGEST and not checked > most else f"from {least} to {most}"
    if not (math.isfinite(checked) and checked == int(checked) and least <= checked <= most):
        raise ConfigError(f"{key}={value}: must be a whole number {allowed}")
    return int(value)


def optional_whole(key: str, value: Any, *, least: int = 0, most: int = LARGEST) -> int | None:
    """As :func:`whole`, with ``None`` let through."""
    return None if value is None else whole(key, value, least=least, most=most)


def optional_number(key: str, value: Any, **bounds: float) -> float | None:
    """As :func:`number`, with ``None`` let through."""
    return None if value is None else number(key, value, **bounds)


def flag(key: str, value: Any) -> bool:
    """Return ``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: must be true or false")
    return value


def _bounds(least: float, most: float, above: float, below: float) -> str:
    parts = []
    if least > -math.inf:
        parts.append(f">= {least:g}")
    if above > -math.inf:
        parts.append(f"> {above:g}")
    if most < math.inf:
        parts.append(f"<= {most:g}")
    if below < math.inf:
        parts.append(f"< {below:g}")
    return " and ".join(parts) if parts else "(any finite value)"

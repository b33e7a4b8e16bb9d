"""When a run is over."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.checks import ConfigError, optional_number, optional_seconds, optional_whole


@dataclass(frozen=True)
class Stop:
    """A run ends at the end of the first instant at which any of these holds.

    Args:
        rounds: so many times ``cohort`` client results received.
        time_limit: virtual seconds.
        updates: client results received.
        bytes: bytes moved, up and down together.
        target: the validation metric has reached this: accuracy in (0, 1] from below, ``distance`` from above.
    """

    rounds: int | None = None
    time_limit: float | None = None
    updates: int | None = None
    bytes: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        plain = {  # a number of NumPy's, say, as Python's own
            "rounds": optional_whole("rounds", self.rounds, least=1),
            "time_limit": optional_seconds("time_limit", self.time_limit, above=0),
            "updates": optional_whole("updates", self.updates, least=1),
            "bytes": optional_whole("bytes", self.bytes, least=1),
            "target": optional_number("target", self.target, above=0),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if all(limit is None for limit in (self.rounds, self.time_limit, self.updates, self.bytes)):
            raise ConfigError("rounds: give at least one of rounds, time_limit, updates, bytes")

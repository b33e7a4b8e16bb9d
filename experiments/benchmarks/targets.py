"""What fedsim wants to reach, in one table, and the gate that holds results against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GATE = 0.6
"""Share of a target below which the short benchmark fails: a shared machine may take a third, not more."""


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Attributes:
        key: of the result.
        what: for tables.
        value: the target.
        unit: after the number.
        most: whether the target is a limit that must not be exceeded.
        gated: whether the short benchmark fails below ``GATE`` of it. Not so for tasks a second, which are the
            machine's as much as fedsim's: their share of a bare loop's is.
    """

    key: str
    what: str
    value: float
    unit: str = ""
    most: bool = False
    gated: bool = True

    def share(self, result: float) -> float:
        """How much of the target is reached; 1 and more is all of it."""
        return self.value / result if self.most else result / self.value


SCHEDULE = 50_000.0
"""Client tasks per processor second with nothing trained."""

OF_BARE = 0.05
"""The same as a share of what a bare event loop in Python does there: 50,000 where that makes a million."""

TARGETS = (
    Target("W1a", "W1a inline, speed per core", 2.8, "x naive"),
    Target("W1b", "W1b inline, speed per core", 1.4, "x naive"),
    Target("W2a", "W2a inline, speed per core", 1.15, "x naive"),
    Target("W2b", "W2b inline, speed per core", 1.15, "x naive"),
    Target("W3", "W3 inline, speed per core", 4.0, "x naive"),
    Target("W1a ray", "W1a, Ray with 2 workers against 1, wall", 1.7, "x"),
    Target("W2a ray", "W2a, Ray with 2 workers against 1, wall", 1.7, "x"),
    Target("W2b ray", "W2b, Ray with 2 workers against 1, wall", 1.7, "x"),
    Target("asynchronous", "FedBuff's samples per second against FedAvg's, W1a, 50 in flight", 0.8, "x"),
    Target("fedavg 10", "schedule only, FedAvg, 10 in flight", SCHEDULE, "tasks/s", gated=False),
    Target("fedavg 100", "schedule only, FedAvg, 100 in flight", SCHEDULE, "tasks/s", gated=False),
    Target("fedavg 1000", "schedule only, FedAvg, 1,000 in flight", SCHEDULE, "tasks/s", gated=False),
    Target("fedbuff 10", "schedule only, FedBuff, 10 in flight", SCHEDULE, "tasks/s", gated=False),
    Target("fedbuff 50", "schedule only, FedBuff, 50 in flight", SCHEDULE, "tasks/s", gated=False),
    Target("fedbuff 1000", "schedule only, FedBuff, 1,000 in flight", SCHEDULE, "tasks/s", gated=False),
    Target("fedavg 100 bare", "schedule only, FedAvg, 100 in flight, against a bare loop", OF_BARE, "x"),
    Target("fedavg 1000 bare", "schedule only, FedAvg, 1,000 in flight, against a bare loop", OF_BARE, "x"),
    Target("fedbuff 50 bare", "schedule only, FedBuff, 50 in flight, against a bare loop", OF_BARE, "x"),
    Target("fedbuff 1000 bare", "schedule only, FedBuff, 1,000 in flight, against a bare loop", OF_BARE, "x"),
    Target("million", "a million clients, peak memory", 2.0, "GB", most=True),
    Target("start", "`fedsim run rounds=1`, the whole command", 6.0, "s", most=True),
)

KEYS = {target.key for target in TARGETS}


def missed(results: Mapping[str, float], share: float = GATE) -> list[str]:
    """A line for each result that is below so much of a target that is gated; what was not measured is left out.

    Raises:
        KeyError: for a result that no target is known for.
    """
    known = {target.key: target for target in TARGETS}
    lines = []
    for key, result in results.items():
        target = known[key]
        if target.gated and not target.share(result) >= share:  # NaN is no success either
            reached = f"{target.share(result):.0%} of the target {target.value:g}"
            lines.append(f"{target.what}: {result:.4g} {target.unit} is {reached}")
    return lines

"""What a node keeps between tasks: the client's state, pending until the server says that a result was used."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedsim.flower.messages import arrays, tensors

COMMITTED = "fedsim.committed"
PENDING = "fedsim.pending."
COMMITS = "fedsim.commits"


class Kept:
    """A client's own tensors in the state of its node's context.

    Args:
        records: the state of a context, which Flower keeps as long as the run and the node last.
    """

    def __init__(self, records: RecordDict) -> None:
        self.records = records

    def decide(self, accepted: Iterable[int], undecided: Iterable[int]) -> None:
        """Commit what the tasks in ``accepted`` have made of the state, in that order, and drop what came to nothing.

        A task may be named twice; what has been committed before is not pending any more.
        """
        for task in accepted:
            new = self.records.pop(f"{PENDING}{task}", None)
            if isinstance(new, ArrayRecord):
                committed = self.records.get(COMMITTED)
                held = dict(committed) if isinstance(committed, ArrayRecord) else {}
                self.records[COMMITTED] = ArrayRecord({**held, **new})
                self.records[COMMITS] = ConfigRecord({"count": self.commits() + 1})
        alive = {f"{PENDING}{task}" for task in undecided}
        for name in [each for each in self.records if each.startswith(PENDING) and each not in alive]:
            del self.records[name]

    def commits(self) -> int:
        """How many tasks have changed the state so far."""
        held = self.records.get(COMMITS)
        return int(str(held["count"])) if isinstance(held, ConfigRecord) else 0

    def committed(self) -> dict[str, Tensor]:
        """The state that results the server has used have left."""
        return tensors(self.records, COMMITTED) if COMMITTED in self.records else {}

    def put(self, task: int, state: dict[str, Tensor]) -> None:
        """Keep what a task has made of the state until the server says what became of its result."""
        if state:
            self.records[f"{PENDING}{task}"] = arrays(state)

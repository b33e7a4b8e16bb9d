"""The machines of a federation: how fast they compute and send, when they are online, what gets lost.

Units: parameters are in seconds and megabits (10^6 bits) per second; sizes are in bytes; every time that
comes out is an integer number of virtual nanoseconds (int64). Every draw is keyed by the seed and the
client, or the client and its own n-th task, slot or interval, so all strategies meet the same devices.
Models hold arrays over clients and plain numbers only: they can be pickled at any moment of a run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.rng import Randomness
from fedsim.system import single
from fedsim.system.availability import Always, Availability, ClassCounts
from fedsim.system.base import LONGEST, Ids
from fedsim.system.compute import Compute
from fedsim.system.compute import Constant as ConstantCompute
from fedsim.system.faults import Faults, Stage
from fedsim.system.network import Network, NoNetwork

__all__ = ["LONGEST", "Availability", "Compute", "Faults", "Network", "SpanColumns", "Spans", "Stage", "System"]


Spans = tuple[int, int, int, int, float]
"""How long a task's download, local work and upload take, in whole nanoseconds; the code of the :class:`Stage` at which
it is lost, and the share of its local work that is done by then."""

SpanColumns = tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.integer[Any]], NDArray[np.float64]
]
"""The :data:`Spans` of many tasks, each item ``[k]``."""


class System:
    """One model of each kind.

    Args:
        compute: durations of local work; 0.1 s per step for everybody unless given.
        network: durations of transfers; none unless given.
        availability: who is online when; everybody always unless given.
        faults: what is lost; nothing unless given.
    """

    def __init__(
        self,
        compute: Compute | None = None,
        network: Network | None = None,
        availability: Availability | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.compute = ConstantCompute() if compute is None else compute
        self.network = NoNetwork() if network is None else network
        self.availability = Always() if availability is None else availability
        self.faults = Faults() if faults is None else faults
        self.few = 1
        """So few tasks are planned one by one, which costs less than arrays do; known after :meth:`prepare`."""

    def prepare(self, clients: int, randomness: Randomness, class_counts: ClassCounts = lambda: None) -> None:
        """Draw everything that is fixed per client, and put availability at time 0.

        Args:
            clients: how many there are.
            randomness: where all draws come from.
            class_counts: gives how many examples of each class each client holds, ``[clients, classes]``.
        """
        self.availability.meet(class_counts)
        self.compute.prepare(clients, randomness)
        self.network.prepare(clients, randomness)
        self.availability.prepare(clients, randomness)
        self.faults.prepare(clients, randomness)
        self._repeated = single.applies(self)
        self.few = single.FEW if self._repeated else 1

    def spans(
        self,
        clients: Ids,
        nth: Ids,
        steps: NDArray[np.int64],
        down_bytes: NDArray[np.int64],
        up_bytes: NDArray[np.int64],
    ) -> SpanColumns:
        """The spans of the ``nth[i]``-th tasks of ``clients[i]``, of so many local steps and bytes each: ``[k]``."""
        down, up = self.network.down(clients, down_bytes), self.network.up(clients, up_bytes)
        stage, fraction = self.faults.draw(clients, nth)
        return down, self.compute.durations(clients, steps, nth), up, stage, fraction

    def spans_of_one(self, client: int, nth: int, steps: int, down_bytes: int, up_bytes: int) -> Spans:
        """What :meth:`spans` gives for one task, bit for bit and in a fraction of the time."""
        if not self._repeated:
            columns = self.spans(*np.array([[client], [nth], [steps], [down_bytes], [up_bytes]]))
            down, compute, up, stage, fraction = (column[0] for column in columns)
            return int(down), int(compute), int(up), int(stage), float(fraction)
        return single.spans(self.network, self.compute, self.faults, client, nth, steps, down_bytes, up_bytes)

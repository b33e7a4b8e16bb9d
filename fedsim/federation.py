"""What a strategy may see and do: one interface, on the virtual clock here, on a Flower grid in deployment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.rng import Draw
from fedsim.vectors import Layout

SERVER = -1
"""The server's own id among the nodes, for messages to and from it."""

Clients = int | Sequence[int] | NDArray[np.int64]


class Task(NamedTuple):
    """One piece of work a client was asked for. Times are virtual seconds."""

    id: int
    client: int
    job: str
    tag: Any
    version: int
    """The server's version when the task took effect."""
    steps: int
    """Local steps the client will run."""
    dispatched: float


@dataclass(slots=True, eq=False)
class Reply:
    """One result that has arrived. ``reply["delta"]`` is the tensor of that name; it is the strategy's own.

    Not frozen, for a run makes many and freezing triples what one costs.
    """

    task: Task
    arrived: float
    samples: int
    """Training examples the client holds."""
    payload: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.payload[name]

    @property
    def client(self) -> int:
        """Who answered."""
        return self.task.client


@dataclass(frozen=True, slots=True)
class Timer:
    """A timer that has gone off."""

    at: float
    tag: Any


class Federation(ABC):
    """The server's view of its clients.

    Attributes:
        clients: how many clients there are; their ids are ``0 .. clients - 1``.
        samples: ``[clients]`` training examples each holds (read only).
        cohort: how many results make a round, in every mode.
        layout: how a parameter vector is made up.
    """

    clients: int
    samples: NDArray[np.int64]
    cohort: int
    layout: Layout

    @property
    @abstractmethod
    def now(self) -> float:
        """Virtual seconds since the start (wall seconds in a deployment)."""

    @property
    @abstractmethod
    def version(self) -> int:
        """How many server steps have been published."""

    @property
    @abstractmethod
    def round(self) -> int:
        """How many times ``cohort`` results have been received; among peers, how many models have been published."""

    @property
    @abstractmethod
    def model(self) -> Tensor:
        """A copy ``[d]`` of the current model."""

    @property
    @abstractmethod
    def busy(self) -> NDArray[np.bool_]:
        """``[clients]``: who has a task (read only)."""

    @property
    @abstractmethod
    def online(self) -> NDArray[np.bool_]:
        """``[clients]``: who can be reached (read only)."""

    @property
    @abstractmethod
    def presence(self) -> NDArray[np.float64] | None:
        """``[clients]``: the share of time each is online in the long run, or None where nobody can know it."""

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """How many tasks are running or about to start."""

    @abstractmethod
    def idle(self) -> NDArray[np.int64]:
        """Ids of clients that are online and have no task, ascending."""

    @abstractmethod
    def pick(self, k: int, among: Sequence[int] | NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Draw up to ``k`` different clients that are online and idle, ascending by id.

        Fewer come back, possibly none, when fewer can be had. ``among`` restricts the draw.
        """

    @abstractmethod
    def dispatch(
        self,
        clients: Clients,
        start: Tensor | None = None,
        steps: int | Sequence[int] | NDArray[np.int64] | None = None,
        *,
        job: str = "train",
        tag: Any = None,
        local: bool = False,
        held: bool = False,
        deadline: float | None = None,
    ) -> list[int]:
        """Ask one client or many for a job; takes effect at the end of this instant, all dispatches as one batch.

        Args:
            clients: one id or several.
            start: vector ``[d]`` or one per client ``[k, d]`` to start from; default the model at take-effect.
            steps: local steps, one number or one per client; default what the job says.
            job: a key of the strategy's ``jobs``.
            tag: anything the strategy wants to see again; ``str(tag)`` is recorded.
            local: nothing travels (a peer trains its own model).
            held: the client already has the start vector, only the message travels down.
            deadline: virtual seconds from the start of the run at which the task is given up
                (``on_lost`` with why ``"deadline"``).

        Returns:
            The new tasks' ids, in the order of ``clients``.

        Raises:
            ValueError: for a client that has a task, an unknown client or job, or steps below 0.
        """

    @abstractmethod
    def cancel(self, task: int) -> None:
        """Give up a task in flight: its client is free at once, its state is as it was."""

    @abstractmethod
    def timer(self, at: float, tag: Any = None) -> None:
        """Call ``on_timer`` at ``at`` virtual seconds from the start of the run."""

    @abstractmethod
    def publish(self, vector: Tensor, used: Iterable[Reply]) -> None:
        """Make ``vector [d]`` the new model, made from the replies in ``used``.

        The replies' tasks become ``applied`` at the version they were applied to, their clients' new
        states are committed, and ``version`` grows by one. With nothing used nothing happens.

        Raises:
            ValueError: for a vector of another shape, or a reply already used or rejected.
            SimulationError: for a vector with non-finite items.
        """

    @abstractmethod
    def reject(self, reply: Reply, why: str) -> None:
        """Decide not to use a reply: outcome ``late`` if ``why`` is ``"late"``, else ``rejected``."""

    @abstractmethod
    def staleness(self, reply: Reply) -> int:
        """Versions published since the reply's task took effect."""

    @abstractmethod
    def stop(self, why: str) -> None:
        """End the run at the end of this instant."""

    @abstractmethod
    def send(self, src: int, dst: int, tag: Any = None, **tensors: Tensor) -> None:
        """Send one message between nodes: ``on_message`` when it arrives, nothing if ``dst`` is offline then."""

    @abstractmethod
    def exchange(self, vectors: Tensor, mixing_matrix: Tensor, tag: Any = None) -> None:
        """One synchronous gossip step of all clients: ``on_exchange`` gets ``mixing_matrix @ vectors``.

        ``vectors [clients, d]``; every off-diagonal entry ``[i, j]`` that is not zero is one message from
        ``j`` to ``i``. The step ends when the slowest link has delivered.
        """

    @abstractmethod
    def state(self, client: int, name: str) -> Tensor:
        """A copy of a client's committed state under ``name``; all jobs of a client share it."""

    @abstractmethod
    def kept(self, name: str) -> dict[int, Tensor]:
        """Copies of the committed state ``name`` by client, of those clients that have it, ascending by id."""

    @abstractmethod
    def profile(self, clients: NDArray[np.int64], steps: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """``[k]``: expected seconds of a task of ``steps`` local steps by each client, transfers included."""

    @abstractmethod
    def rng(self, purpose: str, *ids: Any) -> Draw:
        """Keyed randomness of this run for the strategy's own draws."""

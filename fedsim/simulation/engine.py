"""The main loop: the federation interface implemented on a virtual clock.

How one update travels: ``dispatch`` marks a client busy; at the end of the instant the whole batch takes
effect (snapshot of model, message and state; every time and size planned); the task waits untrained. When
the first waiting task falls due all that wait are trained together. Its arrival frees the client, checks
the result and hands it to the strategy, whose ``publish`` decides the outcome and commits the client's state.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import SimulationError
from fedsim.encoding import attributes_of
from fedsim.federation import Clients, Federation, Reply, Timer
from fedsim.kernel import NS, Kernel, Phase, to_ns
from fedsim.pool import Pool
from fedsim.problems.base import Problem
from fedsim.rng import Draw, Randomness
from fedsim.simulation.evaluation import Evaluation
from fedsim.simulation.garbage import COLLECTOR
from fedsim.simulation.lifecycle import Lifecycle
from fedsim.simulation.links import Links
from fedsim.simulation.stop import Stop
from fedsim.simulation.tries import Tries
from fedsim.strategy import Strategy
from fedsim.system import System
from fedsim.vectors import all_finite

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("fedsim")

LOGGED_WARNINGS = 10
FEW_PICKS = 16
"""So few clients are picked one by one, which costs less than arrays do."""

IDLE_CHANGES = 20_000
"""After so many presence changes during which nothing else happened a run is taken to be stuck."""

CHANGING = (
    "current", "updates", "samples_done", "staleness_sum", "stopped", "warnings", "_version", "_picks", "_idle_changes",
)  # fmt: skip
"""A simulation's own attributes that change between instants."""


class Simulation(Federation):
    """One run. ``problem`` and ``system`` must have been prepared for the same population.

    Args:
        eval_every: rounds between evaluations; 0 never evaluates.
        client_eval_every: rounds between evaluations on the clients' own examples; 0 never.
    """

    clock: ClassVar[str] = "virtual"
    """What its seconds are: ``virtual``, or ``wall``."""

    def __init__(
        self,
        strategy: Strategy,
        problem: Problem,
        system: System,
        pool: Pool,
        stop: Stop,
        randomness: Randomness,
        cohort: int,
        eval_every: int = 1,
        client_eval_every: int = 0,
    ) -> None:
        self.strategy, self.problem, self.system, self.pool = strategy, problem, system, pool
        self.limits, self.randomness = stop, randomness
        self.clients, self.cohort, self.layout = problem.clients, cohort, problem.layout
        self.samples = problem.samples.copy()
        self.samples.flags.writeable = False
        self.current = problem.initial()
        """The model itself, replaced and never written to: tasks in flight share it."""
        self.updates = 0
        """Client results received."""
        self.samples_done = 0
        self.staleness_sum = 0
        self.stopped: str | None = None
        self.warnings: Counter[str] = Counter()
        self.kernel = Kernel(limit=100_000 + 20 * self.clients)
        self.tasks = Lifecycle(self)
        self.links = Links(self)
        self.evaluation = Evaluation(self, eval_every, client_eval_every)
        self._version = 0
        self._picks = 0
        self._tries = Tries(randomness, self.clients)
        self._settled = True
        self._idle_changes = 0
        self._begun = False

    # ---- what a strategy sees --------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.kernel.now / NS

    @property
    def version(self) -> int:
        """Server steps published."""
        return self._version

    @property
    def round(self) -> int:
        """Cohorts of results received, or models published by peers: a node that is away must not hold up the count."""
        return self.strategy.rounds(self) if self.strategy.everybody else self.updates // self.cohort

    @property
    def model(self) -> Tensor:
        """A copy of the model."""
        return self.current.clone()

    @property
    def busy(self) -> NDArray[np.bool_]:
        """Who has a task."""
        return _read_only(self.tasks.busy)

    @property
    def online(self) -> NDArray[np.bool_]:
        """Who can be reached."""
        return _read_only(self.system.availability.online)

    @property
    def presence(self) -> NDArray[np.float64] | None:
        """What the presence model says."""
        return self.system.availability.shares()

    @property
    def in_flight(self) -> int:
        """Tasks running or about to start."""
        return len(self.tasks.of_client)

    def idle(self) -> NDArray[np.int64]:
        """Ids of clients online and without a task."""
        return np.flatnonzero(self.system.availability.online & ~self.tasks.busy)

    def pick(self, k: int, among: Any = None) -> NDArray[np.int64]:
        """A keyed draw of up to ``k`` idle clients."""
        self._picks += 1
        if among is None and 0 < 4 * k <= self.clients:
            found = self._pick_by_trial(k)
            if found is not None:
                return found
        pool = self.idle() if among is None else np.intersect1d(self.idle(), np.asarray(among, dtype=np.int64))
        if len(pool) <= k:
            return pool
        return np.sort(pool[self.randomness("pick", self._picks).choice(len(pool), max(k, 0))])

    def _pick_by_trial(self, k: int) -> NDArray[np.int64] | None:
        """``k`` idle clients without a look at everybody, or None if too many of those tried are away or busy.

        Tries are uniform, so the first ``k`` different idle ones are a uniform draw of the idle.
        """
        pick, tries = self._picks, 4 * k + 8
        if k <= FEW_PICKS:  # most of those tried are idle, so few need be drawn
            found = self._first_idle(self._tries.first(pick, k), k)
            if len(found) < k:
                found = self._first_idle(self._tries.draw(pick).integers(self.clients, tries).tolist(), k)
            found.sort()
            return np.array(found) if len(found) == k else None
        online, busy = self.system.availability.online, self.tasks.busy
        tried = self._tries.draw(pick).integers(self.clients, tries)
        idle = tried[online[tried] & ~busy[tried]]
        _, first = np.unique(idle, return_index=True)
        return np.sort(idle[np.sort(first)[:k]]) if len(first) >= k else None

    def _first_idle(self, tried: Iterable[int], k: int) -> list[int]:
        """The first ``k`` different clients of these that are online and idle, or fewer."""
        online, at_work = self.system.availability.online, self.tasks.of_client
        found: list[int] = []
        for client in tried:
            if client not in at_work and online[client] and client not in found:
                found.append(client)
                if len(found) == k:
                    break
        return found

    def dispatch(
        self,
        clients: Clients,
        start: Tensor | None = None,
        steps: Any = None,
        *,
        job: str = "train",
        tag: Any = None,
        local: bool = False,
        held: bool = False,
        deadline: float | None = None,
    ) -> list[int]:
        """Request tasks; they take effect together at the end of this instant."""
        return self.tasks.request(clients, start, steps, job, tag, local, held, deadline)

    def cancel(self, task: int) -> None:
        """Give up a task in flight."""
        self.tasks.cancel(task)

    def timer(self, at: float, tag: Any = None) -> None:
        """Schedule ``on_timer``."""
        if at < self.now:
            raise ValueError(f"timer at {at} s: it is already {self.now} s")
        # After months of virtual time seconds as floats are coarser than nanoseconds: now must stay now.
        self.kernel.schedule(max(to_ns(at), self.kernel.now), Phase.TIMER, ("timer", Timer(at, tag)))

    def publish(self, vector: Tensor, used: Iterable[Reply]) -> None:
        """A new model, the outcomes of the tasks it was made from, and their clients' states."""
        replies = list(used)
        if not replies:
            return
        if tuple(vector.shape) != (self.layout.size,):
            raise ValueError(f"published a vector of shape {tuple(vector.shape)}, needs [{self.layout.size}]")
        model = vector.detach()
        model = model.clone() if model.dtype == self.layout.dtype else model.to(self.layout.dtype)
        if not all_finite(model):
            raise SimulationError(
                f"{type(self.strategy).__name__} published a model with non-finite values "
                f"at {self.now:.6g} s, version {self._version}: lower the learning rates"
            )
        self.tasks.accept(replies, self._version)
        self.current = model
        self._version += 1

    def reject(self, reply: Reply, why: str) -> None:
        """Decide not to use a reply."""
        self.tasks.refuse(reply, why)

    def staleness(self, reply: Reply) -> int:
        """Versions published since the reply's task took effect."""
        return self._version - reply.task.version

    def stop(self, why: str) -> None:
        """End the run at the end of this instant."""
        self.stopped = self.stopped or why

    def send(self, src: int, dst: int, tag: Any = None, **tensors: Tensor) -> None:
        """Send one message between nodes."""
        self.links.send(src, dst, tag, tensors)

    def exchange(self, vectors: Tensor, mixing_matrix: Tensor, tag: Any = None) -> None:
        """Begin one gossip step."""
        self.links.exchange(vectors, mixing_matrix, tag)

    def state(self, client: int, name: str) -> Tensor:
        """A copy of a client's committed state."""
        return self.tasks.states.of(client)[name].clone()

    def kept(self, name: str) -> dict[int, Tensor]:
        """Copies of all clients' committed states of that name."""
        return self.tasks.states.kept(name)

    def profile(self, clients: NDArray[np.int64], steps: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """Expected seconds of a task by each client."""
        network, size = self.system.network, self.layout.nbytes
        total = network.down(clients, size) + network.up(clients, size)
        seconds: NDArray[np.float64] = (total + self.system.compute.expected(clients, steps)) / NS
        return seconds

    def rng(self, purpose: str, *ids: Any) -> Draw:
        """The strategy's own keyed randomness."""
        return self.randomness(f"strategy: {purpose}", *ids)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self, observers: Sequence[Callable[[Simulation], None]] = ()) -> None:
        """Run to the end, on a pool that is open; ``observers`` are called at the end of every instant.

        Raises:
            SimulationError: if the run cannot go on.
        """
        with COLLECTOR.seldom():
            if not self._begun:
                self._begin()

            def advance() -> bool:
                if self.stopped is None:
                    self._advance()
                    for observer in observers:
                        observer(self)
                return self.stopped is None

            self.strategy.drive(self, advance)
        self.close()
        self.evaluation.final()

    def close(self, failed: int | None = None) -> None:
        """Decide what is still open: ``pending``, and ``failed`` for the task that ended the run."""
        self.tasks.close(failed)
        self.links.close()

    def snapshot(self) -> dict[str, Any]:
        """Everything that changes in the course of a run, between two instants; shared with the run, not copied.

        Devices are drawn anew from the seed, presence apart, which moves on; all randomness is keyed and has no state.
        """
        return {
            **{name: getattr(self, name) for name in CHANGING},
            "kernel": self.kernel.snapshot(),
            "tasks": self.tasks.snapshot(),
            "links": self.links.snapshot(),
            "evaluation": self.evaluation.snapshot(),
            "strategy": attributes_of(self.strategy),
            "availability": attributes_of(self.system.availability),
        }

    def restore(self, snapshot: dict[str, Any], events: list[pa.Table], links: list[pa.Table]) -> None:
        """Become what :meth:`snapshot` saw; :meth:`run` then goes on from there.

        Args:
            snapshot: of a run put together from the same parts.
            events: the rows of ``events`` that were closed then.
            links: the rows of ``links`` there were.
        """
        for name in CHANGING:
            setattr(self, name, snapshot[name])
        self.kernel.restore(snapshot["kernel"])
        self.tasks.restore(snapshot["tasks"], events)
        self.links.restore(snapshot["links"], links)
        self.evaluation.restore(snapshot["evaluation"])
        for part, saved in ((self.strategy, "strategy"), (self.system.availability, "availability")):
            vars(part).clear()
            for name, value in snapshot[saved].items():
                object.__setattr__(part, name, value)
        self._begun = True

    def _begin(self) -> None:
        self.strategy.start(self)
        self._end_instant()
        self._schedule_availability()
        self._greet(np.flatnonzero(self.system.availability.online))
        self.kernel.schedule(self.kernel.now, Phase.SETTLE, ("begin", None))

    def _advance(self) -> None:
        """One instant."""
        due, limit = self.kernel.next_time(), self.limits.time_limit
        if due is None:
            raise SimulationError(self._stuck("nothing is left to happen"))
        if limit is not None and due > to_ns(limit):
            self.kernel.advance(to_ns(limit))
            self.stop("time_limit")
            return
        self.kernel.run_instant(self._handle, self._conclude)
        self._end_instant()

    def _handle(self, event: tuple[str, Any]) -> None:
        kind, subject = event
        self._settled = False
        if kind == "arrive":  # first, for most are
            self._idle_changes = 0
            self.tasks.arrive(subject)
        elif kind == "availability":
            self._change_availability()
        elif kind != "begin":
            self._idle_changes = 0
            if kind == "lose":
                self.tasks.lose(subject)
            elif kind == "expire":
                self.tasks.expire(subject)
            elif kind == "timer":
                self.strategy.on_timer(self, subject)
            elif kind == "message":
                self.links.deliver(subject)
            else:
                self.links.deliver_exchange(subject)

    def _conclude(self) -> bool:
        """Nothing else is left of this instant: settle, then let what was dispatched take effect; False when done."""
        if not self._settled:
            self._settled = True
            self.strategy.settle(self)
        elif self.tasks.requested:
            self.tasks.take_effect()
        else:
            return False
        return True

    def _schedule_availability(self) -> None:
        due = self.system.availability.next_change()
        if due is not None:
            self.kernel.schedule(due, Phase.AVAILABILITY, ("availability", None))

    def _change_availability(self) -> None:
        came, went = self.system.availability.advance(self.kernel.now)
        self.tasks.went_offline(went)
        self.tasks.came_online(came)
        self._greet(came)
        self._schedule_availability()
        self._idle_changes += 1
        if self._idle_changes > IDLE_CHANGES and not self.in_flight and len(self.kernel) <= 1:
            raise SimulationError(self._stuck(f"only presence has changed for the last {IDLE_CHANGES} times"))

    def _greet(self, clients: NDArray[np.int64]) -> None:
        if type(self.strategy).on_online is not Strategy.on_online:
            for client in clients.tolist():
                self.strategy.on_online(self, client)

    def _end_instant(self) -> None:
        """Evaluate if that is due, and see whether the run is over."""
        limits, round, why = self.limits, self.round, None
        if round >= self.evaluation.due:
            self.evaluation.at_round(round)
        if limits.target is not None and self.evaluation.reached(limits.target):
            why = "target"
        elif limits.rounds is not None and round >= limits.rounds:
            why = "rounds"
        elif limits.updates is not None and self.updates >= limits.updates:
            why = "updates"
        elif limits.bytes is not None and sum(self.bytes_moved()) >= limits.bytes:
            why = "bytes"
        if why is not None:
            self.stop(why)

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes so far, down and up; what peers send counts as up."""
        down, up = self.tasks.traffic.total(self.kernel.now)
        return down, up + self.links.bytes_moved()

    def warn(self, text: str, kind: str) -> None:
        """Tell the user, the first few times of each kind."""
        self.warnings[kind] += 1
        if self.warnings[kind] <= LOGGED_WARNINGS:
            logger.warning("%s", text)
        if self.warnings[kind] == LOGGED_WARNINGS:
            logger.warning("further warnings about %s are only counted", kind)

    def _stuck(self, what: str) -> str:
        return (
            f"{what} at {self.now:.6g} s of virtual time, but the run is not over: {self.updates} results received, "
            f"{int(self.online.sum())} of {self.clients} clients online, {self.in_flight} at work; "
            f"{type(self.strategy).__name__} waits for something that will not come"
        )


def _read_only(array: NDArray[np.bool_]) -> NDArray[np.bool_]:
    view = array.view()
    view.flags.writeable = False
    return view

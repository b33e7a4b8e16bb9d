"""The federation on the nodes of a Flower grid: the engine of the simulator on a real clock.

How one update travels: ``dispatch`` marks a client busy; at the end of the instant the batch is pushed to the nodes.
Every so often the grid is looked at: who came and went, which results and losses there are, which timers have gone
off. All that one look brings is one instant, in the simulator's order, with one ``settle`` at its end. Nothing is
written twice: instants, tasks, outcomes, evaluation and records are the simulator's own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, SimulationError
from fedsim.encoding import UnreadableError
from fedsim.flower.clock import WallKernel
from fedsim.flower.configuration import Settings
from fedsim.flower.devices import real_devices
from fedsim.flower.messages import Report, WireError, dtype_name
from fedsim.flower.nodes import Member, News, Nodes
from fedsim.flower.tasks import RemoteTasks
from fedsim.kernel import NS, Phase, to_ns
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.simulation import Simulation, Stop
from fedsim.simulation.tasks import LiveTask
from fedsim.strategy import Strategy

logger = logging.getLogger("fedsim")

Clock = Callable[[], float]
"""Seconds since whenever."""

Sleep = Callable[[float], None]
"""Waits so many seconds."""


class Deployment(Simulation):
    """One run on real nodes. ``problem`` must have been prepared; its evaluation takes place here, on its own data.

    Args:
        grid: of the Flower run.
        settings: of the deployment.
        own_data: whether nodes hold data of their own, and not the problem's partition.
        clock: of the server.
        sleep: how to wait.

    Raises:
        ConfigError: for a strategy or a problem that cannot be deployed.
    """

    clock = "wall"
    kernel: WallKernel
    tasks: RemoteTasks
    pool: Nodes

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        problem: Problem,
        stop: Stop,
        randomness: Randomness,
        cohort: int,
        eval_every: int = 1,
        client_eval_every: int = 0,
        settings: Settings | None = None,
        own_data: bool = False,
        clock: Clock = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self.settings = settings or Settings()
        self._clock, self._sleep = clock, sleep
        check_deployable(strategy, problem)
        system, self.connected, self.measured = real_devices(problem.clients, randomness)
        nodes = Nodes(grid, self.settings, own_data)
        super().__init__(strategy, problem, system, nodes, stop, randomness, cohort, eval_every, client_eval_every)
        self.kernel = WallKernel(limit=self.kernel.limit)
        self.tasks = RemoteTasks(self)
        self._samples = np.zeros_like(problem.samples) if own_data else problem.samples.copy()
        self.samples = self._samples.view()
        self.samples.flags.writeable = False
        self._origin: float | None = None
        self._observers: Sequence[Callable[[Simulation], None]] = ()
        self._quiet_since = 0

    # ---- what a strategy sees, where it is not the simulator's ---------------------------------------

    def state(self, client: int, name: str) -> Tensor:
        """A client's state is its own.

        Raises:
            SimulationError: always.
        """
        raise SimulationError(f"the state '{name}' of client {client} stays at its node: simulate this strategy")

    def kept(self, name: str) -> dict[int, Tensor]:
        """Nothing: what clients keep stays with them."""
        return {}

    def send(self, src: int, dst: int, tag: Any = None, **tensors: Tensor) -> None:
        """Nodes do not talk to each other.

        Raises:
            SimulationError: always.
        """
        raise SimulationError("messages between nodes: a deployment has tasks only; simulate this strategy")

    def exchange(self, vectors: Tensor, mixing_matrix: Tensor, tag: Any = None) -> None:
        """Nodes do not talk to each other.

        Raises:
            SimulationError: always.
        """
        self.send(0, 1)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self, observers: Sequence[Callable[[Simulation], None]] = ()) -> None:
        """Run to the end; ``observers`` are called after every look at the grid, while nodes are waited for, too.

        Raises:
            SimulationError: if the run cannot go on.
        """
        self._observers = observers
        super().run(observers)

    def gather(self) -> None:
        """Wait until every client is there, or ``wait_seconds`` have passed and some are; that is time 0.

        Raises:
            SimulationError: if nobody has come by then.
        """
        wait, began = self.settings.wait_seconds, self._clock()
        while True:
            self._meet(self.pool.look())
            there = len(self.pool.members)
            if there == self.clients:
                break
            if self._clock() - began >= wait:
                if not there:
                    told = "".join(f"; not taken: {why}" for why in dict.fromkeys(self.pool.refused.values()))
                    raise SimulationError(f"no node has come within {wait:g} s{told}")
                logger.warning("begins with %d of %d clients: the others have not come within %g s",
                               there, self.clients, wait)  # fmt: skip
                break
            for observer in self._observers:
                observer(self)
            self._sleep(self.settings.poll_seconds)
        self._origin = self._clock()
        self.connected.advance(0)

    def snapshot(self) -> dict[str, Any]:
        """A deployment's state is spread over its nodes.

        Raises:
            UnreadableError: always.
        """
        raise UnreadableError("lies with the nodes, too")

    def _begin(self) -> None:
        if self._origin is None:
            self.gather()
        super()._begin()

    def _advance(self) -> None:
        """One look at the grid, and the instant it makes."""
        self._wait()
        now, limit = self._elapsed(), self.limits.time_limit
        if limit is not None and now >= to_ns(limit):
            self.kernel.pass_to(now)
            self.stop("time_limit")
            return
        self.kernel.pass_to(now)
        self._take_news(self.pool.look())
        self.kernel.catch_up(now)
        if self.kernel.next_time() == now:
            self._quiet_since = now
            self.kernel.run_instant(self._handle, self._conclude)
            self._end_instant()
        elif not self.in_flight and self.kernel.next_time() is None:
            self._see_whether_stuck(now)

    def _wait(self) -> None:
        due = self.kernel.next_time()
        left = self.settings.poll_seconds
        if due is not None:
            left = min(left, (due - self._elapsed()) / NS)
        if left > 0:
            self._sleep(left)

    def _elapsed(self) -> int:
        """Nanoseconds since the start, and later than the last instant."""
        assert self._origin is not None
        return max(to_ns(self._clock() - self._origin), self.kernel.now + (self.kernel.handled > 0))

    def _take_news(self, news: News) -> None:
        now = self.kernel.now
        for answer in news.answers:
            self.tasks.take_in(answer)
        for member in news.went:
            logger.warning("client %d is gone (node %d)", member.client, member.node)
            self.connected.connected[member.client] = False
            self.tasks.lose_node(member.client)
        self._meet(news)
        if news.came or news.went:
            self.kernel.schedule(now, Phase.AVAILABILITY, ("availability", None))

    def _meet(self, news: News) -> None:
        for member in news.came:
            self._welcome(member)

    def _welcome(self, member: Member) -> None:
        client = member.client
        self._samples[client] = member.samples
        self.measured.meet(client, member.seconds_per_gradient)
        self.connected.connected[client] = True
        self.connected.rest(client, self.kernel.now, member.pause)

    def learn(self, task: LiveTask, report: Report, work: int, whole: int) -> None:
        """A task's node has told how long it worked, and when it will be ready again.

        Args:
            task: which has just arrived.
            report: of its node.
            work: nanoseconds of local work.
            whole: nanoseconds of the task.
        """
        self.measured.learn(task.client, report.steps * task.gradients, work / NS, whole / NS)
        if report.pause:
            self.connected.rest(task.client, self.kernel.now, report.pause)
            self.kernel.schedule(self.kernel.now, Phase.AVAILABILITY, ("availability", None))

    def profile(self, clients: NDArray[np.int64], steps: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """What has been measured; a client that has not been seen is like the mean one."""
        seconds: NDArray[np.float64] = self.measured.expected(np.asarray(clients, dtype=np.int64), steps) / NS
        return seconds

    def _see_whether_stuck(self, now: int) -> None:
        quiet = (now - self._quiet_since) / NS
        if quiet >= self.settings.wait_seconds:
            raise SimulationError(self._stuck(f"nothing has happened for {quiet:.0f} s"))


def check_deployable(strategy: Strategy, problem: Problem) -> None:
    """Refuse what needs a simulator.

    Raises:
        ConfigError: naming it.
    """
    if strategy.everybody:
        raise ConfigError(
            f"strategy: {type(strategy).__name__} has peers that talk to each other or work unasked, a deployment has "
            "nodes that answer their server; simulate it with fedsim run"
        )
    if not problem.trains:
        raise ConfigError(f"problem={type(problem).__name__}: trains nothing; deploy one that does")
    try:
        dtype_name(problem.layout.dtype)
    except WireError as error:
        raise ConfigError(f"model: {error}") from None

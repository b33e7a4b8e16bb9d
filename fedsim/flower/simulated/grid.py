"""Flower's Grid over the simulator: whoever waits for replies lets virtual time pass.

The server app runs in the simulator's own thread. It costs no virtual time itself; ``send_and_receive``, a wait by
``time.sleep`` and polling bring about one instant after another until what they wait for has come.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.checks import SimulationError
from fedsim.federation import Reply, Task, Timer
from fedsim.flower.simulated.arrays import as_vector, first_arrays, has_non_finite
from fedsim.flower.simulated.clients import FIRST_NODE, Nodes
from fedsim.flower.simulated.internals import empty_run, error_reply, name_message
from fedsim.flower.simulated.metrics import Watch
from fedsim.flower.simulated.process_state import VirtualSleep
from fedsim.kernel import NS, Phase, to_ns
from fedsim.simulation import Simulation

MOST_SLEEPS = 100_000
"""After so many waits in a row without a message under way a server app is taken to wait for what will not come."""


class RunOverError(BaseException):
    """The run is over although the server app is not: it ends where it waits.

    Not an Exception, so that an app that catches those lets it pass.
    """


class Posted(NamedTuple):
    """A message on its way to a node."""

    message: Message
    expires: float
    """Virtual seconds from the start of the run at which its time to live is over."""


class VirtualGrid(Grid):
    """A grid whose nodes are the simulator's clients.

    Args:
        sim: the run.
        nodes: what answers.
        advance: brings about the next instant; False once the run is over.
        watch: whether a strategy says what the model is; its reports are told of new ones.
    """

    def __init__(self, sim: Simulation, nodes: Nodes, advance: Callable[[], bool], watch: Watch) -> None:
        self.sim, self.nodes, self.watch = sim, nodes, watch
        self.rounds = 0
        """How many models had been made when the newest round of training began."""
        self.virtual_sleep = VirtualSleep(self.sleep)
        self.broken: BaseException | None = None
        """What ended the run while the server app waited; raised again at whatever else the app asks for."""
        self._advance = advance
        self._thread = threading.get_ident()
        self._run = empty_run()
        self._queues: dict[int, deque[Posted]] = {}
        """Messages that wait for their node to be free, by client."""
        self._open: dict[str, int] = {}
        """Messages that nobody has replied to, and their clients, by id."""
        self._arrived: dict[str, tuple[Message, Reply | None]] = {}
        """Replies nobody has asked for yet, in order of arrival, by the id of what they answer."""
        self._abandoned: set[str] = set()
        """Messages whose replies nobody will ask for."""
        self._taken: list[Reply] = []
        """Replies handed over that no model has been published with."""
        self._count = 0
        self._sleeps = 0
        self._polled: tuple[int, frozenset[str]] | None = None

    # ---- Flower's interface ----------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Show another run's information; nothing depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """What little there is to say of the run: its id."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message, as ``Message(...)`` makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Nodes that are online now, ascending."""
        self._check()
        return [FIRST_NODE + client for client in self.sim.online.nonzero()[0].tolist()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages off; they leave at this instant, or when their node is done with what it was sent before.

        Raises:
            ValueError: for a node that there is not.
        """
        self._check()
        batch = list(messages)
        clients = [self._client(message.metadata.dst_node_id) for message in batch]
        if not self.watch.watching:
            self._sent_model(batch)
        if any(message.metadata.message_type.startswith("train") for message in batch):
            self._begin_round()
        names = []
        for message, client in zip(batch, clients, strict=True):
            self._count += 1
            name_message(message, f"message-{self._count}")
            # What the server app does with the records later must not reach the client.
            posted = Posted(copy.deepcopy(message), self.sim.now + message.metadata.ttl)
            self._queues.setdefault(client, deque()).append(posted)
            self._open[posted.message.metadata.message_id] = client
            names.append(posted.message.metadata.message_id)
        if batch:
            self._sleeps = 0
            self._at(self.sim.kernel.now)  # an instant at which they take effect
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have arrived to these messages, in order of arrival; each is handed over once.

        Whoever polls again in the same instant does not wait in between: then time moves to the next event first.
        """
        self._check()
        names = frozenset(message_ids)
        found = self._hand_over(names)
        if not found and names & self._open.keys():
            if self._polled == (self.sim.kernel.now, names):
                self._step()
                found = self._hand_over(names)
            self._polled = self.sim.kernel.now, names
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages off and wait for their replies, at most ``timeout`` seconds of virtual time.

        Returns:
            The replies in order of arrival, an error for each task that was lost.
        """
        names = frozenset(self.push_messages(messages))
        until = None if timeout is None else self.sim.kernel.now + to_ns(timeout)
        while missing := names & self._open.keys():
            due = self.sim.kernel.next_time()
            if until is not None and (due is None or due > until):
                self._wait_until(until)
                self._abandoned |= missing
                break
            self._step()
        return self._hand_over(names)

    # ---- waiting ---------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass, as ``time.sleep`` does real time.

        Raises:
            SimulationError: if nothing but waiting has happened for very long.
        """
        self._check()
        self._sleeps += 1
        stuck = self._sleeps > MOST_SLEEPS or (
            self._sleeps > MOST_SLEEPS // 100 and self.sim.system.availability.next_change() is None
        )
        if stuck and not self._open:
            self.broken = SimulationError(
                f"the server app waits at {self.sim.now:.6g} s of virtual time for what will not come: no message is "
                f"under way and {int(self.sim.online.sum())} of {self.sim.clients} nodes are online; "
                "does it want more nodes than there are clients?"
            )
            raise self.broken
        if seconds > 0:
            self._wait_until(self.sim.kernel.now + to_ns(seconds))

    def _wait_until(self, time: int) -> None:
        if time > self.sim.kernel.now:
            self._at(time)
        while self.sim.kernel.now < time:
            self._step()

    def _at(self, time: int) -> None:
        """Have an instant at ``time`` (ns), whatever else happens then."""
        self.sim.kernel.schedule(time, Phase.TIMER, ("timer", Timer(time / NS, None)))

    def _step(self) -> None:
        """One instant."""
        try:
            with self.virtual_sleep.suspended():
                going_on = self._advance()
            if not going_on:
                raise RunOverError
        except BaseException as error:
            self.broken = error
            raise

    def _check(self) -> None:
        """End the server app here if the run is over: it may have caught what said so before."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("in virtual time the Grid serves the thread that the server app was called in, only")
        if self.broken is not None:
            raise self.broken
        if self.sim.stopped is not None:
            self.broken = RunOverError()
            raise self.broken

    # ---- between the server app and the simulator ------------------------------------------------

    def dispatch(self) -> None:
        """Send every free node the message that has waited longest for it; what has expired is answered instead."""
        for client in sorted(self._queues):
            queue = self._queues[client]
            while queue and queue[0].expires <= self.sim.now:
                expired = queue.popleft().message
                self._file(expired, error_reply("deadline", expired), None)
            if queue and not self.sim.busy[client]:
                message, expires = queue.popleft()
                kind, _, action = message.metadata.message_type.partition(".")
                tag = action or message.metadata.group_id or None
                (task,) = self.sim.dispatch(client, job=kind, tag=tag, held=True, deadline=expires)
                self.nodes.asked[task] = message
            if not queue:
                del self._queues[client]

    def deliver(self, reply: Reply) -> None:
        """A reply has arrived."""
        message = self.nodes.asked[reply.task.id]
        answer = self.nodes.collect(reply.task.id, reply.client)
        self._count += 1
        name_message(answer, f"message-{self._count}")
        self._file(message, answer, reply)

    def lose(self, task: Task, why: str) -> None:
        """A task will not be answered: Flower says so with an error."""
        message = self.nodes.forget(task.id)
        self._file(message, error_reply(why, message), None)

    def _file(self, message: Message, answer: Message, reply: Reply | None) -> None:
        name = message.metadata.message_id
        del self._open[name]
        if name not in self._abandoned:
            self._arrived[name] = answer, reply
        elif reply is not None:
            self.sim.reject(reply, "late")

    def _hand_over(self, names: frozenset[str]) -> list[Message]:
        ready = [name for name in self._arrived if name in names]
        pairs = [self._arrived.pop(name) for name in ready]
        self._taken += [reply for _, reply in pairs if reply is not None]
        return [answer for answer, _ in pairs]

    def _client(self, node: int) -> int:
        client = node - FIRST_NODE
        if not 0 <= client < self.sim.clients:
            raise ValueError(f"there is no node {node}; Grid.get_node_ids() gives those there are")
        return client

    # ---- models and rounds -----------------------------------------------------------------------

    def _begin_round(self) -> None:
        """Training begins: one round more than there are to be is none."""
        self.rounds, limit = self.sim.version, self.sim.limits.rounds
        if limit is not None and self.rounds >= limit:
            self.sim.stop("rounds")
            self._check()

    def _sent_model(self, batch: list[Message]) -> None:
        """What the first message of a batch carries is the model, where no strategy says what that is."""
        carried = [first_arrays(message) for message in batch if not message.metadata.message_type.startswith("query")]
        if carried and carried[0] is not None:
            self.new_model(carried[0])

    def new_model(self, arrays: ArrayRecord) -> None:
        """The server app has a model: if it is another one than before, the replies handed over have made it."""
        sim, (layout, vector) = self.sim, as_vector(arrays)
        if layout == sim.layout and vector.equal(sim.current):
            return
        if has_non_finite(arrays):
            sim.warn(f"the model has non-finite values at {sim.now:.6g} s", "models with non-finite values")
        sim.layout = layout
        if not self._taken:
            sim.current = vector
            return
        taken, self._taken = self._taken, []
        sim.publish(vector, used=taken)
        self.watch.reports.new_model()

    def close(self) -> None:
        """The server app has ended: what was handed over since the last model counts as used, too."""
        self.rounds = self.sim.version
        self.sim.tasks.accept(self._taken, self.sim.version)
        self._taken = []

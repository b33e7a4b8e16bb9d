"""Who is online when: the interface, and the models that know nothing of days, data or batteries.

A model moves forward from change to change: :meth:`Availability.next_change` says when somebody's state may
next differ, :meth:`Availability.advance` goes there and says who came and who went. Two kinds: *slotted*
models draw all states anew at every slot boundary; *switching* models let each client alternate on its own.
Parameters are in seconds, times integer nanoseconds; all state is plain arrays over clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import number, seconds
from fedsim.kernel import to_ns
from fedsim.rng import Randomness
from fedsim.system.base import SHORTEST, Ids, Nanoseconds, nanoseconds

States = NDArray[np.bool_]
"""True where online, ``[clients]``."""

ClassCounts = Callable[[], NDArray[np.int64] | None]
"""Gives ``[clients, classes]``, how many examples of each class each client holds, or None if there are no classes."""

Change = tuple[Ids, Ids]
"""Who came and who went, ids ascending."""


class Availability(ABC):
    """The availability model."""

    slotted: bool = False
    """Whether states hold for whole slots."""

    _online: States

    def meet(self, class_counts: ClassCounts) -> None:  # noqa: B027 - most models need not know
        """Called before ``prepare`` with what the clients hold, for models that follow the data."""

    @property
    def online(self) -> States:
        """Who is online at the time last advanced to (0 after ``prepare``): a live view, not to be written."""
        return self._online

    @abstractmethod
    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Set the states of clients ``0 .. clients - 1`` at time 0."""

    def shares(self) -> NDArray[np.float64] | None:
        """``[clients]``: the share of time each is online in the long run, after ``prepare``; None if not known."""
        return None

    @abstractmethod
    def next_change(self) -> int | None:
        """The next time (ns) at which anybody's state may change; None for never."""

    @abstractmethod
    def advance(self, now: int) -> Change:
        """Move to time ``now`` (ns, not before the last one) and return the net change: (came, went)."""


def _flip(online: States, changed: Ids) -> Change:
    """Flip the ``changed`` clients (ascending) in place."""
    online[changed] ^= True
    return changed[online[changed]], changed[~online[changed]]


class Always(Availability):
    """Everybody, always."""

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Put everybody online."""
        self._online = np.ones(clients, dtype=np.bool_)

    def shares(self) -> NDArray[np.float64]:
        """1 for all."""
        return np.ones(len(self._online))

    def next_change(self) -> int | None:
        """Never."""
        return None

    def advance(self, now: int) -> Change:
        """Nobody comes or goes."""
        return _flip(self._online, np.empty(0, dtype=np.int64))


class Slotted(Availability):
    """States that hold for slots of equal length, ``[n * slot, (n + 1) * slot)``.

    Args:
        slot: seconds.

    Raises:
        ConfigError: if ``slot`` is shorter than a nanosecond.
    """

    slotted = True

    def __init__(self, slot: float) -> None:
        self.slot = seconds("slot", slot, least=SHORTEST)
        self._slot_ns = to_ns(self.slot)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Set the states of slot 0."""
        self._randomness = randomness
        self._number = 0  # of the slot that `online` shows
        self._online = self._first(np.arange(clients))

    def next_change(self) -> int | None:
        """The next slot boundary."""
        return (self._number + 1) * self._slot_ns

    def advance(self, now: int) -> Change:
        """Move to the slot that holds ``now``."""
        states = self._online
        while self._number < now // self._slot_ns:
            self._number += 1
            states = self._following(np.arange(len(states)), states)
        return _flip(self._online, np.flatnonzero(states != self._online))

    def _uniform(self, ids: Ids) -> NDArray[np.float64]:
        """One uniform per client for the slot arrived at, keyed by (client, slot)."""
        return self._randomness("availability.slot", ids, np.array([self._number])).uniform()

    @abstractmethod
    def _first(self, ids: Ids) -> States:
        """The states in slot 0."""

    @abstractmethod
    def _following(self, ids: Ids, states: States) -> States:
        """The states (a new array) in slot ``self._number``, which follows the one of ``states``."""


class Bernoulli(Slotted):
    """In every slot of ``slot`` seconds each client is online with probability ``p``, independently."""

    def __init__(self, p: float = 0.5, slot: float = 60.0) -> None:
        super().__init__(slot)
        self.p = number("p", p, least=0, most=1)

    def shares(self) -> NDArray[np.float64]:
        """``p`` for all."""
        return np.full(len(self._online), self.p)

    def _first(self, ids: Ids) -> States:
        return self._uniform(ids) <= self.p

    def _following(self, ids: Ids, states: States) -> States:
        return self._uniform(ids) <= self.p


class Switching(Availability):
    """Clients that alternate between on and off, each by itself, for spans that a subclass draws.

    Switches are planned ahead in bulk, a window of time at once, and then handed out one instant after
    the other: a million clients cost arrays and a few sorts, not a million heap entries.
    """

    _times: Nanoseconds  # the window's switches in order,
    _who: Ids  # who makes them,
    _cursor: int  # and the first that is still to come

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Set the states at time 0 and plan the first window."""
        self._randomness = randomness
        self._online, self._next = self._first(np.arange(clients))
        self._ahead = self._online.copy()  # states at the end of the window
        self._interval = np.zeros(clients, dtype=np.int64)  # how often each client has switched by then
        self._plan()

    def next_change(self) -> int | None:
        """The next planned switch."""
        return int(self._times[self._cursor])

    def advance(self, now: int) -> Change:
        """Make all switches up to and including ``now``."""
        switched = [np.empty(0, dtype=np.int64)]
        while self._times[self._cursor] <= now:
            end = int(np.searchsorted(self._times, now, side="right"))
            switched.append(self._who[self._cursor : end])
            self._cursor = end
            if end == len(self._times):
                self._plan()
        ids, counts = np.unique(np.concatenate(switched), return_counts=True)
        return _flip(self._online, ids[counts % 2 == 1])  # an even number of switches is none

    def _plan(self) -> None:
        """Plan every switch up to the time by which 1024 clients, or an eighth of them, have switched."""
        clients = len(self._next)
        rank = min(clients, max(1024, clients // 8)) - 1
        horizon = np.partition(self._next, rank)[rank]
        times, who = [], []
        due = np.flatnonzero(self._next <= horizon)
        while len(due):
            times.append(self._next[due])
            who.append(due)
            self._ahead[due] ^= True
            self._interval[due] += 1
            self._next[due] += self._spans(due, self._interval[due], self._ahead[due])
            due = due[self._next[due] <= horizon]
        all_times, all_who = np.concatenate(times), np.concatenate(who)
        order = np.lexsort((all_who, all_times))
        self._times, self._who = all_times[order], all_who[order]
        self._cursor = 0

    @abstractmethod
    def _first(self, ids: Ids) -> tuple[States, Nanoseconds]:
        """The states at time 0 and when each client first switches."""

    @abstractmethod
    def _spans(self, ids: Ids, interval: NDArray[np.int64], online: States) -> Nanoseconds:
        """How long (ns, at least 1) each client stays in state ``online``, its ``interval``-th from time 0."""


class Cyclic(Switching):
    """Online for ``up`` seconds, offline for ``down``, over and over, from a random phase of each client's own.

    The share of clients online is ``up / (up + down)`` on average.
    """

    def __init__(self, up: float = 600.0, down: float = 600.0) -> None:
        self.up = seconds("up", up, least=SHORTEST)
        self.down = seconds("down", down, least=SHORTEST)
        self._up_ns, self._down_ns = to_ns(self.up), to_ns(self.down)

    def shares(self) -> NDArray[np.float64]:
        """``up / (up + down)`` for all."""
        return np.full(len(self._online), self.up / (self.up + self.down))

    def _first(self, ids: Ids) -> tuple[States, Nanoseconds]:
        period = self._up_ns + self._down_ns
        phase = self._randomness("availability.phase", ids).integers(period)
        online = phase < self._up_ns
        return online, np.where(online, self._up_ns, period) - phase

    def _spans(self, ids: Ids, interval: NDArray[np.int64], online: States) -> Nanoseconds:
        return np.where(online, self._up_ns, self._down_ns)


class Markov(Availability):
    """Two states with mean durations ``up`` (online) and ``down`` (offline) in seconds, begun in stationarity.

    The share of time online is ``up / (up + down)``. With ``slot=None`` durations are exponential; with a
    slot (seconds) states follow a chain that per slot leaves online with probability ``slot / up`` and
    offline with ``slot / down``.

    Raises:
        ConfigError: if a duration is not positive, or ``slot`` longer than ``up`` or ``down``.
    """

    def __init__(self, up: float = 300.0, down: float = 100.0, slot: float | None = None) -> None:
        self.up = seconds("up", up, least=SHORTEST)
        self.down = seconds("down", down, least=SHORTEST)
        self.slot = None if slot is None else number("slot", slot, least=SHORTEST, most=min(self.up, self.down))
        self.slotted = self.slot is not None
        self._law: Availability
        self._law = _Telegraph(self.up, self.down) if self.slot is None else _Chain(self.up, self.down, self.slot)

    @property
    def online(self) -> States:
        """Who is online at the time last advanced to: a live view, not to be written."""
        return self._law.online

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw the states at time 0."""
        self._law.prepare(clients, randomness)

    def shares(self) -> NDArray[np.float64]:
        """``up / (up + down)`` for all."""
        return np.full(len(self.online), self.up / (self.up + self.down))

    def next_change(self) -> int | None:
        """The next switch, or the next slot boundary."""
        return self._law.next_change()

    def advance(self, now: int) -> Change:
        """Move to ``now``."""
        return self._law.advance(now)


def _stationary(randomness: Randomness, ids: Ids, up: float, down: float) -> States:
    return randomness("availability.start", ids).uniform() <= up / (up + down)


class _Telegraph(Switching):
    """Markov in continuous time; a span has no memory, so the one in progress at time 0 is like any other."""

    def __init__(self, up: float, down: float) -> None:
        self.up, self.down = up, down

    def _first(self, ids: Ids) -> tuple[States, Nanoseconds]:
        online = _stationary(self._randomness, ids, self.up, self.down)
        return online, self._spans(ids, np.zeros_like(ids), online)

    def _spans(self, ids: Ids, interval: NDArray[np.int64], online: States) -> Nanoseconds:
        draw = self._randomness("availability.interval", ids, interval).exponential()
        # At least 1 ns: a span of none would switch the same client for ever in one instant.
        return np.maximum(nanoseconds(draw * np.where(online, self.up, self.down)), 1)


class _Chain(Slotted):
    """Markov from slot to slot."""

    def __init__(self, up: float, down: float, slot: float) -> None:
        super().__init__(slot)
        self.up, self.down = up, down

    def _first(self, ids: Ids) -> States:
        return _stationary(self._randomness, ids, self.up, self.down)

    def _following(self, ids: Ids, states: States) -> States:
        leaves = self._uniform(ids) <= np.where(states, self.slot / self.up, self.slot / self.down)
        return states ^ leaves

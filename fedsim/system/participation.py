"""Slotted presence whose probability differs between clients or hours: by time of day, or by the data a client holds.

Parameters are in seconds, times integer nanoseconds; all state is plain arrays over clients.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, number, one_of, seconds, whole
from fedsim.rng import Randomness
from fedsim.system.availability import Availability, Change, ClassCounts, Slotted, States
from fedsim.system.base import SHORTEST, Ids


class Diurnal(Slotted):
    """Clients come and go with the hour: the probability of being online follows a cosine of the time of day.

    At time t, client i would be online with probability ``mean * (1 + amplitude * cos(2 pi (t - phase_i) / period))``;
    its state holds for a slot and is drawn, independently of other slots, with the mean of that over the slot. So the
    share of time online is ``mean`` for every client. A client whose phase is 0 has its peak hour at time 0.

    Args:
        mean: probability of being online, on average over a period; above 0.
        amplitude: swing around it as a share of ``mean``; at most 1, and ``mean * (1 + amplitude)`` at most 1.
        period: seconds.
        timezones: share of the period over which the clients' phases are spread, uniformly; 0 gives all the same.
        slot: seconds.

    Raises:
        ConfigError: if an argument is out of range.
    """

    def __init__(
        self,
        mean: float = 0.5,
        amplitude: float = 0.8,
        period: float = 86400.0,
        timezones: float = 0.25,
        slot: float = 600.0,
    ) -> None:
        super().__init__(slot)
        self.mean = number("mean", mean, above=0, most=1)
        self.amplitude = number("amplitude", amplitude, least=0, most=min(1.0, 1 / self.mean - 1))
        self.period = seconds("period", period, least=SHORTEST)
        self.timezones = number("timezones", timezones, least=0, most=1)

    def shares(self) -> NDArray[np.float64]:
        """``mean`` for all."""
        return np.full(len(self._online), self.mean)

    def probability(self, slot: int) -> NDArray[np.float64]:
        """The probability of each client to be online in that slot, float64 ``[clients]``; after :meth:`prepare`."""
        slots_per_period = self.period / self.slot
        turns = (slot + 0.5) / slots_per_period - self._phase  # of the middle of the slot
        swing = np.cos(2 * np.pi * turns) * np.sinc(1 / slots_per_period)  # the mean over the slot, exactly
        return self.mean * (1 + self.amplitude * swing)

    def _first(self, ids: Ids) -> States:
        self._phase = self.timezones * self._randomness("availability.phase", ids).uniform()  # in periods
        return self._following(ids, np.empty(0, dtype=np.bool_))

    def _following(self, ids: Ids, states: States) -> States:
        return self._uniform(ids) <= self.probability(self._number)


class _Rated(Slotted):
    """Slotted presence at each client's own rate, ``[clients]``, given before ``prepare``."""

    rates: NDArray[np.float64]


class _Independent(_Rated):
    """In every slot anew."""

    def _first(self, ids: Ids) -> States:
        return self._uniform(ids) <= self.rates

    def _following(self, ids: Ids, states: States) -> States:
        return self._uniform(ids) <= self.rates


class _Memory(_Rated):
    """A chain from slot to slot that comes with probability ``come``, and leaves as its rate demands."""

    def __init__(self, slot: float, come: float) -> None:
        super().__init__(slot)
        self.come = come

    def _first(self, ids: Ids) -> States:
        return self._randomness("availability.start", ids).uniform() <= self.rates

    def _following(self, ids: Ids, states: States) -> States:
        leave = self.come * (1 / self.rates - 1)
        # Nobody leaves with more than certainty: who would, comes less often instead, at the same rate.
        changes = np.where(states, np.minimum(leave, 1.0), self.come / np.maximum(leave, 1.0))
        return states ^ (self._uniform(ids) <= changes)


class _Turns(_Rated):
    """On for ``cycle`` times the rate and off for the rest of every cycle, begun somewhere while off."""

    def __init__(self, slot: float, cycle: int) -> None:
        super().__init__(slot)
        self.cycle = cycle

    def _first(self, ids: Ids) -> States:
        self._on = np.maximum(1, np.rint(self.cycle * self.rates).astype(np.int64))
        off = np.maximum(1, self.cycle - self._on)  # one begins at once if there is no time off
        self._wait = np.floor(off * self._randomness("availability.phase", ids).uniform()).astype(np.int64)
        return self._following(ids, np.empty(0, dtype=np.bool_))

    def _following(self, ids: Ids, states: States) -> States:
        online: States = (self._number - self._wait) % self.cycle < self._on
        return online


class LabelCorrelated(Availability):
    """The participation of FedAU's experiments (arXiv:2306.03401): clients with some labels are there more often.

    Client i takes part at rate ``p_i = min(1, max(p_min, classes * mean * <kappa_i, q>))``: ``kappa_i`` is the
    distribution of its labels, ``q`` one Dirichlet(``alpha``) draw over the classes for all clients. Before the
    two bounds the rates are ``mean`` on average. A client without examples has rate ``p_min``. In slots of ``slot``
    seconds, rounds in the paper, the ``pattern`` is

    * ``bernoulli``: in every slot with probability p_i, independently;
    * ``markov``: an absent client comes with probability ``come``, a present one leaves with
      ``come * (1 / p_i - 1)``; if that is above 1 it leaves for certain and ``come`` is divided by it. It begins in
      stationarity;
    * ``cyclic``: ``max(1, round(cycle * p_i))`` slots on, the rest of each ``cycle`` off, at first after a uniform
      number of slots off: at time 0 few are there, over any ``cycle`` slots each has its exact share.

    Departures from the released code: rates are cut at 1 (it cannot draw more), and a client whose slots on fill the
    whole ``cycle`` is never off (there it is off for a slot added to the cycle).

    Args:
        pattern: ``bernoulli``, ``markov`` or ``cyclic``.
        mean: mean rate before the bounds.
        p_min: least rate, above 0.
        alpha: concentration of ``q``; the smaller, the fewer classes decide.
        come: in (0, 1], probability to come per slot under ``markov``.
        cycle: slots in a cycle under ``cyclic``.
        slot: seconds.

    Raises:
        ConfigError: if an argument is out of range; from :meth:`prepare`, if the problem has no classes.
    """

    slotted = True

    def __init__(
        self,
        pattern: str = "bernoulli",
        mean: float = 0.1,
        p_min: float = 0.02,
        alpha: float = 0.1,
        come: float = 0.05,
        cycle: int = 100,
        slot: float = 60.0,
    ) -> None:
        self.pattern = one_of("pattern", pattern, ("bernoulli", "markov", "cyclic"))
        self.mean = number("mean", mean, above=0, most=1)
        self.p_min = number("p_min", p_min, above=0, most=1)
        self.alpha = number("alpha", alpha, least=1e-3, most=1e6)
        self.come = number("come", come, above=0, most=1)
        self.cycle = whole("cycle", cycle, least=1)
        self.slot = seconds("slot", slot, least=SHORTEST)
        self._law: _Rated
        if self.pattern == "bernoulli":
            self._law = _Independent(self.slot)
        elif self.pattern == "markov":
            self._law = _Memory(self.slot, self.come)
        else:
            self._law = _Turns(self.slot, self.cycle)
        self._counts: NDArray[np.int64] | None = None

    @property
    def rates(self) -> NDArray[np.float64]:
        """The rate of each client, float64 ``[clients]``; there after :meth:`prepare`."""
        return self._law.rates

    @property
    def online(self) -> States:
        """Who is online at the time last advanced to: a live view, not to be written."""
        return self._law.online

    def meet(self, class_counts: ClassCounts) -> None:
        """Take the class counts of the clients."""
        self._counts = class_counts()

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Draw the classes' weights and the states in slot 0.

        Raises:
            ConfigError: if the clients' examples have no classes.
        """
        if self._counts is None:
            raise ConfigError(
                "availability=label_correlated: needs a problem whose examples have classes, such as "
                "problem=classification"
            )
        counts, self._counts = self._counts, None  # not kept: the rates say it all
        classes = counts.shape[1]
        weights = randomness("availability.labels").generator().dirichlet(np.full(classes, self.alpha))
        shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))  # of nobody's examples: 0, so p_min
        alike = (shares * weights).sum(axis=1)  # no matrix product: its bits may depend on how many clients there are
        self._law.rates = np.clip(classes * self.mean * alike, self.p_min, 1.0)
        self._law.prepare(clients, randomness)

    def shares(self) -> NDArray[np.float64]:
        """Each client's rate."""
        return self.rates

    def next_change(self) -> int | None:
        """The next slot boundary."""
        return self._law.next_change()

    def advance(self, now: int) -> Change:
        """Move to the slot that holds ``now``."""
        return self._law.advance(now)

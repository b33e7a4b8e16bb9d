"""Presence by battery, charger and wifi: when a phone would be allowed to train.

Parameters are in seconds, hours of the day in hours; all state is plain arrays over clients.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import flag, number, seconds
from fedsim.kernel import NS
from fedsim.system.availability import Slotted, States
from fedsim.system.base import Ids

HOUR_NS = 3600 * NS
DAY_NS = 24 * HOUR_NS

PLUG_HOUR, PLUG_HOUR_HABIT, PLUG_HOUR_DEVIATION = 22.5, 1.0, 1.0
"""When a night at the charger begins: mean, standard deviation over clients and over a client's days, in hours."""

PLUG_LENGTH, PLUG_LENGTH_DEVIATION, PLUG_LENGTH_ENDS = 7.5, 1.5, (1.0, 12.0)
"""How long a charger is used: mean and standard deviation in hours, and the ends to which it is cut."""

BY_DAY = 0.2
"""Probability that the charger is used at any hour of the day, uniformly, instead of at night."""

LEAVES, RETURNS, AWAY_HABIT, AWAY_DEVIATION = 8.0, 18.0, 1.0, 1.0
"""When a client leaves home and returns: means, standard deviation over clients and over a client's days, in hours."""

AT_HOME = 0.3
"""Probability that a client does not leave home on a day."""

DAYS_BEFORE = 2
"""Lived before time 0, so that batteries are in step with their chargers when a run begins."""


class Charging(Slotted):
    """A phone is online while its battery and its network allow it, after the conditions that real systems set.

    Federated learning on phones runs while they are idle, at the charger and on an unmetered network (Bonawitz et
    al., arXiv:1902.01046). This is a model of such phones, not a trace: the constants of this module are plausible,
    not measured. Everything holds for a slot, as it is at its beginning. Time 0 is midnight for everybody.

    * *Charger*: once in every day, mostly from late in the evening and through the night, else at any hour.
    * *Battery*: fills at a rate of the client's own while plugged in, and drains at another while not.
    * *Wifi*: at home only, that is but for a span by day on most days.

    Habits are drawn per client, hours per client and day. What clients are asked to compute costs them no
    charge, so every strategy meets the same devices.

    Args:
        threshold: a phone with more charge than this, a share of its capacity, may train away from the charger.
        needs_charger: whether it must be plugged in nevertheless, whatever its charge.
        needs_wifi: whether it must be on wifi.
        charge_time: mean seconds in which an empty battery fills; a client's own is uniform within half of it around.
        battery_life: mean seconds in which a full battery drains; a client's own likewise.
        slot: seconds, from 60 to 3600.

    Attributes:
        battery: float64 ``[clients]``, charge at the beginning of the slot, as a share of capacity.
        plugged: bool ``[clients]``, whether at the charger.
        wifi: bool ``[clients]``, whether on wifi.

    Raises:
        ConfigError: if an argument is out of range.
    """

    battery: NDArray[np.float64]
    plugged: States
    wifi: States

    def __init__(
        self,
        threshold: float = 0.3,
        needs_charger: bool = False,
        needs_wifi: bool = True,
        charge_time: float = 7200.0,
        battery_life: float = 108000.0,
        slot: float = 600.0,
    ) -> None:
        super().__init__(number("slot", slot, least=60, most=3600))
        self.threshold = number("threshold", threshold, least=0, most=1)
        self.needs_charger = flag("needs_charger", needs_charger)
        self.needs_wifi = flag("needs_wifi", needs_wifi)
        self.charge_time = seconds("charge_time", charge_time, above=0)
        self.battery_life = seconds("battery_life", battery_life, above=0)

    def _first(self, ids: Ids) -> States:
        charge_time, battery_life, self.battery = self._randomness("availability.battery", ids).uniform(3).T
        self._gain = self.slot / (self.charge_time * (0.5 + charge_time))  # of charge, per slot
        self._loss = self.slot / (self.battery_life * (0.5 + battery_life))
        first = -(DAYS_BEFORE * DAY_NS // self._slot_ns)
        self._begin_day(ids, first * self._slot_ns // DAY_NS)
        self._look(first)
        for slot in range(first + 1, 1):
            self._live(ids, slot)
        return self._allowed()

    def _following(self, ids: Ids, states: States) -> States:
        self._live(ids, self._number)
        return self._allowed()

    def _live(self, ids: Ids, slot: int) -> None:
        """Go from the beginning of the slot before to the beginning of this one."""
        self.battery = np.clip(self.battery + np.where(self.plugged, self._gain, -self._loss), 0.0, 1.0)
        day = slot * self._slot_ns // DAY_NS
        if day != self._day:
            self._begin_day(ids, day)
        self._look(slot)

    def _look(self, slot: int) -> None:
        """Who is plugged in and who on wifi at the beginning of a slot of the current day."""
        hour = (slot * self._slot_ns - self._day * DAY_NS) / HOUR_NS
        begins, ends = self._plugs
        self.plugged = ((begins <= hour) & (hour < ends)).any(axis=0)  # today's or yesterday's
        leaves, returns = self._away
        self.wifi = (hour < leaves) | (hour >= returns)

    def _begin_day(self, ids: Ids, day: int) -> None:
        """Draw a day's hours, ``[2, clients]`` each: from when until when at the charger, and away from home."""
        self._day = day
        habits = self._randomness("availability.habit", ids).normal(2).T
        # At the charger since yesterday, too: in hours from today's midnight.
        both = [self._plugged_in(ids, day, habits[0]), self._plugged_in(ids, day - 1, habits[0]) - 24.0]
        self._plugs = np.stack(both, axis=1)
        leaves, returns = AWAY_DEVIATION * self._randomness("availability.away", ids, day).normal(2).T
        leaves += LEAVES + AWAY_HABIT * habits[1]
        returns += RETURNS + AWAY_HABIT * habits[1]
        stays = self._randomness("availability.home", ids, day).uniform() <= AT_HOME
        self._away = np.array([np.where(stays, 24.0, leaves), np.maximum(leaves, returns)])

    def _plugged_in(self, ids: Ids, day: int, habit: NDArray[np.float64]) -> NDArray[np.float64]:
        """When the charger of that day is plugged in and out, in hours from its midnight: ``[2, clients]``."""
        hour, length = self._randomness("availability.plug", ids, day).normal(2).T
        by_day, at = self._randomness("availability.plug_by_day", ids, day).uniform(2).T
        at_night = PLUG_HOUR + PLUG_HOUR_HABIT * habit + PLUG_HOUR_DEVIATION * hour
        begins = np.where(by_day <= BY_DAY, 24.0 * at, at_night)
        return np.array([begins, begins + np.clip(PLUG_LENGTH + PLUG_LENGTH_DEVIATION * length, *PLUG_LENGTH_ENDS)])

    def _allowed(self) -> States:
        power = self.plugged if self.needs_charger else self.plugged | (self.battery > self.threshold)
        return power & self.wifi if self.needs_wifi else power.copy()

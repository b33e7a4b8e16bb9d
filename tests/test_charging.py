"""Phones with batteries, chargers and wifi: habits against their stated moments, presence by a second computation."""

from __future__ import annotations

import numpy as np
import pytest
from devices import has_moments, prepared, watch, within

from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.system import charging
from fedsim.system.charging import DAY_NS, Charging


@pytest.fixture(scope="module")
def phones():
    """Three days of 3000 phones, in slots of ten minutes: battery, plugged, wifi and online, ``[432, 3000]`` each."""
    model = prepared(Charging(), 3000)
    seen = [(model.battery, model.plugged, model.wifi, model.online.copy())]
    for slot in range(1, 432):
        model.advance(slot * 600 * NS)
        seen.append((model.battery, model.plugged, model.wifi, model.online.copy()))
    return model, *(np.array(each) for each in zip(*seen, strict=True))


def test_batteries_fill_and_drain_at_rates_of_their_own(phones):
    _, battery, plugged, _, _ = phones
    step, inner = np.diff(battery, axis=0), (battery[1:] > 0) & (battery[1:] < 1)
    assert (battery.min(), battery.max()) == (0.0, 1.0)
    for state, sign, mean in ((plugged[:-1], 1, 7200.0), (~plugged[:-1], -1, 108_000.0)):
        used = state & inner
        assert np.all(sign * step[used] > 0)
        some = used.any(axis=0)
        highest = np.where(used, sign * step, -np.inf).max(axis=0)[some]
        lowest = np.where(used, sign * step, np.inf).min(axis=0)[some]
        assert highest == pytest.approx(lowest, rel=1e-9)  # the same in every slot of a client's
        assert some.sum() > 2900
        assert has_moments(600 / highest, mean, mean**2 / 12)
    full, empty = plugged[:-1] & (battery[1:] == 1), ~plugged[:-1] & (battery[1:] == 0)
    assert np.array_equal(full | empty, ~inner)


def test_who_is_online_follows_from_battery_charger_and_wifi(phones):
    _, battery, plugged, wifi, online = phones
    assert np.array_equal(online, (plugged | (battery > 0.3)) & wifi)
    rules = [
        ({"needs_charger": True}, plugged & wifi),
        ({"needs_charger": True, "needs_wifi": False}, plugged),
        ({"needs_wifi": False, "threshold": 0.8}, plugged | (battery > 0.8)),
        ({"threshold": 1.0}, plugged & wifi),
    ]
    for settings, wanted in rules:
        model = prepared(Charging(**settings), 3000)
        assert np.array_equal(watch(model, slots=100), wanted[:100])


def test_chargers_are_plugged_in_at_night_or_at_any_hour(monkeypatch):
    model, ids = prepared(Charging(), 1), np.arange(20_000)
    habit = Randomness(1)("availability.habit", ids).normal(2)[:, 0]
    begins, ends = model._plugged_in(ids, 5, habit)
    assert has_moments(ends - begins, 7.5, 1.5**2)
    assert (ends - begins).min() >= 1
    assert ends.max() < 48  # within the next day: no third day has to be looked at
    assert within(begins, 0.8 * 22.5 + 0.2 * 12)
    monkeypatch.setattr(charging, "BY_DAY", 0.0)
    night, next_night = (model._plugged_in(ids, day, habit)[0] for day in (5, 6))
    assert has_moments(night, 22.5, 2.0)
    assert within((night - 22.5) * (next_night - 22.5), 1.0)  # the habit, variance 1 of 2, is what nights share
    assert within(begins == night, 0.8)
    monkeypatch.setattr(charging, "BY_DAY", 1.0)
    assert has_moments(model._plugged_in(ids, 5, habit)[0], 12.0, 24**2 / 12)


def test_plugged_in_is_the_union_of_the_windows(phones):
    model, _, plugged, _, _ = phones
    ids = np.arange(40)
    habit = Randomness(1)("availability.habit", ids).normal(2)[:, 0]
    windows = [24.0 * day + model._plugged_in(ids, day, habit) for day in range(-3, 4)]
    for slot in range(432):
        hour = slot / 6
        wanted = [any(begins[client] <= hour < ends[client] for begins, ends in windows) for client in ids]
        assert plugged[slot, :40].tolist() == wanted


def test_wifi_is_at_home(phones):
    _, _, _, wifi, _ = phones
    days = ~wifi.reshape(3, 144, 3000)
    away = days.any(axis=1)
    assert within(~away, 0.3)
    assert within(away[0] & away[1], 0.49)  # days are drawn apart
    leaves = np.argmax(days, axis=1) / 6
    returns = (144 - np.argmax(days[:, ::-1], axis=1)) / 6
    for hour, mean in ((leaves[0][away[0]], 8.0), (returns[0][away[0]], 18.0)):
        assert has_moments(hour, mean + 1 / 12, 2 + 1 / 432)  # seen at the next slot
    assert np.array_equal(days.sum(axis=1)[away], np.rint(6 * (returns - leaves))[away])  # one span
    both = away[0] & away[1]
    # A client's own habit, variance 1 of 2, is all that two days share.
    shared = (leaves[0][both] - 8 - 1 / 12) * (leaves[1][both] - 8 - 1 / 12)
    assert within(shared, 1.0)


def test_days_are_alike_from_the_first_on(phones):
    _, battery, plugged, _, online = phones
    for hour in (0, 7, 20):
        for day in (1, 2):
            for each in (battery, plugged, online):
                difference = each[6 * hour + 144 * day].astype(float) - each[6 * hour]
                assert within(difference, 0.0)


def test_a_slot_need_not_divide_a_day():
    model, fine = prepared(Charging(slot=1700.0), 200), prepared(Charging(slot=100.0), 200)
    for slot in range(1, 140):
        model.advance(slot * 1700 * NS)
        fine.advance(slot * 1700 * NS)
        assert np.array_equal(model.plugged, fine.plugged)
        assert np.array_equal(model.wifi, fine.wifi)
    assert 139 * 1700 * NS > 2 * DAY_NS

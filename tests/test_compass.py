"""The scheduler of FedCompass alone: the authors' example event by event, and a second one in exact fractions."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest

import fedsim
from fedsim.compass import Compass

SPEEDS = (0.1, 0.2, 0.25, 0.4, 0.5)
"""Seconds per step of clients 0 to 4: the five of the paper's figure 1."""

Row = tuple[float, int, int | None, int, int]
"""Second, client, group, steps, and how many versions old its last model was."""


def played(compass: Compass, until: float, speeds: tuple[float, ...] = SPEEDS) -> list[Row]:
    # All assignments, by an event loop that knows times and versions only.
    heap: list[tuple[float, int, int]] = []  # second, 0 for arrivals and 1 for timers, client or group
    rows: list[Row] = []
    begun: dict[int, int] = {}
    staleness = dict.fromkeys(range(len(speeds)), 0)
    version = 0

    def assign(client: int, now: float) -> None:
        steps, group, latest = compass.assign(client, now)
        rows.append((now, client, group, steps, staleness[client]))
        begun[client] = version
        heapq.heappush(heap, (round(now + steps * speeds[client], 9), 0, client))
        if latest is not None:
            heapq.heappush(heap, (latest, 1, group or 0))

    for client in range(len(speeds)):
        assign(client, 0.0)
    while heap[0][0] <= until:
        now, kind, who = heapq.heappop(heap)
        due: int | None = None
        if kind:
            due = who if compass.expire(who) else None
        else:
            arrival = compass.arrive(who, now)
            staleness[who] = version - begun[who]
            if arrival.kind == "first":
                version += 1
            if arrival.kind != "on time":
                assign(who, now)
            due = arrival.group if arrival.complete else None
        if due is not None:
            version += 1
            for client in compass.disband(due):
                assign(client, now)
    return rows


FIRST = [(0.0, client, None, 20, 0) for client in range(5)]


def together(now: float, group: int, *staleness: int) -> list[Row]:
    # All five, with as many steps as bring them back at once.
    steps = (100, 50, 40, 25, 20)
    return [(now, client, group, steps[client], old) for client, old in enumerate(staleness)]


def test_with_lambda_1_it_does_what_the_papers_figure_shows() -> None:
    expected = [
        *FIRST,
        (2, 0, 1, 100, 0),  # creates group 1, expected at 12
        (4, 1, 1, 40, 1),
        (5, 2, 1, 28, 2),
        (8, 3, 2, 35, 3),  # ten steps until 12 are too few: group 2, expected at 22
        (10, 4, 2, 24, 4),
        (12, 0, 2, 100, 4),  # group 1 is back
        (12, 1, 2, 50, 3),
        (12, 2, 2, 40, 2),
        *together(22, 3, 0, 0, 0, 2, 1),
        *together(32, 4, 0, 0, 0, 0, 0),
        *together(42, 5, 0, 0, 0, 0, 0),
    ]
    assert played(Compass(latest_factor=1.0), 50) == expected


def test_with_lambda_1_2_the_fastest_client_goes_round_alone_once_before_all_are_one_group() -> None:
    compass = Compass(latest_factor=1.2)
    rows = played(compass, 45)
    assert rows[5:] == [
        (2, 0, 1, 100, 0),
        (4, 1, 1, 40, 1),
        (5, 2, 1, 28, 2),
        (8, 3, 2, 40, 3),  # group 1 is back at 24, if it is waited for until 14
        (10, 4, 2, 28, 4),
        (12, 0, 3, 100, 4),  # 120 steps until 24 are too many
        (12, 1, 2, 60, 3),
        (12, 2, 2, 48, 2),
        (22, 0, 2, 20, 0),
        *together(24, 4, 0, 1, 1, 3, 2),
        *together(34, 5, 0, 0, 0, 0, 0),
        *together(44, 6, 0, 0, 0, 0, 0),
    ]


def test_the_times_of_groups_are_those_of_the_figure() -> None:
    for factor, times in ((1.0, {1: (12, 12), 2: (22, 22)}), (1.2, {1: (12, 14), 2: (24, 27.2)})):
        compass = Compass(latest_factor=factor)
        played(compass, 11.9)
        found = {g: (group.expected / 1e9, group.latest / 1e9) for g, group in compass.groups.items()}
        assert found == {g: pytest.approx(each, abs=2e-6) for g, each in times.items()}
        assert [group.running for group in compass.groups.values()] == [{0, 1, 2}, {3, 4}]


def test_with_a_join_factor_of_1_2_the_fastest_client_may_join_with_120_steps() -> None:
    rows = played(Compass(latest_factor=1.2, join_factor=1.2), 30)
    assert rows[10:13] == [(12, 0, 2, 120, 4), (12, 1, 2, 60, 3), (12, 2, 2, 48, 2)]
    assert rows[13] == (24, 0, 3, 100, 0)


def test_whole_numbers_of_steps_are_not_rounded_down() -> None:
    # 5.8 s until group 5 is expected, at 22.8, are 58 steps of 0.1 s, but as floats 57.99999999999999.
    rows = played(Compass(), 17, (0.1, 0.2, 0.3, 0.05))
    assert (17.0, 0, 5, 58, 0) in rows
    assert (17.0, 1, 5, 29, 0) in rows


def test_speeds_within_the_range_of_steps_end_in_one_group_whatever_they_are() -> None:
    # lambda 1 leaves no room: an estimate that is a nanosecond short must not make a client late.
    chance = random.Random(5)
    for _ in range(20):
        speeds = tuple(chance.uniform(0.01, 0.045) for _ in range(7))
        rows = played(Compass(latest_factor=1.0), 60, speeds)[-7:]
        fastest = min(speeds)
        assert {group for _, _, group, _, _ in rows} == {rows[0][2]}
        assert {now for now, *_ in rows} == {rows[0][0]}
        assert {old for *_, old in rows} == {0}
        for _, client, _, steps, _ in rows:
            assert abs(steps - 100 * fastest / speeds[client]) <= 1


def test_speeds_beyond_the_range_of_steps_make_several_groups_at_a_time() -> None:
    compass = Compass()
    rows = played(compass, 300, (0.1, 0.11, 1.0, 1.1))
    assert len(compass.groups) == 2
    assert all(20 <= steps <= 100 for _, _, _, steps, _ in rows)


# ---- late, lost, alone ---------------------------------------------------------------------------------


def with_two() -> Compass:
    """Clients of 0.1 and 0.2 s, second 4: client 0 has 100 steps and client 1 has 40, both are expected at 12."""
    compass = Compass()
    for client, seconds in ((0, 2.0), (1, 4.0)):
        compass.assign(client, 0.0)
        assert compass.arrive(client, seconds) == ("first", None, False)
        compass.assign(client, seconds)
    assert [(group.expected, group.latest) for group in compass.groups.values()] == [(12 * 10**9, 14 * 10**9)]
    return compass


def test_a_group_goes_on_at_its_latest_time_and_who_comes_later_is_late() -> None:
    compass = with_two()
    assert compass.arrive(0, 12.0) == ("on time", 1, False)
    assert not compass.is_free(0)
    assert compass.expire(1)
    assert compass.disband(1) == [0]
    assert compass.is_free(0)
    assert not compass.expire(1)
    assert compass.assign(0, 14.0) == (100, 2, 26.0)
    assert compass.arrive(0, 24.0) == ("on time", 2, True)
    assert compass.disband(2) == [0]
    assert compass.assign(0, 24.0) == (100, 3, 36.0)
    assert compass.arrive(1, 28.0) == ("late", 1, False)
    assert compass.seconds_per_step[1] == pytest.approx(0.1 * 0.2 + 0.9 * 0.6)
    # Ten steps until 34 are too few; group 3 would be back at 36 + 10 s: 18 s of 0.56 s.
    assert compass.assign(1, 28.0) == (32, 4, pytest.approx(28 + 1.2 * 32 * 0.56))
    assert list(compass.groups) == [3, 4]


def test_what_comes_at_the_latest_time_is_on_time_and_a_nanosecond_later_late() -> None:
    for second, kind in ((14.0, "on time"), (14.000000001, "late")):
        compass = with_two()
        assert compass.arrive(1, second).kind == kind


def test_of_a_group_to_which_nobody_came_in_time_everybody_is_late_and_nobody_can_join_it() -> None:
    compass = with_two()
    assert not compass.expire(1)
    assert compass.arrive(0, 15.0) == ("late", 1, False)
    assert compass.assign(0, 15.0).group == 2
    assert compass.arrive(1, 16.0) == ("late", 1, False)
    assert 1 not in compass.groups


def test_a_group_does_not_wait_for_the_lost() -> None:
    compass = with_two()
    compass.arrive(0, 12.0)
    assert compass.lose(1) == 1
    assert compass.disband(1) == [0]
    assert compass.groups == {}
    assert compass.is_free(1)
    assert compass.seconds_per_step[1] == 0.2
    other = with_two()
    assert other.lose(0) is None
    assert other.arrive(1, 12.0) == ("on time", 1, True)
    empty = with_two()
    assert empty.lose(0) is None
    assert empty.lose(1) is None
    assert empty.groups == {}
    first = Compass()
    first.assign(7, 0.0)
    assert first.lose(7) is None
    assert first.assign(7, 1.0) == (20, None, None)


def test_the_newest_speed_has_the_stated_weight_and_time_spent_waiting_is_no_part_of_it() -> None:
    compass = with_two()
    compass.arrive(0, 13.0)  # 11 s for 100 steps
    assert compass.seconds_per_step[0] == pytest.approx(0.1 * 0.1 + 0.9 * 0.11)
    compass.expire(1)
    compass.disband(1)
    steps = compass.assign(0, 14.0).steps
    compass.arrive(0, 14.0 + steps * 0.2)
    assert compass.seconds_per_step[0] == pytest.approx(0.1 * 0.109 + 0.9 * 0.2)


def test_the_same_settings_are_refused_in_one_line() -> None:
    wrong = {
        "least_steps": 0, "most_steps": 19, "latest_factor": 0.9, "speed_momentum": 0, "join_factor": 0.5,
    }  # fmt: skip
    for key, value in wrong.items():
        with pytest.raises(fedsim.ConfigError, match=f"^{key}={value}: must be"):
            Compass(**{key: value})  # type: ignore[arg-type]


# ---- a second scheduler, in exact fractions ------------------------------------------------------------


@dataclass
class Member:
    speed: Fraction = Fraction(0)
    steps: int = 0
    since: Fraction = Fraction(0)
    group: int | None = None


class Exact:
    """The published pseudo-code word for word, but that an emptied group is dropped."""

    def __init__(self, factor: str, bound: int) -> None:
        self.factor, self.bound = Fraction(factor), bound
        self.clients: dict[int, Member] = {}
        self.groups: dict[int, dict[str, Any]] = {}
        self.made = 0

    def assign(self, client: int, now: Fraction) -> tuple[int, int | None]:
        if client not in self.clients:
            self.clients[client] = Member(steps=20, since=now)
            return 20, None
        c = self.clients[client]
        joinable = [
            (q, g)
            for g, group in self.groups.items()
            if group["Ta"] is not None and 20 <= (q := math.floor((group["Ta"] - now) / c.speed)) <= self.bound
        ]
        if joinable:
            c.steps, c.group = max(joinable)
        else:
            best = -1
            for group in self.groups.values():
                if group["Ta"] is not None and now < group["Tmax"]:
                    fastest = min(self.clients[each].speed for each in group["CL"] + group["AL"])
                    q = math.floor((group["Tmax"] + fastest * 100 - now) / c.speed)
                    best = max(best, q) if q <= 100 else best
            c.steps = 100 if best < 0 else max(best, 20)
            self.made += 1
            c.group = self.made
            span = c.steps * c.speed
            self.groups[c.group] = {"Ta": now + span, "Tmax": now + self.factor * span, "CL": [], "AL": []}
        self.groups[c.group]["CL"].append(client)
        c.since = now
        return c.steps, c.group

    def arrive(self, client: int, now: Fraction) -> str:
        c = self.clients[client]
        seen = (now - c.since) / c.steps
        c.speed = seen if c.speed == 0 else c.speed / 10 + seen * 9 / 10
        if c.group is None:
            return "first"
        group = self.groups[c.group]
        group["CL"].remove(client)
        late = group["Ta"] is None or now > group["Tmax"]
        if not late:
            group["AL"].append(client)
        return "late" if late else "on time"

    def aggregate(self, g: int) -> list[int]:
        group = self.groups[g]
        members = sorted(group["AL"], key=lambda each: self.clients[each].speed)
        group["Ta"], group["AL"] = None, []
        return members


@pytest.mark.parametrize("factor", ["1", "1.2", "1.5"])
@pytest.mark.parametrize("bound", [100, 120])
@pytest.mark.parametrize("seed", [1, 2])
def test_it_decides_as_a_second_scheduler_in_exact_fractions_does(factor: str, bound: int, seed: int) -> None:
    # Speeds a factor of ten apart, tasks that take 0.7 to 1.6 times as long: clients are early, late and together.
    chance = random.Random(seed)
    compass = Compass(latest_factor=float(factor), join_factor=bound / 100)
    exact = Exact(factor, bound)
    nominal = [chance.uniform(0.02, 0.2) for _ in range(9)]
    heap: list[tuple[float, int, int]] = []
    kinds: list[str] = []

    def assign(client: int, now: float) -> None:
        steps, group, latest = compass.assign(client, now)
        assert (steps, group) == exact.assign(client, Fraction(round(now * 1e9), 10**9))
        heapq.heappush(heap, (round(now + steps * nominal[client] * chance.uniform(0.7, 1.6), 9), 0, client))
        if latest is not None:
            assert latest == pytest.approx(float(exact.groups[group]["Tmax"]), abs=1.1e-6)
            heapq.heappush(heap, (latest, 1, group))

    def aggregate(g: int, now: float) -> None:
        members = compass.disband(g)
        assert members == exact.aggregate(g)
        for client in members:
            assign(client, now)

    for client in range(9):
        assign(client, 0.0)
    while len(kinds) < 150:
        now, kind, who = heapq.heappop(heap)
        if kind:
            if compass.expire(who):
                assert exact.groups[who]["AL"]
                aggregate(who, now)
            continue
        arrival = compass.arrive(who, now)
        kinds.append(arrival.kind)
        assert exact.arrive(who, Fraction(round(now * 1e9), 10**9)) == arrival.kind
        if arrival.kind != "on time":
            assign(who, now)
        if arrival.complete:
            assert arrival.group is not None
            assert exact.groups[arrival.group]["CL"] == []
            aggregate(arrival.group, now)
    assert min(kinds.count("late"), kinds.count("on time")) > 5

"""The event heap against a sorted list: order within one instant, cancelling, limits, snapshots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.checks import SimulationError
from fedsim.kernel import NS, Kernel, Phase, to_ns


def drain(kernel: Kernel) -> list[tuple[int, Any]]:
    """Run to the end; (time, event) in the order they were handled."""
    seen: list[tuple[int, Any]] = []
    while kernel.next_time() is not None:
        kernel.run_instant(lambda event: seen.append((kernel.now, event)))
    return seen


# ---- order ---------------------------------------------------------------------------------------


def test_phases_have_the_order_of_the_contract() -> None:
    names = [phase.name for phase in sorted(Phase)]
    assert names == ["ARRIVAL", "MESSAGE", "LOSS", "AVAILABILITY", "TIMER", "SETTLE", "DISPATCH"]


def test_events_of_one_instant_run_phase_by_phase_however_they_were_scheduled() -> None:
    for order in (sorted(Phase), sorted(Phase, reverse=True)):
        kernel = Kernel()
        for phase in order:
            kernel.schedule(5, phase, phase)
        assert [event for _, event in drain(kernel)] == sorted(Phase)


def test_ties_go_by_client_then_task_then_order_of_scheduling() -> None:
    kernel = Kernel()
    keys = [(2, 1, "a"), (1, 9, "b"), (1, 3, "c"), (1, 3, "d"), (-1, 7, "e"), (10, 0, "f")]
    for client, task, event in keys:
        kernel.schedule(0, Phase.ARRIVAL, event, client, task)
    assert [event for _, event in drain(kernel)] == ["e", "c", "d", "b", "a", "f"]


def test_time_comes_before_phase_and_one_call_runs_one_instant() -> None:
    kernel = Kernel()
    kernel.schedule(2, Phase.ARRIVAL, "later")
    kernel.schedule(1, Phase.DISPATCH, "sooner")
    seen: list[Any] = []
    kernel.run_instant(seen.append)
    assert (seen, kernel.now, len(kernel)) == (["sooner"], 1, 1)


def test_events_are_never_compared_with_each_other() -> None:
    kernel = Kernel()
    events = [{"no": "order"}, object(), None]
    for event in events:
        kernel.schedule(1, Phase.TIMER, event)
    assert [event for _, event in drain(kernel)] == events


def test_events_added_to_the_running_instant_run_in_it_and_in_their_phase() -> None:
    kernel, seen = Kernel(), []

    def handle(event: str) -> None:
        seen.append((kernel.now, event))
        if event == "first timer":
            kernel.schedule(3, Phase.DISPATCH, "dispatch")
            kernel.schedule(3, Phase.SETTLE, "settle")
            kernel.schedule(3, Phase.ARRIVAL, "arrival")  # its phase is over, so it is next
            kernel.schedule(4, Phase.ARRIVAL, "next instant")

    kernel.schedule(3, Phase.TIMER, "first timer", 0)
    kernel.schedule(3, Phase.TIMER, "second timer", 1)
    kernel.run_instant(handle)
    assert seen == [(3, each) for each in ("first timer", "arrival", "second timer", "settle", "dispatch")]
    assert kernel.next_time() == 4


# ---- the clock -----------------------------------------------------------------------------------


def test_seconds_become_the_nearest_nanosecond() -> None:
    assert to_ns(1) == NS == 10**9
    assert to_ns(0.1 + 0.2) == 300_000_000
    assert to_ns(1.6e-9) == 2
    assert to_ns(1.4e-9) == 1


def test_nothing_can_be_scheduled_in_the_past() -> None:
    kernel = Kernel()
    kernel.advance(10)
    kernel.schedule(10, Phase.TIMER, "now is not past")
    with pytest.raises(ValueError, match="already 10 ns"):
        kernel.schedule(9, Phase.TIMER, "past")
    assert drain(kernel) == [(10, "now is not past")]


def test_the_clock_advances_up_to_the_next_event_and_no_further() -> None:
    kernel = Kernel()
    kernel.schedule(7, Phase.TIMER, "event")
    kernel.advance(7)
    assert kernel.now == 7
    for time in (6, 8):
        with pytest.raises(ValueError, match="cannot move the clock"):
            kernel.advance(time)
    assert kernel.now == 7


def test_a_cancelled_event_does_not_hold_up_the_clock() -> None:
    kernel = Kernel()
    kernel.cancel(kernel.schedule(7, Phase.TIMER, "event"))
    kernel.advance(100)
    assert (kernel.now, len(kernel), kernel.next_time()) == (100, 0, None)


def test_cancelling_takes_out_one_event_even_of_the_running_instant() -> None:
    kernel, seen = Kernel(), []
    handles = {name: kernel.schedule(1, Phase.ARRIVAL, name, client) for client, name in enumerate("abcd")}
    kernel.cancel(handles["b"])
    assert len(kernel) == 3

    def handle(event: str) -> None:
        seen.append(event)
        if event == "a":
            kernel.cancel(handles["c"])

    kernel.run_instant(handle)
    assert seen == ["a", "d"]
    assert (len(kernel), kernel.next_time()) == (0, None)


# ---- errors --------------------------------------------------------------------------------------


def test_an_empty_heap_is_an_error_that_tells_the_time() -> None:
    kernel = Kernel()
    with pytest.raises(SimulationError, match=r"nothing left to happen at 0 s"):
        kernel.run_instant(lambda event: None)
    kernel.cancel(kernel.schedule(5, Phase.TIMER, "only event"))
    kernel.advance(to_ns(2.5))
    with pytest.raises(SimulationError, match=r"nothing left to happen at 2\.5 s"):
        kernel.run_instant(lambda event: None)


def test_an_instant_holds_as_many_events_as_the_limit_and_not_one_more() -> None:
    kernel = Kernel(limit=5)
    for time, count in ((1, 5), (2, 5), (3, 6)):
        for client in range(count):
            kernel.schedule(time, Phase.TIMER, client, client)
    kernel.run_instant(lambda event: None)
    kernel.run_instant(lambda event: None)
    with pytest.raises(SimulationError, match="more than 5 events"):
        kernel.run_instant(lambda event: None)


def test_events_that_answer_each_other_without_end_are_an_error() -> None:
    kernel = Kernel(limit=1000)
    kernel.schedule(1, Phase.TIMER, "again")
    with pytest.raises(SimulationError, match="time stands still"):
        kernel.run_instant(lambda event: kernel.schedule(kernel.now, Phase.TIMER, event))


# ---- against a sorted list -----------------------------------------------------------------------


class SortedList:
    """The kernel's contract in the plainest way: a list, sorted before every event."""

    def __init__(self) -> None:
        self.now = self.count = 0
        self.entries: list[tuple[tuple[int, int, int, int, int], int]] = []

    def schedule(self, time: int, phase: Phase, event: int, client: int, task: int) -> int:
        self.count += 1
        self.entries.append(((time, int(phase), client, task, self.count), event))
        return self.count

    def cancel(self, handle: int) -> None:
        self.entries = [entry for entry in self.entries if entry[0][4] != handle]

    def next_time(self) -> int | None:
        return min((entry[0][0] for entry in self.entries), default=None)

    def run_instant(self, handle: Any) -> None:
        time = self.next_time()
        assert time is not None
        self.now = time
        while self.next_time() == time:
            self.entries.sort(key=lambda entry: entry[0])
            handle(self.entries.pop(0)[1])


Request = tuple[int, Phase, int, int]
requests = st.tuples(
    st.integers(0, 3), st.sampled_from(list(Phase)), st.integers(-1, 3), st.integers(-1, 3)
)  # (delay, phase, client, task)
programmes = st.fixed_dictionaries(
    {
        "first": st.lists(requests, min_size=1, max_size=12),
        "follow": st.lists(st.lists(requests, max_size=2), max_size=10),  # what the n-th handled event schedules
        "cancel": st.lists(st.tuples(st.integers(0, 15), st.integers(0, 30)), max_size=6),  # (at n-th event, which)
    }
)


def play(kernel: Any, programme: dict[str, Any]) -> list[Any]:
    """Run a programme on a kernel to its end; (time, event) in the order they were handled."""
    log: list[Any] = []
    handles: dict[int, int] = {}

    def schedule(wanted: list[Request]) -> None:
        for delay, phase, client, task in wanted:
            event = len(handles)
            handles[event] = kernel.schedule(kernel.now + delay, phase, event, client, task)

    def handle(event: int) -> None:
        step = len(log)
        log.append((kernel.now, event))
        handles[event] = -1
        schedule(programme["follow"][step] if step < len(programme["follow"]) else [])
        for at, which in programme["cancel"]:
            if at == step and handles.get(which, -1) > 0:
                kernel.cancel(handles[which])
                handles[which] = -1

    schedule(programme["first"])
    while kernel.next_time() is not None:
        kernel.run_instant(handle)
    return log


@given(programmes)
@settings(max_examples=200, deadline=None)
def test_any_programme_runs_as_on_a_sorted_list(programme: dict[str, Any]) -> None:
    assert play(Kernel(), programme) == play(SortedList(), programme)


@given(st.lists(requests, max_size=20), st.sets(st.integers(0, 19)), st.integers(0, 5), requests)
@settings(max_examples=200, deadline=None)
def test_a_restored_kernel_has_the_same_future(
    wanted: list[Request], cancelled: set[int], instants: int, extra: Request
) -> None:
    kernel = Kernel(limit=77)
    handles = [kernel.schedule(delay, phase, (delay, i), c, t) for i, (delay, phase, c, t) in enumerate(wanted)]
    for which in sorted(cancelled):
        if which < len(handles):
            kernel.cancel(handles[which])
    for _ in range(instants):
        if kernel.next_time() is not None:
            kernel.run_instant(lambda event: None)
    seen = kernel.snapshot()
    now, left = kernel.now, len(kernel)

    def future(one: Kernel) -> tuple[list[Any], int, int]:
        assert (one.now, len(one)) == (now, left)
        delay, phase, client, task = extra
        handle = one.schedule(now + delay, phase, "extra", client, task)
        return drain(one), handle, one.limit

    first = future(kernel)
    others = [Kernel(), Kernel()]
    for other in others:  # twice: running on from a snapshot must not use it up
        other.schedule(99, Phase.TIMER, "to be forgotten")
        other.restore(seen)
        assert future(other) == first
    kernel.restore(seen)
    assert future(kernel) == first

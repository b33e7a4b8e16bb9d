"""What gets lost and when: every timeline here is worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from support import Given, Scripted

import fedsim
from fedsim.kernel import NS, to_ns
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.system import availability, compute, faults, network

# One task alone: 1,000,000 bytes at 1 MB/s down and 0.5 MB/s up with 0.5 s of latency each way, and 1 s of work,
# so it downloads from 0 to 1.5, works to 2.5 and uploads to 5; bytes move from 0.5 to 1.5 and from 3 to 5.
PROBLEM_BYTES = 1_000_000
ONE_STEP = fedsim.LocalSGD(steps=1)


class Diary(fedsim.Strategy):
    """Asks client 0 once, applies what comes and writes down when it hears of what; looks at ``look`` who is busy."""

    def __init__(self, look=(), at=0.0, **dispatch):
        super().__init__(ONE_STEP)
        self.look, self.at, self.how = look, at, dispatch
        self.heard, self.busy = [], []

    def start(self, fed):
        fed.timer(self.at, "ask")
        fed.timer(1e6, "later")  # so that the run goes on to its time limit
        for at in self.look:
            fed.timer(at, "look")

    def on_timer(self, fed, timer):
        if timer.tag == "ask":
            fed.dispatch(0, **self.how)
        elif timer.tag == "look":
            self.busy.append(bool(fed.busy[0]))

    def on_reply(self, fed, reply):
        self.heard.append((fed.now, "reply"))
        fed.publish(fed.model, used=[reply])

    def on_lost(self, fed, task, why):
        self.heard.append((fed.now, why))
        assert task.client == 0


def diary(strategy, presence=None, fault=None, span=30.0, clients=1, seed=0):
    """The run of a diary over the network above, and its one task."""
    system = fedsim.System(
        compute.Constant(mean=1.0), network.Constant(down=8.0, up=4.0, latency=0.5), presence, fault or faults.Faults()
    )
    problem = fedsim.ScheduleOnly(PROBLEM_BYTES // 4)
    run = fedsim.simulate(
        strategy, problem, system, stop=fedsim.Stop(time_limit=span), seed=seed, clients=clients, cohort=1
    )
    (task,) = run.events.itertuples()
    return run, task


def times(task):
    """Started, computed, upload started, arrived; None where the task did not get there."""
    listed = (task.started, task.computed, task.upload_started, task.arrived)
    return [None if pd.isna(at) else at for at in listed]


def test_a_task_nothing_happens_to():
    strategy = Diary()
    _, task = diary(strategy)
    assert times(task) == [1.5, 2.5, 2.5, 5.0]
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("applied", PROBLEM_BYTES, PROBLEM_BYTES)
    assert strategy.heard == [(5.0, "reply")]


# ---- drop-out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("detect", [0.0, 2.0])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_drop_out_is_heard_of_after_the_detection_time_and_uploads_nothing(when, detect):
    fault = faults.Faults(dropout=1.0, when=when, detect=detect)
    twin = faults.Faults(dropout=1.0, when=when)
    twin.prepare(1, Randomness(3))
    _, fraction = twin.draw(np.array([0]), np.array([0]))
    worked = {"before": 0, "during": round(float(fraction[0]) * NS), "after": NS}[when]
    assert 0 <= worked <= NS
    ended = 1_500_000_000 + worked  # ns: the download is complete in every case
    seen = (ended + to_ns(detect)) / NS
    strategy = Diary(look=(seen - 2e-9, seen + 1e-9))
    _, task = diary(strategy, fault=fault, seed=3)
    assert strategy.heard == [(seen, "dropped")]
    assert strategy.busy == [True, False]
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("dropped", PROBLEM_BYTES, 0)
    assert times(task)[0] == 1.5
    assert times(task)[1] == (2.5 if when == "after" else None)
    assert times(task)[3] is None


def test_drop_out_takes_its_share_of_tasks_and_any_takes_all_three_stages():
    system = fedsim.System(compute.Constant(mean=1.0), network.Constant(), faults=faults.Faults(0.3, "any"))
    run = fedsim.simulate(FedAvg(ONE_STEP), fedsim.ScheduleOnly(1000), system, stop=fedsim.Stop(rounds=100))
    ended = run.events[run.events.outcome != "pending"]
    dropped = ended[ended.outcome == "dropped"]
    assert set(run.summary["outcomes"]) == {"applied", "dropped", "pending"}
    assert abs(len(dropped) / len(ended) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(ended))
    after = dropped.computed.notna().mean()
    assert abs(after - 1 / 3) < 4 * np.sqrt(2 / 9 / len(dropped))


def test_a_dropped_task_frees_its_client_for_another():
    class Again(Diary):
        def on_lost(self, fed, task, why):
            super().on_lost(fed, task, why)
            if len(self.heard) < 3:
                fed.dispatch(0)

    strategy = Again()
    system = fedsim.System(compute.Constant(mean=1.0), faults=faults.Faults(1.0, "after", detect=0.5))
    run = fedsim.simulate(strategy, fedsim.ScheduleOnly(), system, stop=fedsim.Stop(time_limit=9.0), clients=1)
    assert strategy.heard == [(1.5, "dropped"), (3.0, "dropped"), (4.5, "dropped")]
    assert run.events.dispatched.tolist() == [0.0, 1.5, 3.0]


def test_a_client_that_leaves_after_it_dropped_out_is_noticed_no_later():
    # Over at 2.5 (after the work), away from 3 to 20: the server notices 2 s after the end all the same.
    strategy = Diary()
    fault = faults.Faults(dropout=1.0, when="after", detect=2.0, on_offline="pause")
    diary(strategy, Scripted((3.0, 0, False), (20.0, 0, True)), fault)
    assert strategy.heard == [(4.5, "dropped")]


# ---- going offline -------------------------------------------------------------------------------

AWAY = [
    # gone at, and then started, computed, upload started, arrived when the 10 s away are added behind it
    (1.0, [11.5, 12.5, 12.5, 15.0]),  # in the download
    (2.0, [1.5, 12.5, 12.5, 15.0]),  # at work
    (4.0, [1.5, 2.5, 2.5, 15.0]),  # in the upload
]


@pytest.mark.parametrize(("gone", "expected"), AWAY)
def test_a_paused_task_is_put_off_by_exactly_the_time_away(gone, expected):
    strategy = Diary()
    fault = faults.Faults(on_offline="pause", detect=3.0)
    run, task = diary(strategy, Scripted((gone, 0, False), (gone + 10, 0, True)), fault)
    assert times(task) == expected
    assert strategy.heard == [(15.0, "reply")]
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("applied", PROBLEM_BYTES, PROBLEM_BYTES)
    assert run.summary["down_bytes"] == PROBLEM_BYTES


def test_a_task_can_be_paused_in_every_stage():
    strategy = Diary()
    # 1 s away in the download, 2 s in the work, 4 s in the upload.
    presence = Scripted(
        (1.0, 0, False), (2.0, 0, True), (3.0, 0, False), (5.0, 0, True), (7.0, 0, False), (11.0, 0, True)
    )
    _, task = diary(strategy, presence, faults.Faults(on_offline="pause"))
    assert times(task) == [2.5, 5.5, 5.5, 12.0]


@pytest.mark.parametrize(("gone", "down", "up"), [(1.0, 500_000, 0), (2.0, PROBLEM_BYTES, 0), (4.0, 10**6, 500_000)])
def test_a_task_still_paused_at_the_end_has_moved_what_it_had_when_its_client_left(gone, down, up):
    run, task = diary(Diary(), Scripted((gone, 0, False)), faults.Faults(on_offline="pause"))
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("pending", down, up)
    assert (run.summary["down_bytes"], run.summary["up_bytes"]) == (down, up)


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_pause_puts_off_a_drop_out_too(when):
    strategy = Diary()
    fault = faults.Faults(dropout=1.0, when=when, on_offline="pause", detect=1.0)
    plain = Diary()
    diary(plain, fault=faults.Faults(dropout=1.0, when=when, detect=1.0))
    diary(strategy, Scripted((1.0, 0, False), (8.0, 0, True)), fault)
    assert strategy.heard == [(pytest.approx(plain.heard[0][0] + 7.0, abs=1e-9), "dropped")]


def test_a_deadline_runs_while_a_task_is_paused():
    strategy = Diary(deadline=6.0)
    _, task = diary(strategy, Scripted((1.0, 0, False), (9.0, 0, True)), faults.Faults(on_offline="pause"))
    assert strategy.heard == [(6.0, "deadline")]
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("late", 500_000, 0)


@pytest.mark.parametrize("detect", [0.0, 1.25])
@pytest.mark.parametrize(
    ("gone", "down", "up"),
    [(0.25, 0, 0), (1.0, 500_000, 0), (2.0, PROBLEM_BYTES, 0), (2.75, PROBLEM_BYTES, 0), (4.0, PROBLEM_BYTES, 500_000)],
)
def test_a_lost_task_counts_bytes_up_to_the_cut_and_is_heard_of_after_detection(gone, down, up, detect):
    strategy = Diary(look=(gone + detect - 1e-9, gone + detect + 1e-9))
    # It is back at once, which does not bring the task back.
    presence = Scripted((gone, 0, False), (gone + 0.001, 0, True))
    _, task = diary(strategy, presence, faults.Faults(on_offline="lose", detect=detect))
    assert strategy.heard == [(gone + detect, "interrupted")]
    assert strategy.busy == [True, False]
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("interrupted", down, up)
    assert times(task) == [at if at is not None and at <= gone else None for at in (1.5, 2.5, 2.5, None)]


def test_finish_lets_a_client_finish_while_it_is_away():
    strategy = Diary()
    _, task = diary(strategy, Scripted((1.0, 0, False), (20.0, 0, True)), faults.Faults(on_offline="finish"))
    assert times(task) == [1.5, 2.5, 2.5, 5.0]
    assert strategy.heard == [(5.0, "reply")]


def test_leaving_interrupts_unless_presence_is_slotted():
    heard = []
    for slotted in (False, True):
        strategy, presence = Diary(), Scripted((1.0, 0, False))
        presence.slotted = slotted
        diary(strategy, presence)
        heard += strategy.heard
    assert heard == [(1.0, "interrupted"), (5.0, "reply")]


def test_who_leaves_at_the_moment_of_arrival_has_arrived():
    strategy = Diary()
    diary(strategy, Scripted((5.0, 0, False)), faults.Faults(on_offline="lose"))
    assert strategy.heard == [(5.0, "reply")]


def test_a_client_offline_when_its_task_takes_effect_is_lost_at_once_and_moves_nothing():
    strategy = Diary(at=2.0, look=(2.0, 2.0 + 1e-9))
    _, task = diary(strategy, Scripted((1.0, 0, False)))
    assert strategy.heard == [(2.0, "offline")]
    assert strategy.busy == [True, False]
    assert (task.outcome, task.down_bytes, task.up_bytes) == ("dropped", 0, 0)
    assert times(task) == [None] * 4


def test_presence_at_take_effect_is_what_counts():
    # Presence changes come before timers, and take-effect after both: asked and gone in one instant is gone.
    strategy = Diary(at=1.0)
    _, task = diary(strategy, Scripted((1.0, 0, False)))
    assert (task.outcome, strategy.heard) == ("dropped", [(1.0, "offline")])
    strategy = Diary(at=1.0)
    _, task = diary(strategy, Scripted((1.0, 0, True), absent=[0]))
    assert (task.outcome, strategy.heard) == ("applied", [(6.0, "reply")])


def test_a_task_lost_at_take_effect_uses_up_none_of_the_clients_own_draws():
    jitter = compute.Constant(mean=1.0, jitter=1.0, jitter_law="exponential")

    class Twice(Diary):
        def start(self, fed):
            fed.dispatch(0)  # offline: lost
            fed.timer(5.0, "ask")

    run = fedsim.simulate(
        Twice(),
        fedsim.ScheduleOnly(),
        fedsim.System(jitter, availability=Scripted((4.0, 0, True), absent=[0])),
        stop=fedsim.Stop(updates=1),
        clients=1,
    )
    twin = compute.Constant(mean=1.0, jitter=1.0, jitter_law="exponential")
    twin.prepare(1, Randomness(0))
    took = twin.durations(np.array([0]), 1, np.array([0]))[0]
    assert round(run.events.arrived.iloc[1] * NS) == 5 * NS + took


# ---- deadlines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("deadline", "heard"), [(4.9, (4.9, "deadline")), (5.0, (5.0, "reply"))])
def test_a_tasks_deadline_counts_from_the_start_of_the_run_and_what_arrives_on_it_is_in_time(deadline, heard):
    strategy = Diary(deadline=deadline)
    _, task = diary(strategy)
    assert strategy.heard == [heard]
    assert task.outcome == ("late" if heard[1] == "deadline" else "applied")


def test_a_deadline_frees_the_client():
    strategy = Diary(look=(2.0, 2.0 + 1e-9), deadline=2.0)
    diary(strategy)
    assert strategy.busy == [False, False]  # losses come before timers


def rounds_with_deadline(stragglers):
    """Clients that take 1, 2 and 4.5 s, asked together, rounds of at most 3 s; the tasks by outcome."""
    run = fedsim.simulate(
        FedAvg(ONE_STEP, deadline=3.0, stragglers=stragglers),
        fedsim.ScheduleOnly(),
        fedsim.System(Given(1.0, 2.0, 4.5)),
        stop=fedsim.Stop(time_limit=8.0),
        clients=3,
        cohort=3,
    )
    return run, [tuple(row) for row in run.events[["client", "dispatched", "outcome"]].itertuples(index=False)]


def test_a_round_deadline_cancels_stragglers():
    run, tasks = rounds_with_deadline("cancel")
    assert tasks == [
        (0, 0.0, "applied"),
        (1, 0.0, "applied"),
        (2, 0.0, "cancelled"),
        (0, 3.0, "applied"),
        (1, 3.0, "applied"),
        (2, 3.0, "cancelled"),
        (0, 6.0, "pending"),  # arrived at 7, and waits for a round that ends at 9
        (1, 6.0, "pending"),
        (2, 6.0, "pending"),
    ]
    assert run.summary["version"] == 2
    assert run.events.applied_version.dropna().tolist() == [0, 0, 1, 1]


def test_a_round_deadline_lets_stragglers_come_late():
    run, tasks = rounds_with_deadline("late")
    assert tasks == [
        (0, 0.0, "applied"),
        (1, 0.0, "applied"),
        (2, 0.0, "late"),  # arrives at 4.5 in the second round
        (0, 3.0, "applied"),
        (1, 3.0, "applied"),  # the second round asks two and ends with both at 5
        (0, 5.0, "applied"),
        (1, 5.0, "applied"),
        (2, 5.0, "pending"),  # the third is cut off at 8, when two have come and client 2 is at work to 9.5
        (0, 8.0, "pending"),
        (1, 8.0, "pending"),
    ]
    assert run.events.arrived[2] == 4.5
    assert run.summary["version"] == 3


def test_over_selection_refuses_what_comes_after_the_cohort():
    run = fedsim.simulate(
        FedAvg(ONE_STEP, over_selection=2.0, stragglers="late"),
        fedsim.ScheduleOnly(),
        fedsim.System(Given(1.0, 1.0, 1.0, 3.5)),
        stop=fedsim.Stop(time_limit=3.6),
        clients=4,
        cohort=2,
    )
    first = run.events[run.events.dispatched == 0]
    # Three come in one instant: the first two by client id are in, the third is late, the fourth later still.
    assert first.outcome.tolist() == ["applied", "applied", "late", "late"]
    assert first.arrived.tolist() == [1.0, 1.0, 1.0, 3.5]


# ---- state is committed with acceptance ----------------------------------------------------------


class Counter(fedsim.LocalSGD):
    """Counts its client's tasks in the client's state."""

    def initial_state(self, layout):
        return {"count": torch.zeros(1, dtype=torch.float64)}

    def begin(self, ctx):
        ctx.state["count"] = ctx.state["count"] + 1


def counts_of(strategy, system, stop, clients=20, **more):
    """The run, and every client's committed count at its end."""
    kept = []
    run = fedsim.simulate(
        strategy, fedsim.Quadratic(), system, stop=stop, clients=clients, observer=kept.append, **more
    )
    return run, np.array([kept[-1].state(client, "count").item() for client in range(clients)])


@pytest.mark.parametrize("stragglers", ["cancel", "late"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clients_state_counts_its_applied_tasks_and_no_others(stragglers, seed):
    system = fedsim.System(
        compute.Lognormal(mean=1.0),
        network.Constant(down=0.01),
        availability.Markov(20.0, 4.0),
        faults.Faults(dropout=0.15, when="any", detect=0.3, on_offline="lose"),
    )
    strategy = FedAvg(Counter(steps=1), over_selection=1.5, deadline=3.0, stragglers=stragglers)
    run, counts = counts_of(strategy, system, fedsim.Stop(rounds=40), cohort=6, seed=seed)
    seen = set(run.summary["outcomes"])
    assert {"applied", "dropped", "interrupted", "late" if stragglers == "late" else "cancelled"} <= seen
    assert counts.tolist() == run.clients.applied.tolist()
    assert counts.sum() == run.summary["outcomes"]["applied"]


class Sorter(fedsim.Strategy):
    """Treats each client's result in another way."""

    def __init__(self):
        super().__init__(Counter(steps=1))

    def start(self, fed):
        self.tasks = fed.dispatch(range(6), deadline=None)
        fed.timer(0.5, "cancel")
        fed.timer(2.0, "end")

    def on_timer(self, fed, timer):
        if timer.tag == "cancel":
            fed.cancel(self.tasks[3])
        else:
            fed.stop("end")

    def on_reply(self, fed, reply):
        before = fed.state(reply.client, "count").item()
        if reply.client in (0, 5):
            fed.publish(fed.model + reply["delta"], used=[reply])
        elif reply.client == 1:
            fed.reject(reply, "no need")
        elif reply.client == 2:
            fed.reject(reply, "late")
        # client 3 is cancelled, client 4 never decided on
        after = fed.state(reply.client, "count").item()
        assert (before, after) == ((0.0, 1.0) if reply.client in (0, 5) else (0.0, 0.0))


def test_state_changes_at_acceptance_and_only_then():
    run, counts = counts_of(Sorter(), fedsim.System(compute.Constant(mean=1.0)), fedsim.Stop(rounds=9), clients=6)
    assert run.events.outcome.tolist() == ["applied", "rejected", "late", "cancelled", "pending", "applied"]
    assert counts.tolist() == [1, 0, 0, 0, 0, 1]


def test_every_applied_task_sees_the_state_the_one_before_it_left():
    class Ledger(FedAvg):
        def on_reply(self, fed, reply):
            fed.state(reply.client, "count").fill_(99.0)  # a copy: nothing comes of it
            super().on_reply(fed, reply)

    _, counts = counts_of(Ledger(Counter(steps=1)), fedsim.System(), fedsim.Stop(rounds=7), clients=4, cohort=4)
    assert counts.tolist() == [7, 7, 7, 7]


def test_a_strategy_cannot_reach_a_clients_state_through_the_reply():
    class Both(Counter):
        """Sends up the very tensor it keeps."""

        def payload_spec(self, layout):
            return {"count": fedsim.TensorSpec((1,), torch.float64)}

        def finish(self, ctx, x):
            return {"count": ctx.state["count"]}

    class Scribbler(fedsim.Strategy):
        def settle(self, fed):
            if fed.now == 0:
                fed.dispatch(range(fed.clients))

        def on_reply(self, fed, reply):
            reply["count"].fill_(99.0)
            fed.publish(fed.model, used=[reply])

    _, counts = counts_of(Scribbler(Both(steps=1)), fedsim.System(), fedsim.Stop(rounds=1), clients=3, cohort=3)
    assert counts.tolist() == [1, 1, 1]

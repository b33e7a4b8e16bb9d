"""The edges: each odd situation has one defined outcome."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import ONE_STEP, Given, Hooks, Scripted, apply, simulate, tiny

import fedsim
from fedsim.kernel import to_ns
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import availability, compute, faults, network

EVERY_STRATEGY = [FedAvg, FedAsync, FedBuff]


# ---- one instant ---------------------------------------------------------------------------------


def test_simultaneous_arrivals_come_by_client_before_one_settle():
    def note(self, fed, reply):
        self.log.append((fed.now, "reply", reply.client))
        fed.publish(fed.model, used=[reply])

    def settle(self, fed):
        self.log.append((fed.now, "settle", int(fed.in_flight)))
        if fed.now == 0:
            fed.dispatch([4, 1])
            fed.dispatch([3, 0])

    strategy = Hooks(start=lambda self, fed: None, on_reply=note, settle=settle)
    run = simulate(strategy, fedsim.Stop(updates=4), clients=5)
    assert strategy.log == [(0.0, "settle", 0), *((1.0, "reply", c) for c in (0, 1, 3, 4)), (1.0, "settle", 0)]
    assert run.events.client.tolist() == [4, 1, 3, 0]  # tasks are numbered as they were asked for
    assert run.events.staleness.tolist() == [3, 1, 2, 0]


def test_the_order_within_one_instant():
    def start(self, fed):
        fed.dispatch(2, steps=1)  # arrives at 1
        fed.dispatch(1, steps=5, deadline=1.0)  # lost at 1
        fed.timer(1.0, "timer")
        fed.send(fedsim.SERVER, 0, x=torch.zeros(1))  # 32 bits at 32 bit/s: arrives at 1

    def note(kind):
        def handler(self, fed, *what):
            if fed.now == 1:
                self.log.append(kind)

        return handler

    kinds = ("on_timer", "settle", "on_online", "on_lost", "on_message", "on_reply")
    strategy = Hooks(start=start, **{kind: note(kind) for kind in kinds})
    simulate(
        strategy,
        fedsim.Stop(updates=1),
        problem=fedsim.Quadratic(dimension=2),
        network=Free(),
        availability=Scripted((1.0, 3, True), absent=[3]),
        clients=4,
    )
    assert strategy.log == ["on_reply", "on_message", "on_lost", "on_online", "on_timer", "settle"]


class Free(network.NoNetwork):
    """Model-sized transfers take no time, messages of 4 bytes one second."""

    def down(self, clients, nbytes):
        return np.where(np.broadcast_to(nbytes, np.shape(clients)) == 4, to_ns(1.0), 0)


def test_dispatches_of_one_instant_take_effect_together_with_what_is_in_force_at_its_end():
    class Late(Hooks):
        extra = 1.0

        def message(self, fed, task):
            return {"pull": torch.full((3,), self.extra, dtype=torch.float64)}

    class Sum(fedsim.LocalSGD):
        def finish(self, ctx, x):
            return {"delta": ctx.start + ctx.message["pull"]}

    def on_reply(self, fed, reply):
        self.log.append((reply.client, reply.task.tag, reply.task.version, reply["delta"].tolist()))
        self.held.append(reply)

    def settle(self, fed):
        if fed.now == 0:
            fed.dispatch([0, 1])
        elif fed.now == 1:
            fed.dispatch(1, tag="first")
            fed.publish(torch.full((3,), 5.0, dtype=torch.float64), used=self.held[:1])
            fed.dispatch(0, tag="second")
            fed.publish(torch.full((3,), 6.0, dtype=torch.float64), used=self.held[1:])
            self.extra = 7.0

    strategy = Late(Sum(steps=1), on_reply=on_reply, settle=settle)
    strategy.held = []
    run = simulate(strategy, fedsim.Stop(updates=4), fedsim.Quadratic(dimension=3), clients=2, cohort=2)
    assert strategy.log == [
        (0, None, 0, [1.0] * 3),
        (1, None, 0, [1.0] * 3),
        (0, "second", 2, [13.0] * 3),
        (1, "first", 2, [13.0] * 3),
    ]
    assert run.events.version.tolist() == [0, 0, 2, 2]
    assert run.events.staleness.tolist()[:2] == [0, 1]
    assert run.events.tag.tolist() == ["", "", "first", "second"]


def test_stop_acts_at_the_end_of_the_instant():
    def on_reply(self, fed, reply):
        self.log.append(reply.client)
        fed.publish(fed.model, used=[reply])
        fed.stop("enough")

    def settle(self, fed):
        fed.dispatch(fed.idle())

    strategy = Hooks(on_reply=on_reply, settle=settle)
    run = simulate(strategy, fedsim.Stop(rounds=100), clients=3, cohort=3)
    assert strategy.log == [0, 1, 2]
    assert run.summary["stopped"] == "enough"
    assert run.summary["time"] == 1.0
    assert run.events.outcome.tolist() == ["applied"] * 3 + ["pending"] * 3


def test_limits_may_be_numbers_of_numpys():
    stop = fedsim.Stop(rounds=np.int64(3), time_limit=np.float64(2.5), bytes=np.int32(7), target=np.float32(0.5))
    assert [type(each) for each in (stop.rounds, stop.time_limit, stop.bytes, stop.target)] == [int, float, int, float]
    assert (stop.rounds, stop.time_limit, stop.updates, stop.bytes, stop.target) == (3, 2.5, None, 7, 0.5)


def test_the_first_reason_to_stop_is_kept():
    def on_reply(self, fed, reply):
        fed.stop(f"client {reply.client}")

    strategy = Hooks(on_reply=on_reply, start=lambda self, fed: fed.dispatch([0, 1]))
    run = simulate(strategy, fedsim.Stop(updates=2), clients=2)
    assert run.summary["stopped"] == "client 0"
    assert run.events.outcome.tolist() == ["pending", "pending"]  # arrived, and never decided on


def test_on_online_is_called_for_all_at_0_and_for_who_comes_later():
    def on_online(self, fed, client):
        self.log.append((fed.now, client))

    strategy = Hooks(on_online=on_online, start=lambda self, fed: self.log.append("start"))
    presence = Scripted((2.0, 1, True), (2.0, 3, False), (3.0, 3, True), (2.0, 0, True), absent=[0, 1])
    with pytest.raises(fedsim.SimulationError, match="nothing is left"):
        simulate(strategy, fedsim.Stop(rounds=1), availability=presence, clients=4)
    assert strategy.log == ["start", (0.0, 2), (0.0, 3), (2.0, 0), (2.0, 1), (3.0, 3)]


# ---- zero lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
def test_zero_length_tasks_arrive_one_nanosecond_later(local):
    def settle(self, fed):
        fed.dispatch(fed.idle(), steps=0, local=local)

    run = simulate(Hooks(on_reply=apply, settle=settle), fedsim.Stop(updates=30), clients=3)
    assert run.summary["time"] == 10e-9
    applied = run.events[run.events.outcome == "applied"]
    assert np.allclose(applied.arrived - applied.dispatched, 1e-9, rtol=1e-6, atol=0)
    assert applied.steps.sum() == 0


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_no_strategy_livelocks_on_devices_that_take_no_time(kind):
    run = simulate(kind(ONE_STEP), fedsim.Stop(rounds=5), compute=Given(*[0.0] * 8), clients=8, cohort=4)
    assert run.summary["updates"] == 20
    assert run.summary["time"] == pytest.approx(5e-9)


# ---- presence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_nobody_ever_online_is_an_error_that_says_so(kind):
    with pytest.raises(fedsim.SimulationError, match=rf"0 of 4 clients online.*{kind.__name__} waits"):
        simulate(kind(ONE_STEP), fedsim.Stop(rounds=1), availability=Scripted(absent=range(4)), clients=4)


def test_nobody_ever_online_slot_after_slot_is_an_error_too(monkeypatch):
    monkeypatch.setattr("fedsim.simulation.engine.IDLE_CHANGES", 3000)  # 100,000 take a while
    with pytest.raises(fedsim.SimulationError, match=r"only presence has changed.*0 of 4 clients online"):
        simulate(FedAvg(ONE_STEP), fedsim.Stop(rounds=1), availability=availability.Bernoulli(p=0.0), clients=4)


def test_nobody_online_ends_at_the_time_limit():
    nobody = availability.Bernoulli(p=0.0, slot=60.0)
    run = simulate(FedAvg(ONE_STEP), fedsim.Stop(time_limit=1000.0), availability=nobody, clients=4)
    assert (run.summary["stopped"], run.summary["time"], len(run.events)) == ("time_limit", 1000.0, 0)
    assert run.metrics.time.tolist() == [0.0, 1000.0]


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_a_server_waits_until_somebody_comes(kind):
    presence = Scripted((50.0, 2, True), absent=range(4))
    run = simulate(kind(ONE_STEP), fedsim.Stop(updates=2), availability=presence, clients=4, cohort=3)
    assert set(run.events.client) == {2}
    assert run.events.dispatched.tolist()[:2] == [50.0, 51.0]


def test_a_round_goes_on_with_who_is_online():
    run = simulate(FedAvg(ONE_STEP), fedsim.Stop(updates=6), availability=Scripted(absent=[0, 3]), clients=5, cohort=4)
    assert run.events[run.events.outcome == "applied"].client.tolist() == [1, 2, 4, 1, 2, 4]
    assert run.summary["version"] == 2


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_clients_with_one_example_or_none(tmp_path, weighting):
    problem = tiny(tmp_path, examples=5, clients=8)
    strategy = FedAvg(fedsim.LocalSGD(lr=0.5), weighting)
    run = simulate(strategy, fedsim.Stop(rounds=1), problem, clients=8, cohort=8)
    samples = problem.samples
    assert sorted(samples.tolist()) == [0, 0, 0, 1, 1, 1, 1, 1]
    done = run.events[run.events.outcome == "applied"].sort_values("client")
    assert done.steps.tolist() == done.samples.tolist() == samples.tolist()
    assert set(done[done.steps == 0].arrived) == {1e-9}
    start = problem.initial()
    gradients = [problem.gradient(start, client, None, 0) for client in range(8)]
    shares = samples / samples.sum() if weighting == "samples" else np.full(8, 1 / 8)
    expected = start - 0.5 * sum(share * each for share, each in zip(shares.tolist(), gradients, strict=True))
    assert torch.allclose(problem.layout.join(run.model), expected, atol=1e-6)
    assert not torch.allclose(expected, start, atol=1e-3)


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_a_cohort_without_any_example_leaves_the_model_where_it_was(tmp_path, kind):
    problem = tiny(tmp_path, examples=2, clients=6)
    problem.prepare(6, fedsim.rng.Randomness(0))
    without = np.flatnonzero(problem.samples == 0)
    presence = Scripted(absent=np.flatnonzero(problem.samples))
    run = simulate(kind(), fedsim.Stop(rounds=2), problem, availability=presence, clients=6, cohort=len(without))
    assert run.summary["outcomes"]["applied"] == 2 * len(without)
    assert torch.allclose(problem.layout.join(run.model), problem.initial(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_a_cohort_larger_than_the_population_is_the_population(kind):
    run = simulate(kind(ONE_STEP), fedsim.Stop(rounds=3), clients=6, cohort=50)
    assert run.summary["updates"] == 18
    assert run.summary["round"] == 3
    assert run.events.groupby("dispatched").size().max() == 6


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_a_single_client(kind):
    run = simulate(kind(ONE_STEP), fedsim.Stop(rounds=4), clients=1, cohort=1)
    assert run.events.arrived.dropna().tolist() == [1.0, 2.0, 3.0, 4.0]


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_a_target_met_at_the_start_ends_the_run_there(kind):
    run = simulate(kind(), fedsim.Stop(rounds=5, target=1e9), fedsim.Quadratic())
    assert (run.summary["stopped"], run.summary["time"], len(run.events)) == ("target", 0.0, 0)
    assert len(run.metrics) == 1
    assert run.summary["down_bytes"] == run.summary["up_bytes"] == 0
    assert torch.equal(run.model["x"], torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_a_time_limit_in_mid_round_ends_the_run_exactly_there(kind):
    run = simulate(
        kind(ONE_STEP), fedsim.Stop(time_limit=2.5), fedsim.Quadratic(), clients=4, cohort=3, compute=Given(1, 1, 1, 1)
    )
    assert (run.summary["stopped"], run.summary["time"]) == ("time_limit", 2.5)
    assert run.metrics.time.tolist() == [0.0, 1.0, 2.0, 2.5]
    assert run.events.outcome.tolist() == ["applied"] * 6 + ["pending"] * 3
    assert run.events.dispatched.tolist()[6:] == [2.0] * 3
    assert run.events.applied_version[6:].isna().all()


def test_what_happens_at_the_time_limit_still_happens():
    run = simulate(FedAvg(ONE_STEP), fedsim.Stop(time_limit=2.0), clients=4, cohort=4)
    assert (run.summary["updates"], run.summary["time"]) == (8, 2.0)


def test_other_limits_end_the_run_with_the_instant_in_which_they_are_met():
    # Four clients arrive at once, each 4,000 bytes either way.
    for stop, why, rounds in [
        (fedsim.Stop(updates=5), "updates", 2),
        (fedsim.Stop(bytes=32_001), "bytes", 1),  # met when the next downloads have begun, and those take no time
        (fedsim.Stop(rounds=3), "rounds", 3),
    ]:
        run = simulate(FedAvg(ONE_STEP), stop, clients=4, cohort=4)
        assert (run.summary["stopped"], run.summary["round"]) == (why, rounds)


def test_everybody_always_dropping_out_is_an_error_that_says_so():
    with pytest.raises(fedsim.SimulationError, match=r"all lost without one result \(the last one: dropped\)"):
        simulate(FedAvg(ONE_STEP), fedsim.Stop(rounds=1), faults=faults.Faults(1.0), clients=2, cohort=2)


def test_asking_an_offline_client_again_and_again_is_an_error_that_says_so():
    strategy = Hooks(
        start=lambda self, fed: fed.dispatch(0), on_lost=lambda self, fed, task, why: fed.dispatch(task.client)
    )
    with pytest.raises(fedsim.SimulationError, match=r"the last one: offline\)"):
        simulate(strategy, fedsim.Stop(rounds=1), availability=Scripted(absent=[0]), clients=2)


@pytest.mark.parametrize("handler", ["settle", "on_timer"])
def test_time_that_stands_still_is_an_error(handler):
    strategy = Hooks(
        start=lambda self, fed: fed.timer(0.0), **{handler: lambda self, fed, *_: fed.timer(fed.now, "again")}
    )
    with pytest.raises(fedsim.SimulationError, match="time stands still"):
        simulate(strategy, fedsim.Stop(rounds=1), clients=2)


def test_a_strategy_that_waits_for_nothing_is_named():
    with pytest.raises(fedsim.SimulationError, match=r"nothing is left to happen at 0 s.*Hooks waits"):
        simulate(Hooks(), fedsim.Stop(rounds=1))


def test_a_timer_may_be_set_for_now_after_months_of_virtual_time():
    # Past 2^52 ns (52 days) seconds no longer give back every nanosecond: fed.now must be good enough all the same.
    def on_timer(self, fed, timer):
        self.log.append(timer.tag)

    def on_reply(self, fed, reply):
        fed.timer(fed.now, reply.client)
        apply(self, fed, reply)

    def settle(self, fed):
        if len(fed.idle()):
            fed.dispatch(fed.idle())

    strategy = Hooks(settle=settle, on_reply=on_reply, on_timer=on_timer)
    run = simulate(strategy, fedsim.Stop(updates=300), compute=compute.Uniform(4.0e6, 4.1e6), clients=100)
    assert run.summary["time"] > 1.2e7
    assert strategy.log == run.events[run.events.outcome == "applied"].sort_values("arrived").client.tolist()


# ---- limits of the clock, and runs without an end ---------------------------------------------------


def test_the_end_of_the_clock_is_an_error_and_no_task_takes_no_time():
    with pytest.raises(fedsim.SimulationError, match=r"the clock ends at 1.153e\+09 s"):
        simulate(FedAvg(ONE_STEP), fedsim.Stop(rounds=40), compute=compute.Constant(3e8), clients=5, cohort=5)
    with pytest.raises(fedsim.SimulationError, match="a task lasts"):
        simulate(FedAvg(fedsim.LocalSGD(steps=10)), fedsim.Stop(rounds=1), compute=compute.Constant(1e9), clients=5)


def test_a_deadline_that_nobody_can_meet_is_an_error():
    with pytest.raises(fedsim.SimulationError, match="look at faults, availability and deadlines"):
        simulate(FedAvg(ONE_STEP, deadline=0.001), fedsim.Stop(rounds=3), clients=5, cohort=5)


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_a_strategy_object_serves_one_run(strategy):
    used = strategy(ONE_STEP)
    simulate(used, fedsim.Stop(rounds=1))
    with pytest.raises(fedsim.ConfigError, match="has served a run already"):
        simulate(used, fedsim.Stop(rounds=1))


def test_a_target_without_its_view_is_an_error():
    strategy = Hooks(views=lambda self, fed: {"mine": fed.model})
    with pytest.raises(fedsim.SimulationError, match="views give no 'distance'"):
        simulate(strategy, fedsim.Stop(rounds=1, target=1e-9), problem=fedsim.Quadratic())

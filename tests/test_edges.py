"""The edges: each odd situation has one defined outcome, and each mistake of a strategy or rule a clear error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import Given, Scripted

import fedsim
from fedsim.data import Iid, NpzFile
from fedsim.kernel import to_ns
from fedsim.problems.models import Logistic
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import availability, compute, faults, network

ONE_STEP = fedsim.LocalSGD(steps=1)
EVERY_STRATEGY = [FedAvg, FedAsync, FedBuff]


class Hooks(fedsim.Strategy):
    """A strategy made of functions, for tests only: ``Hooks(start=lambda self, fed: ...)``."""

    def __init__(self, local=ONE_STEP, **handlers):
        super().__init__(local)
        self.handlers, self.log = handlers, []

    def call(self, name, fed, *what):
        if name in self.handlers:
            self.handlers[name](self, fed, *what)

    def start(self, fed):
        self.call("start", fed)

    def on_reply(self, fed, reply):
        self.call("on_reply", fed, reply)

    def settle(self, fed):
        self.call("settle", fed)

    def on_timer(self, fed, timer):
        self.call("on_timer", fed, timer)

    def on_lost(self, fed, task, why):
        self.call("on_lost", fed, task, why)

    def on_online(self, fed, client):
        self.call("on_online", fed, client)

    def on_message(self, fed, src, dst, payload, tag):
        self.call("on_message", fed, src, dst)

    def message(self, fed, task):
        return self.handlers["message"](self, fed, task) if "message" in self.handlers else {}

    def views(self, fed):
        return self.handlers["views"](self, fed) if "views" in self.handlers else super().views(fed)


def simulate(strategy, stop=None, problem=None, **more):
    system = fedsim.System(
        more.pop("compute", compute.Constant(mean=1.0)),
        more.pop("network", None),
        more.pop("availability", None),
        more.pop("faults", None),
    )
    return fedsim.simulate(strategy, problem or fedsim.ScheduleOnly(1000), system, stop=stop, **more)


def apply(self, fed, reply):
    """An ``on_reply`` that takes every result and leaves the model as it is."""
    fed.publish(fed.model, used=[reply])


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


def tiny(tmp_path, examples, clients):
    """Classification with ``examples`` training examples, dealt out to ``clients`` clients."""
    rng = np.random.default_rng(3)
    np.savez(
        tmp_path / "tiny.npz",
        x_train=rng.normal(size=(examples, 4)).astype(np.float32),
        y_train=np.arange(examples) % 2,
        x_test=rng.normal(size=(6, 4)).astype(np.float32),
        y_test=np.arange(6) % 2,
    )
    return fedsim.Classification(NpzFile(str(tmp_path / "tiny.npz")), Logistic(), Iid(), validation=0.0)


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


# ---- mistakes of a strategy ----------------------------------------------------------------------

BAD_DISPATCHES = {
    "busy": (lambda fed: (fed.dispatch(1), fed.dispatch(1)), "client 1 has a task already"),
    "twice in one call": (lambda fed: fed.dispatch([0, 2, 0]), "client 0 has a task already"),
    "unknown client": (lambda fed: fed.dispatch([0, 4]), "clients are 0 to 3"),
    "server": (lambda fed: fed.dispatch(fedsim.SERVER), "clients are 0 to 3"),
    "unknown job": (lambda fed: fed.dispatch(0, job="tune"), "no job 'tune'"),
    "negative steps": (lambda fed: fed.dispatch(0, steps=-1), "steps=-1"),
    "steps for others": (lambda fed: fed.dispatch([0, 1], steps=[1, 2, 3]), "shape|broadcast"),
    "wrong start": (lambda fed: fed.dispatch([0, 1], start=torch.zeros(3, 10)), "start has shape"),
    "unknown task": (lambda fed: fed.cancel(17), "task 17 is not in flight"),
    "timer in the past": (lambda fed: fed.timer(-1.0), "already"),
    "unknown node": (lambda fed: fed.send(0, 9, x=torch.zeros(1)), "no node 9"),
}


@pytest.mark.parametrize("mistake", BAD_DISPATCHES)
def test_a_wrong_request_is_refused(mistake):
    act, expected = BAD_DISPATCHES[mistake]
    with pytest.raises(ValueError, match=expected):
        simulate(Hooks(start=lambda self, fed: act(fed)), fedsim.Stop(rounds=1), fedsim.Quadratic(), clients=4)


def test_a_refused_dispatch_leaves_no_trace():
    def start(self, fed):
        with pytest.raises(ValueError, match="client 1 has a task"):
            fed.dispatch([0, 1, 1])
        assert (fed.in_flight, fed.busy.any()) == (0, False)
        fed.dispatch([0, 1])

    run = simulate(Hooks(start=start, on_reply=apply), fedsim.Stop(updates=2), clients=2)
    assert run.events.task.tolist() == [0, 1]


BAD_REPLIES = {
    "used twice": (lambda fed, r: (fed.publish(fed.model, [r]), fed.publish(fed.model, [r])), "used or rejected"),
    "used twice at once": (lambda fed, r: fed.publish(fed.model, [r, r]), "used or rejected"),
    "used and rejected": (lambda fed, r: (fed.publish(fed.model, [r]), fed.reject(r, "no")), "used or rejected"),
    "rejected and used": (lambda fed, r: (fed.reject(r, "no"), fed.publish(fed.model, [r])), "used or rejected"),
    "cancelled": (lambda fed, r: fed.cancel(r.task.id), "not in flight"),
    "wrong shape": (lambda fed, r: fed.publish(fed.model[:-1], [r]), r"shape \(9,\), needs \[10\]"),
    "not a number": (lambda fed, r: fed.publish(fed.model * torch.nan, [r]), "non-finite"),
    "infinite": (lambda fed, r: fed.publish(fed.model + torch.inf, [r]), "non-finite"),
}


@pytest.mark.parametrize("mistake", BAD_REPLIES)
def test_a_wrong_use_of_a_reply_is_refused(mistake):
    act, expected = BAD_REPLIES[mistake]
    strategy = Hooks(start=lambda self, fed: fed.dispatch(0), on_reply=lambda self, fed, reply: act(fed, reply))
    with pytest.raises((ValueError, fedsim.SimulationError), match=expected):
        simulate(strategy, fedsim.Stop(rounds=2), fedsim.Quadratic(), clients=4, cohort=1)


def test_a_model_that_only_overflows_in_its_own_precision_is_refused(tmp_path):
    def on_reply(self, fed, reply):
        fed.publish(torch.full((fed.layout.size,), 1e300, dtype=torch.float64), used=[reply])

    strategy = Hooks(start=lambda self, fed: fed.dispatch(0), on_reply=on_reply)
    with pytest.raises((ValueError, fedsim.SimulationError), match="non-finite"):
        simulate(strategy, fedsim.Stop(updates=1), tiny(tmp_path, 5, 2), clients=2)


def test_publishing_from_nothing_makes_no_version():
    def on_reply(self, fed, reply):
        fed.publish(fed.model + 1, used=[])
        self.log.append((fed.version, fed.model.sum().item()))
        fed.reject(reply, "no need")

    strategy = Hooks(start=lambda self, fed: fed.dispatch(0), on_reply=on_reply)
    run = simulate(strategy, fedsim.Stop(updates=1), fedsim.Quadratic(), clients=1)
    assert strategy.log == [(0, 0.0)]
    assert run.events.outcome.tolist() == ["rejected"]


# ---- mistakes of a rule --------------------------------------------------------------------------


class Sick(fedsim.LocalSGD):
    """Client 1 sends something else than it should."""

    how = staticmethod(lambda payload: payload)

    def finish(self, ctx, x):
        payload = super().finish(ctx, x)
        return type(self).how(payload) if ctx.clients[0] == 1 else payload


SICKNESSES = {
    "nan": lambda payload: {"delta": payload["delta"] * torch.nan},
    "one infinity": lambda payload: {"delta": payload["delta"].index_fill(1, torch.tensor([3]), torch.inf)},
    "too short": lambda payload: {"delta": payload["delta"][:, :-1]},
    "float32": lambda payload: {"delta": payload["delta"].float()},
    "another name": lambda payload: {"gradient": payload["delta"]},
    "nothing": lambda payload: {},
    "too much": lambda payload: {**payload, "extra": payload["delta"]},
}


@pytest.mark.parametrize("sickness", SICKNESSES)
def test_a_malformed_result_is_rejected_counted_and_never_averaged(sickness):
    class Ill(Sick):
        how = staticmethod(SICKNESSES[sickness])

    class Listener(FedAvg):
        def __init__(self, local):
            super().__init__(local, "uniform")
            self.heard = []

        def on_lost(self, fed, task, why):
            super().on_lost(fed, task, why)
            self.heard.append((fed.now, task.client, why))

    strategy, problem = Listener(Ill(lr=0.1, steps=1)), fedsim.Quadratic()
    run = simulate(strategy, fedsim.Stop(rounds=2), problem, clients=3, cohort=3)
    assert run.summary["outcomes"] == {"applied": 4, "pending": 3, "rejected": 2}
    assert strategy.heard == [(1.0, 1, "rejected"), (2.0, 1, "rejected")]
    assert run.summary["updates"] == 6  # it was received: a run of sick clients ends
    x = torch.zeros(10, dtype=torch.float64)
    for _ in range(2):
        x = x - 0.1 * (problem.gradient(x, 0, None, 0) + problem.gradient(x, 2, None, 0)) / 2
    assert torch.allclose(run.model["x"], x, rtol=0, atol=1e-14)


def test_a_run_of_nothing_but_sick_clients_ends():
    class Hopeless(fedsim.LocalSGD):
        def finish(self, ctx, x):
            return {"delta": x * torch.nan}

    for kind in (FedAvg, FedBuff):
        run = simulate(kind(Hopeless(steps=1)), fedsim.Stop(rounds=3), fedsim.Quadratic(), clients=6, cohort=2)
        assert run.summary["outcomes"]["rejected"] == 6
        assert run.summary["version"] == 0


def test_a_rule_that_raises_is_named_with_client_task_and_step():
    class Clumsy(fedsim.LocalSGD):
        def direction(self, ctx, x, batch):
            if ctx.clients[0] == 2 and ctx.step == 3:
                raise KeyError("momentum")
            return super().direction(ctx, x, batch)

    expected = r"Clumsy raised KeyError: 'momentum' \(client 2, task 2, job 'train', local step 4\)"
    with pytest.raises(fedsim.SimulationError, match=expected):
        simulate(FedAvg(Clumsy(steps=5)), fedsim.Stop(rounds=2), fedsim.Quadratic(), clients=3, cohort=3)


# ---- a strategy that writes to whatever it gets its hands on -------------------------------------


class Pulled(fedsim.LocalSGD):
    """Uses its message, and writes to all it was handed when it is done with it."""

    def direction(self, ctx, x, batch):
        return super().direction(ctx, x, batch) - ctx.message["pull"]

    def finish(self, ctx, x):
        payload = {"delta": x - ctx.start}
        ctx.start.fill_(77.0)
        ctx.message["pull"].fill_(77.0)
        return payload


class Tidy(fedsim.Strategy):
    """Asynchronous; starts half of its tasks from a vector of its own, and sends one along."""

    vandal = False

    def __init__(self):
        super().__init__(Pulled(lr=0.1, steps=2))
        self.pull = torch.ones(10, dtype=torch.float64)

    def message(self, fed, task):
        return {"pull": self.pull}

    def on_reply(self, fed, reply):
        base, delta = fed.model, reply["delta"]
        new = base + 0.5 * delta
        fed.publish(new, used=[reply])
        fed.send(0, 1, x=new)
        self.spoil(base, delta, new, reply.payload["delta"])

    def on_message(self, fed, src, dst, payload, tag):
        self.heard = payload["x"].sum().item()

    def settle(self, fed):
        idle = fed.idle()
        vector = fed.model * 0.9
        if len(idle):
            fed.dispatch(idle[:1], start=vector)
            fed.dispatch(idle[1:])
        self.spoil(vector, fed.model)
        self.pull = torch.full((10,), 1.0 + fed.version, dtype=torch.float64)
        if self.vandal and len(idle):
            fed.timer(fed.now + 1e-9, "spoil what has just been sent")

    def on_timer(self, fed, timer):
        self.sent = self.pull
        self.pull = self.pull.clone()
        self.spoil(self.sent)

    def views(self, fed):
        return {"global": fed.model}

    def spoil(self, *tensors):
        if self.vandal:
            for tensor in tensors:
                tensor.fill_(1e6)


class Vandal(Tidy):
    vandal = True

    def start(self, fed):
        for array in (fed.samples, fed.busy, fed.online):
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0


def test_a_strategy_that_writes_to_what_it_was_handed_changes_nothing():
    def run(strategy):
        return simulate(
            strategy,
            fedsim.Stop(updates=60),
            fedsim.Quadratic(),
            compute=compute.Lognormal(),
            network=network.Constant(down=0.01, latency=0.001),
            clients=6,
            cohort=6,
        )

    tidy, vandal = run(Tidy()), run(Vandal())
    assert tidy.manifest["events_sha256"] == vandal.manifest["events_sha256"]
    assert tidy.manifest["model_sha256"] == vandal.manifest["model_sha256"]
    assert torch.isfinite(tidy.model["x"]).all()


def test_one_buffer_filled_anew_for_every_message_reaches_every_client_as_it_was():
    class Reusing(Hooks):
        def message(self, fed, task):
            self.buffer = getattr(self, "buffer", torch.zeros(1, dtype=torch.float64))
            self.buffer.fill_(task.client)
            return {"number": self.buffer}

    class Echo(fedsim.LocalSGD):
        def payload_spec(self, layout):
            return {"number": fedsim.TensorSpec((1,), torch.float64)}

        def finish(self, ctx, x):
            return {"number": ctx.message["number"]}

    strategy = Reusing(
        Echo(steps=1),
        start=lambda self, fed: fed.dispatch([0, 1, 2]),
        on_reply=lambda self, fed, reply: self.log.append((reply.client, reply["number"].item())),
    )
    simulate(strategy, fedsim.Stop(updates=3), fedsim.Quadratic(), clients=3)
    assert strategy.log == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_message_sent_is_the_message_as_it_was_when_sent():
    letter = torch.ones(3)

    def start(self, fed):
        fed.send(fedsim.SERVER, 0, x=letter)
        letter.fill_(5.0)

    class Reader(Hooks):
        def on_message(self, fed, src, dst, payload, tag):
            self.log.append(payload["x"].tolist())
            fed.stop("read")

    strategy = Reader(start=start)
    simulate(strategy, fedsim.Stop(rounds=1), fedsim.Quadratic(), clients=2)
    assert strategy.log == [[1.0, 1.0, 1.0]]


def test_starting_vectors_are_one_for_all_or_one_each():
    starts = torch.arange(30, dtype=torch.float64).reshape(3, 10)

    class Echo(fedsim.LocalSGD):
        def finish(self, ctx, x):
            return {"delta": ctx.start}

    def start(self, fed):
        fed.dispatch([2, 0, 1], start=starts)
        fed.dispatch([3, 4], start=starts[1])
        starts.fill_(-1.0)

    expected = {2: 0.0, 0: 10.0, 1: 20.0, 3: 10.0, 4: 10.0}
    strategy = Hooks(
        Echo(steps=1), start=start, on_reply=lambda self, fed, r: self.log.append((r.client, r["delta"][0].item()))
    )
    simulate(strategy, fedsim.Stop(updates=5), fedsim.Quadratic(), clients=5)
    assert dict(strategy.log) == expected


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_local_rules_cannot_spoil_each_others_start(kind):
    class Rough(fedsim.LocalSGD):
        def run(self, ctx):
            payload = super().run(ctx)
            payload = {name: tensor.clone() for name, tensor in payload.items()}
            ctx.start.fill_(1e9)
            return payload

    runs = [
        simulate(kind(rule(lr=0.1)), fedsim.Stop(rounds=5), fedsim.Quadratic(), clients=8, cohort=4)
        for rule in (fedsim.LocalSGD, Rough)
    ]
    assert runs[0].manifest["model_sha256"] == runs[1].manifest["model_sha256"]


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


class Numbered(fedsim.LocalSGD):
    """Sends back the number it was sent."""

    def finish(self, ctx, x):
        return {"delta": 0 * x + ctx.message["number"]}


@pytest.mark.parametrize("way", ["numpy", "data"])
def test_message_buffers_changed_behind_torchs_back_reach_every_client_as_they_were(way):
    buffer = np.zeros(1)
    tensor = torch.from_numpy(buffer)

    def message(self, fed, task):
        if way == "numpy":
            buffer[0] = task.client
        else:
            tensor.data.fill_(task.client)
        return {"number": tensor}

    def on_reply(self, fed, reply):
        assert set(reply["delta"].tolist()) == {float(reply.client)}
        self.log.append(reply.client)

    strategy = Hooks(
        Numbered(steps=1), start=lambda self, fed: fed.dispatch(range(15)), message=message, on_reply=on_reply
    )
    simulate(strategy, fedsim.Stop(updates=15), problem=fedsim.Quadratic(), clients=15, cohort=15)
    assert sorted(strategy.log) == list(range(15))

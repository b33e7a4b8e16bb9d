"""Laws of motion: what must hold of time, staleness and bytes whatever the method; closed forms and conservation."""

from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from support import Scripted

import fedsim
from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import availability, compute, faults, network

ONE_STEP = fedsim.LocalSGD(steps=1)
LAWS = {
    "lognormal": lambda: compute.Lognormal(mean=1.0, sigma=0.7, jitter=0.2),
    "exponential": lambda: compute.Constant(mean=1.0, jitter=1.0, jitter_law="exponential"),
    "unequal": lambda: compute.Uniform(low=0.5, high=2.0),
}


def schedule(strategy, stop, compute_model=None, **more):
    """A run without training."""
    system = more.pop("system", None) or fedsim.System(compute_model)
    problem = more.pop("problem", None) or fedsim.ScheduleOnly(parameters=1000)
    return fedsim.simulate(strategy, problem, system, stop=stop, **more)


# ---- staleness -----------------------------------------------------------------------------------


def assert_staleness_is_conserved(run, in_flight, buffer):
    """The mean is (M - 1) / K but for what the tasks still in flight at the end have seen.

    Arrival a applies at version ceil(a / K) - 1 and sets off one task at version floor(a / K); summed over A
    arrivals the two differ by A / K = V. The M tasks open at the end are dispatched and not applied, so
    sum(staleness) = (M - 1) V - sum over open tasks of (V - version): exact, whatever the law of durations.
    """
    applied = run.events[run.events.outcome == "applied"]
    pending = run.events[run.events.outcome == "pending"]
    version = run.summary["version"]
    assert len(applied) == version * buffer == run.summary["updates"]
    assert len(pending) == in_flight
    assert applied.arrived.is_unique  # no ties
    still_unseen = int((version - pending.version).sum())
    assert int(applied.staleness.sum()) == (in_flight - 1) * version - still_unseen
    # What is unseen is about M^2 / K versions for durations of one size, that is (M - 1) / K * M / updates of the mean.
    limit = (in_flight - 1) / buffer
    assert abs(applied.staleness.mean() - limit) <= 4 * limit * in_flight / len(applied)
    assert run.summary["mean_staleness"] == pytest.approx(applied.staleness.mean(), abs=1e-12)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("in_flight", "buffer"), [(2, 1), (6, 4), (12, 12), (20, 5)])
def test_mean_staleness_of_fedbuff_is_in_flight_less_one_over_buffer(law, in_flight, buffer):
    run = schedule(
        FedBuff(ONE_STEP, buffer_size=buffer, concurrency=in_flight),
        fedsim.Stop(updates=600 // buffer * buffer),
        LAWS[law](),
        clients=40,
    )
    assert_staleness_is_conserved(run, in_flight, buffer)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("in_flight", "clients"), [(3, 30), (10, 10), (25, 60)])
def test_mean_staleness_of_fedasync_is_in_flight_less_one(law, in_flight, clients):
    strategy = FedAsync(ONE_STEP, concurrency=in_flight)
    run = schedule(strategy, fedsim.Stop(updates=600), LAWS[law](), clients=clients)
    assert_staleness_is_conserved(run, in_flight, 1)


def test_one_task_in_flight_is_never_stale():
    run = schedule(FedAsync(ONE_STEP, concurrency=1), fedsim.Stop(updates=50), LAWS["exponential"](), clients=9)
    assert set(run.events.staleness.dropna()) == {0}


@pytest.mark.parametrize(
    ("buffer", "pattern"),
    [
        (1, [0, 1, 2, 3]),
        (2, [0, 0, 1, 1]),
        (4, [0, 0, 0, 0]),
        # K = 3: publications after arrivals 3, 6, 9 and 12; four leave together at versions 0, 1, 2, then 4.
        (3, [0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]),
    ],
)
def test_ties_have_the_staleness_a_hand_computes(buffer, pattern):
    strategy = FedBuff(ONE_STEP, buffer_size=buffer, concurrency=4)
    run = schedule(strategy, fedsim.Stop(updates=24), compute.Constant(mean=1.0), clients=4)
    applied = run.events[run.events.outcome == "applied"]
    assert applied.staleness.tolist() == pattern * (24 // len(pattern))
    assert applied.arrived.tolist() == [float(1 + nth // 4) for nth in range(24)]


# ---- the length of a round -----------------------------------------------------------------------


def assert_round_length(run, mean_task, waited, asked):
    """Rounds last as the ``waited``-th of ``asked`` exponential times: within 4 standard errors of its mean."""
    lengths = np.diff(run.metrics.time)
    terms = 1.0 / np.arange(asked - waited + 1, asked + 1)
    expected = mean_task * terms.sum()  # m (H_n - H_{n-k})
    error = mean_task * math.sqrt((terms**2).sum() / len(lengths))
    assert abs(lengths.mean() - expected) < 4 * error
    assert error < 0.05 * expected  # else the bound says nothing
    return lengths


@pytest.mark.parametrize(("cohort", "clients"), [(1, 5), (8, 8), (12, 30)])
def test_a_synchronous_round_of_exponential_tasks_lasts_the_mean_times_the_harmonic_number(cohort, clients):
    model = compute.Constant(mean=0.5, jitter=1.0, jitter_law="exponential")
    rounds = 1000 if cohort == 1 else 200
    local = fedsim.LocalSGD(steps=3)
    run = schedule(FedAvg(local), fedsim.Stop(rounds=rounds), model, cohort=cohort, clients=clients)
    assert_round_length(run, 3 * 0.5, cohort, cohort)


@pytest.mark.parametrize(("cohort", "share", "asked"), [(4, 2.0, 8), (8, 1.25, 10), (10, 1.1, 11)])
def test_over_selection_waits_for_an_order_statistic(cohort, share, asked):
    model = compute.Constant(mean=1.0, jitter=1.0, jitter_law="exponential")
    strategy = FedAvg(ONE_STEP, over_selection=share)
    run = schedule(strategy, fedsim.Stop(rounds=200), model, cohort=cohort, clients=20)
    lengths = assert_round_length(run, 1.0, cohort, asked)

    # And exactly, from the compute model alone: the cohort-th shortest of those asked, each client's n-th task.
    twin = compute.Constant(mean=1.0, jitter=1.0, jitter_law="exponential")
    twin.prepare(20, Randomness(0))
    nth = run.events.groupby("client").cumcount().to_numpy()
    took = twin.durations(run.events.client.to_numpy(), 1, nth)
    for number, (_, tasks) in enumerate(run.events.groupby("dispatched")):
        if number < len(lengths):
            assert len(tasks) == asked
            end = round(tasks.dispatched.iloc[0] * NS) + np.sort(took[tasks.index])[cohort - 1]
            assert end == round(run.metrics.time.iloc[number + 1] * NS)


# ---- presence ------------------------------------------------------------------------------------


class Census(fedsim.Strategy):
    """Counts who is online, every second."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def start(self, fed):
        fed.timer(0.0)

    def on_timer(self, fed, timer):
        self.counts.append(int(fed.online.sum()))
        fed.timer(fed.now + 1.0)


def share_error(up, down, span, clients):
    """Standard error of the share of time up: Var = 2 p q tau / (span clients), tau = 1 / (1 / up + 1 / down)."""
    share, memory = up / (up + down), 1 / (1 / up + 1 / down)
    return share, math.sqrt(2 * share * (1 - share) * memory / (span * clients))


@pytest.mark.parametrize(("up", "down"), [(30.0, 10.0), (5.0, 20.0)])
def test_markov_clients_are_online_for_their_share_of_the_run(up, down):
    census = Census()
    system = fedsim.System(availability=availability.Markov(up, down))
    schedule(census, fedsim.Stop(time_limit=500.0), clients=200, system=system)
    share, error = share_error(up, down, 500.0, 200)
    assert len(census.counts) == 501
    assert abs(np.mean(census.counts) / 200 - share) < 4 * error


class Everybody(fedsim.Strategy):
    """Whoever is online and idle works."""

    def on_reply(self, fed, reply):
        fed.publish(fed.model, used=[reply])

    def settle(self, fed):
        if len(fed.idle()):
            fed.dispatch(fed.idle())


def test_clients_that_pause_do_work_for_their_share_of_the_run():
    up, down, span, clients = 8.0, 4.0, 200.0, 30
    system = fedsim.System(
        compute.Constant(mean=1.0), availability=availability.Markov(up, down), faults=faults.Faults(on_offline="pause")
    )
    run = schedule(Everybody(ONE_STEP), fedsim.Stop(time_limit=span), clients=clients, system=system, cohort=30)
    # One task is one second of being online; each client may have one unfinished at the end.
    share, error = share_error(up, down, span, clients)
    worked = run.summary["updates"] / (span * clients)
    assert share - 4 * error - 1 / span < worked < share + 4 * error
    applied = run.events[run.events.outcome == "applied"]
    assert (applied.arrived - applied.dispatched).min() == pytest.approx(1.0, abs=1e-9)  # no task is shorter


# ---- bytes ---------------------------------------------------------------------------------------


def assert_ledger(run):
    """The same bytes in events (and links), in the summary and in the last row of the metrics."""
    for side in ("up_bytes", "down_bytes"):
        moved = int(run.events[side].sum()) + (int(run.links.bytes.sum()) if side == "up_bytes" else 0)
        assert moved == run.summary[side] == run.metrics[side].iloc[-1]
    for name in ("time", "version", "round", "updates", "samples"):
        assert run.metrics[name].iloc[-1] == run.summary[name]


class Talkative(FedAvg):
    """FedAvg that sends 3 float32 and 2 int64 along with the model."""

    def message(self, fed, task):
        return {"a": torch.zeros(3, dtype=torch.float32), "b": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", [FedAvg, FedAsync, FedBuff])
def test_bytes_in_events_are_the_ledgers_and_tensors_times_item_size(kind, seed):
    system = fedsim.System(
        compute.Lognormal(mean=1.0), network.Lognormal(down=0.01, up=0.005), faults=faults.Faults(dropout=0.2)
    )
    run = fedsim.simulate(
        kind(), fedsim.Quadratic(dimension=7), system, stop=fedsim.Stop(rounds=12), seed=seed, clients=20, cohort=6
    )
    assert_ledger(run)
    finished = run.events[run.events.arrived.notna()]
    assert set(finished.down_bytes) == set(finished.up_bytes) == {7 * 8}
    assert run.events.outcome.isin(["dropped"]).any()
    assert (run.events.up_bytes[run.events.outcome == "dropped"] == 0).all()
    assert run.events.up_bytes.max() <= 56


def test_messages_are_charged_by_items_times_item_size_and_the_model_by_its_layout():
    system = fedsim.System(network=network.Constant(down=1.0, up=1.0, latency=0.0))
    run = fedsim.simulate(Talkative(), fedsim.Quadratic(dimension=7), system, stop=fedsim.Stop(rounds=2), cohort=4)
    finished = run.events[run.events.outcome == "applied"]
    assert set(finished.down_bytes) == {7 * 8 + 3 * 4 + 2 * 8}
    assert set(finished.up_bytes) == {7 * 8}
    assert_ledger(run)


def test_doubling_the_bytes_doubles_the_transfer():
    times = {}
    for size in (1000, 2000):
        system = fedsim.System(network=network.Constant(down=1.0, up=0.5, latency=0.0))
        problem = fedsim.ScheduleOnly(parameters=size)
        run = schedule(FedAvg(ONE_STEP), fedsim.Stop(rounds=1), problem=problem, system=system, cohort=1)
        task = run.events.iloc[0]
        times[size] = [task.started - task.dispatched, task.arrived - task.upload_started]
    assert times[1000] == pytest.approx([4000 * 8 / 1e6, 4000 * 8 / 5e5], abs=1e-9)
    assert times[2000] == pytest.approx([2 * each for each in times[1000]], abs=1e-9)


class CutShort(fedsim.Strategy):
    """One task for client 0, cut short at a time in a given way."""

    def __init__(self, way, at):
        super().__init__(ONE_STEP)
        self.way, self.at = way, at

    def start(self, fed):
        deadline = self.at if self.way == "deadline" else None
        self.task = fed.dispatch(0, deadline=deadline)[0]
        fed.timer(self.at, "cut")
        fed.timer(10.0, "end")

    def on_reply(self, fed, reply):
        fed.publish(fed.model, used=[reply])

    def on_timer(self, fed, timer):
        if timer.tag == "end":
            fed.stop("end")
        elif self.way == "cancel":
            fed.cancel(self.task)


CUTS = [
    # 1,000,000 bytes at 1 MB/s down and 0.5 MB/s up, 0.5 s of latency each way, 1 s of work:
    # down 0.5 to 1.5, work to 2.5, up 3 to 5.
    (0.3, 0, 0),
    (0.5, 0, 0),
    (0.75, 250_000, 0),
    (1.4, 900_000, 0),
    (1.5, 1_000_000, 0),
    (2.0, 1_000_000, 0),
    (2.9, 1_000_000, 0),
    (3.5, 1_000_000, 250_000),
    (4.999999, 1_000_000, 999_999),
]


@pytest.mark.parametrize("way", ["cancel", "deadline", "offline", "end of the run"])
@pytest.mark.parametrize(("at", "down", "up"), CUTS)
def test_a_cut_transfer_counts_up_to_the_cut(way, at, down, up):
    system = fedsim.System(
        compute.Constant(mean=1.0),
        network.Constant(down=8.0, up=4.0, latency=0.5),
        Scripted((at, 0, False)) if way == "offline" else None,
        faults.Faults(on_offline="lose"),
    )
    stop = fedsim.Stop(time_limit=at if way == "end of the run" else 20.0)
    run = schedule(CutShort(way, at), stop, problem=fedsim.ScheduleOnly(250_000), system=system, clients=2, cohort=1)
    (task,) = run.events.itertuples()
    expected = {"cancel": "cancelled", "deadline": "late", "offline": "interrupted", "end of the run": "pending"}
    assert (task.outcome, task.down_bytes, task.up_bytes) == (expected[way], down, up)
    assert pd.isna(task.arrived)
    assert [pd.notna(task.started), pd.notna(task.computed)] == [at >= 1.5, at >= 2.5]
    assert_ledger(run)


# ---- the clock -----------------------------------------------------------------------------------


class Slow(fedsim.Quadratic):
    """Takes its (real) time, and not always the same."""

    calls = 0

    def gradient(self, x, client, batch, noise):
        self.calls += 1
        time.sleep(0.004 * (self.calls % 3))
        return super().gradient(x, client, batch, noise)


@pytest.mark.parametrize("kind", [FedAvg, FedBuff])
def test_virtual_time_never_reads_the_wall_clock(kind):
    def run(problem):
        system = fedsim.System(
            compute.Lognormal(mean=0.001),  # work that is quicker in virtual time than it really is
            network.Constant(down=0.1, latency=0.001),
            availability.Markov(0.5, 0.2),
            faults.Faults(dropout=0.1, when="any", detect=0.01),
        )
        return fedsim.simulate(kind(), problem, system, stop=fedsim.Stop(rounds=15), clients=12, cohort=4)

    quick, slow = run(fedsim.Quadratic()), run(Slow())
    assert slow.manifest["wall_seconds"] > 0.1
    pd.testing.assert_frame_equal(quick.events.drop(columns="group"), slow.events.drop(columns="group"))
    pd.testing.assert_frame_equal(quick.metrics, slow.metrics)
    for name in ("events_sha256", "model_sha256"):
        assert quick.manifest[name] == slow.manifest[name]


# ---- picks ---------------------------------------------------------------------------------------


class Picking(fedsim.Strategy):
    """Picks ``k`` many times over while some clients are busy and others offline."""

    def __init__(self, k, times, busy=()):
        super().__init__(ONE_STEP)
        self.k, self.times, self.busy, self.picked = k, times, list(busy), []

    def settle(self, fed):
        if not self.picked:
            fed.dispatch(self.busy)
            self.picked = [fed.pick(self.k).tolist() for _ in range(self.times)]
            fed.stop("done")


@pytest.mark.parametrize(("clients", "k", "idle"), [(40, 1, 37), (40, 9, 30), (40, 3, 4), (40, 30, 37), (7, 3, 5)])
def test_picks_are_uniform_over_the_idle_whichever_way_they_are_drawn(clients, k, idle):
    # By trial where many are idle, from the list of the idle where few are or many are wanted.
    times, offline = 4000, tuple(range(idle, clients - 1))
    strategy = Picking(k, times, busy=[clients - 1])
    schedule(
        strategy, fedsim.Stop(rounds=1), system=fedsim.System(availability=Scripted(absent=offline)), clients=clients,
    )  # fmt: skip
    for picked in strategy.picked:
        assert len(set(picked)) == k
        assert picked == sorted(picked)
    counts = np.bincount(np.concatenate(strategy.picked), minlength=clients)
    assert counts[idle:].sum() == 0
    share = k / idle
    # Each count is binomial: none of 40 lies beyond 4.5 standard deviations but once in 3,700 seeds; the seed is fixed.
    assert np.abs(counts[:idle] - times * share).max() <= 4.5 * math.sqrt(times * share * (1 - share)) + 1e-9

"""What is shorter than the trip to a worker is trained by the driver: by the clock, and never seen in the bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import ray
import torch

import fedsim
from fedsim.pool import InlinePool, Pool
from fedsim.pool.ray import Group, RayPool
from fedsim.pool.trips import ENOUGH, LONG, RECENT, Trips
from fedsim.rng import Randomness
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Lognormal
from fedsim.training import Work


def work(task: int, steps: int = 1, job: str = "main") -> Work:
    return Work(task, task, 0, job, torch.ones(10), {}, {}, 0.1, steps)


def informed(trip: float, rate: float, job: str = "main") -> Trips:
    """Knows that a trip takes so many seconds, and a local step so many."""
    trips = Trips()
    for _ in range(ENOUGH):
        trips.travelled(trip)
        trips.trained([work(0, steps=3, job=job)], 4 * rate)
    return trips


# ---- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "least"), [(1, 8), (2, 8), (4, 16 / 3), (8, 32 / 7)])
def test_tasks_travel_if_the_workers_save_more_than_a_trip_of_4_ms(workers: int, least: float) -> None:
    tasks = [work(number, steps=9) for number in range(10)]  # 100 to reckon with
    for milliseconds, travels in ((0.99 * least, False), (1.01 * least, True)):
        assert informed(0.004, milliseconds / 1000 / 100).are_worth_it(tasks, workers) is travels


def test_more_workers_than_tasks_save_nothing_more() -> None:
    trips = informed(0.004, 0.007 / 30)
    assert not trips.are_worth_it([work(0, steps=14), work(1, steps=14)], 100)
    assert trips.are_worth_it([work(number, steps=2) for number in range(10)], 100)


def test_what_takes_long_travels_however_slow_the_trips_were() -> None:
    for share, travels in ((0.99, False), (1.01, True)):
        assert informed(trip=5.0, rate=share * LONG / 2).are_worth_it([work(0)], 2) is travels


def test_tasks_travel_until_enough_is_known_of_trips_and_of_every_job() -> None:
    trips = Trips()
    for _ in range(ENOUGH):
        assert trips.are_worth_it([work(0)], 2)
        trips.travelled(1.0)
        trips.trained([work(0)], 1e-6)
    assert not trips.are_worth_it([work(0)], 2)
    assert trips.are_worth_it([work(0), work(1, job="other")], 2)


def test_a_measurement_that_was_disturbed_does_not_count_and_an_old_one_is_forgotten() -> None:
    trips, tasks = informed(0.004, 0.001), [work(number) for number in range(3)]  # 6 ms
    trips.trained([work(0)], 10.0)
    trips.travelled(10.0)
    assert not trips.are_worth_it(tasks, 2)
    for _ in range(RECENT):
        trips.travelled(0.002)
    assert trips.are_worth_it(tasks, 2)
    for _ in range(RECENT):
        trips.travelled(0.004)
    assert not trips.are_worth_it(tasks, 2)


# ---- what is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "waits_since", "known"),
    [(1.0, 1.5, [4.0]), (1.0, 6.1, []), (float("nan"), 1.5, []), (1.0, float("inf"), [])],
    ids=["waited for all along", "may have lain there", "queued behind another", "only looked at"],
)
def test_a_trip_counts_if_the_driver_waited_for_it(
    sent: float, waits_since: float, known: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, group = RayPool(), Group([work(0)], [], sent=sent)
    pool._waits_since = waits_since
    monkeypatch.setattr("time.perf_counter", lambda: 10.0)
    pool._learn(group, seconds=5.0)
    monkeypatch.undo()
    assert list(pool._trips._seconds) == known
    assert list(pool._trips._rates["main"]) == [2.5]


# ---- the same bits, whoever trains ----------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Momentary(fedsim.LocalSGD):
    """Has a state, and draws of its own."""

    def initial_state(self, layout: Any) -> dict[str, torch.Tensor]:
        return {"tasks": torch.zeros(1)}

    def direction(self, ctx: fedsim.Context, x: torch.Tensor, batch: object) -> torch.Tensor:
        return ctx.grad(x, batch) + 0.01 * ctx.state["tasks"]

    def finish(self, ctx: fedsim.Context, x: torch.Tensor) -> dict[str, torch.Tensor]:
        ctx.state = {"tasks": ctx.state["tasks"] + 1}
        return super().finish(ctx, x)


def in_turn(seen: list[bool]) -> Callable[..., bool]:
    """Sends every other batch away."""

    def decide(_: Trips, works: Sequence[Work], workers: int) -> bool:
        seen.append(len(seen) % 2 == 0)
        return seen[-1]

    return decide


@pytest.mark.usefixtures("cluster")
def test_who_trains_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(pool: Pool) -> tuple[fedsim.Run, tuple[str, str]]:
        done = fedsim.simulate(
            FedBuff(Momentary(momentum=0.5, steps=3)),
            fedsim.Classification(),
            fedsim.System(Lognormal()),
            pool,
            fedsim.Stop(rounds=4),
            clients=12,
            cohort=6,
            eval_every=2,
        )
        return done, (done.manifest["model_sha256"], done.manifest["events_sha256"])

    seen: list[bool] = []
    monkeypatch.setattr(Trips, "are_worth_it", in_turn(seen))
    mixed, hashes = run(RayPool(2, group=4))
    assert {True, False} == set(seen)
    assert mixed.events.group.max() <= 4
    assert hashes == run(InlinePool())[1]


@pytest.mark.usefixtures("cluster")
def test_a_rule_changed_in_mid_run_does_not_reach_what_the_driver_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = fedsim.Quadratic()
    problem.prepare(10, Randomness(0))
    results = []
    monkeypatch.setattr(Trips, "are_worth_it", lambda *_: False)
    for decay in (0.0, 0.9):
        rule, pool = fedsim.LocalSGD(steps=2), RayPool(1)
        pool.open(problem, {"main": rule}, Randomness(0))
        rule.weight_decay = decay
        pool.submit([work(0, steps=2), work(1, steps=2)])
        results.append(pool.result(1).payload["delta"])
        assert pool.ready([0, 1]).keys() == {0}
        assert not pool._running  # nothing travelled
        pool.close()
    assert torch.equal(*results)


@pytest.mark.usefixtures("cluster")
def test_on_a_gpu_everything_travels_for_there_the_group_and_the_place_show(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RayPool(1)
    problem = fedsim.Quadratic()
    problem.prepare(10, Randomness(0))
    pool.open(problem, {"main": fedsim.LocalSGD(steps=1)}, Randomness(0))
    pool.device = "cuda"
    monkeypatch.setattr(Trips, "are_worth_it", lambda *_: False)
    pool.submit([work(0)])
    assert pool._due == {0}
    assert pool.result(0).steps == 1
    pool.close()

"""FedCompass in the simulator: the authors' example in the records, weights by hand, nothing lost and nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import Given, Scripted
from torch import Tensor

import fedsim
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedcompass import FedCompass
from fedsim.system.availability import Availability, Markov
from fedsim.system.compute import Compute, Lognormal
from fedsim.system.faults import Faults

SPEEDS = (0.1, 0.2, 0.25, 0.4, 0.5)
"""Seconds per step: the five clients of the paper's figure 1."""

Vector = NDArray[np.float64]


class OneHot(fedsim.LocalSGD):
    """Client i's update is the i-th unit vector: the model then holds the sum of every client's weights."""

    def finish(self, ctx: fedsim.Context, x: Tensor) -> dict[str, Tensor]:
        return {"delta": torch.eye(x.shape[1], dtype=x.dtype)[torch.from_numpy(ctx.clients)]}


class Untrained(fedsim.Quadratic):
    """With clients that hold 1, 2, 3, ... examples."""

    trains = False

    def prepare(self, clients: int, randomness: Randomness) -> None:
        super().prepare(clients, randomness)
        self.samples = np.arange(1, clients + 1)


class Slow(Given):
    """As listed, but that some tasks take longer: (client, its nth task) by factor."""

    def __init__(self, *seconds: float, **factors: float) -> None:
        super().__init__(*seconds)
        self.factors = {tuple(map(int, key[1:].split("_"))): factor for key, factor in factors.items()}

    def durations(self, clients: Any, steps: Any, nth: Any) -> Any:
        plain = super().durations(clients, steps, nth)
        pairs = zip(clients.tolist(), nth.tolist(), strict=True)
        return (plain * [self.factors.get(pair, 1.0) for pair in pairs]).astype(np.int64)


def run(
    strategy: fedsim.Strategy,
    until: float = 33.0,
    compute: Compute | None = None,
    clients: int = 5,
    availability: Availability | None = None,
    faults: Faults | None = None,
    **more: Any,
) -> fedsim.Run:
    system = fedsim.System(compute or Given(*SPEEDS), None, availability, faults)
    stop = more.pop("stop", fedsim.Stop(time_limit=until))
    problem = more.pop("problem", None) or Untrained(clients)
    return fedsim.simulate(strategy, problem, system, stop=stop, clients=clients, cohort=clients, eval_every=0, **more)


def compass(**settings: Any) -> FedCompass:
    return FedCompass(OneHot(), **{"weighting": "uniform", "server_lr": 1.0} | settings)


def model(done: fedsim.Run) -> Vector:
    found: Vector = done.model["x"].numpy()
    return found


# ---- the example ---------------------------------------------------------------------------------------


def rows(done: fedsim.Run) -> list[tuple[float, int, str]]:
    events = done.events.sort_values("task")
    return list(zip(events.dispatched.tolist(), events.client.tolist(), events.tag.tolist(), strict=True))


def tags(second: float, group: int, *pairs: tuple[int, int]) -> list[tuple[float, int, str]]:
    return [(second, client, f"group={group} steps={steps}") for client, steps in pairs]


ALL = tuple(enumerate((100, 50, 40, 25, 20)))

EXAMPLES = {
    1.0: [
        *tags(2, 1, (0, 100)),
        *tags(4, 1, (1, 40)),
        *tags(5, 1, (2, 28)),
        *tags(8, 2, (3, 35)),
        *tags(10, 2, (4, 24)),
        *tags(12, 2, (0, 100), (1, 50), (2, 40)),
        *tags(22, 3, *ALL),
        *tags(32, 4, *ALL),
    ],
    1.2: [
        *tags(2, 1, (0, 100)),
        *tags(4, 1, (1, 40)),
        *tags(5, 1, (2, 28)),
        *tags(8, 2, (3, 40)),
        *tags(10, 2, (4, 28)),
        *tags(12, 3, (0, 100)),
        *tags(12, 2, (1, 60), (2, 48)),
        *tags(22, 2, (0, 20)),
        *tags(24, 4, *ALL),
    ],
}


@pytest.mark.parametrize("factor", EXAMPLES)
def test_events_show_the_papers_example(factor: float) -> None:
    done = run(compass(latest_factor=factor))
    first = [(0.0, client, "group=None steps=20") for client in range(5)]
    assert rows(done) == first + EXAMPLES[factor]
    assert done.events.tag.str.endswith(tuple(f"steps={n}" for n in (20, 25))).any()
    assert all(tag.endswith(f"steps={steps}") for tag, steps in zip(done.events.tag, done.events.steps, strict=True))


def test_staleness_in_the_example_is_that_of_the_paper() -> None:
    events = run(compass(latest_factor=1.0)).events.sort_values("task")
    found = events[events.outcome == "applied"].groupby("client").staleness.apply(list)
    assert found.tolist() == [[0, 4, 0, 0], [1, 3, 0, 0], [2, 2, 0, 0], [3, 2, 0], [4, 1, 0]]


def weights(*staleness: int, sign: int = -1) -> float:
    return sum((1 + each) ** (sign * 0.5) for each in staleness)


@pytest.mark.parametrize(("stale_updates", "sign"), [("discount", -1), ("amplify", 1)])
@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_every_update_has_the_weight_of_its_staleness_and_share(stale_updates: str, sign: int, weighting: str) -> None:
    settings = {"latest_factor": 1.0, "stale_updates": stale_updates, "weighting": weighting, "server_lr": 0.9}
    share = np.full(5, 1 / 5) if weighting == "uniform" else np.arange(1, 6) / 15
    expected = [weights(*each, sign=sign) for each in ((0, 4, 0), (1, 3, 0), (2, 2, 0), (3, 2), (4, 1))]
    np.testing.assert_allclose(model(run(compass(**settings), 23.0)), 0.9 * share * expected, rtol=1e-12)


def test_a_group_of_few_moves_the_model_less() -> None:
    one = run(compass(staleness="constant"), 23.0)  # lambda 1.2: client 0 goes round alone
    before = run(compass(staleness="constant"), 21.0)
    np.testing.assert_allclose(model(one) - model(before), [1 / 5, 0, 0, 0, 0], atol=1e-15)


# ---- variants ------------------------------------------------------------------------------------------


def test_normalised_updates_count_per_step_times_the_mean_steps_of_their_group() -> None:
    settings = {"latest_factor": 1.0, "staleness": "constant", "normalise": True}
    at_12 = model(run(compass(**settings), 13.0))  # singles, then 100, 40 and 28 steps
    np.testing.assert_allclose(at_12[:3], (1 + 56 / np.array([100, 40, 28])) / 5, rtol=1e-12)
    np.testing.assert_allclose(at_12[3:], 1 / 5, rtol=1e-12)
    by_samples = model(run(compass(**settings, weighting="samples"), 13.0))
    mean_steps = (1 * 100 + 2 * 40 + 3 * 28) / 6
    share = np.array([1, 2, 3]) / 15
    np.testing.assert_allclose(by_samples[:3], share * (1 + mean_steps / np.array([100, 40, 28])), rtol=1e-12)


def test_with_equal_steps_normalising_changes_nothing() -> None:
    plain, normalised = (model(run(compass(least_steps=30, most_steps=30, normalise=each))) for each in (False, True))
    np.testing.assert_allclose(normalised, plain, rtol=1e-12)


def steps_of(make: Callable[[], FedCompass]) -> list[Vector]:
    models = [np.zeros(5)]

    def look(sim: Any) -> None:
        if sim.version >= len(models):
            models.append(sim.model.numpy())

    run(make(), 40.0, observer=look)
    return list(np.diff(models, axis=0))


def test_with_momentum_the_model_moves_by_all_steps_so_far_each_less_than_the_next() -> None:
    plain = steps_of(compass)
    found = steps_of(lambda: compass(server=fedsim.Momentum(0.6)))
    assert len(plain) == len(found) == 9
    for number, step in enumerate(found):
        expected = sum(0.6 ** (number - i) * each for i, each in enumerate(plain[: number + 1]))
        np.testing.assert_allclose(step, expected, rtol=1e-10, atol=1e-14)


# ---- what it becomes -----------------------------------------------------------------------------------


def test_with_equal_speeds_and_steps_it_is_fedavg_with_server_rate_alpha() -> None:
    rule = fedsim.LocalSGD(lr=0.1)
    strategy = FedCompass(rule, 7, 7, weighting="uniform", server_lr=0.8, staleness="constant")
    found = run(strategy, compute=Given(*[0.1] * 5), problem=fedsim.Quadratic(5), stop=fedsim.Stop(rounds=12))
    plain = FedAvg(rule.replace(steps=7), "uniform", 0.8)
    expected = run(plain, compute=Given(*[0.1] * 5), problem=fedsim.Quadratic(5), stop=fedsim.Stop(rounds=12))
    np.testing.assert_allclose(model(found), model(expected), rtol=1e-12)
    assert found.summary["time"] == expected.summary["time"]


# ---- late, lost, away ----------------------------------------------------------------------------------


def test_a_late_update_is_applied_with_the_next_group_and_its_client_goes_on_at_once() -> None:
    # Client 1's forty steps take 24 s instead of 8; its group goes on without it after 14.
    strategy = compass(staleness="constant", server_lr=1.0)
    done = run(strategy, 34.2, Slow(0.1, 0.2, n1_1=3.0), clients=2)
    assert rows(done)[2:] == [
        *tags(2, 1, (0, 100)),
        *tags(4, 1, (1, 40)),
        *tags(14, 2, (0, 100)),
        *tags(24, 3, (0, 100)),
        *tags(28, 4, (1, 32)),  # 0.1 * 0.2 + 0.9 * 0.6 = 0.56 s per step
        *tags(34, 5, (0, 100)),  # 119 steps until group 4 is expected are too many
    ]
    events = done.events.sort_values("task")
    assert events[events.client == 1].staleness.tolist()[:2] == [1, 2]
    assert events[events.client == 1].applied_version.tolist()[1] == 4
    np.testing.assert_allclose(model(done), [4 / 2, 2 / 2], rtol=1e-12)


def test_a_late_update_counts_once_also_if_its_client_is_on_time_before_it_is_applied() -> None:
    # Alone: its second task comes at 22 and is late, its third at 32 is on time, and both are applied then.
    done = run(compass(staleness="constant"), 33.0, Slow(0.1, n0_1=2.0), clients=1)
    assert rows(done)[1:] == [*tags(2, 1, (0, 100)), *tags(22, 2, (0, 100)), *tags(32, 3, (0, 100))]
    assert done.events.applied_version.tolist()[:3] == [0, 1, 1]
    np.testing.assert_allclose(model(done), [3])


def test_a_group_that_waits_for_a_lost_client_only_goes_on() -> None:
    presence = Scripted((13.0, 1, False), (20.0, 1, True))
    more = {"availability": presence, "faults": Faults(on_offline="lose")}
    found = rows(run(compass(), 21.0, Slow(0.1, 0.2, n1_1=3.0), clients=2, **more))
    assert [each[:2] for each in found[4:]] == [(13.0, 0), (20.0, 1)]
    assert found[5][2] == "group=3 steps=75"  # to be back at 35, when group 2 will be that is waited for until 25


def test_a_client_that_leaves_while_it_waits_begins_anew_when_it_is_back() -> None:
    presence = Scripted((12.5, 0, False), (16.0, 0, True))
    done = run(compass(staleness="constant"), 17.0, Slow(0.1, 0.2, n1_1=3.0), clients=2, availability=presence)
    assert [each[:2] for each in rows(done)[4:]] == [(16.0, 0)]
    np.testing.assert_allclose(model(done), [2 / 2, 1 / 2])
    back_before = Scripted((12.5, 0, False), (13.0, 0, True))
    done = run(compass(), 17.0, Slow(0.1, 0.2, n1_1=3.0), clients=2, availability=back_before)
    assert [each[:2] for each in rows(done)[4:]] == [(14.0, 0)]


def test_clients_without_examples_are_not_asked_and_have_no_share() -> None:
    class Empty(Untrained):
        def prepare(self, clients: int, randomness: Randomness) -> None:
            super().prepare(clients, randomness)
            self.samples = np.array([4, 0, 4, 4, 4])

    done = run(compass(staleness="constant"), 10.5, problem=Empty(5))
    np.testing.assert_allclose(model(done), [1 / 4, 0, 1 / 4, 1 / 4, 1 / 4])


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("on_offline", ["finish", "lose", "pause"])
@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_happens_no_update_is_lost_or_counted_twice(factor: float, on_offline: str, seed: int) -> None:
    # Weights all 1: the model is the number of each client's updates that were applied.
    strategy = compass(staleness="constant", server_lr=8.0, latest_factor=factor, least_steps=2, most_steps=10)
    faults = Faults(0.15, "any", on_offline, detect=0.3)
    presence = Markov(up=6.0, down=2.0)
    stop = fedsim.Stop(updates=250)
    done = run(
        strategy, compute=Lognormal(jitter=0.4), clients=8, availability=presence, faults=faults, stop=stop, seed=seed
    )
    events = done.events
    outcomes = events.outcome.value_counts()
    assert set(outcomes.index) <= {"applied", "pending", "dropped", "interrupted"}
    assert outcomes["dropped"] > 10
    applied = events[events.outcome == "applied"].client.value_counts().reindex(range(8), fill_value=0)
    np.testing.assert_allclose(model(done), applied.to_numpy(), rtol=1e-12)
    waiting = [each.reply.task.id for each in sum(strategy.on_time.values(), strategy.late)]
    assert len(waiting) == len(set(waiting)) == done.summary["updates"] - int(applied.sum())
    assert set(waiting) <= set(events[events.outcome == "pending"].task)
    assert (applied > 5).all()  # nobody is forgotten
    at_work = set(events[events.outcome == "pending"].task) - set(waiting)
    assert {task.client for task in events.itertuples() if task.task in at_work} == set(strategy.compass._tasks)


# ---- refusals ------------------------------------------------------------------------------------------


def test_settings_out_of_range_and_steps_from_elsewhere_are_refused() -> None:
    with pytest.raises(fedsim.ConfigError, match=r"^local\.steps=5: FedCompass gives the steps; leave it null$"):
        FedCompass(fedsim.LocalSGD(steps=5))
    wrong = {"most_steps": 5, "server_lr": 0, "stale_updates": "ignore", "normalise": 1, "weighting": "equal"}
    for key, value in wrong.items():
        with pytest.raises(fedsim.ConfigError, match=f"^{key}={value}: "):
            FedCompass(**{key: value})  # type: ignore[arg-type]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("settings", [{"normalise": True}, {"server": fedsim.Momentum(0.5)}])
def test_it_resumes_with_groups_and_buffers_to_the_same_bits(settings: dict[str, Any], tmp_path: Any) -> None:
    def stop(sim: Any) -> None:
        if sim.now > 12.5 and sim.strategy.late:
            raise StoppedError

    def once(**more: Any) -> fedsim.Run:
        fresh = {**settings, **({"server": fedsim.Momentum(0.5)} if "server" in settings else {})}
        return run(compass(**fresh), 60.0, Slow(*SPEEDS, n1_1=2.0, n4_1=3.0), faults=Faults(0.1), **more)

    often = fedsim.CheckpointSchedule(events=1)
    with pytest.raises(StoppedError):
        once(out=tmp_path / "run", checkpoint=often, observer=stop)
    resumed = once(out=tmp_path / "run", checkpoint=often, resume=True)
    assert "resumed at" in (tmp_path / "run/run.log").read_text()
    whole = once()
    for name in ("model_sha256", "events_sha256"):
        assert resumed.manifest[name] == whole.manifest[name]

"""Clients that come when they like with any number of steps: AFA-CD and AFA-CS against closed forms and replays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import Given, Scripted
from torch import Tensor

import fedsim
from fedsim.rng import Randomness
from fedsim.strategies.afa_cd import AfaCd
from fedsim.strategies.afa_cs import AfaCs
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.availability import Markov
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults

SECONDS = (0.1, 0.02, 0.05, 0.073, 0.037, 0.061)
"""Of a step."""

Bowls = NDArray[np.float64]


def bowls(clients: int = 6) -> tuple[Bowls, Bowls]:
    # ``a`` and ``b`` of every client's 1/2 sum a (x - b)^2.
    problem = fedsim.Quadratic(4)
    problem.prepare(clients, Randomness(0))
    return problem.curvature, problem.centres


def run(strategy: fedsim.Strategy, clients: int = 6, **more: Any) -> fedsim.Run:
    system = fedsim.System(
        more.pop("compute", Given(*SECONDS[:clients])),
        availability=more.pop("availability", None),
        faults=more.pop("faults", None),
    )
    more = {"stop": fedsim.Stop(rounds=20), "cohort": 3, "eval_every": 0} | more
    return fedsim.simulate(strategy, more.pop("problem", None) or fedsim.Quadratic(4), system, clients=clients, **more)


def model(done: fedsim.Run) -> Bowls:
    found: Bowls = done.model["x"].numpy()
    return found


class OneHot(fedsim.LocalSGD):
    # Client i's mean gradient is minus the i-th unit vector: the model then holds every client's weights.

    def finish(self, ctx: fedsim.Context, x: Tensor) -> dict[str, Tensor]:
        return {self.sends: -torch.eye(x.shape[1], dtype=x.dtype)[torch.from_numpy(ctx.clients)]}


class Untrained(fedsim.Quadratic):
    trains = False


# ---- a second computation of whole runs ----------------------------------------------------------------


def mean_gradient(x: Bowls, client: int, steps: int, lr: float) -> Bowls:
    # Gradient descent on a bowl contracts: x_K - b = (1 - lr a)^K (x - b).
    a, b = (each[client] for each in bowls())
    end: Bowls = (1 - (1 - lr * a) ** steps) * (x - b) / (lr * steps)
    return end


def replayed(done: fedsim.Run, method: type[fedsim.Strategy], size: int, server_lr: float, lr: float) -> Bowls:
    # The model that the run's own events must give, by the equations alone.
    came = done.events[done.events.arrived.notna() & done.events.outcome.isin(["applied", "pending"])]
    came = came[came.arrived <= done.summary["time"]].sort_values(["arrived", "client"])
    models, table, waiting = [np.zeros(4)], np.zeros((6, 4)), []
    for task in came.itertuples():
        gradient = mean_gradient(models[task.version], task.client, task.steps, lr)
        table[task.client] = gradient
        waiting.append(gradient)
        if len(waiting) == size:
            step = np.mean(waiting, axis=0) if method is AfaCd else table.sum(axis=0) / 6
            models.append(models[-1] - server_lr * step)
            waiting = []
    assert len(models) == done.summary["version"] + 1 > 10
    return models[-1]


@pytest.mark.parametrize("method", [AfaCd, AfaCs])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("pause", [0.0, 0.7])
def test_a_run_equals_a_replay_of_its_events_by_the_equations(method: Any, size: int, pause: float) -> None:
    strategy = method(fedsim.LocalSGD(lr=0.05), 0.1, size, 20, pause)
    more = {"availability": Markov(up=5, down=2), "faults": Faults(0.2, "any")}
    done = run(strategy, compute=Lognormal(jitter=0.3), **more, stop=fedsim.Stop(updates=100))
    assert {"applied", "dropped"} < set(done.events.outcome)
    np.testing.assert_allclose(model(done), replayed(done, method, size, 0.1, 0.05), rtol=1e-10)


# ---- the errors that the methods have and have not ------------------------------------------------------


def distance(x: Bowls, pace: Bowls) -> float:
    # Squared, to the optimum of the objective in which clients count by ``pace [clients]``.
    a, b = bowls()
    weighted = pace[:, None] * a
    return float(((x - (weighted * b).sum(axis=0) / weighted.sum(axis=0)) ** 2).sum())


@pytest.mark.parametrize(("size", "server_lr"), [(1, 0.1), (3, 0.3)])
def test_the_squared_error_of_afa_cs_vanishes_with_the_local_rate_a_hundredfold_per_tenth(
    size: int, server_lr: float
) -> None:
    # Any steps from 1 to 20, clients of unlike speeds.
    errors = []
    for lr in (1e-3, 1e-4, 1e-7):
        done = run(AfaCs(fedsim.LocalSGD(lr=lr), server_lr, size), stop=fedsim.Stop(updates=450))
        errors.append(distance(model(done), np.ones(6)))
    assert errors[0] > 1e-6
    np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.2)
    assert errors[2] < 1e-10


def test_afa_cd_keeps_the_bias_of_the_arrivals_however_small_the_local_rate() -> None:
    # Its models swing about the optimum of the objective in which a client counts by its share of arrivals.
    models: list[Bowls] = []
    strategy = AfaCd(fedsim.LocalSGD(lr=1e-7, steps=10), 0.02)
    run(strategy, stop=fedsim.Stop(updates=1800), observer=lambda sim: models.append(sim.model.numpy()))
    mean = np.mean(models[len(models) // 2 :], axis=0)
    assert distance(mean, 1 / np.array(SECONDS)) < 1e-3
    assert distance(mean, np.ones(6)) > 0.3


def test_every_client_weighs_alike_in_afa_cs_and_by_its_arrivals_in_afa_cd() -> None:
    # Server rate 1: the model is the sum of all weights so far.
    rule, stop = OneHot(steps=10), fedsim.Stop(time_limit=100.0)
    shared = run(AfaCs(rule, 1.0), problem=Untrained(6), stop=stop)
    weights = model(shared) / shared.summary["version"]
    np.testing.assert_allclose(weights, 1 / 6, rtol=0.02)
    mixed = run(AfaCd(rule, 1.0), problem=Untrained(6), stop=stop)
    pace = 1 / np.array(SECONDS)
    np.testing.assert_allclose(model(mixed) / mixed.summary["version"], pace / pace.sum(), rtol=0.01)
    assert model(mixed).sum() == pytest.approx(mixed.summary["version"], rel=1e-12)


def test_clients_that_have_not_come_yet_count_as_zero_in_afa_cs() -> None:
    done = run(AfaCs(OneHot(steps=10), 1.0, 1), problem=Untrained(6), stop=fedsim.Stop(time_limit=0.3))
    assert done.summary["version"] == 1  # client 1 after 0.2 s, alone
    np.testing.assert_allclose(model(done), [0, 1 / 6, 0, 0, 0, 0], rtol=1e-15)


def test_of_a_clients_two_results_in_one_step_of_afa_cs_the_later_counts_and_both_are_used() -> None:
    done = run(AfaCs(OneHot(steps=10), 1.0, 2), problem=Untrained(6), stop=fedsim.Stop(time_limit=0.39))
    assert done.summary["version"] == 1  # clients 1 and 4, after 0.2 and 0.37 s
    twice = run(AfaCs(OneHot(steps=10), 1.0, 3), problem=Untrained(6), stop=fedsim.Stop(time_limit=0.4))
    np.testing.assert_allclose(model(twice), [0, 1 / 6, 0, 0, 1 / 6, 0], rtol=1e-15)
    assert twice.events[twice.events.outcome == "applied"].client.tolist() == [1, 4, 1]


def test_twice_the_steps_are_not_twice_the_weight() -> None:
    # Client 0 makes two steps in the time of one, at local rate 1e-6: a mean gradient hardly changes, a sum doubles.

    def moves(strategy: Any) -> tuple[Bowls, Bowls]:
        # The end with one step and with two.
        single = run(strategy(fedsim.LocalSGD(lr=1e-6, steps=1)), compute=Given(*SECONDS))
        double = run(strategy(fedsim.LocalSGD(lr=1e-6, steps=[2, *[1] * 5])), compute=Given(0.05, *SECONDS[1:]))
        assert single.events.dispatched.tolist() == double.events.dispatched.tolist()
        return model(single), model(double)

    for method in (AfaCd, AfaCs):
        one, two = moves(lambda rule, method=method: method(rule, 0.05))
        assert 0 < np.abs(two - one).max() < 1e-5 * np.abs(one).max()
    one, two = moves(lambda rule: FedBuff(rule, 3, staleness="constant", concurrency=6))
    assert np.abs(two - one).max() > 0.05 * np.abs(one).max()


# ---- what they become ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AfaCd, AfaCs])
def test_with_everybody_in_every_step_it_is_fedavg_of_server_rate_eta_over_local_rate_and_steps(method: Any) -> None:
    rule, alike = fedsim.LocalSGD(lr=0.1, steps=7), Given(*[0.1] * 6)
    anarchic = run(method(rule, 0.8 * 0.1 * 7), cohort=6, compute=alike)
    orderly = run(FedAvg(rule, server_lr=0.8), cohort=6, compute=alike)
    assert anarchic.summary["version"] == orderly.summary["version"] == 20
    np.testing.assert_allclose(model(anarchic), model(orderly), rtol=1e-12)


# ---- who comes when, and for how long --------------------------------------------------------------------


def test_every_number_of_steps_up_to_the_most_is_equally_likely_and_the_clients_own() -> None:
    few = run(AfaCd(), stop=fedsim.Stop(updates=2000), problem=Untrained(4)).events
    counts = np.bincount(few.steps, minlength=21)
    assert counts[0] == 0
    assert len(counts) == 21
    assert (np.abs(counts[1:] - len(few) / 20) < 5 * np.sqrt(len(few) / 20)).all()
    stop = fedsim.Stop(updates=500)
    many = run(AfaCs(), clients=12, compute=Lognormal(), stop=stop, problem=Untrained(4)).events
    for client in range(6):
        mine, other = (each[each.client == client].steps.tolist() for each in (few, many))
        assert len(other) > 5
        assert mine[: len(other)] == other[: len(mine)]


def test_a_setting_takes_the_place_of_the_draws() -> None:
    events = run(AfaCs(fedsim.LocalSGD(lr=0.01, steps=[3, 1, 4, 1, 5, 9]), 0.01)).events
    assert events.groupby("client").steps.unique().apply(list).tolist() == [[3], [1], [4], [1], [5], [9]]
    assert set(run(AfaCs(most_steps=1)).events.steps) == {1}


def test_pauses_are_exponential_and_end_when_the_client_says() -> None:
    rule = fedsim.LocalSGD(lr=0.01, steps=1)
    done = run(AfaCd(rule, pause=2.0), stop=fedsim.Stop(updates=2000), problem=Untrained(4))
    events = done.events[done.events.client == 0].sort_values("dispatched")
    gaps = events.dispatched.to_numpy()[1:] - events.arrived.to_numpy()[:-1]
    gaps = gaps[np.isfinite(gaps)]
    assert len(gaps) > 300
    assert abs(gaps.mean() - 2) < 5 * 2 / np.sqrt(len(gaps))
    assert abs((gaps < 1).mean() - (1 - np.exp(-0.5))) < 5 * 0.5 / np.sqrt(len(gaps))
    assert events.dispatched.iloc[0] > 0


def test_who_leaves_while_it_pauses_begins_anew_when_it_is_back() -> None:
    presence = Scripted((0.001, 0, False), (50.0, 0, True), absent=(1,))
    strategy = AfaCd(fedsim.LocalSGD(lr=0.01, steps=1), 0.01, 1, pause=3.0)
    events = run(strategy, clients=2, availability=presence, stop=fedsim.Stop(updates=5)).events
    assert set(events.client) == {0}
    assert (events.dispatched > 50).all()
    assert (events.dispatched - events.dispatched.min() < 50).all()


def test_clients_without_examples_are_not_asked_and_do_not_count() -> None:
    class Empty(Untrained):
        def prepare(self, clients: int, randomness: Randomness) -> None:
            super().prepare(clients, randomness)
            self.samples = np.array([1, 0, 1, 1, 1, 1])

    done = run(AfaCs(OneHot(steps=10), 1.0, 1), problem=Empty(6), stop=fedsim.Stop(time_limit=0.4))
    np.testing.assert_allclose(model(done), [0, 0, 0, 0, 1 / 5, 0], rtol=1e-15)


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AfaCd, AfaCs])
def test_what_makes_no_mean_gradient_is_refused(method: Any) -> None:
    with pytest.raises(fedsim.ConfigError, match=r"^local\.momentum=0\.9: a step along a velocity is no gradient"):
        method(fedsim.LocalSGD(momentum=0.9))
    with pytest.raises(fedsim.ConfigError, match=r"^local\.lr=0\.0: .* need a rate > 0"):
        method(fedsim.LocalSGD(lr=0))
    for key, value in {"server_lr": 0, "buffer_size": 0, "most_steps": 0, "pause": -1}.items():
        with pytest.raises(fedsim.ConfigError, match=f"^{key}={value}: must be"):
            method(**{key: value})


class StoppedError(Exception):
    pass


def test_a_run_with_pauses_resumes_to_the_same_bits(tmp_path: Any) -> None:
    def stop(sim: Any) -> None:
        if sim.version == 9:
            raise StoppedError

    often = fedsim.CheckpointSchedule(events=1)
    with pytest.raises(StoppedError):
        run(AfaCs(pause=1.0), out=tmp_path / "run", checkpoint=often, observer=stop)
    resumed = run(AfaCs(pause=1.0), out=tmp_path / "run", checkpoint=often, resume=True)
    assert "resumed at" in (tmp_path / "run/run.log").read_text()
    whole = run(AfaCs(pause=1.0))
    for name in ("model_sha256", "events_sha256"):
        assert resumed.manifest[name] == whole.manifest[name]

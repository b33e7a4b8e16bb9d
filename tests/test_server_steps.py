"""Server optimisers against a second computation written here, and the methods they become."""

from __future__ import annotations

import numpy as np
import pytest

import fedsim
from fedsim.strategies.fedadagrad import FedAdagrad
from fedsim.strategies.fedadam import FedAdam
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavgm import FedAvgM
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.fedyogi import FedYogi
from fedsim.system.compute import Constant

LOCAL = fedsim.LocalSGD(lr=0.1, steps=3)
ROUNDS = 12


def run(strategy, **more):
    stop = fedsim.Stop(rounds=more.pop("rounds", ROUNDS))
    return fedsim.simulate(strategy, fedsim.Quadratic(4), stop=stop, clients=6, cohort=6, **more)


def trajectory(strategy, rounds=ROUNDS):
    """The model after each round, from the start."""
    models = []

    def look(sim):
        if not models or sim.version >= len(models):
            models.append(sim.model.numpy())

    run(strategy, observer=look, rounds=rounds)
    return np.array(models)


def mean_delta(x):
    """What six clients of the bowl send on average, in closed form: three steps of gradient descent contract."""
    problem = fedsim.Quadratic(4)
    problem.prepare(6, fedsim.rng.Randomness(0))
    a, b = problem.curvature, problem.centres
    return (((1 - 0.1 * a) ** 3 - 1) * (x - b)).mean(axis=0)


def expected(step):
    """Models by a rule ``step(delta, memory) -> move`` in plain numpy."""
    x, memory, models = np.zeros(4), {}, [np.zeros(4)]
    for number in range(ROUNDS):
        x = x + step(number, mean_delta(x), memory)
        models.append(x)
    return np.array(models)


def momentum(number, delta, memory):
    # The sum that the recursion unrolls to.
    memory.setdefault("all", []).append(delta)
    return 0.7 * sum(0.8 ** (number - i) * each for i, each in enumerate(memory["all"]))


def adaptive(kind):
    def step(number, delta, memory):
        deltas = memory.setdefault("all", [])
        deltas.append(delta)
        squares = [each**2 for each in deltas]
        beta1 = 0.0 if kind == "adagrad" else 0.6
        first = sum((1 - beta1) * beta1 ** (number - i) * each for i, each in enumerate(deltas))
        if kind == "adagrad":
            second = 0.05**2 + sum(squares)
        elif kind == "adam":
            second = 0.9 ** (number + 1) * 0.05**2 + sum(0.1 * 0.9 ** (number - i) * s for i, s in enumerate(squares))
        else:
            second = memory.get("v", np.full(4, 0.05**2))
            # Yogi, item by item: towards the new square by a tenth of it, whichever side it lies on.
            second = np.array(
                [
                    v + 0.1 * s if v < s else v - 0.1 * s if v > s else v
                    for v, s in zip(second, squares[-1], strict=True)
                ]
            )
            memory["v"] = second
        return 0.3 * first / (np.sqrt(second) + 0.05)

    return step


CASES = {
    "fedavgm": (lambda: FedAvgM(LOCAL, server_lr=0.7, momentum=0.8), momentum),
    "fedadam": (lambda: FedAdam(LOCAL, server_lr=0.3, beta1=0.6, beta2=0.9, tau=0.05), adaptive("adam")),
    "fedyogi": (lambda: FedYogi(LOCAL, server_lr=0.3, beta1=0.6, beta2=0.9, tau=0.05), adaptive("yogi")),
    "fedadagrad": (lambda: FedAdagrad(LOCAL, server_lr=0.3, beta1=0.0, tau=0.05), adaptive("adagrad")),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_second_computation(name):
    make, rule = CASES[name]
    found, wanted = trajectory(make()), expected(rule)
    assert len(found) == ROUNDS + 1
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert np.abs(np.diff(wanted, axis=0)).min() > 1e-6  # something moved in every item and round


def hashes(one):
    return one.manifest["model_sha256"]


def test_without_momentum_fedavgm_is_fedavg_to_the_bit():
    assert hashes(run(FedAvgM(LOCAL, momentum=0.0))) == hashes(run(FedAvg(LOCAL)))
    assert hashes(run(FedAvgM(LOCAL, momentum=0.5))) != hashes(run(FedAvg(LOCAL)))


def test_with_a_large_tau_adagrad_is_fedavg():
    # tau swallows the second moment, so the move is server_lr / (2 tau) Delta.
    slow = trajectory(FedAdagrad(LOCAL, server_lr=2e6, beta1=0.0, tau=1e6))
    np.testing.assert_allclose(slow, trajectory(FedAvg(LOCAL)), rtol=1e-9, atol=1e-9)


def test_fedprox_without_the_term_is_fedavg_to_the_bit_and_with_it_contracts_to_the_start():
    assert hashes(run(FedProx(LOCAL, mu=0.0))) == hashes(run(FedAvg(LOCAL)))
    # One client's steps from x: x_{k+1} - x = (1 - eta (a + mu)) (x_k - x) - eta a (x - b).
    problem = fedsim.Quadratic(4)
    problem.prepare(6, fedsim.rng.Randomness(0))
    a, b = problem.curvature, problem.centres
    x = np.zeros(4)
    for _ in range(5):
        moved = np.zeros_like(a)
        for _ in range(3):
            moved = (1 - 0.1 * (a + 0.5)) * moved - 0.1 * a * (x - b)
        x = x + moved.mean(axis=0)
    np.testing.assert_allclose(trajectory(FedProx(LOCAL, mu=0.5), rounds=5)[-1], x, rtol=1e-12)


def test_fedprox_uses_the_partial_work_of_stragglers():
    whole = fedsim.LocalSGD(lr=0.1, steps=8)
    tasks = run(FedProx(whole, partial=0.5), rounds=400, eval_every=0).events
    applied = tasks[tasks.outcome == "applied"]
    assert len(applied) == 2400
    counts = np.bincount(applied.steps, minlength=9)
    assert counts[0] == 0
    # Half of them run U{1..8} steps, so 1/16 each of 1 to 7, and 9/16 all eight; within 5 standard deviations.
    share = np.array([1 / 16] * 7 + [9 / 16])
    assert (np.abs(counts[1:] - 2400 * share) <= 5 * np.sqrt(2400 * share * (1 - share))).all()
    assert set(run(FedProx(whole, partial=0.0)).events.steps) == {8}


def test_fedprox_refuses_two_different_penalties():
    with pytest.raises(fedsim.ConfigError, match=r"mu=0\.1: local\.prox=0\.3 sets the same penalty"):
        FedProx(fedsim.LocalSGD(prox=0.3), mu=0.1)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", CASES)
def test_resumes_with_its_memory(name, tmp_path):
    def stop(sim):
        if sim.version == 5:
            raise StoppedError

    make, _ = CASES[name]
    often = fedsim.CheckpointSchedule(events=1)
    with pytest.raises(StoppedError):
        run(make(), out=tmp_path / "run", checkpoint=often, observer=stop)
    resumed = run(make(), out=tmp_path / "run", checkpoint=often, resume=True)
    assert "resumed at" in (tmp_path / "run/run.log").read_text()
    assert hashes(resumed) == hashes(run(make()))


def test_stragglers_are_drawn_anew_after_a_round_without_a_result() -> None:
    """All run a random part of ten steps of a second, and the round closes after 3.5: many come to nothing."""
    strategy = FedProx(fedsim.LocalSGD(lr=0.1, steps=10), partial=1.0, deadline=3.5)
    system, stop = fedsim.System(Constant(mean=1.0)), fedsim.Stop(rounds=20)
    run = fedsim.simulate(strategy, fedsim.Quadratic(3), system, stop=stop, clients=2, cohort=2)
    assert run.summary["round"] == 20
    steps = run.events.groupby("dispatched").steps.apply(tuple)
    assert len(set(steps)) > len(steps) / 4
    assert (steps.map(min) > 3).any()  # such a round came to nothing

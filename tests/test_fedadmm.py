"""FedADMM: against loops by hand and textbook ADMM, the server's invariant, and what the released rule does."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedsim
from fedsim import SAM, ConfigError, LeastSquares, LocalSGD, Quadratic, Stop, System
from fedsim.rng import Randomness
from fedsim.simulation import Simulation
from fedsim.strategies.fedadmm import FedADMM, FedADMMReleased
from fedsim.strategies.fedprox import FedProx
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults

Vector = NDArray[np.float64]


@cache
def bowls(clients: int = 20) -> Quadratic:
    problem = Quadratic()
    problem.prepare(clients, Randomness(0))
    return problem


class Away(Quadratic):
    """Models begin at 5, not at 0."""

    def initial(self) -> torch.Tensor:
        return super().initial() + 5.0


def simulate(strategy: fedsim.Strategy, rounds: int, cohort: int = 4, clients: int = 20, **more: Any) -> fedsim.Run:
    system, problem = more.pop("system", None), more.pop("problem", Quadratic)()
    return fedsim.simulate(strategy, problem, system, stop=Stop(rounds=rounds), clients=clients, cohort=cohort, **more)


def cohorts(run: fedsim.Run) -> list[list[int]]:
    """Whose results each server step used, in order of arrival."""
    used = run.events[run.events.outcome == "applied"].sort_values(["arrived", "client"])
    return [used[used.applied_version == step].client.tolist() for step in range(run.summary["version"])]


def errors(run: fedsim.Run) -> Vector:
    """The distance to the optimum relative to its size, round by round."""
    distances: Vector = np.sqrt(run.metrics.distance.to_numpy()) / np.linalg.norm(bowls().optimum)
    return distances


# ---- the paper's algorithm, once more ----------------------------------------------------------------

UNRELIABLE = System(Lognormal(jitter=0.3), faults=Faults(0.2, "any"))


@pytest.mark.parametrize("rho_sam", [0.0, 0.3])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("eta", [None, 0.4])
def test_it_is_the_papers_loop_when_clients_are_sampled_late_and_lost(
    eta: float | None, warm: bool, rho_sam: float
) -> None:
    rho, lr, steps, m = 0.7, 0.1, 3, 20
    rule = SAM(lr=lr, steps=steps, rho=rho_sam) if rho_sam else LocalSGD(lr=lr, steps=steps)
    strategy = FedADMM(rule, rho, eta, warm, over_selection=1.5, stragglers="late")
    run = simulate(strategy, 30, system=UNRELIABLE, problem=Away)
    a, b = bowls().curvature, bowls().centres
    theta, w, y, joined = np.full(10, 5.0), np.full((m, 10), 5.0), np.zeros((m, 10)), set()
    assert {"late", "dropped", "applied"} <= set(run.events.outcome)
    for chosen in cohorts(run):
        total = np.zeros(10)
        for i in chosen:
            x = w[i] if warm and i in joined else theta
            for _ in range(steps):
                slope = a[i] * (x - b[i])
                if rho_sam:
                    slope = a[i] * (x + rho_sam * slope / np.linalg.norm(slope) - b[i])
                x = x - lr * (slope + y[i] + rho * (x - theta))
            dual = y[i] + rho * (x - theta)
            total += (x + dual / rho) - (w[i] + y[i] / rho)
            w[i], y[i] = x, dual
            joined.add(i)
        theta = theta + (eta if eta is not None else len(chosen) / m) * total / len(chosen)
    np.testing.assert_allclose(run.model["x"], theta, rtol=0, atol=1e-10)


def test_theta_is_always_the_mean_of_all_augmented_models_whatever_is_refused() -> None:
    seen = []

    def look(sim: Any) -> None:
        assert isinstance(sim, Simulation)
        if sim.version > len(seen):
            model, dual = sim.kept("model"), sim.kept("dual")
            joined = {i for i, each in sim.kept("joined").items() if each}
            start = torch.full((10,), 5.0, dtype=torch.float64)
            own = [model[i] + dual[i] / 0.5 if i in joined else start for i in range(sim.clients)]
            seen.append(float((torch.stack(own).mean(dim=0) - sim.model).norm()))

    strategy = FedADMM(LocalSGD(lr=0.2, steps=5), 0.5, over_selection=1.5, stragglers="late")
    run = simulate(strategy, 60, system=UNRELIABLE, problem=Away, observer=look)
    assert (run.events.outcome == "late").sum() > 20
    assert len(seen) == run.summary["version"] >= 40
    assert max(seen) < 1e-12


def test_at_full_participation_and_solved_exactly_it_is_textbook_admm() -> None:
    # The curvature is 0.7 to 2.5: 60 steps of 0.6 leave (1 - 0.6 * 0.7)^60 = 6e-15 of a local error.
    rho, rounds, m = 0.5, 12, 6
    run = simulate(FedADMM(LocalSGD(lr=0.6, steps=60), rho), rounds, cohort=m, clients=m)
    a, b = bowls(m).curvature, bowls(m).centres
    z, dual = np.zeros(10), np.zeros((m, 10))
    for _ in range(rounds):
        x = (a * b + rho * z - dual) / (a + rho)
        # The scaled dual steps with the model that clients have, before the server's step, as in the paper.
        dual = dual + rho * (x - z)
        z = (x + dual / rho).mean(axis=0)
    np.testing.assert_allclose(run.model["x"], z, rtol=0, atol=1e-12)


def test_in_the_limit_each_dual_is_minus_its_clients_gradient_at_the_optimum() -> None:
    duals: dict[int, torch.Tensor] = {}
    simulate(
        FedADMM(LocalSGD(lr=0.2, steps=5), 1.0), 400, observer=lambda sim: duals.update(sim.kept("dual")), eval_every=0
    )
    a, b, optimum = bowls().curvature, bowls().centres, bowls().optimum
    for i in range(20):
        np.testing.assert_allclose(duals[i], -a[i] * (optimum - b[i]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("warm", [False, True])
def test_clients_without_data_hold_nobody_back(warm: bool) -> None:
    class SomeEmpty(Quadratic):
        def prepare(self, clients: int, randomness: Randomness) -> None:
            super().prepare(clients, randomness)
            self.samples[:3] = 0

    strategy = FedADMM(LocalSGD(lr=0.2, steps=5), 1.0, warm_start=warm)
    run = simulate(strategy, 120, cohort=6, clients=10, problem=SomeEmpty, eval_every=0)
    a, b = bowls(10).curvature[3:], bowls(10).centres[3:]
    np.testing.assert_allclose(run.model["x"], (a * b).sum(axis=0) / a.sum(axis=0), rtol=0, atol=1e-4)


# ---- rates and bias ----------------------------------------------------------------------------------


def test_the_paper_rule_reaches_the_optimum_under_sampling_at_the_server_step_of_the_mean() -> None:
    """20 unlike bowls, 4 per round, 5 local steps, rho = 1: known to come to 1.6e-6 or better in 400 rounds."""
    for lr, warm in ((0.1, False), (0.2, True)):
        run = simulate(FedADMM(LocalSGD(lr=lr, steps=5), 1.0, warm_start=warm), 400, eval_every=100)
        assert errors(run)[-1] < 1e-10


def test_a_server_step_of_one_diverges_from_a_cold_start_and_is_slow_with_a_warm_one_and_a_small_rho() -> None:
    rule = LocalSGD(lr=0.1, steps=5)
    for rho in (0.1, 1.0):
        assert errors(simulate(FedADMM(rule, rho, server_lr=1.0), 150, eval_every=50))[-1] > 1e2
    warm = errors(simulate(FedADMM(rule, 0.1, server_lr=1.0, warm_start=True), 300, eval_every=100))
    assert 0.01 < warm[-1] < 0.15
    assert errors(simulate(FedADMM(rule, 1.0, server_lr=1.0, warm_start=True), 100, eval_every=50))[-1] > 1


def test_the_released_rule_stalls_away_from_the_optimum() -> None:
    for eta in (0.5, 1.0):
        run = simulate(FedADMMReleased(LocalSGD(lr=0.1, steps=5), 1.0, eta, eta), 240, eval_every=60)
        found = errors(run)
        assert 0.08 < found[-1] < 0.31
        assert abs(found[-1] - found[-2]) < 2e-3  # it has stopped there


def test_the_released_rule_is_its_code() -> None:
    rho, lr, m = 0.3, 0.1, 20
    run = simulate(FedADMMReleased(LocalSGD(lr=lr, steps=3, momentum=0.5), rho, later=10), 20)
    a, b = bowls().curvature, bowls().centres
    theta, alpha = np.zeros(10), np.zeros((m, 10))
    for number, chosen in enumerate(cohorts(run)):
        total = np.zeros(10)
        for i in chosen:
            x, previous, before, velocity = theta, theta, alpha[i].copy(), np.zeros(10)
            for _ in range(3):
                velocity = 0.5 * velocity + a[i] * (x - b[i]) + alpha[i] + rho * (x - theta)
                x = x - lr * velocity
            alpha[i] = alpha[i] + rho * (x - theta)
            total += (x - previous) + 1 / rho * (alpha[i] - before)
        theta = theta + (1.0 if number < 10 else 0.5) * total / len(chosen)
    np.testing.assert_allclose(run.model["x"], theta, rtol=0, atol=1e-12)


def test_while_all_duals_are_zero_both_are_fedprox_at_twice_the_server_step() -> None:
    rule = LocalSGD(lr=0.1, steps=4)
    prox = simulate(FedProx(rule, 0.3, weighting="uniform", server_lr=2 * 0.25), 1)
    for strategy in (FedADMM(rule, 0.3, server_lr=0.25), FedADMMReleased(rule, 0.3, server_lr=0.25)):
        run = simulate(strategy, 1)
        torch.testing.assert_close(run.model["x"], prox.model["x"], rtol=1e-12, atol=1e-13)


# ---- traffic, passes, other problems -----------------------------------------------------------------


@pytest.mark.parametrize("method", [FedADMM, FedADMMReleased])
def test_one_vector_goes_down_and_one_up(method: Any) -> None:
    run = simulate(method(LocalSGD(steps=2)), 5)
    done = run.events[run.events.outcome == "applied"]
    assert len(done) == 20
    assert (done.down_bytes == 80).all()
    assert (done.up_bytes == 80).all()


@pytest.mark.parametrize("method", [FedADMM, FedADMMReleased])
def test_passes_are_drawn_anew_for_every_client_and_round(method: Any) -> None:
    problem = LeastSquares()
    strategy = method(LocalSGD(lr=0.02, batch_size=4), random_epochs=3)
    run = fedsim.simulate(strategy, problem, stop=Stop(rounds=40), clients=10, cohort=10)
    events = run.events[run.events.outcome == "applied"]
    per_pass = -(-problem.samples[events.client] // 4)
    passes = events.steps.to_numpy() / per_pass
    counts = np.array([(passes == each).sum() for each in (1, 2, 3)])
    assert counts.sum() == len(events) == 400
    assert (abs(counts - 400 / 3) < 4 * np.sqrt(400 * 2 / 9)).all()
    assert len({tuple(each) for _, each in events.sort_values("task").groupby("dispatched").steps}) > 30


def test_on_mini_batches_of_least_squares_it_comes_far_nearer_than_fedavg() -> None:
    from fedsim.strategies.fedavg import FedAvg

    def gap(strategy: fedsim.Strategy) -> float:
        problem = LeastSquares(dimension=5, spread=1.0, weighting="uniform")
        run = fedsim.simulate(strategy, problem, stop=Stop(rounds=100), clients=10, cohort=5, eval_every=50)
        return float(run.metrics.gap.iloc[-1])

    rule = LocalSGD(lr=0.05, steps=10, batch_size=None)
    assert gap(FedADMM(rule, 1.0)) < 1e-6 < 1e-3 < gap(FedAvg(rule, "uniform"))


def test_settings_that_contradict_the_method_are_refused() -> None:
    for method in (FedADMM, FedADMMReleased):
        with pytest.raises(ConfigError, match=r"^rho=0\.1: local\.prox=0\.5 sets the same penalty"):
            method(LocalSGD(prox=0.5), 0.1)
        with pytest.raises(ConfigError, match=r"^rho=0: must be a number > 0"):
            method(rho=0)
        with pytest.raises(ConfigError, match=r"^random_epochs=0: must be a whole number from 1 to 1000000"):
            method(random_epochs=0)
    with pytest.raises(ConfigError, match=r"^warm_start=1: must be true or false"):
        FedADMM(warm_start=1)  # type: ignore[arg-type]
    own = FedADMM(LocalSGD()).jobs["train"]
    with pytest.raises(
        ConfigError, match=r"^local\._target_=fedsim\.strategies\.fedadmm\.AugmentedSGD: it has its own"
    ):
        FedADMM(own)

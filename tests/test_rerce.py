"""RERCE-Fed: against ADMM with duals and its own protocol by hand, its fixed points, its noise, and what travels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedsim
from fedsim import SAM, ConfigError, LeastSquares, LocalSGD, LogisticRegression, Problem, Quadratic, ScheduleOnly, Stop
from fedsim.data.sources import Dataset
from fedsim.rng import Randomness
from fedsim.simulation import Simulation
from fedsim.strategies.rerce import RERCE, RERCECLU, ContinualStep, ProximalStep
from fedsim.training import GeneralTrainer, Work

Vector = NDArray[np.float64]
K, D = 8, 6


def squares() -> LeastSquares:
    return LeastSquares(dimension=D, samples_low=3, samples_high=5, noise=0.1, weighting="uniform")


@cache
def normal_equations() -> tuple[Vector, Vector, Vector]:
    """A_k, b_k, and the optimum of the sum."""
    problem = squares()
    problem.prepare(K, Randomness(0))
    pairs = [problem.examples(k) for k in range(K)]
    a = np.array([(h.T @ h / len(y)).numpy() for h, y in pairs])
    b = np.array([(h.T @ y / len(y)).numpy() for h, y in pairs])
    return a, b, np.linalg.solve(a.sum(axis=0), b.sum(axis=0))


def inverses(rho: float) -> Vector:
    found: Vector = np.linalg.inv(normal_equations()[0] + rho * np.eye(D))
    return found


def simulate(strategy: fedsim.Strategy, steps: int, cohort: int = K, problem: Problem | None = None) -> fedsim.Run:
    """So many steps of the server."""

    def enough(sim: Any) -> None:
        assert isinstance(sim, Simulation)
        if sim.version == steps:
            sim.stop("enough")

    return fedsim.simulate(
        strategy,
        problem or squares(),
        stop=Stop(updates=10**6),
        clients=K,
        cohort=cohort,
        eval_every=0,
        observer=enough,
    )


def decibels(x: Vector) -> float:
    """The clients' mean squared deviation from the optimum, relative to it."""
    optimum = normal_equations()[2]
    return float(10 * np.log10(((x - optimum) ** 2).sum(axis=-1).mean() / (optimum**2).sum()))


def asked(run: fedsim.Run) -> list[list[int]]:
    """Whose results each step of the server heard, in order of arrival."""
    heard = run.events[(run.events.outcome == "applied") & (run.events.tag == "upload")]
    heard = heard.sort_values(["arrived", "client"])
    return [heard[heard.applied_version == step].client.tolist() for step in range(run.summary["version"])]


# ---- ADMM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_with_everybody_and_without_noise_it_is_admm_with_duals(rho: float) -> None:
    b = normal_equations()[1]
    inverse, z, dual = inverses(rho), np.zeros(D), np.zeros((K, D))
    models = []
    for _ in range(20):
        x = np.einsum("kij,kj->ki", inverse, b + rho * z - dual)
        before, z = z, (x + dual / rho).mean(axis=0)
        dual = dual + rho * (x - z)
        models.append(2 * z - before)
        np.testing.assert_allclose(z, x.mean(axis=0), atol=1e-12)
    found = simulate(RERCE(rho=rho, solver="exact"), 20).model["x"]
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-10)
    # The other variant extrapolates on the clients, so that its model is s of the first.
    found = simulate(RERCECLU(rho=rho, solver="exact", selected=K), 20).model["x"]
    np.testing.assert_allclose(found, models[-1], rtol=0, atol=1e-10)


def test_it_comes_to_the_optimum_and_the_released_order_of_s_does_not() -> None:
    """Known: -154 dB in the right order, a floor of -31 dB when z^1 is forgotten, with everybody and no noise."""
    b = normal_equations()[1]
    inverse, steps = inverses(1.0), 150
    strategy = RERCE(solver="exact")
    seen: dict[int, torch.Tensor] = {}
    fedsim.simulate(
        strategy, squares(), stop=Stop(rounds=steps), clients=K, cohort=K, eval_every=0,
        observer=lambda sim: seen.update(strategy.own_models(sim)),
    )  # fmt: skip
    assert decibels(torch.stack(list(seen.values())).numpy()) < -150
    x = np.einsum("kij,kj->ki", inverse, b)
    z, old = x.mean(axis=0), np.zeros(D)
    s = 2 * z - old
    for _ in range(steps):
        x = x + np.einsum("kij,kj->ki", inverse, s - x)
        z = x.mean(axis=0)
        s, old = 2 * z - old, z
    assert -60 < decibels(x) < -5


# ---- the protocol, once more -------------------------------------------------------------------------


class Keys:
    """What tasks draw: by client and its own n-th task."""

    def __init__(self) -> None:
        self.nth = [0] * K

    def take(self, client: int) -> tuple[Vector, Vector]:
        """Noise on the way down and up of a client's next task."""
        nth, self.nth[client] = self.nth[client], self.nth[client] + 1
        keys = (np.array([client]), np.array([nth]))
        down, up = (Randomness(0)(f"{way} noise", *keys).normal(D)[0] for way in ("downlink", "uplink"))
        return down, up


def test_with_few_asked_and_noise_on_the_links_it_is_the_protocol() -> None:
    rho, up, down = 0.5, 0.3, 0.2
    run = simulate(RERCE(rho=rho, solver="exact", uplink_noise=up, downlink_noise=down), 12, cohort=3)
    inverse, keys = inverses(rho), Keys()
    x = np.einsum("kij,kj->ki", inverse, normal_equations()[1])
    first = [keys.take(k) for k in range(K)]
    z, before = np.zeros(D), np.zeros(D)
    for n, chosen in enumerate(asked(run)):
        assert len(chosen) == 3
        received = []
        for k in chosen:
            v, u = keys.take(k) if n else first[k]
            if n:
                x[k] = x[k] + rho * inverse[k] @ (2 * z - before + down * v - x[k])
            received.append(x[k] + up * u)
        z, before = np.mean(received, axis=0), z
    np.testing.assert_allclose(run.model["x"], z, rtol=0, atol=1e-10)


def test_continual_updates_are_their_protocol() -> None:
    rho, up, down = 0.5, 0.3, 0.2
    run = simulate(RERCECLU(rho=rho, selected=3, solver="exact", uplink_noise=up, downlink_noise=down), 12)
    inverse, keys = inverses(rho), Keys()
    x = np.einsum("kij,kj->ki", inverse, normal_equations()[1])
    heard = 2 * x + up * np.array([keys.take(k)[1] for k in range(K)])
    z, last = heard.mean(axis=0), np.zeros((K, D))
    steps = asked(run)
    assert [len(each) for each in steps] == [K] + [3] * 11
    for chosen in steps[1:]:
        noise = [keys.take(k) for k in range(K)]
        for k in range(K):
            if k in chosen:
                last[k] = z + down * noise[k][0]
            new = x[k] + rho * inverse[k] @ (last[k] - x[k])
            if k in chosen:
                heard[k] = 2 * new - x[k] + up * noise[k][1]
            x[k] = new
        z = heard.mean(axis=0)
    np.testing.assert_allclose(run.model["x"], z, rtol=0, atol=1e-10)
    assert run.summary["round"] == 12


# ---- fixed points, solvers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ProximalStep, ContinualStep])
def test_every_consensus_is_a_fixed_point(kind: Any) -> None:
    problem = squares()
    problem.prepare(K, Randomness(0))
    point = torch.from_numpy(Randomness(5)("point").normal(D))
    for client in range(K):
        state = {"x": point, "joined": torch.ones(1, dtype=torch.float64), "received": torch.zeros_like(point)}
        steps = {**state, "v": -problem.gradient(point, client, None, 0)}
        exact = {**state, "inverse": torch.from_numpy(inverses(1.0)[client])}
        for solver, held in (("steps", steps), ("exact", exact)):
            rule = kind(lr=0.1, prox=1.0, solver=solver, batch_size=None).replace(sends="model")
            work = Work(0, client, 0, "train", point, {}, held, 0.1, 7)
            done = GeneralTrainer(problem, {"train": rule}, Randomness(0)).train([work])[0]
            assert done.error is None
            torch.testing.assert_close(done.payload["model"], point, rtol=0, atol=1e-14)
            torch.testing.assert_close(done.state["x"], point, rtol=0, atol=1e-14)


@pytest.mark.parametrize("selected", [K, 3])
def test_many_steps_are_the_exact_solver(selected: int) -> None:
    # With rho = 1 the curvature is between 1 and 1 / 0.08: 400 steps leave at most (1 - 0.08)^400 = 3e-15 of the way.
    assert np.linalg.eigvalsh(normal_equations()[0]).max() + 1 < 1 / 0.08
    rule = LocalSGD(lr=0.08, steps=400, batch_size=None)
    for make in (lambda **how: RERCE(**how), lambda **how: RERCECLU(selected=selected, **how)):
        exact, near = (
            simulate(make(solver=solver, local=rule), 8, cohort=selected).model["x"] for solver in ("exact", "steps")
        )
        torch.testing.assert_close(near, exact, rtol=0, atol=1e-10)


def test_what_inexact_steps_leave_over_is_made_good() -> None:
    """sum_k v_k = rho K (z^n - z^{n-1}) whatever the steps do, so that where z rests the gradients sum to zero."""
    rho, gaps = 0.7, []
    strategy = RERCE(LocalSGD(lr=0.1, steps=2, batch_size=None), rho)

    def look(sim: Any) -> None:
        if sim.version > len(gaps):
            total = torch.stack(list(sim.kept("v").values())).sum(dim=0)
            gaps.append(float((total - rho * K * (strategy.z - strategy.previous)).norm()))

    done = fedsim.simulate(strategy, squares(), stop=Stop(rounds=300), clients=K, cohort=K, eval_every=0, observer=look)
    assert len(gaps) == 300
    assert max(gaps) < 1e-12
    np.testing.assert_allclose(done.model["x"], normal_equations()[2], rtol=0, atol=1e-8)


def test_a_start_that_is_not_zero_shifts_everything() -> None:
    class Shifted(Quadratic):
        def initial(self) -> torch.Tensor:
            return super().initial() + 5.0

    run = simulate(RERCE(solver="exact"), 60, problem=Shifted(D))
    problem = Quadratic(D)
    problem.prepare(K, Randomness(0))
    np.testing.assert_allclose(run.model["x"], problem.optimum, rtol=0, atol=1e-6)
    run = simulate(RERCECLU(solver="exact", selected=K), 60, problem=Shifted(D))
    np.testing.assert_allclose(run.model["x"], problem.optimum, rtol=0, atol=1e-6)


# ---- noise and sampling ------------------------------------------------------------------------------


def test_noise_walks_along_the_consensus_and_few_clients_leave_a_floor() -> None:
    def course(cohort: int, noise: float, steps: int) -> list[float]:
        found: list[float] = []
        strategy = RERCE(rho=1.0, solver="exact", uplink_noise=noise, downlink_noise=noise)

        def look(sim: Any) -> None:
            if sim.version > len(found):
                found.append(decibels(torch.stack(list(strategy.own_models(sim).values())).numpy()))
            if sim.version == steps:
                sim.stop("enough")

        fedsim.simulate(
            strategy, squares(), stop=Stop(updates=10**6), clients=K, cohort=cohort, eval_every=0, observer=look
        )
        return found

    clean, noisy, few = course(K, 0.0, 200), course(K, 0.02, 200), course(3, 0.0, 200)
    assert clean[-1] < -150
    assert np.mean(noisy[-50:]) > min(noisy) + 3
    assert np.mean(noisy[120:]) > np.mean(noisy[10:70])
    assert -40 < few[-1] < -3
    assert abs(np.mean(few[-50:]) - np.mean(few[-100:-50])) < 3


# ---- traffic, mistakes -------------------------------------------------------------------------------


def test_one_vector_each_way_for_those_who_are_asked_and_nothing_for_the_others() -> None:
    vector = D * 8
    for strategy, first in ((RERCE(), 3), (RERCECLU(selected=3), K)):
        run = simulate(strategy, 5, cohort=3)
        events = run.events[run.events.outcome == "applied"]
        heard, silent = events[events.tag == "upload"], events[events.tag == "silent"]
        assert (heard.up_bytes == vector).all()
        assert (silent[["up_bytes", "down_bytes"]] == 0).all(axis=None)
        down = heard.groupby("applied_version").down_bytes.sum()
        assert down.tolist() == [0] + [3 * vector] * 4
        assert len(heard) == first + 3 * 4
        assert len(silent) == (K - 3 if first == 3 else (K - 3) * 4)


def test_settings_that_contradict_the_method_are_refused() -> None:
    for method in (RERCE, RERCECLU):
        with pytest.raises(ConfigError, match=r"^rho=1\.0: local\.prox=0\.5 sets the same penalty"):
            method(LocalSGD(prox=0.5))
        with pytest.raises(ConfigError, match=r"^solver=exact: .*take local=sgd$"):
            method(SAM(), solver="exact")
        with pytest.raises(ConfigError, match=r"^uplink_noise=-1: must be a number >= 0"):
            method(uplink_noise=-1)
        with pytest.raises(ConfigError, match=r"^solver=newton: unknown name"):
            method(solver="newton")
        with pytest.raises(ConfigError, match=r"^strategy\.solver=exact: needs a matrix of 5000\^2 numbers"):
            simulate(method(solver="exact"), 1, problem=Quadratic(5000))
        with pytest.raises(fedsim.SimulationError, match="needs a problem whose gradient is linear"):
            simulate(method(solver="exact"), 1, problem=LogisticRegression(spread_out(), l2=0.01))


def test_a_matrix_that_cannot_be_held_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for problem, size in ((Quadratic(5000), 5000), (ScheduleOnly(), 0)):
        with pytest.raises(ConfigError, match=rf"^strategy\.solver=exact: needs a matrix of {size}\^2 numbers"):
            fedsim.simulate(RERCE(solver="exact"), problem, stop=Stop(rounds=1), clients=K, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def spread_out() -> Dataset:
    x = 5 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(dim=1) > 0).long()
    return Dataset(x[:80], y[:80], x[80:], y[80:], 2)

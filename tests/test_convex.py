"""Convex problems: gradients, optima and fixed points against closed forms and other solvers; tables of real data."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor

from fedsim import LocalSGD, Stop
from fedsim.app import simulate
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.data.partitions import Continuous, Dirichlet, Drawn, Iid, Natural, Partition, Sampled, Size, Table
from fedsim.data.sources import Dataset
from fedsim.data.tabular import Adult, BreastCancer
from fedsim.problems.classification import Classification
from fedsim.problems.least_squares import LeastSquares
from fedsim.problems.logistic import LogisticRegression
from fedsim.recording import Run
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg

CONF = Path(__file__).parents[1] / "conf"
Convex = LeastSquares | LogisticRegression
WEIGHTINGS = ["samples", "uniform"]

needs_scikit = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_xai = pytest.mark.skipif(find_spec("xai") is None, reason="xai is not installed")


def labelled(n: int = 120, classes: int = 2) -> Dataset:
    """``n`` training and 50 test examples, 2x3 features; the class depends on them."""
    x = torch.randn(n + 50, 2, 3, generator=torch.Generator().manual_seed(1))
    score = x.sum(dim=(1, 2)) + torch.randn(n + 50, generator=torch.Generator().manual_seed(2))
    y = torch.bucketize(score, torch.linspace(-2, 2, classes + 1)[1:-1])
    return Dataset(x[:n], y[:n], x[n:], y[n:], classes)


def squares(clients: int = 6, seed: int = 0, **settings: Any) -> LeastSquares:
    problem = LeastSquares(**{"dimension": 7, "samples_low": 3, "samples_high": 9, "noise": 0.5, **settings})
    problem.prepare(clients, Randomness(seed))
    return problem


def logistic(clients: int = 6, seed: int = 0, data: Dataset | None = None, **settings: Any) -> LogisticRegression:
    settings = {"partition": Dirichlet(0.5), "l2": 0.05, **settings}
    problem = LogisticRegression(labelled() if data is None else data, **settings)
    problem.prepare(clients, Randomness(seed))
    return problem


def point(problem: Convex, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=problem.layout.size))


def loss(problem: Convex, x: Tensor, client: int, batch: list[int] | None = None) -> Tensor:
    """A client's mean loss as the definitions have it."""
    h, y = problem.examples(client)
    if batch is not None:
        h, y = h[batch], y[batch]
    logistic = isinstance(problem, LogisticRegression)
    each = (1 + (-(2 * y - 1) * (h @ x)).exp()).log() if logistic else (y - h @ x) ** 2 / 2
    return each.mean() + problem.l2 / 2 * (x**2).sum()


def weights(problem: Convex) -> list[float]:
    if problem.weighting == "samples":
        return [count / sum(problem.samples) for count in problem.samples]
    return [(count > 0) / sum(problem.samples > 0) for count in problem.samples]


def aim(problem: Convex, x: Tensor) -> float:
    pairs = enumerate(weights(problem))
    return sum(weight * float(loss(problem, x, client)) for client, weight in pairs if weight)


def aim_gradient(problem: Convex, x: Tensor) -> Tensor:
    pairs = enumerate(weights(problem))
    return sum((weight * problem.gradient(x, client, None, 0) for client, weight in pairs), torch.zeros_like(x))


# ---- gradients, optima and metrics ---------------------------------------------------------------

PROBLEMS = [
    squares(),
    squares(weighting="uniform", l2=0.3, spread=2.0),
    logistic(),
    logistic(weighting="uniform"),
    logistic(30, partition=Iid(), data=labelled(20), weighting="uniform"),
    logistic(5, partition=Sampled(9, 0.2), weighting="samples"),
]
CASES = pytest.mark.parametrize(
    "problem", PROBLEMS, ids=["squares", "squares-uniform", "logistic", "logistic-uniform", "empty", "shared"]
)


@CASES
@pytest.mark.parametrize("batch", [None, [0], [2, 0, 2, 1]])
def test_gradient_is_autograds(problem: Convex, batch: list[int] | None) -> None:
    client = int(problem.samples.argmax())
    if batch is not None and max(batch) >= problem.samples[client]:
        batch = [0]
    x = point(problem)
    before, variable = x.clone(), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(problem, variable, client, batch), variable)
    found = problem.gradient(x, client, None if batch is None else torch.tensor(batch), 5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


@CASES
def test_the_optimum_has_no_gradient_and_evaluate_measures_from_it(problem: Convex) -> None:
    assert aim_gradient(problem, problem.optimum).norm() < 1e-12
    for x in (point(problem), problem.optimum + 0.1, problem.initial()):
        metrics = problem.evaluate(x)
        assert metrics["loss"] == pytest.approx(aim(problem, x), rel=1e-12)
        assert metrics["gap"] == pytest.approx(aim(problem, x) - aim(problem, problem.optimum), rel=1e-9)
        assert metrics["distance"] == pytest.approx(float(((x - problem.optimum) ** 2).sum()), rel=1e-12)
    least = problem.evaluate(problem.optimum)
    assert least["gap"] == least["distance"] == 0
    assert least["loss"] == pytest.approx(aim(problem, problem.optimum), rel=1e-12)


@CASES
def test_a_pickled_copy_gives_the_same_bits(problem: Convex) -> None:
    other, x = pickle.loads(pickle.dumps(problem)), point(problem)
    client = int(problem.samples.argmax())
    for batch in (None, torch.tensor([0, 0])):
        assert torch.equal(other.gradient(x, client, batch, 0), problem.gradient(x, client, batch, 0))
    assert other.evaluate(x) == problem.evaluate(x)
    assert problem.target_metric == ("distance", "below")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_least_squares_has_lstsqs_optimum(weighting: str) -> None:
    problem = squares(spread=1.5, weighting=weighting, l2=0.2)
    h, y = problem.features.numpy(), problem.targets.numpy()
    row = np.sqrt(np.repeat(weights(problem) / problem.samples, problem.samples))
    ridge = np.sqrt(0.2) * np.eye(7)
    solved = np.linalg.lstsq(np.vstack([row[:, None] * h, ridge]), np.r_[row * y, np.zeros(7)])[0]
    np.testing.assert_allclose(problem.optimum, solved, rtol=1e-11)
    other = squares(spread=1.5, weighting=WEIGHTINGS[weighting == "samples"], l2=0.2)
    assert torch.equal(problem.features, other.features)
    assert (problem.optimum - other.optimum).norm() > 0.01


@needs_scikit
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_logistic_has_scikit_learns_optimum(weighting: str) -> None:
    from sklearn.linear_model import LogisticRegression as Scikit

    problem = logistic(weighting=weighting)
    counts = np.asarray(problem.samples)
    share = np.repeat(np.divide(weights(problem), counts, out=np.zeros(6), where=counts > 0), counts)
    rows = np.concatenate([problem.spread.of(client) for client in range(6)])
    h = np.column_stack([problem.data.train_x.flatten(1).double().numpy(), np.ones(120)])[rows]  # type: ignore[union-attr]
    model = Scikit(C=1 / 0.05, fit_intercept=False, solver="newton-cholesky", tol=1e-13, max_iter=200)
    model.fit(h, problem.data.train_y.numpy()[rows], sample_weight=share)  # type: ignore[union-attr]
    np.testing.assert_allclose(problem.optimum, model.coef_[0], rtol=1e-7)
    tested = problem.data.test_x.flatten(1).double().numpy()  # type: ignore[union-attr]
    right = model.score(np.column_stack([tested, np.ones(50)]), problem.data.test_y.numpy())  # type: ignore[union-attr]
    assert problem.evaluate(problem.optimum)["accuracy"] == pytest.approx(right)
    assert right > 0.7


def test_more_classes_are_odd_against_even() -> None:
    data = labelled(classes=5)
    problem = logistic(4, data=data, partition=Dirichlet(0.2))
    held = [problem.spread.of(client) for client in range(4)]
    for client in range(4):
        assert problem.examples(client)[1].tolist() == [label % 2 for label in data.train_y[held[client]].tolist()]
    counts = [np.bincount(data.train_y[each], minlength=5).tolist() for each in held]
    assert problem.class_counts().tolist() == counts
    assert [list(row) for row in zip(*list(problem.client_table().values())[1:], strict=True)] == counts
    assert list(problem.client_table()) == ["samples", *(f"class_{label}" for label in range(5))]
    assert list(logistic(4, partition=Sampled(9)).client_table()) == ["samples"]


@pytest.mark.parametrize("kept", [0.0, 0.3])
@pytest.mark.parametrize("partition", [Sampled(7, 0.2), Dirichlet(0.3)])
def test_class_counts_are_those_of_the_clients_taken_one_by_one(
    partition: Partition, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Classification(labelled(700, 4), partition=partition, client_test=kept)
    problem.prepare(230, Randomness(3))
    expected = [np.bincount(problem.examples(client)[1], minlength=4).tolist() for client in range(230)]
    assert problem.class_counts().tolist() == expected
    monkeypatch.setattr("fedsim.problems.base.EXAMPLES", 20)
    assert problem.class_counts().tolist() == expected
    other = logistic(230, data=labelled(700, 4), partition=partition)
    rows = [other.spread.of(client) for client in range(230)]
    assert other.class_counts().tolist() == [np.bincount(other.labels[each], minlength=4).tolist() for each in rows]


def test_examples_drawn_by_the_client_are_counted_many_clients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Classification(labelled(classes=4), partition=Sampled(7, 0.2))
    problem.prepare(1000, Randomness(3))
    calls: list[int] = []
    draw = Drawn.draw
    monkeypatch.setattr(Drawn, "draw", lambda self, clients: calls.append(len(clients)) or draw(self, clients))
    problem.class_counts()
    assert calls == [100] * 10


def test_clients_without_examples_neither_move_nor_count() -> None:
    problem = PROBLEMS[4]
    empty = np.flatnonzero(problem.samples == 0)
    assert len(empty) == 10
    assert (problem.weights[empty] == 0).all()
    assert np.unique(problem.weights[problem.samples > 0]).tolist() == [1 / 20]
    assert problem.gradient(point(problem), int(empty[0]), None, 0).count_nonzero() == 0


def test_logistic_finds_the_optimum_where_full_newton_steps_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_t(2, size=(40, 3)) * 1000)
    y = (x.sum(dim=1) > 0).long()
    problem = logistic(1, data=Dataset(x, y, x, y, 2), l2=1e-6, partition=Iid())
    assert aim_gradient(problem, problem.optimum).norm() < 1e-12
    full = problem.initial()
    for _ in range(40):
        full = full - torch.linalg.solve(problem.hessian(full), aim_gradient(problem, full))
    assert not aim_gradient(problem, full).norm() < 1e-3
    monkeypatch.setattr("fedsim.problems.logistic.ATTEMPTS", 4)
    with pytest.raises(ConfigError, match=r"^problem\.l2=1e-06: the optimum cannot be found"):
        problem.prepare(1, Randomness(0))


# ---- the drawn data ------------------------------------------------------------------------------


def test_a_client_is_the_same_in_any_population() -> None:
    few, many = squares(4, spread=1.0), squares(50, spread=1.0)
    for client in range(4):
        for mine, other in zip(few.examples(client), many.examples(client), strict=True):
            assert torch.equal(mine, other)
    assert not torch.equal(few.targets, squares(4, seed=1, spread=1.0).targets)


def test_without_noise_all_clients_measure_the_same_and_the_loss_vanishes() -> None:
    problem = squares(noise=0.0)
    assert problem.evaluate(problem.optimum)["loss"] < 1e-25
    for client in range(6):
        h, y = problem.examples(client)
        torch.testing.assert_close(h @ problem.optimum, y, rtol=1e-10, atol=1e-10)


def test_the_truth_and_the_clients_own_are_normal() -> None:
    truths = torch.cat([squares(3, seed, noise=0.0, dimension=8, samples_low=8).optimum for seed in range(250)])
    assert abs(float(truths.mean())) < 5 / np.sqrt(2000)
    assert abs(float((truths**2).mean()) - 1) < 5 * np.sqrt(2 / 2000)
    problem = squares(300, spread=3.0, noise=0.0, samples_low=20, samples_high=20)
    common = squares(300, noise=0.0, samples_low=20, samples_high=20).optimum
    held = [[each.numpy() for each in problem.examples(client)] for client in range(300)]
    own = np.array([np.linalg.lstsq(h, y)[0] for h, y in held])
    away = (own - common.numpy()) / 3
    assert abs(float(away.mean())) < 5 / np.sqrt(2100)
    assert abs(float((away**2).mean()) - 1) < 5 * np.sqrt(2 / 2100)


def test_features_errors_and_sample_counts_have_the_stated_laws() -> None:
    problem = squares(400, dimension=2, samples_low=100, samples_high=139, shift=2.0, variance_low=4, variance_high=9)
    means = np.array([float(problem.examples(i)[0].mean()) for i in range(400)])
    variances = np.array([float(problem.examples(i)[0].var()) for i in range(400)])
    # Uniform laws: mean (low + high) / 2, variance (high - low)^2 / 12; what a client's own sampling adds is small.
    assert abs(means.mean()) < 5 * 4 / np.sqrt(12 * 400) + 0.01
    assert abs(means.var() - (16 / 12 + 6.5 / 240)) < 5 * 1.2 / np.sqrt(400)
    assert abs(variances.mean() - 6.5) < 5 * np.sqrt(25 / 12 + 2 * 45 / 240) / np.sqrt(400)
    assert 3 < variances.min() < 4.5
    assert 8.5 < variances.max() < 12
    assert set(problem.samples.tolist()) == set(range(100, 140))
    assert abs(problem.samples.mean() - 119.5) < 5 * 40 / np.sqrt(12 * 400)
    error = problem.targets - problem.features @ problem.optimum
    assert abs(float((error**2).mean()) / 0.25 - 1) < 5 * np.sqrt(2 / len(error))


def test_least_squares_refuses_what_has_no_optimum_and_what_cannot_be_held() -> None:
    with pytest.raises(ConfigError, match=r"^problem\.dimension=7: the \d examples of clients=1 do not determine"):
        squares(1, samples_high=6)
    problem = squares(1, samples_high=6, l2=0.1)
    assert aim_gradient(problem, problem.optimum).norm() < 1e-13
    with pytest.raises(ConfigError, match=r"clients=1000000 hold \d+ examples, \d+ GB; at most 4 GB"):
        squares(1_000_000, dimension=128)
    wrong = {"dimension": 5000, "samples_high": 2, "variance_low": 0, "noise": -1, "weighting": "equal", "l2": -1}
    for key, value in wrong.items():
        with pytest.raises(ConfigError, match=f"^{key}={value}: "):
            LeastSquares(**{key: value})  # type: ignore[arg-type]
    for key in ("shift", "variance_low", "variance_high", "noise", "spread", "l2"):
        with pytest.raises(ConfigError, match=f"^{key}=1e\\+200: must be a number .*<= 1e\\+0"):
            LeastSquares(**{key: 1e200})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^problem\.variance_low=1e-310: the optimum is too far away"):
        squares(variance_low=1e-310, variance_high=1e-310, shift=0)
    widest = dict.fromkeys(("shift", "variance_low", "variance_high", "noise", "spread"), 1e6)
    assert np.isfinite(list(squares(50, l2=1e9, **widest).evaluate(torch.ones(7).double()).values())).all()


def test_logistic_refuses_what_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"l2": 0, "weighting": "equal", "data": 3, "partition": 3}.items():
        with pytest.raises(ConfigError, match=f"^{key}={value}: "):
            LogisticRegression(**{key: value})  # type: ignore[arg-type]
    wide = Dataset(torch.ones(2, 5000), torch.tensor([0, 1]), torch.ones(2, 5000), torch.tensor([0, 1]), 2, "wide")
    with pytest.raises(ConfigError, match="wide has 5000 features, allowed: 4096"):
        logistic(1, data=wide)
    monkeypatch.setattr("fedsim.problems.logistic.MOST_ENTRIES", (120 + 50) * 7)
    logistic(1)
    monkeypatch.setattr("fedsim.problems.logistic.MOST_ENTRIES", (120 + 50) * 7 - 1)
    with pytest.raises(ConfigError, match=r"^problem: the features of data take 0\.0 GB; at most 4 GB can be held$"):
        logistic(1)


@pytest.mark.parametrize("problem", ["logistic", "classification"])
def test_a_partition_that_leaves_nobody_an_example_is_refused(problem: str) -> None:
    make = {"logistic": LogisticRegression, "classification": Classification}[problem]
    for partition in (Size(sizes=[0, 0, 0]), Size(fractions=[1e-9, 0, 1e-9])):
        with pytest.raises(ConfigError, match=r"^partition: no client holds an example; clients=3 could share \d+ "):
            make(labelled(), partition=partition).prepare(3, Randomness(0))
    make(labelled(), partition=Size(sizes=[0, 0, 1])).prepare(3, Randomness(0))


def test_too_few_natural_clients_say_that_validation_takes_examples() -> None:
    data = labelled()
    alone = Dataset(data.train_x, data.train_y, data.test_x, data.test_y, 2, "alone", torch.arange(120))
    problem = Classification(alone, partition=Natural(), validation=0.1)
    with pytest.raises(ConfigError, match=r"^clients=120: partition=natural has 108 .*problem\.validation keeps ex"):
        problem.prepare(120, Randomness(0))


def test_the_bias_is_no_feature_to_sort_by() -> None:
    assert logistic(partition=Continuous(feature=5)).samples.sum() == 120
    with pytest.raises(ConfigError, match=r"^partition\.feature=6: an example has no such position$"):
        logistic(partition=Continuous(feature=6))


def test_the_hessian_is_the_same_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = logistic()
    x = problem.optimum + 0.1
    h, odds = problem.train_h.numpy(), 1 / (1 + np.exp(-(problem.train_h @ x).numpy()))
    expected = (h.T * (odds * (1 - odds) / len(h))) @ h + 0.05 * np.eye(7)
    for rows in (4096, 50, 1):
        monkeypatch.setattr("fedsim.problems.logistic.ROWS", rows)
        np.testing.assert_allclose(problem.hessian(x), expected, rtol=1e-12)


# ---- what federated averaging makes of them ------------------------------------------------------


def averaged(problem: Convex, rounds: int, clients: int, lr: float, steps: int = 1) -> Run:
    strategy = FedAvg(LocalSGD(lr=lr, batch_size=None, steps=steps), weighting=problem.weighting)
    return simulate(strategy, problem, stop=Stop(rounds=rounds), clients=clients, cohort=clients)


def steepest(problem: Convex) -> float:
    """The largest curvature of the aim; of the logistic loss's, at most a quarter of the squares'."""
    if isinstance(problem, LeastSquares):
        return float(np.linalg.eigvalsh(problem.hessian)[-1])
    h = problem.train_h.numpy()
    return float(np.linalg.eigvalsh(h.T @ h / len(h))[-1]) / 4 + problem.l2


@pytest.mark.parametrize("problem", [squares(1, samples_low=40, samples_high=40), logistic(1, l2=0.3)])
def test_one_client_converges_at_the_rate_of_gradient_descent(problem: Convex) -> None:
    largest = steepest(problem)
    mu = problem.l2 or float(np.linalg.eigvalsh(problem.hessian)[0])  # type: ignore[arg-type]
    rounds = int(
        np.ceil(np.log(1e-11 / problem.evaluate(problem.initial())["distance"]) / np.log(1 - mu / largest) / 2)
    )
    distance = averaged(problem, rounds, 1, 1 / largest).metrics["distance"].to_numpy()
    bound = distance[0] * (1 - mu / largest) ** (2 * np.arange(rounds + 1))
    assert len(distance) == rounds + 1
    assert (distance <= bound * (1 + 1e-9)).all()
    assert distance[-1] < 1e-10 < distance[0]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("make", [squares, logistic])
def test_one_local_step_of_everybody_is_gradient_descent_on_the_aim(make: Any, weighting: str) -> None:
    problem = make(weighting=weighting)
    x = problem.initial().requires_grad_()
    for _ in range(5):
        total = sum(weight * loss(problem, x, client) for client, weight in enumerate(weights(problem)) if weight)
        (slope,) = torch.autograd.grad(total, x)
        x = (x - 0.2 * slope).detach().requires_grad_()
    run = averaged(problem, 5, 6, 0.2)
    reached = problem.layout.join(run.model)
    torch.testing.assert_close(reached, x.detach(), rtol=1e-12, atol=1e-12)
    assert problem.evaluate(reached)["loss"] < 0.9 * problem.evaluate(problem.initial())["loss"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_more_local_steps_end_at_the_known_wrong_point(weighting: str) -> None:
    problem = squares(spread=1.0, weighting=weighting, l2=0.5)
    lr, steps, eye = 0.1, 10, np.eye(7)
    pull, push = np.zeros((7, 7)), np.zeros(7)
    for client, weight in enumerate(weights(problem)):
        h, y = (each.numpy() for each in problem.examples(client))
        hessian = h.T @ h / len(y) + 0.5 * eye
        kept = np.linalg.matrix_power(eye - lr * hessian, steps)  # x_K = kept x_0 + (1 - kept) optimum_i
        pull += weight * (eye - kept)
        push += weight * (eye - kept) @ np.linalg.solve(hessian, h.T @ y / len(y))
    fixed = np.linalg.solve(pull, push)
    run = averaged(problem, 50, 6, lr, steps)
    np.testing.assert_allclose(run.model["x"], fixed, atol=1e-8)
    wrong = float(((fixed - problem.optimum.numpy()) ** 2).sum())
    assert run.metrics["distance"].iloc[-1] == pytest.approx(wrong, rel=1e-6)
    assert wrong > 1e-3


# ---- tables --------------------------------------------------------------------------------------


def raw(data: Dataset, table: np.ndarray, numbers: int) -> np.ndarray:
    """All examples with their labels, standardising undone: a feature's extremes must be those of the table."""
    x = torch.cat([data.train_x, data.test_x]).double().numpy()
    low, high = table[:, :numbers].min(axis=0), table[:, :numbers].max(axis=0)
    least, most = x[:, :numbers].min(axis=0), x[:, :numbers].max(axis=0)
    x[:, :numbers] = low + (x[:, :numbers] - least) * (high - low) / (most - least)
    return np.column_stack([x, torch.cat([data.train_y, data.test_y])])


@needs_scikit
def test_breast_cancer_is_scikit_learns_standardised_on_the_training_set() -> None:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    data = BreastCancer().load()
    assert (data.train_x.shape, data.test_x.shape, data.classes) == ((456, 30), (113, 30), 2)
    table = np.column_stack([x, y])
    scale = np.ptp(table, axis=0)
    near = np.abs((raw(data, table, 30)[:, None] - table) / scale).max(axis=2)
    assert sorted(near.argmin(axis=1)) == list(range(569))
    assert near.min(axis=1).max() < 1e-5
    torch.testing.assert_close(data.train_x.mean(dim=0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std(dim=0, correction=0), torch.ones(30), atol=1e-5, rtol=0)
    assert abs(float(data.train_y.double().mean() - data.test_y.double().mean())) < 1 / 113


@needs_xai
def test_adult_is_the_census_one_hot_with_occupations_as_clients() -> None:
    file = Path(find_spec("xai").submodule_search_locations[0], "data/census.csv")  # type: ignore[union-attr,index]
    census = pd.read_csv(file, index_col=0, skipinitialspace=True)
    numbers = ["age", "education-num", "capital-gain", "capital-loss", "hours-per-week"]
    names = ["workclass", "education", "marital-status", "occupation", "relationship", "ethnicity", "gender"]
    table = np.column_stack([census[numbers], pd.get_dummies(census[names]), census["loan"] == ">50K"]).astype(float)
    data = Adult().load()
    assert (data.train_x.shape, data.test_x.shape, data.classes) == ((26049, 65), (6512, 65), 2)
    assert int(data.train_y.sum() + data.test_y.sum()) == 7841
    expected, counts = np.unique(table, axis=0, return_counts=True)
    found, found_counts = np.unique(raw(data, table, 5).round(), axis=0, return_counts=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found_counts, counts)
    torch.testing.assert_close(data.train_x[:, :5].mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x[:, :5].std(dim=0, correction=0), torch.ones(5), atol=1e-5, rtol=0)
    assert data.train_ids is not None
    assert torch.equal(data.train_ids, data.train_x[:, 37:52].argmax(dim=1))
    assert "xai" not in sys.modules


class ByNature(Partition):
    def holders(self, table: Table, clients: int, randomness: Randomness) -> np.ndarray:
        assert table.ids is not None
        assert table.feature is not None
        np.testing.assert_array_equal(table.feature(40), table.ids == 3)  # an item of occupation's one-hot
        return table.ids


@needs_xai
def test_pooled_logistic_regression_on_adult_is_as_good_as_known() -> None:
    data = Adult().load()
    problem = logistic(15, data=data, partition=ByNature(), l2=0.01)
    assert problem.samples.tolist() == np.bincount(data.train_ids).tolist()  # type: ignore[arg-type]
    assert all((problem.examples(client)[0][:, 37 + client] == 1).all() for client in (0, 5, 14))
    # 0.8455 is known of another split; one of 6,512 examples has a standard error of 0.0045.
    assert problem.evaluate(problem.optimum)["accuracy"] == pytest.approx(0.8455, abs=0.009)
    assert problem.evaluate(problem.initial())["accuracy"] == pytest.approx(1 - 7841 / 32561, abs=1e-4)


@pytest.mark.parametrize("source", [BreastCancer(), Adult()])
def test_without_the_package_one_line_says_how_to_get_it(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name, package = {"BreastCancer": ("breast_cancer", "scikit-learn"), "Adult": ("adult", "xai")}[
        type(source).__name__
    ]
    with pytest.raises(ConfigError, match=rf"^data={name}: needs the package {package}: pip install .*{package}==\S+$"):
        source.load()


@pytest.mark.parametrize("source", [BreastCancer(), Adult()])
def test_another_table_is_refused(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr("fedsim.data.tabular.package_path", lambda *_: tmp_path / "other.csv")
    with pytest.raises(ConfigError, match=r"^data=\w+: .*other\.csv is not the table of"):
        source.load()


# ---- from the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ("data/breast_cancer", BreastCancer),
        ("data/adult", Adult),
        ("problem/least_squares", LeastSquares),
        ("problem/logistic", LogisticRegression),
    ],
)
def test_yaml_and_constructor_agree(choice: str, made: type) -> None:
    text = (CONF / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    keys = yaml.safe_load(text)
    assert keys.pop("_target_") == f"{made.__module__}.{made.__qualname__}"
    defaults = {name: each.default for name, each in inspect.signature(made).parameters.items()}
    assert keys == {name: value for name, value in defaults.items() if name not in ("data", "partition")}


@pytest.mark.parametrize(
    "overrides",
    [
        ["problem=least_squares"],
        pytest.param(["problem=logistic", "data=breast_cancer", "problem.l2=0.1", "partition=iid"], marks=needs_scikit),
    ],
)
def test_a_run_stops_at_its_distance(overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["run", *overrides, "clients=20", "target=0.02", "rounds=300", f"out={out}"]) == 0
    distance = pd.read_parquet(out / "metrics.parquet")["distance"]
    assert distance.iloc[-1] <= 0.02 < distance.iloc[-2]
    assert json.loads((out / "summary.json").read_text())["stopped"] == "target"

"""FedAU and its baselines: weights by who took part when, whom a round asks, and what is known of presence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import Scripted
from torch import Tensor, eye, from_numpy

import fedsim
from fedsim import LocalSGD, Quadratic, Run, Stop, Strategy, System
from fedsim.rng import Randomness
from fedsim.strategies.average_all import AverageAll
from fedsim.strategies.average_participating import AverageParticipating
from fedsim.strategies.fedau import FedAU, IntervalWeights
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.known_probability import KnownProbability
from fedsim.system import availability, participation
from fedsim.system.charging import Charging
from fedsim.system.compute import Constant, Uniform
from fedsim.system.faults import Faults

Floats = NDArray[np.float64]

# ---- the estimator -----------------------------------------------------------------------------------


def recursive(took_part: list[bool], cutoff: int | None) -> list[float]:
    """omega^t of every round, by the paper's recursion from round to round."""
    length, pieces, omega, found = 0, 0, 1.0, []
    for t in range(len(took_part)):
        if t >= 1:
            length += 1
            if took_part[t - 1] or length == cutoff:
                omega = (pieces * omega + length) / (pieces + 1)
                pieces, length = pieces + 1, 0
        found.append(omega)
    return found


def by_lists(took_part: list[bool], cutoff: int | None) -> list[float]:
    """The same as the mean of a list of intervals, made anew for every round."""
    found = []
    for t in range(len(took_part)):
        pieces, length = [], 0
        for before in took_part[:t]:
            length += 1
            if before or length == cutoff:
                pieces.append(length)
                length = 0
        found.append(float(np.mean(pieces)) if pieces else 1.0)
    return found


@pytest.mark.parametrize("cutoff", [1, 2, 3, 7, 50, None])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_weight_is_that_of_the_recursion_and_of_the_list(p: float, cutoff: int | None) -> None:
    took_part = (np.random.default_rng(7).uniform(size=200) < p).tolist()
    weights = IntervalWeights(3, cutoff)
    found = {t: weights.take_part(1, t) for t in range(200) if took_part[t]}
    for method in (recursive, by_lists):
        wanted = method(took_part, cutoff)
        np.testing.assert_allclose(list(found.values()), [wanted[t] for t in found], rtol=1e-12)
    assert weights.omega[[0, 2]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("p", "cutoff"), [(0.1, 1), (0.1, 5), (0.1, 50), (0.1, None), (0.5, 2), (1.0, 4)])
def test_the_mean_weight_is_that_of_cut_geometric_intervals(p: float, cutoff: int | None) -> None:
    """(1 - (1 - p)^K) / p; the largest standard error of these is 0.8 %."""
    weights = IntervalWeights(50, cutoff)
    for client, part in enumerate(np.random.default_rng(1).uniform(size=(50, 3000)) < p):
        for t in np.flatnonzero(part).tolist():
            weights.take_part(client, t)
    wanted = (1 - (1 - p) ** (cutoff or np.inf)) / p
    assert weights.omega.mean() == pytest.approx(wanted, rel=0.02)
    if cutoff == 1 or p == 1:
        assert set(weights.omega) == {1.0}


# ---- whole runs: one round in every slot of a second -------------------------------------------------


class Rates(availability.Slotted):
    """Each client online at its own rate, in every second anew."""

    def __init__(self, *rates: float) -> None:
        super().__init__(1.0)
        self.given = np.array(rates)

    def shares(self) -> Floats:
        return self.given

    def _first(self, ids: Any) -> Any:
        return self._uniform(ids) <= self.given

    def _following(self, ids: Any, states: Any) -> Any:
        return self._uniform(ids) <= self.given


class Untrained(Quadratic):
    """For rules that need no gradients."""

    trains = False


class OneHot(LocalSGD):
    """Client i's update is the i-th unit vector: the model then holds the sum of every client's weights."""

    def finish(self, ctx: fedsim.Context, x: Tensor) -> dict[str, Tensor]:
        return {"delta": eye(x.shape[1], dtype=x.dtype)[from_numpy(ctx.clients)]}


ONE_STEP = LocalSGD(lr=0.1, steps=1)
RATES = (0.1, 0.25, 0.5, 0.9)


def run(strategy: Strategy, presence: Any, seconds: float = 20.5, clients: int = 4, **more: Any) -> Run:
    system = System(more.pop("compute", Constant(1.0)), None, presence, more.pop("faults", None))
    problem = more.pop("problem", None) or Quadratic(clients)
    more = {"eval_every": 0, "cohort": 2} | more
    return fedsim.simulate(strategy, problem, system, stop=Stop(time_limit=seconds), clients=clients, **more)


def mean_weights(strategy: Strategy, presence: Any, rounds: int = 1500, clients: int = 4, **more: Any) -> Floats:
    """N times a client's mean weight in a round: 1 if it is unbiased."""
    done = run(strategy, presence, rounds + 0.5, clients, problem=Untrained(clients), **more)
    weights: Floats = done.model["x"].numpy() * clients / rounds
    return weights


MEANS: dict[str, tuple[Any, Floats]] = {
    "fedau": (FedAU, np.ones(4)),
    "fedau-uncut": (lambda rule: FedAU(rule, cutoff=None), np.ones(4)),
    "fedau-3": (lambda rule: FedAU(rule, 3), 1 - (1 - np.array(RATES)) ** 3),
    "known_probability": (KnownProbability, np.ones(4)),
    "average_all": (AverageAll, np.array(RATES)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANS)
def test_the_mean_weight_of_a_client_is_what_the_method_promises(name: str) -> None:
    """Over 3,000 rounds; the largest standard error, of the rarest client, is 5.5 %."""
    make, wanted = MEANS[name]
    np.testing.assert_allclose(mean_weights(make(OneHot(steps=1)), Rates(*RATES), 3000), wanted, atol=0.15)


def test_rounds_to_which_nobody_comes_are_counted() -> None:
    """A client by itself, there in three of ten rounds: not to count the others would make its weight 1 in those."""
    alone: dict[str, Any] = {"rounds": 500, "clients": 1}
    assert mean_weights(FedAU(OneHot(steps=1)), Rates(0.3), **alone) == pytest.approx(1.0, abs=0.1)
    assert mean_weights(AverageParticipating(OneHot(steps=1)), Rates(0.3), **alone) == pytest.approx(0.3, abs=0.1)


def test_who_drops_out_has_not_taken_part() -> None:
    """All are there, and every other task is lost: one weighs 2 on average."""
    weights = mean_weights(FedAU(OneHot(steps=1)), None, faults=Faults(0.5), rounds=200)
    np.testing.assert_allclose(weights, np.ones(4), atol=0.25)


def averaged_error(strategy: Strategy, rounds: int, rates: Any, dimension: int) -> float:
    """Squared distance to the optimum of the mean of the models after the first quarter of the rounds."""
    models: list[Floats] = []

    def look(sim: Any) -> None:
        if sim.now >= len(models):
            models.append(sim.model.numpy())

    problem = Quadratic(dimension)
    run(strategy, Rates(*rates), rounds + 0.5, len(rates), problem=problem, observer=look)
    assert len(models) == rounds + 1
    return float(((np.mean(models[rounds // 4 :], axis=0) - problem.optimum) ** 2).sum())


@pytest.mark.slow
def test_fedau_ends_at_the_optimum_where_the_mean_of_participants_does_not() -> None:
    """20 bowls in ten dimensions at rates from 0.05 to 1, one step a round of rate 0.01, no cutoff, 6,000 rounds."""
    rates = 0.05 + 0.95 * np.random.default_rng(3).uniform(size=20)
    rule = LocalSGD(lr=0.01, steps=1)
    participating = averaged_error(AverageParticipating(rule), 6000, rates, 10)
    assert participating > 0.1
    assert averaged_error(FedAU(rule, cutoff=None), 6000, rates, 10) < participating / 100


def test_fedau_comes_nearer_than_the_mean_of_participants() -> None:
    """The short form of the slow test above: 8 bowls in four dimensions, rate 0.1, 200 rounds."""
    rates, rule = (0.1, 0.2, 0.9, 1.0, 0.3, 0.8, 0.15, 0.95), LocalSGD(lr=0.1, steps=1)
    participating = averaged_error(AverageParticipating(rule), 200, rates, 4)
    assert averaged_error(FedAU(rule, cutoff=None), 200, rates, 4) < participating / 20


# ---- what they become --------------------------------------------------------------------------------


def test_with_everybody_there_all_are_fedavg() -> None:
    rule = LocalSGD(lr=0.1, steps=3)
    plain = run(FedAvg(rule, "uniform"), None, cohort=4)
    for strategy in (FedAU(rule), FedAU(rule, 1), AverageAll(rule), AverageParticipating(rule), KnownProbability(rule)):
        done = run(strategy, None)
        assert done.summary["version"] == plain.summary["version"] == 6
        assert done.manifest["model_sha256"] == plain.manifest["model_sha256"]


def test_with_cutoff_one_fedau_is_average_all_to_the_bit_whoever_comes() -> None:
    rule = LocalSGD(lr=0.1, steps=1)
    one, other, cut = (run(each, Rates(*RATES)) for each in (FedAU(rule, 1), AverageAll(rule), FedAU(rule, 2)))
    assert one.manifest["model_sha256"] == other.manifest["model_sha256"] != cut.manifest["model_sha256"]
    twice = run(AverageAll(rule, server_lr=2.0), Rates(*RATES), seconds=1.5)
    once = run(AverageAll(rule), Rates(*RATES), seconds=1.5)
    np.testing.assert_allclose(twice.model["x"], 2 * once.model["x"].numpy(), rtol=1e-12)
    assert once.model["x"].abs().min() > 0


def test_the_models_are_those_of_a_second_computation() -> None:
    """20 rounds of two steps, by the recursion and by the definitions, from who took part as the records have it."""
    rule, n = LocalSGD(lr=0.1, steps=2), 4
    problem = Quadratic(n)
    problem.prepare(n, Randomness(0))
    a, b = problem.curvature, problem.centres
    for strategy, kind in (
        (FedAU(rule, 3, 0.8), "fedau"),
        (AverageParticipating(rule, 0.8), "participating"),
        (AverageAll(rule, 0.8), "all"),
        (KnownProbability(rule, server_lr=0.8), "known"),
    ):
        done = run(strategy, Rates(*RATES), 40.5, n, compute=Constant(0.5))
        applied = done.events[done.events.outcome == "applied"]
        parts = np.zeros((41, n), dtype=bool)
        parts[np.rint(applied.dispatched).astype(int), applied.client] = True
        omega = np.array([recursive(part.tolist(), 3) for part in parts.T]).T
        x = np.zeros(n)
        for t in range(40):
            delta = ((1 - 0.1 * a) ** 2 - 1) * (x - b)
            weights = {
                "fedau": parts[t] * omega[t] / n,
                "participating": parts[t] / max(parts[t].sum(), 1),
                "all": parts[t] / n,
                "known": parts[t] / np.array(RATES) / n,
            }[kind]
            x = x + 0.8 * (weights[:, None] * delta).sum(axis=0)
        assert 5 < parts.any(axis=1).sum() < 41
        np.testing.assert_allclose(done.model["x"], x, rtol=1e-10)


# ---- whom a round asks -------------------------------------------------------------------------------


def test_everybody_who_is_online_and_idle_is_asked_and_waited_for() -> None:
    presence = Scripted((1.2, 2, True), (2.5, 0, False), absent=(2, 3))
    events = run(FedAvg(ONE_STEP, selection="online"), presence, seconds=4.5).events
    asked = events.groupby("dispatched").client.apply(list).to_dict()
    assert asked == {0.0: [0, 1], 1.0: [0, 1], 2.0: [0, 1, 2], 3.0: [1, 2], 4.0: [1, 2]}


@pytest.mark.parametrize("stragglers", ["cancel", "late"])
def test_a_deadline_leaves_out_who_is_slow_and_fedau_knows(stragglers: str) -> None:
    """Of four clients the slowest never makes it: its weight stays 1, the others' too."""
    strategy = FedAU(OneHot(steps=1), deadline=2.0, stragglers=stragglers)
    done = run(strategy, None, 41.0, problem=Untrained(4), compute=Uniform(0.5, 2.5))
    slow = done.events.client[done.events.outcome == ("late" if stragglers == "late" else "cancelled")]
    assert 0 < slow.nunique() < 4
    assert (done.model["x"][slow.unique()] == 0).all()
    others = sorted(set(range(4)) - set(slow))
    np.testing.assert_allclose(done.model["x"][others], done.summary["version"] / 4, rtol=1e-12)


@pytest.mark.parametrize("method", [FedAU, AverageParticipating, AverageAll, KnownProbability])
def test_one_vector_travels_down_and_one_up(method: Any) -> None:
    events = run(method(ONE_STEP), Rates(*RATES)).events
    applied = events[events.outcome == "applied"]
    assert set(applied.down_bytes) == set(applied.up_bytes) == {32}


# ---- what is known of presence -----------------------------------------------------------------------

SLOT = 5.0
KNOWN = {
    "always": availability.Always,
    "bernoulli": lambda: availability.Bernoulli(0.3, SLOT),
    "cyclic": lambda: availability.Cyclic(30.0, 70.0),
    "markov": lambda: availability.Markov(30.0, 20.0),
    "markov-slotted": lambda: availability.Markov(30.0, 20.0, SLOT),
    "diurnal": lambda: participation.Diurnal(0.4, period=600.0, slot=SLOT),
    "label-bernoulli": lambda: participation.LabelCorrelated(mean=0.4, alpha=1.0, slot=SLOT),
    "label-markov": lambda: participation.LabelCorrelated("markov", mean=0.4, alpha=1.0, come=0.5, slot=SLOT),
    "label-cyclic": lambda: participation.LabelCorrelated("cyclic", mean=0.4, alpha=1.0, slot=SLOT),
}


@pytest.mark.parametrize("name", KNOWN)
def test_each_clients_share_of_time_is_what_its_model_says(name: str) -> None:
    """Over 12,000 s; the largest standard error of these, Markov's, is 0.02."""
    model: Any = KNOWN[name]()
    model.meet(lambda: np.random.default_rng(0).integers(1, 9, size=(8, 3)))
    model.prepare(8, Randomness(1))
    online = np.zeros(8)
    for second in range(12_000):
        model.advance(second * 10**9)
        online += model.online
    np.testing.assert_allclose(online / 12_000, model.shares(), atol=0.08)
    assert (online / 12_000).mean() == pytest.approx(model.shares().mean(), abs=0.03)


def test_where_nobody_knows_the_shares_probabilities_must_be_given() -> None:
    assert Charging().shares() is None
    presence = Scripted((2.5, 0, False))
    with pytest.raises(fedsim.ConfigError, match=r"^strategy\.probability=null: must be given"):
        run(KnownProbability(ONE_STEP), presence)
    weights = run(KnownProbability(OneHot(steps=1), [0.5, 0.25, 1.0, 0.1]), presence, 1.5, problem=Untrained(4))
    np.testing.assert_allclose(weights.model["x"], [0.5, 1.0, 0.25, 2.5], rtol=1e-12)
    weights = run(KnownProbability(OneHot(steps=1), 0.5), presence, 1.5, problem=Untrained(4))
    np.testing.assert_allclose(weights.model["x"], [0.5] * 4, rtol=1e-12)


@pytest.mark.parametrize("cohort", [1, 4, 20])
def test_binomial_cohorts_are_in_the_probabilities(cohort: int) -> None:
    """Cohorts of one are empty four times of ten, and are drawn again; those of 20 are all 8 clients."""
    for presence, share in ((availability.Bernoulli(0.8, 1.0), 0.8), (None, 1.0)):
        strategy = KnownProbability(OneHot(steps=1), selection="binomial")
        done = run(strategy, presence, 200.5, 8, cohort=cohort, problem=Untrained(8))
        assert strategy.p.tolist() == [share] * 8
        assert done.model["x"].mean() * 8 / 200 == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FedAU(cutoff=0), "cutoff=0: must be a whole number >= 1"),
        (lambda: FedAU(selection="all"), "selection=all: unknown name, .*online"),
        (lambda: KnownProbability(selection="fixed"), "selection=fixed: unknown name, allowed: binomial, online"),
        (lambda: KnownProbability(probability=0.0), "probability=0.0: must be a number > 0 and <= 1"),
        (lambda: KnownProbability(probability=[0.5, 1.5]), "probability=1.5: must be a number > 0 and <= 1"),
        (lambda: run(KnownProbability(probability=[0.5, 0.5]), None), "strategy.probability: 2 numbers for 4 clients"),
        (lambda: run(KnownProbability(probability=[]), None), "strategy.probability: 0 numbers for 4 clients"),
        (lambda: AverageAll(server_lr=0), "server_lr=0: must be a number > 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, said: str) -> None:
    with pytest.raises(fedsim.ConfigError, match=said):
        make()

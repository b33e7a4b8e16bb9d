"""SCAFFOLD and the momentum methods against a second computation, the methods they become, and known fixed points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedsim
from fedsim import Classification, Context, LocalSGD, Quadratic, Run, Stop, Strategy, System
from fedsim.data.partitions import Dirichlet
from fedsim.data.sources import Dataset
from fedsim.pool import InlinePool
from fedsim.problems.models import Mlp
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgMomentum
from fedsim.strategies.fedavg_m_vr import FedAvgMomentumVR
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldMomentum
from fedsim.strategies.scaffold_m_vr import ScaffoldMomentumVR
from fedsim.system.compute import Constant, Uniform

Vector = NDArray[np.float64]

METHODS: dict[str, Callable[..., Any]] = {
    "scaffold-I": lambda local, beta, **more: Scaffold(local, "I", **more),
    "scaffold-II": lambda local, beta, **more: Scaffold(local, "II", **more),
    "fedavg_m": FedAvgMomentum,
    "scaffold_m": ScaffoldMomentum,
    "fedavg_m_vr": FedAvgMomentumVR,
    "scaffold_m_vr": ScaffoldMomentumVR,
}
CORRECTED = ["scaffold-I", "scaffold-II", "scaffold_m", "scaffold_m_vr"]


def run(strategy: Strategy, rounds: int, clients: int = 8, cohort: int = 3, **more: Any) -> Run:
    problem = more.pop("problem", None) or Quadratic(4)
    system = System(more.pop("compute", None))
    more = {"eval_every": 0} | more
    return fedsim.simulate(strategy, problem, system, stop=Stop(rounds=rounds), clients=clients, cohort=cohort, **more)


def bowls(clients: int, dimension: int = 4) -> Quadratic:
    problem = Quadratic(dimension)
    problem.prepare(clients, Randomness(0))
    return problem


class Watch:
    """An observer of each version: the model, and what each client and the server hold of control variates."""

    def __init__(self) -> None:
        self.models: list[Vector] = []
        self.controls: list[tuple[Vector, Vector]] = []

    def __call__(self, sim: Any) -> None:
        if len(self.models) <= sim.version:
            self.models.append(sim.model.numpy())
            if hasattr(sim.strategy, "control"):
                held = [sim.state(client, "control").numpy() for client in range(sim.clients)]
                self.controls.append((sim.strategy.control.numpy().copy(), np.array(held)))


# ---- a second computation ----------------------------------------------------------------------------


class ByHand:
    """The algorithms as in the papers: c_i^+ from displacements where the code takes mean gradients, x^{t-1} kept."""

    def __init__(self, name: str, clients: int, beta: float, server_lr: float) -> None:
        self.name, self.beta, self.server_lr = name, beta, server_lr
        self.problem = bowls(clients)
        self.c, self.g = np.zeros(4), np.zeros(4)
        self.c_i = np.zeros((clients, 4))
        self.models = [np.zeros(4)]

    def slope(self, client: int, x: Vector) -> Vector:
        return self.problem.curvature[client] * (x - self.problem.centres[client])

    def direction(self, client: int, x: Vector) -> Vector:
        own, beta = self.slope(client, x), self.beta
        before = self.slope(client, self.models[-2] if len(self.models) > 1 else self.models[-1])
        corrected = own - self.c_i[client] + self.c
        if self.name.startswith("scaffold-"):
            return corrected
        return {
            "fedavg_m": beta * own + (1 - beta) * self.g,
            "scaffold_m": beta * corrected + (1 - beta) * self.g,
            "fedavg_m_vr": own + (1 - beta) * (self.g - before),
            "scaffold_m_vr": own - beta * (self.c_i[client] - self.c) + (1 - beta) * (self.g - before),
        }[self.name]

    def new_control(self, client: int, x: Vector, end: Vector, lr: float, steps: int) -> Vector:
        moved = (x - end) / (lr * steps)
        if self.name == "scaffold-I":
            return self.slope(client, x)
        if self.name == "scaffold-II":
            return self.c_i[client] - self.c + moved
        if self.name == "scaffold_m":
            return (moved - (1 - self.beta) * self.g) / self.beta + self.c_i[client] - self.c
        at, slopes = x, []
        for _ in range(steps):
            slopes.append(self.slope(client, at))
            at = at - lr * self.direction(client, at)
        return np.mean(slopes, axis=0)

    def round(self, clients: list[int], steps: list[int], lr: float) -> None:
        x = self.models[-1]
        ends, new = [], []
        for client, count in zip(clients, steps, strict=True):
            y = x
            for _ in range(count):
                y = y - lr * self.direction(client, y)
            ends.append(y)
            new.append(self.new_control(client, x, y, lr, count))
        moves = np.array(ends) - x
        self.g = -moves.sum(axis=0) / (lr * sum(steps))
        self.c = self.c + (np.array(new) - self.c_i[clients]).sum(axis=0) / len(self.c_i)
        self.c_i[clients] = new
        self.models.append(x - self.server_lr * lr * np.mean(steps) * self.g)


@pytest.mark.parametrize("name", METHODS)
def test_every_model_is_that_of_a_second_computation(name: str) -> None:
    """Three of eight clients a round, of 1 to 8 steps each; eta = 0.2 with decay 0.95 a round, beta 0.3, eta_g 0.7."""
    steps = [3, 1, 8, 5, 2, 7, 4, 6]
    watch, local = Watch(), LocalSGD(lr=0.2, steps=steps, lr_decay=0.95)
    done = run(METHODS[name](local, beta=0.3, server_lr=0.7), 25, observer=watch)
    hand = ByHand(name, 8, 0.3, 0.7)
    for version, tasks in done.events.groupby("applied_version"):
        clients = tasks.client.tolist()
        hand.round(clients, [steps[client] for client in clients], 0.2 * 0.95**version)
    assert len(watch.models) == len(hand.models) == 26
    np.testing.assert_allclose(watch.models, hand.models, rtol=1e-10, atol=1e-10)
    assert np.abs(np.diff(hand.models, axis=0)).max(axis=1).min() > 1e-4  # no round in which nothing moved
    for c, c_i in watch.controls[-1:]:
        np.testing.assert_allclose(c, hand.c, atol=1e-10)
        np.testing.assert_allclose(c_i, hand.c_i, atol=1e-10)


def test_both_gradients_of_a_step_share_their_noise() -> None:
    """One step from x^0 = x^{-1} with g = 0: (g + noise) - (1 - beta) (g + noise), so beta of FedAvg's step."""
    local = LocalSGD(lr=0.1, steps=1)
    plain, *reduced = (
        run(strategy, 1, problem=Quadratic(4, noise=2.0)).model["x"].numpy()
        for strategy in (FedAvg(local), FedAvgMomentumVR(local, beta=0.3), ScaffoldMomentumVR(local, beta=0.3))
    )
    for model in reduced:
        np.testing.assert_allclose(model, 0.3 * plain, rtol=1e-12)


# ---- methods that become each other ------------------------------------------------------------------

LOCAL = LocalSGD(lr=0.1, steps=4)


@pytest.mark.parametrize("name", ["fedavg_m", "fedavg_m_vr"])
def test_with_beta_one_it_is_fedavg_to_the_bit(name: str) -> None:
    fedavg = run(FedAvg(LOCAL, "uniform"), 20).manifest["model_sha256"]
    assert run(METHODS[name](LOCAL, beta=1.0), 20).manifest["model_sha256"] == fedavg
    assert run(METHODS[name](LOCAL, beta=0.9), 20).manifest["model_sha256"] != fedavg


def test_with_beta_one_scaffold_m_is_scaffold_to_the_bit_and_its_vr_to_rounding() -> None:
    scaffold = run(Scaffold(LOCAL), 20)
    assert run(ScaffoldMomentum(LOCAL, beta=1.0), 20).manifest["model_sha256"] == scaffold.manifest["model_sha256"]
    reduced = run(ScaffoldMomentumVR(LOCAL, beta=1.0), 20)
    np.testing.assert_allclose(reduced.model["x"], scaffold.model["x"], rtol=1e-12)
    assert not np.allclose(scaffold.model["x"], run(FedAvg(LOCAL), 20).model["x"], atol=0.01)


@pytest.mark.parametrize("option", ["I", "II"])
def test_a_client_by_itself_has_nothing_to_correct(option: str) -> None:
    """c_i = c, so SCAFFOLD is gradient descent."""
    alone = run(Scaffold(LOCAL, option), 20, clients=1, cohort=1)
    np.testing.assert_allclose(alone.model["x"], run(FedAvg(LOCAL), 20, clients=1, cohort=1).model["x"], rtol=1e-12)


# ---- optima and fixed points -------------------------------------------------------------------------


def distances(strategy: Strategy, rounds: int, **more: Any) -> Vector:
    """Squared distances to the optimum, every fifth round."""
    found: Vector = run(strategy, rounds, eval_every=5, **more).metrics["distance"].to_numpy()
    return found


def dozen() -> dict[str, Any]:
    """Twelve bowls, three of them a round."""
    return {"problem": Quadratic(4, low=0.5), "clients": 12, "cohort": 3}


@pytest.mark.parametrize("name", CORRECTED)
def test_control_variates_reach_the_optimum_with_a_quarter_of_the_clients(name: str) -> None:
    """eta = 0.2, 5 steps, beta = 0.2."""
    assert distances(METHODS[name](LocalSGD(lr=0.2, steps=5), beta=0.2), 125, **dozen())[-1] < 1e-10


@pytest.mark.parametrize("name", ["fedavg", "fedavg_m", "fedavg_m_vr"])
def test_without_control_variates_the_sampling_shows(name: str) -> None:
    """The same for 60 rounds; the control of the test above."""
    local = LocalSGD(lr=0.2, steps=5)
    strategy = FedAvg(local) if name == "fedavg" else METHODS[name](local, beta=0.2)
    assert distances(strategy, 60, **dozen())[6:].min() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "fedavg"])
def test_in_the_long_run_only_control_variates_are_exact(name: str) -> None:
    """20 bowls in ten dimensions, 5 a round, eta = 0.05, 5 steps, beta = 0.2, gamma = eta K; FedAvg-M and its VR keep
    the floor that FedAvg has."""
    local = LocalSGD(lr=0.05, steps=5)
    strategy = FedAvg(local) if name == "fedavg" else METHODS[name](local, beta=0.2)
    found = distances(strategy, 1000, problem=Quadratic(10), clients=20, cohort=5)
    assert found[-1] < 1e-12 if name in CORRECTED else found[50:].min() > 0.01


@pytest.mark.parametrize(("name", "stragglers"), [("scaffold-II", "cancel"), *((name, "late") for name in CORRECTED)])
def test_deadlines_and_results_that_are_dropped_do_not_show(name: str, stragglers: str) -> None:
    """Speeds and times differ, so that many results are dropped; eta = 0.2, 3 steps, beta = 0.4."""
    deadline = 6.6 if name.endswith("vr") else 3.3  # its steps take two gradients
    more = {"over_selection": 2.0, "deadline": deadline, "stragglers": stragglers}
    devices = {"clients": 5, "cohort": 2, "compute": Uniform(0.7, 1.3, jitter=0.4)}
    watch, rounds = Watch(), {"cancel": 90, "late": 210}[stragglers]  # late results count as received
    strategy = METHODS[name](LocalSGD(lr=0.2, steps=3), beta=0.4, **more)
    problem = Quadratic(4, low=1.0)
    done = run(strategy, rounds, problem=problem, observer=watch, eval_every=rounds, **devices)
    outcomes = done.events.outcome.value_counts()
    assert outcomes["late" if stragglers == "late" else "cancelled"] > outcomes["applied"] / 2
    assert done.metrics.distance.iloc[-1] < 1e-10
    assert len(watch.controls) > 60
    for c, c_i in watch.controls:
        np.testing.assert_allclose(c, c_i.mean(axis=0), atol=1e-12)


def drifted(problem: Quadratic, lr: float, steps: int) -> Vector:
    """FedAvg's fixed point with all clients: sum_i (1 - (1 - lr a_i)^K) (x - b_i) = 0, item by item."""
    pull = 1 - (1 - lr * problem.curvature) ** steps
    point: Vector = (pull * problem.centres).sum(axis=0) / pull.sum(axis=0)
    return point


def test_with_all_clients_fedavg_m_ends_where_fedavg_with_rate_eta_beta_does() -> None:
    """eta = 0.2, beta = 0.3, 5 steps; FedAvg-M-VR ends where FedAvg with rate eta does."""
    problem = Quadratic(4, low=1.0)
    local, everybody = LocalSGD(lr=0.2, steps=5), {"clients": 4, "cohort": 4, "problem": problem}
    mixed = run(FedAvgMomentum(local, beta=0.3), 85, **everybody).model["x"]
    short = run(FedAvg(LocalSGD(lr=0.06, steps=5), "uniform"), 50, **everybody).model["x"]
    reduced = run(FedAvgMomentumVR(local, beta=0.3), 85, **everybody).model["x"]
    near, far = drifted(problem, 0.06, 5), drifted(problem, 0.2, 5)
    np.testing.assert_allclose(mixed, near, atol=1e-10)
    np.testing.assert_allclose(short, near, atol=1e-10)
    np.testing.assert_allclose(reduced, far, atol=1e-10)
    assert 1e-4 < ((near - problem.optimum) ** 2).sum() < ((far - problem.optimum) ** 2).sum() / 4


# ---- control variates --------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"momentum": 0.6}, {"clip": 0.5}, {"weight_decay": 0.3}, {"prox": 0.4}])
def test_option_two_is_the_mean_gradient_whatever_else_the_steps_do(extra: dict[str, float]) -> None:
    """One client; its gradients by hand along the steps that torch's own optimiser would take."""
    a, b = (getattr(bowls(1), name)[0] for name in ("curvature", "centres"))
    watch = Watch()
    run(Scaffold(LocalSGD(lr=0.2, steps=4, **extra)), 1, clients=1, cohort=1, observer=watch)
    x, velocity, slopes = np.zeros(4), np.zeros(4), []
    for _ in range(4):
        slope = a * (x - b)
        slopes.append(slope)
        if "clip" in extra:
            slope = slope * min(1.0, extra["clip"] / np.linalg.norm(slope))
        slope = slope + (extra.get("weight_decay", 0) + extra.get("prox", 0)) * x
        velocity = extra.get("momentum", 0) * velocity + slope
        x = x - 0.2 * velocity
    c, c_i = watch.controls[-1]
    np.testing.assert_allclose(watch.models[-1], x, rtol=1e-12)
    np.testing.assert_allclose(c_i[0], np.mean(slopes, axis=0), rtol=1e-12)
    np.testing.assert_allclose(c, c_i[0], rtol=1e-12)


def small(kind: type[Classification] = Classification) -> Classification:
    """Three classes in five dimensions, spread so unevenly that clients make 1 to 15 steps; some may have no data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 5, generator=generator)
    data = Dataset(x[:200], x[:200, :3].argmax(dim=1), x[200:], x[200:, :3].argmax(dim=1), 3)
    return kind(data, Mlp(6), Dirichlet(0.3), validation=0.0)


def small_model() -> Tensor:
    """What :func:`small` begins with."""
    problem = small()
    problem.prepare(8, Randomness(0))
    return problem.initial()


class ByAutograd(Classification):
    """Trained client by client."""

    def chain(self) -> None:
        return None


def flat(done: Run) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in done.model.values()])


@pytest.mark.parametrize("name", METHODS)
def test_in_a_stack_those_who_have_finished_neither_move_nor_count(name: str) -> None:
    """Clients of different numbers of steps side by side, and one after another by another path."""
    local = LocalSGD(lr=0.1, batch_size=4, epochs=1)
    done = run(METHODS[name](local, beta=0.5), 5, problem=small())
    assert done.events.steps.nunique() >= 4
    by_itself = run(METHODS[name](local, beta=0.5), 5, problem=small(), pool=InlinePool(group=1))
    assert by_itself.manifest["model_sha256"] == done.manifest["model_sha256"]
    general = run(METHODS[name](local, beta=0.5), 5, problem=small(ByAutograd))
    torch.testing.assert_close(flat(general), flat(done), rtol=1e-3, atol=1e-5)
    assert float((flat(done) - small_model()).norm()) > 0.05


# ---- traffic, and what is refused --------------------------------------------------------------------

VECTORS = {
    "scaffold-I": (2, 2),
    "scaffold-II": (2, 2),
    "fedavg_m": (2, 1),
    "scaffold_m": (2, 2),
    "fedavg_m_vr": (2 + 1 / 4, 1),
    "scaffold_m_vr": (3 + 1 / 4, 2),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_is_counted(name: str) -> None:
    """In vectors of four items of 8 bytes; the VR methods send one number more."""
    down, up = VECTORS[name]
    events = run(METHODS[name](LOCAL, beta=0.5), 3).events
    assert set(events.down_bytes[events.outcome == "applied"]) == {32 * down}
    assert set(events.up_bytes[events.outcome == "applied"]) == {32 * up}


def test_a_rate_of_zero_moves_nothing() -> None:
    done = run(ScaffoldMomentumVR(LocalSGD(lr=0.0, steps=2)), 3)
    assert done.model["x"].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["fedavg_m", "scaffold_m", "fedavg_m_vr", "scaffold_m_vr"])
def test_settings_that_would_come_back_with_the_momentum_are_refused(name: str) -> None:
    for key in ("momentum", "weight_decay", "prox"):
        with pytest.raises(fedsim.ConfigError, match=rf"^local\.{key}=0\.1: must be 0"):
            METHODS[name](LocalSGD(**{key: 0.1}), beta=0.5)
    for beta in (0.0, 1.1):
        with pytest.raises(fedsim.ConfigError, match=rf"^beta={beta}: must be a number > 0 and <= 1"):
            METHODS[name](LocalSGD(), beta=beta)


def test_a_rule_of_another_kind_is_refused_and_all_settings_are_kept() -> None:
    class Own(LocalSGD):
        def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
            return {"delta": 2 * ctx.change(x)}

    with pytest.raises(fedsim.ConfigError, match=r"^local\._target_=.*Own: it has its own finish, as this strategy"):
        Scaffold(Own())
    with pytest.raises(fedsim.ConfigError, match=r"^option=III: unknown name, .*allowed: I, II"):
        Scaffold(option="III")
    settings = {"lr": 0.3, "batch_size": None, "epochs": 2.0, "steps": 7, "momentum": 0.5, "weight_decay": 0.1}
    settings |= {"clip": 3.0, "prox": 0.2, "lr_decay": 0.9, "keep": True}
    assert {key: getattr(LocalSGD(), key) == value for key, value in settings.items()} == dict.fromkeys(settings, False)
    rule = Scaffold(LocalSGD(**settings), "I").jobs["train"]  # type: ignore[arg-type]
    assert {**vars(rule)} == {**vars(LocalSGD(**settings)), "option": "I", "gradient": None}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_costs_as_many_gradients_as_it_takes(name: str) -> None:
    def seconds(local: LocalSGD) -> float:
        strategy = METHODS[name](local, beta=0.4)
        return float(run(strategy, 1, clients=2, cohort=2, compute=Constant(1.0)).events.computed.max())

    gradients = 2 if name.endswith("vr") else 1
    assert seconds(LocalSGD(steps=3)) == 3 * gradients
    assert seconds(fedsim.SAM(steps=3)) == 6 * gradients


@pytest.mark.parametrize("name", ["scaffold-II", "scaffold_m", "scaffold_m_vr"])
def test_the_control_variates_of_sharpness_aware_clients_are_means_of_their_gradients(name: str) -> None:
    """One step and rho: c_i is the gradient of the bowl at the end of the ascent step from the start."""
    rho, watch, problem = 0.3, Watch(), bowls(5)
    strategy = METHODS[name](fedsim.SAM(lr=0.1, steps=1, rho=rho), beta=0.4)
    run(strategy, 1, clients=5, cohort=5, observer=watch)
    c_i, x = watch.controls[-1][1], problem.initial()
    for client in range(5):
        slope = problem.gradient(x, client, None, 0)
        expected = problem.gradient(x + rho * slope / slope.norm(), client, None, 0)
        np.testing.assert_allclose(c_i[client], expected.numpy(), rtol=1e-10)

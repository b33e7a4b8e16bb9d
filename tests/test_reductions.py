"""Methods that must become each other and runs that must not differ, to the bit; a fixed point in closed form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import Classification, Context, LocalSGD, Quadratic, Run, ScheduleOnly, Stop, Strategy, System, simulate
from fedsim.data.partitions import Dirichlet
from fedsim.data.sources import Dataset
from fedsim.pool import InlinePool
from fedsim.problems.base import Problem
from fedsim.problems.models import Mlp
from fedsim.record import RunDirectory
from fedsim.rng import Randomness
from fedsim.simulation import Simulation
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.availability import Markov
from fedsim.system.compute import Constant, Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Lognormal as LognormalNetwork
from fedsim.training.native import NativeLinear, instruction_sets


class ByAutograd(Classification):
    """Trained on the general path by gradients that are subtracted, whose bits a loop by hand can match.

    A step in one go with its product of matrices need not: ``addmm_`` on small layers did not on an EPYC of AMD.
    """

    def chain(self) -> None:
        return None

    def descend(self, *step: Any) -> None:
        Problem.descend(self, *step)


def as_trained(problem: Classification) -> Classification:
    """The problem as workers train it where they have the native kernel, for gradients of the same bits."""
    return problem.with_linear(NativeLinear) if instruction_sets() else problem


def small(clients: int = 8, kind: type[Classification] = Classification) -> Classification:
    """Three classes in five dimensions, spread unevenly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30 * clients, 5, generator=generator)
    y = x[:, :3].argmax(dim=1)
    data = Dataset(x[: 25 * clients], y[: 25 * clients], x[25 * clients :], y[25 * clients :], 3)
    return kind(data, Mlp(6), Dirichlet(0.5))


def images() -> Classification:
    return Classification(model=Mlp(16), partition=Dirichlet(0.5))


def field(dropout: float = 0.2) -> System:
    """Devices as they are: speeds, jitter, limited bandwidth, drop-outs."""
    return System(Lognormal(jitter=0.3), LognormalNetwork(), faults=Faults(dropout, "any"))


def strategies(local: LocalSGD) -> dict[str, Strategy]:
    return {"fedavg": FedAvg(local), "fedasync": FedAsync(local), "fedbuff": FedBuff(local, buffer_size=3)}


NAMES = ["fedavg", "fedasync", "fedbuff"]


def hashes(run: Run) -> tuple[str, str]:
    return run.manifest["model_sha256"], run.manifest["events_sha256"]


def flat(run: Run) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in run.model.values()])


def assert_same_model(one: Run, other: Run) -> None:
    assert one.model.keys() == other.model.keys()
    for name in one.model:
        assert torch.equal(one.model[name], other.model[name]), name


def assert_moved(run: Run, problem: Classification | Quadratic) -> None:
    """Guards against two runs that agree because neither did anything."""
    assert float((flat(run) - problem.initial()).norm()) > 0.01


# ---- methods that become each other --------------------------------------------------------------


class Plain(LocalSGD):
    """Mini-batch SGD as one would write it, without any of the other terms."""

    def run(self, ctx: Context) -> dict[str, Tensor]:
        x = ctx.start.clone()
        for batch in ctx.batches():
            x = x - ctx.lr * ctx.grad(x, batch)
        return {"delta": x - ctx.start}


def test_fedprox_with_mu_zero_is_fedavg() -> None:
    # The rate is a power of two, so that rate times gradient is exact and no order of rounding can show.
    runs = [
        simulate(FedAvg(rule), small(), stop=Stop(rounds=5), clients=8, cohort=4)
        for rule in (LocalSGD(lr=0.125, prox=0.0), Plain(lr=0.125), LocalSGD(lr=0.125, prox=0.01))
    ]
    assert_same_model(runs[0], runs[1])
    assert hashes(runs[0]) == hashes(runs[1])
    assert not torch.equal(flat(runs[0]), flat(runs[2]))


@pytest.mark.parametrize(
    ("clients", "staleness"),
    [(1, "constant"), (2, "constant"), (5, "constant"), (12, "constant"), (5, "polynomial"), (12, "hinge")],
)
def test_fedbuff_without_staleness_is_fedavg(clients: int, staleness: str) -> None:
    local = LocalSGD(lr=0.1, steps=4, momentum=0.9)

    def run(strategy: Strategy, problem: Classification) -> Run:
        equal = System(compute=Constant(0.3))
        return simulate(strategy, problem, equal, stop=Stop(rounds=5), clients=clients, cohort=clients)

    problem = small(12)
    averaged = run(FedAvg(local, weighting="uniform"), problem)
    buffered = run(FedBuff(local, clients, staleness=staleness, concurrency=clients), small(12))
    assert_same_model(averaged, buffered)
    assert hashes(averaged) == hashes(buffered)
    assert averaged.summary["version"] == 5
    assert_moved(averaged, problem)


def test_fedbuff_by_default_buffers_and_keeps_busy_one_cohort() -> None:
    local = LocalSGD(lr=0.1, steps=2)
    runs = [
        simulate(strategy, small(), System(compute=Constant()), stop=Stop(rounds=4), clients=8, cohort=3)
        for strategy in (FedAvg(local, weighting="uniform"), FedBuff(local))
    ]
    assert_same_model(*runs)
    assert hashes(runs[0]) == hashes(runs[1])


def test_server_rates_scale_the_step_and_nothing_else() -> None:
    local = LocalSGD(lr=0.1, steps=3)
    whole, half = (
        simulate(FedAvg(local, server_lr=rate), small(), stop=Stop(rounds=1), clients=8, cohort=8) for rate in (1, 0.5)
    )
    start = small()
    start.prepare(8, Randomness(0))
    step = flat(whole) - start.initial()
    torch.testing.assert_close(flat(half), start.initial() + 0.5 * step, rtol=0, atol=1e-6)


def local_pass(problem: Classification | Quadratic, x: Tensor, client: int, nth: int, size: int, lr: float) -> Tensor:
    """One epoch of mini-batch SGD by hand, its batches from the keys of seed 0."""
    samples = int(problem.samples[client])
    order = torch.arange(samples)
    if samples > size:  # one batch of all lies as it is
        order = torch.from_numpy(Randomness(0)("batches", client, nth, 0).permutation(samples))
    for first in range(0, samples, size):
        x = x - lr * problem.gradient(x, client, order[first : first + size], 0)
    return x


def test_fedavg_with_one_client_is_plain_sgd() -> None:
    # The server adds the difference y - x to x, which may miss y by an ulp: the same two operations are done here.
    problem = small(kind=ByAutograd)
    run = simulate(FedAvg(LocalSGD(lr=0.125, batch_size=7)), problem, stop=Stop(rounds=6), clients=1, cohort=1)
    x, trained = problem.initial(), as_trained(problem)
    for nth in range(6):
        x = x + (local_pass(trained, x, 0, nth, 7, 0.125) - x)
    assert torch.equal(flat(run), x)
    assert_moved(run, problem)


def test_fedavg_with_one_client_and_all_data_is_gradient_descent_by_torch() -> None:
    problem = small()
    local = LocalSGD(lr=0.1, batch_size=None, steps=3)
    run = simulate(FedAvg(local), problem, stop=Stop(rounds=4), clients=1, cohort=1)
    x = problem.initial().requires_grad_()
    optimiser = torch.optim.SGD([x], lr=0.1)
    for _ in range(12):
        x.grad = problem.gradient(x.detach(), 0, None, 0)
        optimiser.step()
    torch.testing.assert_close(flat(run), x.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clients", [1, 6])
def test_fedasync_that_takes_whole_models_one_by_one_is_sequential_sgd(clients: int) -> None:
    # Here the server takes over the client's model itself, so that this is plain SGD without any difference formed.
    problem = small(kind=ByAutograd)
    strategy = FedAsync(LocalSGD(lr=0.125, batch_size=7), alpha=1.0, rho=0.0, staleness="constant", concurrency=1)
    run = simulate(strategy, problem, field(dropout=0), stop=Stop(updates=40), clients=clients, cohort=1)
    applied = run.events[run.events.outcome == "applied"]
    assert (len(applied), applied.staleness.max()) == (40, 0)
    assert applied.client.nunique() == min(clients, 6)
    x, trained, nth = problem.initial(), as_trained(problem), Counter[int]()
    for client in applied.client:
        x = local_pass(trained, x, client, nth[client], 7, 0.125)
        nth[client] += 1
    assert torch.equal(flat(run), x)


def test_fedasync_with_constant_staleness_forgets_at_rate_alpha() -> None:
    # On a bowl one client's task is affine, so alpha < 1 has a closed form too.
    problem = Quadratic(4)
    strategy = FedAsync(LocalSGD(lr=0.3, steps=2), alpha=0.25, rho=0.0, staleness="constant")
    run = simulate(strategy, problem, stop=Stop(updates=9), clients=1, cohort=1)
    a, b = problem.curvature[0], problem.centres[0]
    factor = 0.75 + 0.25 * (1 - 0.3 * a) ** 2
    np.testing.assert_allclose(flat(run).numpy(), b - factor**9 * b, rtol=1e-12)


LAWS = {
    "constant": lambda late: 1.0,
    "polynomial": lambda late: (late + 1.0) ** -0.5,
    "hinge": lambda late: 1.0 if late <= 1 else 1.0 / (10 * (late - 1) + 1),
}


def stale_run(strategy: Strategy) -> tuple[Quadratic, pd.DataFrame, NDArray[np.float64]]:
    """Four of eight unlike clients at work at a time: the bowls, the applied tasks as applied, the final model."""
    problem = Quadratic(4)
    run = simulate(strategy, problem, System(Lognormal()), stop=Stop(updates=40), clients=8, cohort=4, eval_every=0)
    applied = run.events[run.events.outcome == "applied"].sort_values(["applied_version", "arrived", "client"])
    assert applied.staleness.max() >= 3
    return problem, applied, flat(run).numpy()


def ended_at(problem: Quadratic, x: NDArray[np.float64], client: int, prox: float) -> NDArray[np.float64]:
    """Three local steps of rate 0.3 by hand."""
    y = x
    for _ in range(3):
        y = y - 0.3 * (problem.curvature[client] * (y - problem.centres[client]) + prox * (y - x))
    return y


@pytest.mark.parametrize("law", LAWS)
def test_fedasync_mixes_by_staleness_as_its_paper_says(law: str) -> None:
    strategy = FedAsync(LocalSGD(lr=0.3, steps=3), alpha=0.6, rho=0.1, staleness=law, staleness_a=10, staleness_b=1)
    if law == "polynomial":
        strategy = FedAsync(LocalSGD(lr=0.3, steps=3), alpha=0.6, rho=0.1)  # the default: a = 1/2
    problem, applied, final = stale_run(strategy)
    models = [np.zeros(4)]
    for task in applied.itertuples():
        assert task.applied_version == len(models) - 1
        alpha = 0.6 * LAWS[law](task.staleness)
        models.append((1 - alpha) * models[-1] + alpha * ended_at(problem, models[task.version], task.client, 0.1))
    np.testing.assert_allclose(final, models[-1], rtol=1e-10)


@pytest.mark.parametrize("law", LAWS)
def test_fedbuff_weighs_by_staleness_as_its_paper_says(law: str) -> None:
    settings: dict[str, Any] = {"buffer_size": 2, "server_lr": 0.8}
    if law != "polynomial":  # the default: a = 1/2
        settings |= {"staleness": law, "staleness_a": 10, "staleness_b": 1}
    problem, applied, final = stale_run(FedBuff(LocalSGD(lr=0.3, steps=3), **settings))
    models = [np.zeros(4)]
    for version, buffer in applied.groupby("applied_version"):
        assert (version, len(buffer)) == (len(models) - 1, 2)
        step = np.zeros(4)
        for task in buffer.itertuples():
            start = models[task.version]
            step += LAWS[law](task.staleness) / 2 * (ended_at(problem, start, task.client, 0) - start)
        models.append(models[-1] + 0.8 * step)
    np.testing.assert_allclose(final, models[-1], rtol=1e-10)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedavg_weighs_its_cohort_as_its_paper_says(weighting: str) -> None:
    problem = small()
    local = LocalSGD(lr=0.125, batch_size=7)
    run = simulate(FedAvg(local, weighting), problem, stop=Stop(rounds=1), clients=8, cohort=4)
    cohort = run.events.client[:4].to_numpy()
    held = problem.samples[cohort]
    assert len(set(held)) > 1
    weights = held / held.sum() if weighting == "samples" else np.full(4, 1 / 4)
    start = problem.initial()
    ends = [local_pass(problem, start, client, 0, 7, 0.125) for client in cohort]
    expected = sum(weight * end.double() for weight, end in zip(weights, ends, strict=True))
    torch.testing.assert_close(flat(run).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_rate_of_a_task_is_that_of_the_round_it_begins_in() -> None:
    problem = Quadratic(4)
    local = LocalSGD(lr=0.4, lr_decay=0.5, steps=2)
    run = simulate(FedAvg(local), problem, stop=Stop(rounds=5), clients=3, cohort=3)
    x = np.zeros((3, 4))
    for round in range(5):
        x[:] = (problem.centres + (1 - 0.4 * 0.5**round * problem.curvature) ** 2 * (x - problem.centres)).mean(axis=0)
    np.testing.assert_allclose(flat(run).numpy(), x[0], rtol=1e-12)


# ---- FedAvg's fixed point ------------------------------------------------------------------------

STEPS = 6


def settled(lr: float, rounds: int) -> tuple[Quadratic, NDArray[np.float64]]:
    """Where FedAvg has come to after many rounds of full participation."""
    problem = Quadratic(4)
    local = LocalSGD(lr=lr, steps=STEPS)
    run = simulate(FedAvg(local), problem, stop=Stop(rounds=rounds), clients=3, cohort=3, eval_every=rounds)
    return problem, flat(run).numpy()


def test_fedavg_stops_at_its_biased_fixed_point_which_nears_the_optimum_with_the_rate() -> None:
    distance = {}
    for lr, rounds in ((0.2, 60), (0.02, 400)):
        problem, x = settled(lr, rounds)
        weights = 1 - (1 - lr * problem.curvature) ** STEPS
        fixed = (weights * problem.centres).sum(axis=0) / weights.sum(axis=0)
        np.testing.assert_allclose(x, fixed, rtol=0, atol=1e-10)
        distance[lr] = float(((x - problem.optimum) ** 2).sum())
    # The bias is of first order in the rate, its square of second: 100 for a tenth, up to higher orders.
    assert distance[0.2] > 1e-3
    assert 80 < distance[0.2] / distance[0.02] < 120


def test_one_local_step_has_no_bias() -> None:
    problem = Quadratic(5)
    local = LocalSGD(lr=0.5, steps=1)
    run = simulate(FedAvg(local), problem, stop=Stop(rounds=150), clients=5, cohort=5, eval_every=50)
    np.testing.assert_allclose(flat(run).numpy(), problem.optimum, rtol=0, atol=1e-10)


# ---- what must not change a run ------------------------------------------------------------------

LOCAL = LocalSGD(lr=0.05, batch_size=20, momentum=0.9)


def image_run(name: str, **more: Any) -> Run:
    settings: dict[str, Any] = {"problem": images(), "system": field(), "stop": Stop(rounds=3), "eval_every": 0, **more}
    return simulate(strategies(LOCAL)[name], clients=20, cohort=5, seed=3, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_collected_training_equals_one_by_one(name: str) -> None:
    runs = {group: image_run(name, pool=InlinePool(group)) for group in (1, 3, 12, "auto")}
    for run in runs.values():
        assert_same_model(run, runs[1])
        assert hashes(run) == hashes(runs[1])
    reached = {group: run.manifest["group_sizes"]["max"] for group, run in runs.items()}
    assert (reached[1], reached[3]) == (1, 3)
    assert reached[12] == reached["auto"] > 3  # so groups were really formed
    outcomes = Counter(runs[1].events.outcome)
    assert outcomes["dropped"] > 0
    assert outcomes["applied"] > 5


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_equal_and_two_seeds_are_not(name: str) -> None:
    def run(seed: int) -> Run:
        return simulate(strategies(LOCAL)[name], small(), field(), stop=Stop(rounds=4), seed=seed, clients=8, cohort=3)

    first, second, other = run(0), run(0), run(1)
    assert_same_model(first, second)
    assert hashes(first) == hashes(second)
    pd.testing.assert_frame_equal(first.events, second.events)
    pd.testing.assert_frame_equal(first.metrics, second.metrics)
    assert hashes(first)[0] != hashes(other)[0]
    assert hashes(first)[1] != hashes(other)[1]


def test_the_hash_seed_of_python_does_not_show() -> None:
    code = "import test_reductions as t; print(*[h for name in t.NAMES for h in t.hashes(t.image_run(name))])"
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    other = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        here = [each for name in NAMES for each in hashes(image_run(name))]
        there = process.communicate(timeout=600)[0].split()
    assert len(set(here)) == 6
    assert there == here


@pytest.mark.parametrize("name", NAMES)
def test_writing_records_does_not_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**more: Any) -> Run:
        return simulate(strategies(LOCAL)[name], small(), field(), stop=Stop(rounds=4), clients=8, cohort=3, **more)

    silent = run()
    monkeypatch.setattr(RunDirectory, "FLUSH_SECONDS", -1.0)  # a part after every instant
    written = run(out=tmp_path / "run")
    assert written.path == tmp_path / "run"
    assert len(list((written.path / "events.parquet").glob("part-*.parquet"))) > 1
    assert hashes(written) == hashes(silent)
    pd.testing.assert_frame_equal(written.events, silent.events)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_does_not_show_even_with_a_model_that_draws(name: str) -> None:
    def run(every: int) -> Run:
        problem = Classification(small().data, dropping, Dirichlet(0.5))
        return simulate(
            strategies(LOCAL)[name], problem, field(), stop=Stop(rounds=6), clients=8, cohort=3, eval_every=every
        )

    never, always, sometimes = run(0), run(1), run(5)
    assert hashes(never) == hashes(always) == hashes(sometimes)
    assert len(never.metrics) == 0
    assert len(always.metrics) > len(sometimes.metrics) > 1
    common = always.metrics.merge(sometimes.metrics[["version", "updates"]])
    pd.testing.assert_frame_equal(common, sometimes.metrics)


def test_an_observer_does_not_show_and_global_generators_neither_matter_nor_move() -> None:
    def run(seed: int, **more: Any) -> Run:
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
        problem = Classification(small().data, dropping, Dirichlet(0.5))
        made = simulate(FedBuff(LOCAL), problem, field(), stop=Stop(rounds=4), clients=8, cohort=3, **more)
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
        return made

    seen: list[float] = []
    with torch.random.fork_rng():
        assert hashes(run(1)) == hashes(run(2, observer=lambda sim: seen.append(sim.now)))
    assert len(seen) > 4


# ---- every strategy meets the same devices -------------------------------------------------------


def test_the_strategy_changes_no_client() -> None:
    def clients(name: str) -> pd.DataFrame:
        run = simulate(strategies(LOCAL)[name], small(), field(), stop=Stop(rounds=3), clients=8, cohort=3)
        return run.clients.drop(columns=["tasks", "applied"])

    expected = clients("fedavg")
    fixed = ["seconds_per_step", "down_bytes_per_second", "up_bytes_per_second", "samples", "class_0"]
    assert expected[fixed].nunique().min() > 1
    for name in ("fedasync", "fedbuff"):
        pd.testing.assert_frame_equal(clients(name), expected)


def presence(strategy: Strategy) -> list[tuple[int, bytes]]:
    """Every change of who is online within five minutes."""
    changes: list[tuple[int, bytes]] = []

    def watch(sim: Simulation) -> None:
        state = sim.online.tobytes()
        if not changes or changes[-1][1] != state:
            changes.append((sim.kernel.now, state))

    system = System(Lognormal(mean=6), availability=Markov(up=60, down=30))
    problem, stop = ScheduleOnly(), Stop(time_limit=300)
    simulate(strategy, problem, system, stop=stop, clients=12, cohort=4, eval_every=0, observer=watch)
    return changes[1:]  # the first is the state at the first instant, whenever that was


def test_the_strategy_changes_nobodys_presence() -> None:
    seen = {name: presence(strategy) for name, strategy in strategies(LocalSGD(steps=1)).items()}
    assert len(seen["fedavg"]) > 50
    assert seen["fedasync"] == seen["fedavg"]
    assert seen["fedbuff"] == seen["fedavg"]


def fates(strategy: Strategy) -> dict[tuple[int, int], int | str]:
    """Of each client's n-th task: how long it computed (ns), or that it was lost."""
    system = System(Lognormal(jitter=0.5), LognormalNetwork(), faults=Faults(0.3, "during"))
    problem, stop = ScheduleOnly(), Stop(updates=300)
    events = simulate(strategy, problem, system, stop=stop, clients=12, cohort=4, eval_every=0).events
    nth = events.groupby("client").cumcount()
    spans = (events.computed - events.started) * 1e9
    return {
        (client, n): "dropped" if outcome == "dropped" else round(span)
        for client, n, span, outcome in zip(events.client, nth, spans, events.outcome, strict=True)
        if outcome == "dropped" or not np.isnan(span)
    }


def test_the_strategy_changes_no_task_of_a_client() -> None:
    met = {name: fates(strategy) for name, strategy in strategies(LocalSGD(steps=1)).items()}
    expected = met.pop("fedavg")
    for other in met.values():
        common = expected.keys() & other.keys()
        assert len(common) > 150
        assert sum(expected[each] == "dropped" for each in common) > 20
        assert len({expected[each] for each in common}) > 100
        assert {each: other[each] for each in common} == {each: expected[each] for each in common}

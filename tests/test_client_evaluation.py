"""Examples that clients keep apart, their own models, and the evaluation of many models at once."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from examined import PARTS, by_hand, logits, parts_of, prepared, problem
from hypothesis import example, given
from hypothesis import strategies as st
from support import Given, Hooks, apply, simulate

import fedsim
from fedsim.cli import main
from fedsim.data import Dirichlet, Iid, Sampled
from fedsim.problems.client_split import ClientSplit
from fedsim.problems.models import Logistic
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults

# ---- which examples are kept apart ---------------------------------------------------------------


@pytest.mark.parametrize(
    "partition", [Iid(), Dirichlet(alpha=0.1), Sampled(samples=11)], ids=["iid", "dirichlet", "sampled"]
)
@pytest.mark.parametrize(("validation", "test"), [(0.2, 0.3), (0.0, 0.25), (0.4, 0.0), (0.5, 0.5)])
def test_a_clients_parts_are_disjoint_and_together_all_that_it_holds(partition, validation, test):
    whole = prepared(partition=partition)
    apart = prepared(partition=partition, client_validation=validation, client_test=test)
    for client in range(20):
        parts = parts_of(apart, client)
        assert sorted(chain(*parts.values())) == sorted(whole.rows(client).tolist())
        assert apart.rows(client).tolist() == parts["training"]
        assert apart.samples[client] == len(parts["training"]) >= 1
        if not isinstance(partition, Sampled):  # the only one by which a client may hold an example twice
            assert len(set(chain(*parts.values()))) == whole.samples[client]
        for part, share in (("test", test), ("validation", validation)):
            assert bool(parts[part]) == (share > 0 and whole.samples[client] >= 3)


@given(
    held=st.lists(st.integers(0, 3000), min_size=1, max_size=30),
    hundredths=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
@example(held=[100], hundredths=(29, 29))  # 0.29 * 100 is 28.999999999999996
def test_how_many_are_kept_is_the_share_rounded_down_but_one_at_least(held, hundredths):
    shares = {part: each / 100 for part, each in zip(("test", "validation"), hundredths, strict=True)}
    if max(held) < 3 and any(hundredths):
        with pytest.raises(fedsim.ConfigError, match=r"^problem.client_(test|validation)=.*3 training examples"):
            ClientSplit(np.array(held), shares, Randomness(0))
        return
    split = ClientSplit(np.array(held), shares, Randomness(0))
    for client, n in enumerate(held):
        left = n
        for part, each in zip(("test", "validation"), hundredths, strict=True):
            wanted = max(1, int(Fraction(each, 100) * n)) if each and n >= 3 else 0
            expected = min(wanted, left - 1) if wanted else 0
            assert split.kept[part][client] == expected
            left -= expected
        assert split.training[client] == left
        positions = [split.positions(client, part) for part in PARTS]
        assert sorted(np.concatenate(positions).tolist()) == list(range(n))
        assert all((np.diff(each) > 0).all() for each in positions)


def test_every_example_is_kept_as_often_as_any_other():
    held = np.full(4000, 10)
    split = ClientSplit(held, {"test": 0.2, "validation": 0.0}, Randomness(1))
    counts = np.bincount(np.concatenate([split.positions(client, "test") for client in range(4000)]), minlength=10)
    # 4000 draws of 2 out of 10: each position Binomial(4000, 0.2); five standard deviations of 25.3.
    assert np.abs(counts - 800).max() < 127


def test_what_is_kept_for_test_depends_neither_on_validation_nor_on_the_population():
    few, many, both = (
        prepared(clients, partition=Sampled(samples=12), client_test=0.25, client_validation=validation)
        for clients, validation in ((5, 0.0), (400, 0.0), (5, 0.3))
    )
    for client in range(5):
        assert parts_of(few, client) == parts_of(many, client)
        assert parts_of(few, client)["test"] == parts_of(both, client)["test"]
    other = prepared(5, 1, partition=Sampled(samples=12), client_test=0.25)
    assert any(parts_of(few, client)["test"] != parts_of(other, client)["test"] for client in range(5))


def test_training_sees_only_its_own_part():
    made = prepared(client_test=0.3, client_validation=0.2)
    x = torch.linspace(-1, 1, made.layout.size)
    for client in range(20):
        rows = parts_of(made, client)["training"]
        weights = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits(weights, made.train_x[rows]), made.train_y[rows])
        (slope,) = torch.autograd.grad(loss, weights)
        torch.testing.assert_close(made.gradient(x, client, None, 0), slope)
        last = made.gradient(x, client, torch.tensor([made.samples[client] - 1]), 0)
        assert not torch.equal(last, torch.zeros_like(last))
        with pytest.raises(IndexError):
            made.gradient(x, client, torch.tensor([made.samples[client]]), 0)
        assert made.class_counts()[client].tolist() == np.bincount(made.train_y[rows], minlength=5).tolist()


def test_without_shares_a_client_trains_on_all_it_holds():
    made = prepared()
    assert made.samples.tolist() == made.spread.sizes.tolist()
    for client in range(20):
        assert made.rows(client).tolist() == made.train_rows[made.spread.of(client)].tolist()
    assert made.client_parts == ()
    assert set(made.client_table()) == {"samples", *(f"class_{label}" for label in range(5))}


def test_a_large_population_that_draws_its_examples_stays_lazy(monkeypatch):
    made = problem(Sampled(samples=10), client_test=0.2)
    drawn = []
    made.partition.spread = counted(made.partition.spread, drawn)
    strategy = Hooks(start=lambda self, fed: fed.dispatch([3, 77_777]), on_reply=apply)
    monkeypatch.setattr(type(made), "evaluate_clients", lambda *_: {})
    run = simulate(strategy, fedsim.Stop(updates=2), made, clients=100_000)
    assert made.samples.tolist() == [8] * 100_000
    assert sum(drawn) <= 4
    assert run.clients.test_samples.tolist() == [2] * 100_000


def counted(spread, drawn):
    """A partition's ``spread`` whose result counts the clients it draws for."""

    def made(*arguments):
        result = spread(*arguments)
        draw = result.draw
        result.draw = lambda clients: drawn.append(len(clients)) or draw(clients)
        return result

    return made


# ---- how a model does on them --------------------------------------------------------------------


@pytest.mark.parametrize(
    "partition", [Dirichlet(alpha=0.1, minimum=0), Sampled(samples=9)], ids=["dirichlet", "sampled"]
)
@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_models_metrics_on_each_clients_own_examples_are_those_computed_by_hand(partition, part):
    made = prepared(130, partition=partition, client_test=0.3, client_validation=0.2)  # more than are drawn at once
    x = torch.from_numpy(np.random.default_rng(4).normal(size=35)).float()
    clients = np.random.default_rng(5).permutation(130)
    metrics = made.evaluate_clients(x, clients, part)
    expected = np.array([by_hand(made, x, client, part) for client in clients.tolist()])
    assert isinstance(partition, Sampled) or np.isnan(expected).any()
    np.testing.assert_allclose(metrics["loss"], expected[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], expected[:, 1], rtol=1e-12)


def run_images(strategy=None, settings=None, rounds=6, **more):
    """A run whose clients keep examples apart unless ``settings`` say otherwise."""
    settings = {"client_test": 0.3, "client_validation": 0.2} if settings is None else settings
    more = {"clients": 23, "cohort": 4, **more}
    return fedsim.simulate(strategy or kept_by(FedAvg), problem(**settings), stop=fedsim.Stop(rounds=rounds), **more)


def kept_by(method, keep=True, **more):
    return method(fedsim.LocalSGD(lr=0.2, epochs=3, keep=keep), **more)


def test_clients_that_keep_only_validation_examples_have_only_those_columns():
    run = run_images(settings={"client_validation": 0.2}, client_eval_every=3)
    x, made = run.model, prepared(23, client_validation=0.2)
    expected = [by_hand(made, made.layout.join(x), client, "validation")[1] for client in range(23)]
    np.testing.assert_allclose(run.clients.val_accuracy, expected)
    assert not {"accuracy", "own_accuracy", "test_samples"} & set(run.clients)
    named = {name for name in run.metrics if "client_" in name}
    endings = ("loss", "accuracy", "accuracy_std", "accuracy_worst")
    assert named == {f"{own}client_val_{ending}" for own in ("", "own_") for ending in endings}


@pytest.fixture(scope="module")
def evaluated():
    return run_images(client_eval_every=2)


@pytest.mark.parametrize("part", ["", "val_"])
def test_the_last_row_of_metrics_sums_up_the_table_of_clients(evaluated, part):
    clients, last = evaluated.clients, evaluated.metrics.iloc[-1]
    accuracy, own = clients[f"{part}accuracy"], clients[f"own_{part}accuracy"]
    assert accuracy.isna().tolist() == (clients[f"{'validation' if part else 'test'}_samples"] == 0).tolist()
    assert 0 < own.isna().sum() < 23  # some were never asked
    for name, values in (("client_", accuracy), ("own_client_", own.fillna(accuracy))):
        values = np.sort(values.dropna())
        assert len(values) > 20
        name = f"{name}{part}accuracy"
        assert last[name] == pytest.approx(values.mean(), abs=1e-12)
        assert last[f"{name}_std"] == pytest.approx(np.sqrt((values**2).mean() - values.mean() ** 2), abs=1e-9)
        assert last[f"{name}_worst"] == pytest.approx(values[:3].mean(), abs=1e-12)
    assert last[f"client_{part}loss"] == pytest.approx(clients[f"{part}loss"].mean())
    mixed = clients[f"own_{part}loss"].fillna(clients[f"{part}loss"])
    assert last[f"own_client_{part}loss"] == pytest.approx(mixed.mean())


def test_the_table_of_clients_tells_of_the_final_model(evaluated):
    made = prepared(23, client_test=0.3, client_validation=0.2)
    x = made.layout.join(evaluated.model)
    for part, prefix in (("test", ""), ("validation", "val_")):
        expected = np.array([by_hand(made, x, client, part) for client in range(23)])
        np.testing.assert_allclose(evaluated.clients[f"{prefix}loss"], expected[:, 0], rtol=1e-4)
        np.testing.assert_allclose(evaluated.clients[f"{prefix}accuracy"], expected[:, 1])
    assert evaluated.clients.samples.tolist() == made.samples.tolist()


def test_the_worst_tenth_of_ten_clients_is_one_of_eleven_two():
    for clients, worst in ((10, 1), (11, 2), (20, 2), (30, 3)):
        run = run_images(kept_by(FedAvg, keep=False), {"partition": Iid(), "client_test": 0.3}, 1, clients=clients,
                         client_eval_every=1)  # fmt: skip
        lowest = np.sort(run.clients.accuracy)[:worst]
        assert run.metrics.client_accuracy_worst.iloc[-1] == pytest.approx(lowest.mean(), abs=1e-12)


# ---- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "client_every", "rounds", "with_clients"),
    [(1, 2, 7, [0, 2, 4, 6, 7]), (2, 3, 8, [0, 4, 6, 8]), (4, 1, 6, [0, 4, 6]), (1, 50, 3, [0, 3]), (3, 0, 6, [])],
)
def test_clients_are_looked_at_with_the_first_evaluation_that_is_due_and_at_the_end(
    every, client_every, rounds, with_clients
):
    run = run_images(kept_by(FedAvg, False), rounds=rounds, eval_every=every, client_eval_every=client_every)
    seen = sorted({*range(0, rounds + 1, every), rounds})
    assert run.metrics["round"].tolist() == seen
    if client_every:
        assert run.metrics["round"][run.metrics.client_accuracy.notna()].tolist() == with_clients
        assert run.summary["metrics"]["client_accuracy"] == run.metrics.client_accuracy.iloc[-1]
    else:
        assert not [name for name in run.metrics if "client" in name]


@pytest.mark.parametrize("method", [FedAvg, FedBuff])
def test_keeping_models_and_looking_at_clients_changes_nothing(method):
    runs = [
        run_images(kept_by(method, keep), client_eval_every=every, eval_every=eval_every)
        for keep, every, eval_every in ((False, 0, 1), (True, 1, 1), (True, 0, 0))
    ]
    for name in ("model_sha256", "events_sha256"):
        assert len({run.manifest[name] for run in runs}) == 1
    plain = list(runs[0].metrics)
    pd.testing.assert_frame_equal(runs[0].metrics, runs[1].metrics[plain], check_exact=True)
    assert runs[2].clients.own_accuracy.notna().any()  # the table is there without any evaluation
    pd.testing.assert_frame_equal(runs[1].clients, runs[2].clients, check_exact=True)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("instants", [7, 25])
def test_a_run_resumed_in_the_middle_has_the_same_metrics_and_own_models(tmp_path, instants):
    def run(out, **more):
        saving = fedsim.CheckpointSchedule(seconds=None, events=3)
        devices = fedsim.System(Lognormal(jitter=0.3))
        strategy = kept_by(FedBuff)
        return run_images(strategy, client_eval_every=2, system=devices, out=out, checkpoint=saving, rounds=8, **more)

    def stop(_, left=[instants]):  # noqa: B006 - counted down
        left[0] -= 1
        if not left[0]:
            raise StoppedError

    whole = run(tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tmp_path / "cut", observer=stop)
    resumed = run(tmp_path / "cut", resume=True)
    for table in ("metrics", "clients", "events"):
        pd.testing.assert_frame_equal(getattr(whole, table), getattr(resumed, table), check_exact=True)
        read = pd.read_parquet(tmp_path / "cut" / f"{table}.parquet")
        pd.testing.assert_frame_equal(read, getattr(resumed, table), check_exact=True)


@pytest.mark.parametrize(
    ("settings", "more", "line"),
    [
        ({}, {"client_eval_every": 2}, "client_eval_every=2: must be 0, no client keeps"),
        ({"client_test": 0.2}, {"client_eval_every": 2, "eval_every": 0}, "client_eval_every=2: .*eval_every=0"),
        ({"client_test": 0.2}, {"client_eval_every": -1}, "client_eval_every=-1: must be a whole number"),
        ({"client_test": 0.51}, {}, "client_test=0.51: must be a number"),
        ({"client_validation": -0.1}, {}, "client_validation=-0.1: must be a number"),
        ({"client_test": 0.2, "partition": Sampled(samples=2)}, {}, "problem.client_test=0.2: no client holds the 3"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(settings, more, line):
    with pytest.raises(fedsim.ConfigError, match="^" + line):
        run_images(settings=settings, **more)


def test_a_problem_without_kept_examples_refuses_evaluations_of_clients():
    with pytest.raises(fedsim.ConfigError, match=r"^client_eval_every=1: must be 0"):
        simulate(FedAvg(), fedsim.Stop(rounds=1), fedsim.Quadratic(), client_eval_every=1)


def test_the_command_line_has_the_keys(tmp_path, capsys):
    run = ["run", "model=logistic", "rounds=1", "clients=10", "cohort=10", "client_eval_every=1", "local.keep=true"]
    assert main([*run, "problem.client_test=0.2", f"out={tmp_path / 'run'}"]) == 0
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert metrics.own_client_accuracy.notna().tolist() == [False, True]
    assert main([*run, f"out={tmp_path / 'none'}"]) == 2
    assert "client_eval_every=1: must be 0" in capsys.readouterr().err


# ---- the clients' own models ---------------------------------------------------------------------


class Choosy(Hooks):
    """Uses every third result, rejects or lets go of the others, and knows what it used last of each client."""

    def __init__(self, local):
        super().__init__(local)
        self.last, self.seen = {}, 0

    def start(self, fed):
        fed.dispatch([0, 1, 2, 3])

    def on_reply(self, fed, reply):
        self.seen += 1
        if self.seen % 3 == 0:
            self.last[reply.client] = reply["model"].clone()
            fed.publish(reply["model"], used=[reply])
        else:
            fed.reject(reply, "late" if self.seen % 2 else "not wanted")

    def settle(self, fed):
        running = [client for client in range(4) if fed.busy[client]]
        if self.seen % 5 == 4 and running:
            fed.cancel(max(self.tasks[client] for client in running))
        if len(fed.idle()):
            fed.dispatch(fed.idle())

    @property
    def tasks(self):
        return {client: task.id for client, task in self.sim.tasks.of_client.items()}


def test_a_clients_own_model_is_the_one_its_last_accepted_task_ended_with():
    strategy = Choosy(fedsim.LocalSGD(lr=0.1, epochs=2, keep=True).replace(sends="model"))
    compared = []

    def watch(sim):
        strategy.sim = sim
        own = strategy.own_models(sim)
        assert own.keys() == strategy.last.keys()
        assert all(torch.equal(own[client], strategy.last[client]) for client in own)
        compared.append(len(own))
        for each in own.values():
            each.zero_()  # a copy: no harm done

    events = simulate(
        strategy, fedsim.Stop(updates=60), problem(partition=Iid(), client_test=0.2), clients=6, cohort=2,
        compute=Given(1.0, 1.3, 0.7, 2.1, 0.9, 1.1), faults=Faults(dropout=0.1, when="any"), observer=watch,
    ).events  # fmt: skip
    assert max(compared) >= 4
    assert {"applied", "late", "rejected", "dropped", "cancelled"} <= set(events.outcome)


def test_an_own_model_is_start_plus_delta():
    class Watching(FedAvg):
        def on_reply(self, fed, reply):
            self.expected[reply.client] = fed.model + reply["delta"]
            super().on_reply(fed, reply)

    strategy = Watching(fedsim.LocalSGD(lr=0.1, momentum=0.9, keep=True))
    strategy.expected = {}
    own = {}
    stop = fedsim.Stop(rounds=4)
    simulate(strategy, stop, problem(), clients=9, cohort=3, observer=lambda sim: own.update(sim.kept("own")))
    assert 3 <= len(own) <= 9
    for client, model in own.items():
        torch.testing.assert_close(model, strategy.expected[client], rtol=1e-6, atol=1e-7)


class Reading(fedsim.LocalSGD):
    """Has state of its own, a count of tasks, and notes down what it was handed."""

    handed: ClassVar = []

    def initial_state(self, layout):
        return {"tasks": torch.zeros(())}

    def begin(self, ctx):
        self.handed.append(sorted(ctx.state))

    def finish(self, ctx, x):
        ctx.state["tasks"] = ctx.state["tasks"] + 1
        return super().finish(ctx, x)


class ReadingOwn(Reading):
    unread = ()


@pytest.mark.parametrize("rule", [Reading, ReadingOwn])
def test_own_models_live_beside_a_rules_state_and_are_handed_down_only_if_it_reads_them(rule):
    Reading.handed = rule.handed = []
    counts, own = {}, {}

    def watch(sim):
        counts.update(sim.kept("tasks"))
        own.update(sim.kept("own"))

    run = simulate(
        FedAvg(rule(lr=0.1, keep=True)), fedsim.Stop(rounds=5), problem(), clients=6, cohort=3, observer=watch
    )
    applied = run.events[run.events.outcome == "applied"].client.value_counts()
    assert {client: int(count) for client, count in counts.items() if count} == applied.to_dict()
    assert sorted(own) == sorted(applied.index)
    assert (["own", "tasks"] in rule.handed) == (rule is ReadingOwn)
    assert ["tasks"] in rule.handed


def test_with_few_classes_per_client_own_models_beat_the_global_one_on_own_data():
    learnt = fedsim.Classification(None, Logistic(), Dirichlet(alpha=0.1), client_test=0.25)
    strategy = FedAvg(fedsim.LocalSGD(lr=0.05, keep=True))
    run = fedsim.simulate(
        strategy, learnt, stop=fedsim.Stop(rounds=15), clients=30, cohort=10, eval_every=15, client_eval_every=15
    )
    last = run.metrics.iloc[-1]
    assert last.own_client_accuracy > last.client_accuracy + 0.05
    assert last.client_accuracy > 0.5
    assert last.own_client_accuracy_worst > last.client_accuracy_worst

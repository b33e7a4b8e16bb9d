"""How runs of Flower apps end, and what their records say."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time

import numpy as np
import pytest
import torch
from flower_apps import answering, arrays, flower, serving, starting, to
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import FedAvg
from support import Given

import fedsim
from fedsim.checks import Interrupted
from fedsim.pool.ray import RayPool
from fedsim.strategies.fedavg import FedAvg as OurFedAvg


def averaging(rounds=5):
    return starting(lambda: FedAvg(fraction_evaluate=0.5), rounds, evaluate_fn=lambda n, x: MetricRecord({"n": n}))


@pytest.mark.parametrize(("limit", "stopped", "version"), [(2, "rounds", 2), (5, "app", 5), (6, "app", 5)])
def test_the_limit_of_rounds_ends_a_run_before_one_more_is_begun(limit, stopped, version):
    run = flower(averaging(), stop=fedsim.Stop(rounds=limit))
    assert (run.summary["stopped"], run.summary["version"], run.summary["round"]) == (stopped, version, version)
    assert run.metrics["version"].tolist() == run.metrics["round"].tolist() == run.metrics["n"].tolist()
    assert len(run.metrics) == version + 1
    torch.testing.assert_close(run.model["x"], torch.full((4,), float(version), dtype=torch.float64))


def test_the_limit_of_time_ends_a_server_app_that_catches_everything():
    def main(grid):
        while True:
            with contextlib.suppress(Exception):
                grid.send_and_receive(messages=[to(0)])

    run = flower(main, stop=fedsim.Stop(time_limit=10.5))
    assert (run.summary["stopped"], run.summary["time"], run.summary["updates"]) == ("time_limit", 10.5, 10)
    assert run.events.outcome.tolist() == ["applied"] * 10 + ["pending"]


def test_a_row_of_metrics_stands_where_its_model_was_made_and_holds_all_that_is_reported_of_it():
    run = flower(averaging(2), system={"compute": Given(1.0, 2.0, 4.0, 3.0)}, costs={"evaluate_cost": 1.0})
    table = run.metrics
    assert table.version.tolist() == [0, 1, 2]
    assert table.time.iloc[:2].tolist() == [0.0, 4.0]  # the slowest of all four; evaluation comes after that
    begun = run.events[run.events.job == "train"].dispatched.unique()
    asked = run.events[(run.events.job == "evaluate") & (run.events.version == 1)]
    assert begun[1] == asked.arrived.max()
    assert table.time[2] == begun[1] + 4.0
    np.testing.assert_array_equal(table.train_loss, [np.nan, 1.5, 1.5])  # the mean of 0 to 3
    np.testing.assert_array_equal(table.client_acc, [np.nan, 1.0, 2.0])  # the model is its round's number
    assert table.updates.tolist() == [0, 4, 10]
    assert table.samples.tolist() == [0, 128, 256]


def test_rows_come_every_so_many_models_and_at_the_end():
    assert flower(averaging(5), eval_every=3).metrics.version.tolist() == [0, 3, 5]
    assert flower(averaging(5), eval_every=0).metrics.empty


def test_lists_and_names_of_columns_among_metrics_stay_apart():
    metrics = {"time": 3.0, "per_class": [0.25, 0.5]}
    main = starting(lambda: FedAvg(fraction_evaluate=0.0), 1, evaluate_fn=lambda n, x: MetricRecord(metrics))
    row = flower(main).metrics.iloc[0]
    assert (row["time"], row["app_time"], row["per_class_0"], row["per_class_1"]) == (0.0, 3.0, 0.25, 0.5)


def test_a_loop_of_its_own_makes_a_version_of_every_new_model_it_sends():
    def main(grid):
        for n in range(3):
            content = RecordDict({"arrays": arrays(x=np.full(2, n))})
            grid.send_and_receive(messages=[to(0, content), to(1, content)])
            grid.send_and_receive(messages=[to(2, content, kind="evaluate")])

    run = flower(main)
    assert run.summary["version"] == 2  # the first one is version 0
    assert run.events.version.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert run.summary["outcomes"] == {"applied": 9}
    assert run.summary["mean_staleness"] == 0
    assert run.model["x"].tolist() == [2, 2]


def test_a_model_of_several_dtypes_is_kept_as_it_is():
    first = {
        "steps": np.array(3, dtype=np.int64),
        "weight": np.array([[1.5, -2.0]], dtype=np.float32),
        "mask": np.array([True, False, True]),
        "mean": np.array([1e-3], dtype=np.float64),
    }
    run = flower(starting(lambda: FedAvg(fraction_train=0.0, fraction_evaluate=0.0), 1, first))
    for name, value in first.items():
        np.testing.assert_array_equal(run.model[name].numpy(), value)
        assert run.model[name].numpy().dtype == value.dtype


def test_the_table_of_clients_says_what_they_reported():
    run = flower(starting(lambda: FedAvg(fraction_evaluate=0.0, fraction_train=0.5), 1))
    assert sorted(run.clients.samples) == [0, 0, 32, 32]
    assert run.clients.applied.tolist() == (run.clients.samples // 32).tolist()


def test_models_that_are_no_numbers_any_more_are_told_of(caplog):
    broken = answering(work=lambda message, context: arrays(x=np.full(4, np.nan)))
    with caplog.at_level(logging.WARNING, "fedsim"):
        flower(starting(lambda: FedAvg(fraction_evaluate=0.0), 1), broken)
    assert "non-finite values at 1 s" in caplog.text


def test_an_app_without_arrays_leaves_an_empty_model(tmp_path):
    run = flower(lambda grid: time.sleep(3), out=tmp_path / "run")
    assert (run.model, run.summary["time"], run.summary["version"]) == ({}, 3.0, 0)
    assert (run.path / "model.safetensors").exists()


def test_a_signal_ends_the_server_app_where_it_waits(tmp_path):
    def work(message, context):
        if grid_now[0].sim.now >= 2:
            os.kill(os.getpid(), signal.SIGINT)
        return message.content["arrays"]

    grid_now = []

    def main(grid):
        grid_now.append(grid)
        while True:
            grid.send_and_receive(messages=[to(0)])

    with pytest.raises(Interrupted, match=r"interrupted at 2 s of virtual time; it cannot be saved, see .*run\.log"):
        flower(main, answering(work=work), out=tmp_path / "run")


WITHOUT_EVALUATION = {"fraction_evaluate": 0.0}
RULES = {
    "FedAvg": {},
    "FedMedian": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "FedAvgM": {"server_learning_rate": 1.0, "server_momentum": 0.0},
}


@pytest.mark.parametrize("name", RULES)
def test_each_way_to_average_finds_what_all_clients_agree_on(name):
    strategy = starting(lambda: getattr(flowers, name)(**WITHOUT_EVALUATION, **RULES[name]), 3)
    run = flower(strategy, clients=9)
    assert run.summary["version"] == 3
    torch.testing.assert_close(run.model["x"], torch.full((4,), 3.0, dtype=torch.float64))


def test_a_strategy_around_another_is_watched_as_one():
    def made():
        inner = FedAvg(**WITHOUT_EVALUATION)
        return flowers.DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1.0, num_sampled_clients=4)

    run = flower(starting(made, 2))
    # Every update, all ones of norm 2, is clipped to norm 1; no noise.
    torch.testing.assert_close(run.model["x"], torch.full((4,), 1.0, dtype=torch.float64))
    assert run.metrics.version.tolist() == [0, 1, 2]


def test_only_its_own_problem_and_pool_fit(tmp_path):
    with pytest.raises(fedsim.ConfigError, match="problem=ScheduleOnly: a Flower app brings its own"):
        flower(averaging(), problem=fedsim.ScheduleOnly())
    with pytest.raises(fedsim.ConfigError, match="pool=ray: a Flower app runs in this process; use pool=inline"):
        flower(averaging(), pool=RayPool(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_strategies_cannot_learn_an_app():
    from fedsim.flower.simulated.clients import AppProblem, Cost, Nodes

    with pytest.raises((fedsim.FedsimError, KeyError)):
        fedsim.simulate(OurFedAvg(), AppProblem(Nodes({}, Cost())), stop=fedsim.Stop(rounds=1), clients=2, cohort=2)


def test_serving_twice_needs_two_objects():
    from fedsim.flower.simulated import App, FlowerApp

    strategy = FlowerApp(App(serving(lambda grid: None), answering()))
    fedsim.simulate(strategy, stop=fedsim.Stop(rounds=1), clients=2)
    with pytest.raises(fedsim.ConfigError, match="has served a run already"):
        fedsim.simulate(strategy, stop=fedsim.Stop(rounds=1), clients=2)

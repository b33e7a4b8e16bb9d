from __future__ import annotations

import csv
import io
import json
import signal
import threading

import numpy as np
import pandas
import pytest
import yaml
from grids import IMAGES, deployed, grid_of
from support import Given

from fedsim import report
from fedsim.assemble import Assembly
from fedsim.checks import ConfigError, Interrupted, SimulationError
from fedsim.flower.configuration import read_run_config, run_config
from fedsim.progress import ended
from fedsim.recording import is_complete

SPEEDS = (0.25, 0.5, 1.0)


def predicted(grid, out):
    held = read_run_config(grid.run_config)
    parts = Assembly({**held.config, "out": str(out)}, held.choices)
    parts.system.compute = Given(*SPEEDS)
    return parts.run()


def test_a_deployment_leaves_the_tables_of_a_simulation_on_a_wall_clock(tmp_path):
    grid = grid_of(tmp_path, "strategy=fedbuff", "cohort=2", "rounds=5", "local.steps=4", speeds=SPEEDS)
    run = deployed(grid)
    out = tmp_path / "out"
    prediction = predicted(grid, tmp_path / "predicted")
    assert is_complete(out)
    assert json.loads((out / "manifest.json").read_text())["clock"] == "wall"
    assert prediction.manifest["clock"] == "virtual"
    assert "of wall time" in ended(run)
    for table in ("events", "metrics", "clients"):
        ours, theirs = (pandas.read_parquet(each / f"{table}.parquet") for each in (out, tmp_path / "predicted"))
        assert list(ours.columns) == list(theirs.columns)
        assert ours.dtypes.tolist() == theirs.dtypes.tolist()
    assert yaml.safe_load((out / "config.yaml").read_text())["strategy"]["_target_"].endswith("FedBuff")
    assert not (out / "checkpoint").exists()


def test_times_of_a_task_lie_in_their_order_and_bytes_are_what_travelled(tmp_path):
    grid = grid_of(tmp_path, "rounds=3", "local.steps=4", speeds=SPEEDS)
    run = deployed(grid)
    done = run.events[run.events["outcome"] == "applied"]
    way_there = done["started"] - done["dispatched"]
    np.testing.assert_allclose(way_there, done["arrived"] - done["computed"], atol=2e-9)
    assert (done["computed"] >= done["started"]).all()
    assert (done["upload_started"] == done["computed"]).all()
    np.testing.assert_allclose(done["arrived"] - done["dispatched"], np.tile([1.0, 2.0, 4.0], 3), atol=1e-6)
    assert set(run.events["down_bytes"]) == {20 * 8}
    assert set(done["up_bytes"]) == {20 * 8}
    assert run.summary["down_bytes"] == run.events["down_bytes"].sum()
    assert run.summary["up_bytes"] == run.events["up_bytes"].sum()
    measured = run.clients["seconds_per_step"]
    assert ((measured > 0) & (measured < 0.1)).all()  # what the nodes' own clocks say, not the test's
    assert run.clients["up_bytes_per_second"].isna().all()


def test_a_report_lays_a_deployment_beside_the_simulation_that_predicted_it(tmp_path, capsys):
    grid = grid_of(tmp_path, "cohort=2", "rounds=6", "local.steps=4", speeds=SPEEDS)
    run = deployed(grid)
    prediction = predicted(grid, tmp_path / "predicted")
    target = float(prediction.metrics["distance"].iloc[3])
    report.main(
        [str(tmp_path / "out"), str(tmp_path / "predicted")],
        format="csv", out=str(tmp_path / "report"), target=target * (1 + 1e-9), metric=None,
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["group"] for row in rows} == {"clock=wall", "clock=virtual"}
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000
    times = [float(row["time"]) for row in rows]
    assert times[0] == pytest.approx(times[1], abs=1e-6)
    assert times[0] == pytest.approx(float(run.metrics["time"].iloc[3]), abs=1e-6)


def test_profile_is_what_was_measured(tmp_path):
    grid = grid_of(tmp_path, "rounds=3", "local.steps=4", speeds=(0.25, 0.5, 0.5))
    seen = []
    deployed(grid, observer=lambda deployment: seen.append(deployment.profile(np.arange(3), 4)))
    # The way there and back is all that takes time on this clock, so tasks last 1 s, 2 s and 2 s.
    assert seen[-1] == pytest.approx([1.0, 2.0, 2.0], abs=0.05)


def test_a_real_deadline_calls_stragglers_back(tmp_path):
    grid = grid_of(tmp_path, "rounds=2", "strategy.deadline=2.5", "local.steps=4", speeds=SPEEDS)
    run = deployed(grid)
    slow = run.events[run.events["client"] == 2]
    assert slow["outcome"].iloc[0] == "cancelled"
    assert run.events["dispatched"].unique()[1] == pytest.approx(2.5)


def test_time_limit_is_in_wall_seconds(tmp_path):
    grid = grid_of(tmp_path, "rounds=null", "time_limit=5.5", "local.steps=4", speeds=SPEEDS)
    run = deployed(grid)
    assert run.summary["stopped"] == "time_limit"
    assert run.summary["time"] == pytest.approx(5.5, abs=0.1)
    assert run.summary["version"] == 1


def test_a_signal_stops_a_deployment_that_waits_for_nodes(tmp_path):
    grid = grid_of(tmp_path, speeds=())
    grid.clock.later(3.0, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="cannot be saved"):
        deployed(grid)
    assert grid.clock() < 104
    assert threading.current_thread() is threading.main_thread()
    assert "cannot be saved and resumed" in (tmp_path / "out" / "run.log").read_text()


# ---- data of the nodes' own ------------------------------------------------------------------------


def test_a_node_with_the_same_examples_of_its_own_gives_the_same_model(tmp_path):
    given = grid_of(tmp_path, *IMAGES, "strategy=scaffold_m")
    (tmp_path / "own").mkdir()
    own = grid_of(tmp_path / "own", *IMAGES, "strategy=scaffold_m", loader="own_data:examples")
    one, other = deployed(given), deployed(own)
    assert one.summary["samples"] == other.summary["samples"] > 0
    assert max(float((one.model[name] - other.model[name]).abs().max()) for name in one.model) <= 1e-6


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ("own_data", "loader=own_data: must be package.module:function"),
        ("own_data:nobody", "loader=own_data.nobody: own_data has no 'nobody'"),
        ("own_data:nothing", "gave a NoneType, must give a fedsim Dataset or Problem"),
        ("own_data:examples", "gave a Dataset, which LeastSquares does not learn"),
        ("own_data:problem", "all examples of its Problem must be client"),
    ],
)
def test_a_loader_that_does_not_load_is_said_in_one_line(tmp_path, loader, said):
    grid = grid_of(tmp_path, loader=loader, wait_seconds=1.0)
    with pytest.raises(SimulationError) as caught:
        deployed(grid)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_with_data_of_its_own_may_not_claim_more_than_is_allowed(tmp_path):
    grid = grid_of(tmp_path, *IMAGES, "rounds=1", loader="own_data:examples", most_samples=1000, wait_seconds=1.0)
    with pytest.raises(SimulationError, match=r"client 0 says it holds 1960 examples; allowed: 0 to 1000"):
        deployed(grid)


# ---- the run configuration ---------------------------------------------------------------------------


def test_a_run_configuration_comes_back_as_it_was():
    told = run_config({"seed": 3, "target": None, "local": {"lr": 0.1}}, {"strategy": "fedavg"}, "a.b:c", ttl_seconds=9)
    assert all(isinstance(value, str) for value in told.values())
    held = read_run_config(told)
    assert held.config == {"seed": 3, "target": None, "local": {"lr": 0.1}}
    assert (held.choices, held.loader, held.settings.ttl_seconds) == ({"strategy": "fedavg"}, "a.b:c", 9.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "^fedsim: the run configuration must hold this key"),
        ({"fedsim": "{"}, "^fedsim={: must be a JSON object"),
        ({"fedsim": "[]"}, "must be a JSON object"),
        ({"fedsim": '{"config": {}, "choices": {}, "deployment": {"poll_seconds": 0}}'}, "^poll_seconds=0: must be"),
        ({"fedsim": '{"config": {}, "choices": {}}', "loader": 3}, "^loader=3: must be package.module:function"),
    ],
)
def test_a_wrong_run_configuration_is_one_line(given, said):
    with pytest.raises(ConfigError, match=said):
        read_run_config(given)

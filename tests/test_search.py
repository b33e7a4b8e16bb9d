"""A sweep whose values Optuna chooses."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.config import swept_values
from fedsim.sweeps import search
from fedsim.sweeps.processes import Sweep
from fedsim.sweeps.search import Objective

pytest.importorskip("optuna")

QUICK = ["problem=quadratic", "clients=8", "cohort=2", "rounds=2", "strategy=fedbuff"]
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_search_finds_the_best_of_its_trials_and_the_same_command_runs_none_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-m", "-j", "2", *QUICK, *OPTUNA, "local.lr=tag(log,interval(0.01,0.5))", "out=tried"]
    assert main(command) == 0
    table = pd.read_parquet("tried/index.parquet")
    assert len(table) == 2
    assert table["local.lr"].between(0.01, 0.5).all()
    worth = [pd.read_parquet(Path(path) / "metrics.parquet")["distance"].min() for path in table["path"]]
    assert table["objective"].tolist() == worth
    found = yaml.safe_load(Path("tried/optimization_results.yaml").read_text())
    best = table.loc[table["objective"].idxmin()]
    assert found["best_value"] == min(worth)
    assert found["best_params"] == {"local.lr": best["local.lr"]}
    assert f"best: local.lr={best['local.lr']}, {min(worth):.6g} ({best['path']})" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.glob("tried/*/manifest.json")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("tried/*/manifest.json")} == before
    assert pd.read_parquet("tried/index.parquet")["objective"].tolist() == worth


def test_there_is_no_best_of_trials_that_never_reach_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "-m", *QUICK, OPTUNA[0], "hydra.sweeper.n_trials=1", "target=1e-9", "local.lr=choice(0.01,0.02)"]
    assert main([*command, "out=tried"]) == 0
    said = capsys.readouterr().out
    assert "best: none, no trial came to anything" in said
    assert "inf" not in said


def test_an_interrupted_search_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sweep, "start", lambda sweep, member: sweep._stop(signal.SIGINT, None))
    command = ["run", "-m", *QUICK, *OPTUNA, "local.lr=interval(0.01,0.5)", "out=tried"]
    assert main(command) == 128 + signal.SIGINT
    assert "interrupted; go on with the same command and out=tried" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_that_fails_is_worth_least_and_takes_no_other_down(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from fedsim.strategies.fedbuff import FedBuff\n\nclass Frail(FedBuff):\n"
    code += "    def start(self, fed):\n        1 / (self.server_lr - 2)\n        super().start(fed)\n"
    (folder / "frail.py").write_text(code)
    (folder / "frail.yaml").write_text("# Frail\n_target_: frail.Frail\nserver_lr: 1.0  # two is too many\n")
    command = ["run", "-m", "-j", "2", *QUICK[:4], "strategy=frail", "strategy.server_lr=1,2", *OPTUNA, "out=tried"]
    assert main([*command, "hydra/sweeper/sampler=grid"]) == 1
    table = pd.read_parquet("tried/index.parquet").set_index("strategy.server_lr").sort_index()
    assert table["status"].tolist() == ["complete", "failed"]
    assert table["objective"].tolist() == [table.loc[1, "final_distance"], math.inf]
    said = capsys.readouterr()
    assert "1 of 2 runs failed: server_lr2" in said.err
    assert "best: strategy.server_lr=1, " in said.out


def test_objective_is_the_best_validation_value_or_the_time_to_the_target(folder: Path) -> None:
    path = folder / "run"
    (path / "metrics.parquet").mkdir(parents=True)
    columns = {"val_accuracy": [0.1, 0.7, math.nan, 0.6], "accuracy": [0.9, 0.1, 0.1, 0.2]}
    columns["distance"] = [5.0, math.inf, 2.0, 3.0]
    pd.DataFrame(columns).to_parquet(path / "metrics.parquet/part-000000.parquet")
    assert Objective("val_accuracy", True, None).value(path) == 0.7
    assert Objective("distance", False, None).value(path) == 2.0
    assert [Objective("distance", rising, None).direction for rising in (True, False)] == ["maximize", "minimize"]
    assert Objective("val_accuracy", True, 0.8).direction == "minimize"
    for stopped, worth in (("target", 12.5), ("rounds", math.inf)):
        (path / "summary.json").write_text(json.dumps({"stopped": stopped, "time": 12.5}))
        assert Objective("val_accuracy", True, 0.8).value(path) == worth
    pd.DataFrame({"val_accuracy": [math.nan]}).to_parquet(path / "metrics.parquet/part-000000.parquet")
    assert Objective("val_accuracy", True, None).value(path) == -math.inf


def test_both_ends_of_a_range_and_every_value_of_a_list_are_probed() -> None:
    given = [
        "seed=1",
        "strategy=fedavg,fedbuff",
        "local.lr=interval(0.01,0.5)",
        "cohort=range(1,9,2)",
        "rounds=choice(3,4,5)",
    ]
    assert swept_values(given) == {
        "strategy": ["fedavg", "fedbuff"],
        "local.lr": ["0.01", "0.5"],
        "cohort": ["1", "7"],
        "rounds": ["3", "4", "5"],
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=0,1", "local.lr=0.1,0.2"], "seed=0,1: must be one value, Optuna would choose among several"),
        ([], "nothing to choose; write local.lr=interval(0.01,0.3)"),
        (["local.lr=interval(-1,0.5)"], "local.lr=-1.0: must be a number >= 0"),
        (["strategy=fedavg,fedbfuf"], "did you mean 'fedbuff'?"),
        (["problem=none", "local.lr=0.1,0.2"], "this problem has no validation metric"),
        (["eval_every=0", "local.lr=0.1,0.2"], "eval_every=0 evaluates nothing"),
        (["hydra.sweeper.direction=maximize", "local.lr=0.1,0.2"], "must be minimize: smallest distance"),
    ],
)
def test_a_search_that_cannot_be_made_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["run", "-m", *QUICK, *OPTUNA, *arguments, "out=tried"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(folder.iterdir()) == []


def test_a_sweeper_that_is_missing_or_unknown_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"hydra/sweeper=optuna: needs an extra: pip install .*\[optuna\]"):
        search.search(["local.lr=0.1,0.2"], None)

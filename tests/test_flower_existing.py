"""An existing Flower app, a folder as `flwr new` lays it out, runs from the command line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from fedsim.cli import main
from fedsim.flower.simulated.folder import AppFolder

EXISTING = Path(__file__).parent.parent / "experiments" / "flower_existing"

SMALL = ["clients=6", "strategy.run_config.num-server-rounds=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.getLogger("fedsim").handlers.clear()


@pytest.fixture
def copied(folder):
    """The app where a test may change it."""
    return Path(shutil.copytree(EXISTING, folder / "mine", ignore=shutil.ignore_patterns("__pycache__")))


def run(*overrides, app=EXISTING, out="run"):
    status = main(["run", "strategy=flower", f"app={app}", *SMALL, f"out={out}", *overrides])
    path = Path(out)
    return status, json.loads((path / "manifest.json").read_text()) if status == 0 else None


def refused(capsys, *overrides, app=EXISTING):
    """The line that is said of it; nothing is written."""
    assert run(*overrides, app=app, out="refused") == (2, None)
    assert not Path("refused").exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told.removeprefix("fedsim: ").rstrip("\n")


def test_an_existing_app_runs_and_leaves_all_records(folder):
    status, manifest = run("strategy.run_config.learning-rate=0.05")
    assert status == 0
    metrics, events = (pd.read_parquet(f"run/{name}.parquet") for name in ("metrics", "events"))
    assert metrics.version.tolist() == [0, 1, 2]
    assert metrics.accuracy.iloc[-1] > metrics.accuracy.iloc[0]
    assert {"loss", "train_loss", "client_eval_acc", "client_eval_loss"} <= set(metrics)
    assert (events.outcome == "applied").all()
    # Half of six clients in each of two rounds of training, and two, for Flower asks no fewer, for evaluation.
    assert events.groupby("job").size().to_dict() == {"evaluate": 4, "train": 6}
    model = load_file("run/model.safetensors")
    assert {name: tuple(each.shape) for name, each in model.items()} == {
        "fc1.weight": (24, 16), "fc1.bias": (24,), "fc2.weight": (4, 24), "fc2.bias": (4,),
    }  # fmt: skip
    assert sum(4 * each.numel() for each in model.values()) == events.down_bytes.iloc[0]
    assert manifest["clock"] == "virtual"
    assert manifest["strategy"] == "flower"
    assert "flwr" in manifest["versions"]
    assert not manifest["choices"].keys() & {"data", "model", "partition", "problem"}
    config = yaml.safe_load(Path("run/config.yaml").read_text())["strategy"]
    assert config["run_config"] == {"num-server-rounds": 2, "learning-rate": 0.05}
    assert "flwr: aggregate_train: Received 3 results and 0 failures" in Path("run/run.log").read_text()
    assert not [name for name in sys.modules if name.partition(".")[0] == "flowerapp"]
    assert str(EXISTING) not in sys.path


HASHES = ("model_sha256", "events_sha256", "code_sha256", "config_sha256")


def test_it_is_the_same_run_again(folder):
    _, one = run(out="one")
    _, two = run(out="two")
    assert [one[name] for name in HASHES] == [two[name] for name in HASHES]
    assert run("seed=1", out="other")[1]["model_sha256"] != one["model_sha256"]


@pytest.mark.slow
def test_it_is_the_same_run_in_a_process_of_its_own(folder):
    _, one = run(out="one")
    command = [sys.executable, "-m", "fedsim.cli", "run", "strategy=flower", f"app={EXISTING}", *SMALL, "out=other"]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "99"}, check=True, capture_output=True)
    other = json.loads(Path("other/manifest.json").read_text())
    assert [one[name] for name in HASHES] == [other[name] for name in HASHES]


def test_settings_reach_the_app_and_its_code_is_part_of_what_a_run_is(folder, copied):
    _, plain = run(app=copied, out="plain")
    _, faster = run("strategy.run_config.learning-rate=0.3", app=copied, out="faster")
    assert faster["model_sha256"] != plain["model_sha256"]
    task = copied / "flowerapp" / "task.py"
    task.write_text(task.read_text().replace("momentum=0.9", "momentum=0.0"))
    _, changed = run(app=copied, out="changed")
    assert changed["code_sha256"] != plain["code_sha256"]
    assert changed["model_sha256"] != plain["model_sha256"]


def test_a_whole_number_does_for_a_real_one_and_dots_for_tables(copied):
    file = copied / "pyproject.toml"
    file.write_text(file.read_text() + '\n[tool.flwr.app.config.train]\nname = "sgd"\nnesterov = false\n')
    folder = AppFolder(str(copied), {"learning-rate": 1, "train": {"nesterov": True}})
    assert folder.run_config["learning-rate"] == 1.0
    assert type(folder.run_config["learning-rate"]) is float
    assert (folder.run_config["train.name"], folder.run_config["train.nesterov"]) == ("sgd", True)


def test_two_apps_whose_packages_have_one_name_are_told_apart(folder, copied):
    server = copied / "flowerapp" / "server_app.py"
    server.write_text(server.read_text().replace('{"accuracy": accuracy, "loss": loss}', '{"mine": loss}'))
    run(out="theirs")
    run(app=copied, out="mine_run")
    assert "mine" in pd.read_parquet("mine_run/metrics.parquet")
    assert "mine" not in pd.read_parquet("theirs/metrics.parquet")


SETTINGS = {
    "strategy.run_config.num-server-round=2": "strategy.run_config.num-server-round=2: the app has no such setting, ",
    "strategy.run_config.batch-size=big": "strategy.run_config.batch-size=big: must be a whole number",
    "strategy.batch_size=0": "strategy.batch_size=0: must be a whole number from 1 to ",
    "strategy.local_step=3": "strategy.local_step=3: unknown key, ",
    "data=digits": "data=digits: strategy=flower brings its own; leave out data",
    "local.lr=0.5": "local=sgd: strategy=flower brings its own; leave out local",
    "server=momentum": "server=momentum: FlowerApp leaves the server's steps to the app; leave it plain",
    "target=0.5": "target=0.5: this problem has no validation metric to reach it on",
    "pool=ray": "pool=ray: a Flower app runs in this process; use pool=inline",
}


@pytest.mark.parametrize("override", SETTINGS)
def test_a_wrong_setting_is_refused_in_a_line(override, capsys):
    assert refused(capsys, override).startswith(SETTINGS[override])


def without(text):
    return lambda app: (app / "pyproject.toml").write_text((app / "pyproject.toml").read_text().replace(text, ""))


def ending(name, text):
    return lambda app: (app / "flowerapp" / name).write_text((app / "flowerapp" / name).read_text() + text)


def naming(text):
    def change(app):
        file = app / "pyproject.toml"
        file.write_text(file.read_text().replace("flowerapp.client_app:app", text))

    return change


FOLDERS = {
    "no project": (lambda app: (app / "pyproject.toml").unlink(), "must hold a Flower app, it has no pyproject.toml"),
    "no toml": (lambda app: (app / "pyproject.toml").write_text("a = "), "pyproject.toml cannot be read (Invalid"),
    "no server": (
        without('serverapp = "flowerapp.server_app:app"'),
        "pyproject.toml must name a serverapp in [tool.flwr.app.components]",
    ),
    "no components": (
        lambda app: (app / "pyproject.toml").write_text("[project]\nname = 'x'\n"),
        "pyproject.toml must name a serverapp in [tool.flwr.app.components]",
    ),
    "no name": (naming("flowerapp.client_app"), "clientapp=flowerapp.client_app in its pyproject.toml must be module"),
    "no module": (naming("flowerapp.client:app"), "clientapp=flowerapp.client:app cannot be imported: ModuleNotFound"),
    "no such name": (naming("flowerapp.client_app:apq"), "clientapp=flowerapp.client_app:apq: there is no 'apq', "),
    "another thing": (naming("flowerapp.server_app:app"), "must be a ClientApp, is a ServerApp"),
    "import error": (
        ending("client_app.py", "import torch.no_such\n"),
        "cannot be imported: ModuleNotFoundError: No module named 'torch.no_such'",
    ),
    "raises": (ending("server_app.py", "1 / 0\n"), "cannot be imported: ZeroDivisionError: division by zero"),
    "a list": (
        lambda app: (app / "pyproject.toml").open("a").write("\n[tool.flwr.app.config.more]\nlayers = [1, 2]\n"),
        "more.layers=[1, 2] must be true or false, a number or text",
    ),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_a_folder_that_is_no_app_is_refused_in_a_line(mistake, copied, capsys):
    change, said = FOLDERS[mistake]
    change(copied)
    told = refused(capsys, app=copied)
    assert told.startswith(f"strategy.app={copied}: ")
    assert said in told
    assert not [name for name in sys.modules if name.partition(".")[0] == "flowerapp"]


def test_there_must_be_an_app_and_it_must_be_a_folder(capsys, folder):
    assert refused(capsys, app=folder / "nowhere") == f"strategy.app={folder}/nowhere: there is no such folder"
    assert main(["run", "strategy=flower"]) == 2
    assert capsys.readouterr().err == "fedsim: strategy.app: must be given\n"
    assert main(["run", f"app={EXISTING}", "out=refused"]) == 2
    assert "strategy.app" in capsys.readouterr().err


def stopping(copied, on_error):
    client = copied / "flowerapp" / "client_app.py"
    raising = (
        '    if context.node_config["partition-id"] == 1:\n        raise ValueError("no data")\n    model = Net()\n'
    )
    client.write_text(client.read_text().replace("    model = Net()\n", raising, 1))
    return run("strategy.run_config.fraction-train=1.0", f"faults.on_error={on_error}", app=copied)


def test_a_client_that_raises_ends_the_run_or_loses_its_task(copied, capsys):
    assert stopping(copied, "drop")[0] == 0
    events = pd.read_parquet("run/events.parquet")
    assert events[events.outcome == "failed"].client.tolist() == [1, 1]
    shutil.rmtree("run")
    capsys.readouterr()
    assert main(
        ["run", "strategy=flower", f"app={copied}", *SMALL, "strategy.run_config.fraction-train=1.0", "out=run"]
    )
    said = capsys.readouterr().err
    assert "FlowerApp: the client app raised ValueError: no data (client 1, task 1, 'train')" in said


def test_a_run_that_did_not_end_cannot_be_resumed_and_says_so(copied, capsys):
    stopping(copied, "fail")
    assert "cannot be saved and resumed: a Flower server app waits" in Path("run/run.log").read_text()
    capsys.readouterr()
    before = sorted(Path("run").rglob("*"))
    assert main(["resume", "run"]) == 2
    assert capsys.readouterr().err == (
        "fedsim: run: cannot be resumed, a Flower server app waits in the middle of its own code, which cannot be "
        "saved; run it again with overwrite=true\n"
    )
    assert sorted(Path("run").rglob("*")) == before


@pytest.mark.slow
def test_a_sweep_runs_an_app_with_several_seeds(folder):
    more = ["strategy=flower", f"app={EXISTING}", *SMALL]
    assert main(["run", "-m", *more, "seed=0,1", "strategy.run_config.learning-rate=0.1,0.05", "out=sweep"]) == 0
    hashes = {json.loads(path.read_text())["model_sha256"] for path in Path("sweep").glob("*/manifest.json")}
    assert len(hashes) == 4

"""The command line, in process: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from fedsim.cli import main

QUICK = ["problem=quadratic", "rounds=2", "clients=8", "cohort=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_npz(path: str, spoil: str = "") -> None:
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    y = np.arange(40) % 3
    train_x, train_y = x.copy(), y
    if spoil == "nan":
        train_x[3, 2] = np.nan
    if spoil == "short":
        train_y = y[:10]
    if spoil == "labels":
        train_y = y - 1
    np.savez(path, x_train=train_x, y_train=train_y, x_test=x, y_test=y)


# ---- what works ----------------------------------------------------------------------------------


def test_run_writes_a_run_where_it_was_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *QUICK, "out=here", "strategy=fedbuff", "seed=7"]) == 0
    assert "here: stopped by rounds" in capsys.readouterr().out
    manifest = json.loads((folder / "here/manifest.json").read_text())
    assert (manifest["strategy"], manifest["problem"], manifest["seed"]) == ("fedbuff", "quadratic", 7)
    config = yaml.safe_load((folder / "here/config.yaml").read_text())
    assert config["strategy"]["buffer_size"] is None
    assert config["out"] == "here"
    assert pd.read_parquet("here/metrics.parquet")["round"].iloc[-1] == 2


def test_run_without_out_makes_a_new_folder_each_time(folder: Path) -> None:
    assert main(["run", *QUICK]) == 0
    assert main(["run", *QUICK]) == 0
    assert len(list((folder / "runs").iterdir())) == 2


def test_same_command_same_bits_and_overwrite(folder: Path) -> None:
    def hashes() -> tuple[str, str]:
        manifest = json.loads((folder / "a/manifest.json").read_text())
        return manifest["model_sha256"], manifest["events_sha256"]

    assert main(["run", *QUICK, "out=a"]) == 0
    first = hashes()
    assert main(["run", *QUICK, "out=a", "overwrite=true"]) == 0
    assert hashes() == first
    assert main(["run", *QUICK, "out=a", "overwrite=true", "seed=1"]) == 0
    assert hashes() != first


def test_a_sweep_runs_every_combination_names_it_and_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", *QUICK, "strategy=fedavg,fedbuff", "seed=7", "local.lr=0.1,0.05", "out=sweep"]) == 0
    names = {path.parent.name for path in folder.glob("sweep/*/manifest.json")}
    assert names == {f"{s}_lr{r}" for s in ("fedavg", "fedbuff") for r in ("0.1", "0.05")}  # what varies
    for name in names:
        config = yaml.safe_load((folder / "sweep" / name / "config.yaml").read_text())
        assert config["strategy"]["_target_"].lower().endswith(name.partition("_")[0])
        assert name.endswith(f"_lr{config['local']['lr']}")
        assert config["seed"] == 7
    assert "4 runs in sweep" in capsys.readouterr().out
    assert main(["report", "sweep", "--format", "markdown"]) == 0
    table = capsys.readouterr().out
    assert "fedavg" in table
    assert "fedbuff" in table
    assert (folder / "sweep/report.png").stat().st_size > 10_000


def test_a_strategy_of_ones_own_in_the_working_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "halfway.py").write_text(
        "from fedsim import Asynchronous\n"
        "class Halfway(Asynchronous):\n"
        "    def __init__(self, local=None, share: float = 0.5):\n"
        "        super().__init__(local)\n"
        "        self.share = share\n"
        "    def on_reply(self, fed, reply):\n"
        "        fed.publish(fed.model + self.share * reply['delta'], used=[reply])\n"
    )
    (folder / "halfway.yaml").write_text("# Mine\n_target_: halfway.Halfway\nshare: 0.25  # how far\n")
    assert main(["run", *QUICK, "strategy=halfway", "out=mine"]) == 0
    assert json.loads((folder / "mine/manifest.json").read_text())["strategy"] == "halfway"
    capsys.readouterr()
    assert main(["list", "strategy"]) == 0
    assert "strategy=halfway: Mine" in capsys.readouterr().out
    assert main(["run", *QUICK, "strategy=halfway", "strategy.share=much", "out=other"]) == 2
    assert "strategy.share=much: must be a number" in capsys.readouterr().err


def test_group_files_in_the_users_own_conf(folder: Path) -> None:
    (folder / "conf/compute").mkdir(parents=True)
    (folder / "conf/compute/phone.yaml").write_text(
        "# A phone\n_target_: fedsim.system.compute.Constant\nmean: 2.0  # seconds per step\n"
    )
    assert main(["run", *QUICK, "compute=phone", "out=mine"]) == 0
    assert (pd.read_parquet("mine/clients.parquet")["seconds_per_step"] == 2.0).all()


def test_list_names_every_group_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("problem", "quadratic", "fedasync", "lognormal", "bernoulli", "dirichlet", "mlp", "inline", "first"):
        assert name in text.split()


def test_run_help_teaches_keys_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for piece in ("rounds (100)", "strategy.buffer_size (null)", "compute.sigma (1.0)", "Mbit/s", "--multirun"):
        assert piece in text


def test_doctor_finds_this_installation_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "6000 training and 1000 test examples" in text
    assert "same bits for any group size: yes" in text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0


def test_tab_completion_completes_groups(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMP_LINE", "fedsim run strategy=fedb")
    monkeypatch.setenv("COMP_POINT", str(len("fedsim run strategy=fedb")))
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["strategy=fedbuff"]
    monkeypatch.setenv("COMP_LINE", "fedsim re")
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["resume", "report"]


def test_rejected_updates_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A rate so high that local training overflows: every update is non-finite.
    assert main(["run", *QUICK, "local.lr=1e200", "local.steps=5", "out=wild"]) == 0
    assert "4 updates REJECTED" in capsys.readouterr().out
    assert json.loads((folder / "wild/summary.json").read_text())["outcomes"]["rejected"] == 4
    assert "non-finite" in (folder / "wild/run.log").read_text()


def test_a_run_that_gets_stuck_ends_with_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "idle.py").write_text("from fedsim import Strategy\n\nclass Idle(Strategy):\n    pass\n")
    (folder / "idle.yaml").write_text("# Asks nobody\n_target_: idle.Idle\n")
    assert main(["run", *QUICK, "strategy=idle", "out=lost"]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "nothing is left to happen" in error


def test_whole_numbers_may_be_written_as_floats(folder: Path) -> None:
    assert main(["run", *QUICK, "clients=8.0", "cohort=2.0", "seed=0.0", "out=floats"]) == 0
    assert main(["run", *QUICK, "out=ints"]) == 0
    floats, ints = (json.loads((folder / name / "manifest.json").read_text()) for name in ("floats", "ints"))
    assert floats["model_sha256"] == ints["model_sha256"]


def test_overwrite_deletes_nothing_but_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *QUICK, "out=a"]) == 0
    assert main(["report", "a", "--out", "a"]) == 0  # what we put there ourselves may go
    assert main(["run", *QUICK, "out=b/../a/.", "overwrite=true"]) == 0
    for stray in ("notes.txt", "events.parquet/notes.csv", ".notes.draft"):
        (folder / "a" / stray).write_text("mine")
        assert main(["run", *QUICK, "out=a", "overwrite=true"]) == 2
        assert f"it holds {stray}" in capsys.readouterr().err
        (folder / "a" / stray).unlink()
    assert main(["run", *QUICK, "out=a", "overwrite=true"]) == 0
    assert sorted(os.listdir(folder)) == ["a"]


def test_two_runs_cannot_write_to_one_directory(folder: Path) -> None:
    from fedsim.checks import ConfigError
    from fedsim.record import RunDirectory

    first = RunDirectory.create("same")
    with pytest.raises(ConfigError, match="is being written by another run"):
        RunDirectory.create("same", overwrite=True)
    first.close()
    RunDirectory.create("same", overwrite=True).close()


def test_runs_started_in_the_same_second_do_not_collide(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from fedsim.assemble import new_folder

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: new_folder(), range(24)))
    assert len(set(made)) == 24


@pytest.mark.parametrize("name", ["q sweep", "it's", "a,b", "$HOME", "[x]"])
def test_a_sweep_goes_where_it_was_told(name: str, folder: Path) -> None:
    from fedsim.sweeps.multirun import quoted

    assert main(["run", "-m", *QUICK, "seed=0", f"out={quoted(Path(name))}"]) == 0
    assert sorted(os.listdir(folder)) == [name]
    assert {path.name for path in (folder / name).iterdir()} == {"0", "index.csv", "index.parquet", "multirun.yaml"}


@pytest.mark.parametrize("path", ["fedavg.yaml", "conf/strategy/fedavg.yaml"])
def test_a_choice_named_like_ours_is_refused(path: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text("# Mine\n_target_: fedsim.strategies.fedavg.FedAvg\nserver_lr: 0.1  # mine\n")
    assert main(["run", *QUICK, "strategy=fedavg"]) == 2
    assert "there is a strategy=fedavg already" in capsys.readouterr().err


def test_numbers_in_a_users_yaml_are_read_as_hydra_reads_them(folder: Path) -> None:
    (folder / "mine.yaml").write_text("# Mine\n_target_: fedsim.strategies.fedavg.FedAvg\nserver_lr: 1e-3  # small\n")
    assert main(["run", *QUICK, "strategy=mine", "out=mine"]) == 0
    assert yaml.safe_load((folder / "mine/config.yaml").read_text())["strategy"]["server_lr"] == 1e-3


def test_cfg_prints_what_would_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--cfg", "job", "strategy=fedbuff", "local.lr=0.3"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["local"]["lr"] == 0.3
    assert config["strategy"]["_target_"].endswith("FedBuff")
    assert os.listdir(folder) == []


def test_report_of_runs_that_learn_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["problem=none", "rounds=3", "clients=8", "cohort=2", "out=sweep"]
    assert main(["run", "-m", *quiet, "strategy=fedavg,fedbuff"]) == 0
    capsys.readouterr()
    assert main(["report", "sweep", "--format", "csv"]) == 0
    table = capsys.readouterr().out
    time = pd.read_parquet("sweep/fedavg/metrics.parquet")["time"].iloc[-1]
    assert f"{time:.6g}"[:6] in table


# ---- what is refused -------------------------------------------------------------------------------

WRONG = {
    "strategy=fedavgg": "did you mean 'fedavg'?",
    "strategy.buffer=3": "strategy.buffer=3: unknown key",
    "roundss=3": "did you mean 'rounds'?",
    "local.lrr=1": "did you mean 'lr'?",
    "foo.bar=1": "foo.bar=1: unknown key",
    "+foo=1": "foo=1: unknown key",
    "bogus": "bogus: cannot be read as key=value",
    "strategy=[fedavg": "cannot be read as key=value",
    "~strategy": "strategy: must be given",
    "--bogus": "--bogus: unknown flag",
    "network=dialup": "network=dialup: unknown name, allowed: constant, lognormal, mobile, none, trace",
    "rounds=-1": "rounds=-1: must be a whole number >= 1",
    "rounds=abc": "rounds=abc: must be a whole number",
    "rounds=1.5": "rounds=1.5: must be a whole number",
    "rounds=null": "rounds: give at least one of",
    "time_limit=inf": "time_limit=inf: must be a finite number > 0",
    "target=1.5": "target=1.5: must be a number > 0 and <= 1",
    "problem=none target=0.5": "target=0.5: this problem has no validation metric",
    "eval_every=0 target=0.5": "target=0.5: needs evaluations",
    "clients=0": "clients=0: must be a whole number from 1 to 100000000",
    "cohort=2.5": "cohort=2.5: must be a whole number >= 1",
    "seed=-1": "seed=-1: must be a whole number >= 0",
    "eval_every=-1": "eval_every=-1: must be a whole number >= 0",
    "local.lr=nan": "local.lr=nan: must be a finite number >= 0",
    "local.lr=fast": "local.lr=fast: must be a number",
    "local.batch_size=0": "local.batch_size=0: must be a whole number from 1",
    "local.steps=[1,2,3]": "local.steps: 3 numbers for 100 clients",
    "local.momentum=1": "local.momentum=1: must be a number >= 0 and < 1",
    "compute.mean=-2": "compute.mean=-2: must be a number > 0",
    "compute.jitter_law=gauss": "allowed: exponential, lognormal",
    "network.up=0": "network.up=0: must be a number > 0",
    "availability=bernoulli availability.p=2": "availability.p=2: must be a number >= 0 and <= 1",
    "faults=dropout faults.when=later": "did you mean 'after'?",
    "partition.alpha=0": "partition.alpha=0",
    "clients=100000": "need 100000 training examples, there are 5400",
    "model.hidden=0": "model.hidden=0: must be a whole number >= 1",
    "data=npz": "data.path=null",
    "data=npz data.path=missing.npz": "data.path=missing.npz: no such file",
    "data=npz data.path=nan.npz clients=4": "x_train has 1 values that are not finite",
    "data=npz data.path=short.npz clients=4": "40 examples, train_y 10 labels",
    "data=npz data.path=labels.npz clients=4": "data.path=labels.npz",
    "data=npz data.path=ok.npz model=cnn clients=4": "model=cnn: needs images",
    "out=taken": "out=taken: exists already",
    "out=taken overwrite=true": "is not a run's directory",
    "out=ok.npz": "out=ok.npz: is not a directory",
    "out=.": "is the working directory",
    "out=": "is the working directory",
    "out=.. overwrite=true": "is the working directory or above it",
    "out=like_ours overwrite=true": "is not a run's directory (it has no .fedsim-run)",
    "out=new/..": "is the working directory or above it",
    "out=drafts": "exists already",
    "-m --cfg job seed=0,1": "--cfg: shows one configuration",
    "-m seed=0,1 out=taken": "multirun.yaml is no sweep's of Hydra",
    "pool=ray pool.gpus_per_worker=1.5": "pool.gpus_per_worker=1.5: must be a fraction",
    "pool=ray pool.workers=1e12": "must be a whole number from 1 to 4096",
    "pool=ray pool.address=127.0.0.1:1": "pool.address=127.0.0.1:1: no Ray there",
    f"out={'x' * 300}": "File name too long",
    "time_limit=1e300": "time_limit=1e+300: must be a number > 0 and <= 1e+09",
    "strategy.deadline=1e300": "strategy.deadline=1e+300: must be a number",
    "faults=dropout faults.detect=1e300": "faults.detect=1e+300",
    "network.latency=1e12": "network.latency=1000000000000.0",
    "availability=cyclic availability.up=1e300": "availability.up=1e+300",
    "compute.sigma=1e200": "compute.sigma=1e+200",
    "compute.jitter=1e200": "compute.jitter=1e+200",
    "network=lognormal network.sigma=1e5": "network.sigma=100000.0",
    f"seed={'9' * 400}": "must be a whole number",
    f"local.lr={'9' * 400}": "local.lr=inf: must be a finite number",
    "local.steps=1e30": "local.steps=1e+30: must be",
    "problem=none problem.parameters=1e30": "problem.parameters=1e+30: must be",
    "local.sends=model": "local.sends=model: unknown key",
    "strategy=null": "strategy=null: must be the name of one choice, allowed: afa_cd, afa_cs, async_fedavg, ",
    "data=digits compute=null": "compute=null: must be the name of one choice, allowed: constant, exponential, ",
    "data=digits availability=[a,b]": "availability=[a,b]: must be the name of one choice, allowed: always, ",
    "local=3": "local=3: must be the name of one choice, allowed: prox, sam, sgd",
    "experiment=null": "experiment=null: must be the name of one choice, allowed: compass, first, ",
    "seed=0,1": "seed=0,1: several values are a sweep, add -m",
    "--cfg job foo=1": "foo=1: unknown key",
    "--cfg": "--cfg: must be followed by job",
    "-m out=a,b": "a sweep has one directory",
    "strategy=glob(fed*)": "several values are a sweep, add -m",
    "-m strategy=glob(zzz*)": "strategy=glob(zzz*): matches no choice, allowed: ",
    "-m seed=glob(*)": "seed=glob(*): glob is for groups of choices",
    "-m local=glob(s*),prox": "glob stands alone, several patterns are local=glob([one*,other*])",
    "-m seed=range(3,3)": "seed=range(3,3): the range is empty",
    "-m seed=range(0,1000000000) rounds=1,2": (
        "seed=range(0,1000000000) rounds=1,2: a sweep has at most 10,000 runs, give fewer values"
    ),
    "-m seed=range(101) cohort=range(1,101)": (
        "seed=range(101) cohort=range(1,101): a sweep has at most 10,000 runs, give fewer values"
    ),
    "-m seed=range(1,3,0)": "seed=range(1,3,0): cannot be swept (range() arg 3 must not be zero)",
    "-m seed=glob(*),3": "seed=glob(*),3: glob is for groups of choices",
    "-m hydra/sweeper=optuna local=glob(x*)": "local=glob(x*): matches no choice, allowed: prox, sam, sgd",
    "-m data=npz data.path=ok.npz,nan.npz clients=4": "x_train has 1 values that are not finite",
    "strategy._target_=broken.Strategy": "broken.py line 1",
    "overwrite=maybe": "overwrite=maybe: must be true or false",
    "strategy=fedbuff strategy.buffer_size=0": "strategy.buffer_size=0: must be a whole number >= 1",
    "strategy=fedasync strategy.staleness=cubic": "strategy.staleness=cubic: unknown name",
    "strategy=fedasync local.prox=0.3": "sets the same penalty",
    "strategy.deadline=-2": "strategy.deadline=-2: must be a number > 0",
    "strategy._target_=nowhere.Nothing": "there is no module 'nowhere'",
    "strategy._target_=fedsim.strategies.fedavg.FedAvgg": "did you mean 'FedAvg'?",
    "pool.group=0": "pool.group=0: must be auto or a whole number >= 1",
    "pool.group=1.5": "pool.group=1.5: must be",
    "pool.group=quick": "pool.group=quick: must be auto or a whole number >= 1",
    "checkpoint.seconds=0": "checkpoint.seconds=0: must be a number > 0",
    "-j 2": "--jobs=2: is for sweeps, add -m",
    "-m -j x seed=0,1": "-j=x: must be a whole number >= 1",
    "faults.on_error=ignore": "faults.on_error=ignore: unknown name",
    "-m strategy=fedavg,fedbogus": "strategy=fedbogus: unknown name",
    "-m seed=0,-1": "seed=-1: must be a whole number >= 0",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_configuration(arguments: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, spoil in (("ok", ""), ("nan", "nan"), ("short", "short"), ("labels", "labels")):
        write_npz(f"{name}.npz", spoil)
    (folder / "broken.py").write_text("def (:\n")
    (folder / "like_ours").mkdir()
    for name in ("config.yaml", "run.log", "thesis.txt"):
        (folder / "like_ours" / name).write_text("a: 1\n")
    (folder / "drafts").mkdir()
    (folder / "drafts/chapter.draft").write_text("precious")
    (folder / "taken").mkdir()
    (folder / "taken/multirun.yaml").write_text("mine")
    (folder / "taken/precious.txt").write_text("keep me")
    before = sorted(os.listdir(folder))
    assert main(["run", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert WRONG[arguments] in shown.err
    assert sorted(os.listdir(folder)) == before
    assert (folder / "taken/precious.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["report", "nowhere"], "nowhere"),
        (["report"], "DIR"),
        (["list", "stratgy"], "did you mean 'strategy'?"),
        (["list", "compute", "--format", "markdown"], "format=markdown: only `fedsim list strategy` has a table"),
        (["list", "strategy", "--format", "latex"], "format=latex"),
        (["runn"], "runn"),
        (["--bogus"], "--bogus"),
        (["report", "x", "--bogus"], "--bogus"),
    ],
)
def test_wrong_commands(arguments: list[str], piece: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert piece in error
    assert len(error.strip().splitlines()) == 1

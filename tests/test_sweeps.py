"""Sweeps: several at a time, none takes another down, and what is complete is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

QUICK = ["problem=quadratic", "clients=8", "cohort=2", "rounds=2", "strategy=fedbuff"]

FAULTY = """
import os, signal
from fedsim import Asynchronous

class Faulty(Asynchronous):
    def __init__(self, local=None, how: str = "well"):
        super().__init__(local)
        self.how = how

    def on_reply(self, fed, reply):
        if self.how == "raises":
            1 / 0
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        fed.publish(fed.model + reply["delta"], used=[reply])
"""


def fedsim(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedsim.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "faulty.yaml").write_text("# Fails\n_target_: faulty.Faulty\nhow: well  # or raises, or dies\n")
    return tmp_path


def test_a_member_that_fails_or_dies_takes_no_other_down_and_the_rest_is_not_run_again(folder: Path) -> None:
    sweep = [
        "run",
        "-m",
        "-j",
        "2",
        *QUICK,
        "strategy=faulty",
        "strategy.how=raises,well,dies",
        "seed=0,1",
        "out=sweep",
    ]
    done = fedsim(*sweep, folder=folder)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "how-dies_seed0: its process was killed (Killed)" in done.stderr
    assert "4 of 6 runs failed: how-raises_seed0, how-raises_seed1, how-dies_seed0, how-dies_seed1" in done.stderr
    assert "2 runs in sweep" in done.stdout
    well = {seed: folder / f"sweep/how-well_seed{seed}" for seed in (0, 1)}
    before = {seed: (manifest(path), path.stat().st_mtime_ns) for seed, path in well.items()}

    # Mended: the strategy is other code now, so what was complete is kept and told of, what was stopped begins anew.
    (folder / "faulty.py").write_text(FAULTY.replace("1 / 0", "pass").replace("os.kill", "(lambda *_: 0)"))
    done = fedsim(*sweep, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "6 runs in sweep (2 were complete already)" in done.stdout
    assert "how-well_seed0: complete, but made by something else (the code" in done.stderr
    assert {seed: (manifest(path), path.stat().st_mtime_ns) for seed, path in well.items()} == before
    for seed in (0, 1):
        hashes = {
            manifest(folder / f"sweep/how-{how}_seed{seed}")["model_sha256"] for how in ("raises", "well", "dies")
        }
        assert len(hashes) == 1


def test_members_equal_single_runs_whatever_the_number_of_jobs(folder: Path) -> None:
    assert fedsim("run", *QUICK, "seed=1", "out=single", folder=folder).returncode == 0
    for jobs in ("1", "3"):
        assert fedsim("run", "-m", "-j", jobs, *QUICK, "seed=0,1,2", f"out=jobs{jobs}", folder=folder).returncode == 0
        for key in ("model_sha256", "events_sha256", "config_sha256", "code_sha256"):
            assert manifest(folder / f"jobs{jobs}/seed1")[key] == manifest(folder / "single")[key]


def test_a_sweep_of_other_settings_in_the_same_place_is_refused(folder: Path) -> None:
    assert fedsim("run", "-m", *QUICK, "seed=0,1", "out=sweep", folder=folder).returncode == 0
    done = fedsim("run", "-m", *QUICK, "seed=0,1,2", "local.lr=0.2", "out=sweep", folder=folder)
    assert done.returncode == 2
    assert "out=sweep/seed0: holds a run of another configuration" in done.stderr
    assert not (folder / "sweep/seed2").exists()
    done = fedsim("run", "-m", *QUICK, "seed=0,1,2", "local.lr=0.2", "out=sweep", "overwrite=true", folder=folder)
    assert done.returncode == 0
    assert "3 runs in sweep;" in done.stdout


def test_an_interrupted_sweep_goes_on_where_it_was(folder: Path) -> None:
    sweep = ["run", "-m", "-j", "2", *QUICK[:3], "strategy=fedavg,fedbuff", "rounds=1500", "seed=0,1", "out=sweep"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fedsim.cli", *sweep],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    member = folder / "sweep/fedavg_seed0"
    deadline = time.monotonic() + 60
    while not (member / "events.parquet").exists():  # its first records are there two seconds after it began
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)  # as the terminal does
    _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT
    assert "go on with the same command and out=sweep" in said
    assert "resumed" not in (member / "run.log").read_text()
    assert list((member / "checkpoint").glob("checkpoint-*"))
    assert not (folder / "sweep/fedbuff_seed1").exists()

    done = fedsim(*sweep, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "resumed at" in (member / "run.log").read_text()
    assert fedsim("run", *QUICK[:3], "strategy=fedavg", "rounds=1500", "out=whole", folder=folder).returncode == 0
    for key in ("model_sha256", "events_sha256"):
        assert manifest(member)[key] == manifest(folder / "whole")[key]
    tables = [pd.read_parquet(path / "metrics.parquet") for path in (member, folder / "whole")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_members_save_themselves_when_the_sweep_is_killed_and_the_next_one_goes_on(folder: Path) -> None:
    sweep = ["run", "-m", "-j", "2", *QUICK[:3], "strategy=fedavg", "rounds=3000", "seed=0,1", "out=sweep"]
    command = [sys.executable, "-m", "fedsim.cli", *sweep]
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    members = [folder / f"sweep/seed{seed}" for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while not all((member / "events.parquet").exists() for member in members):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.kill()
    running.wait()
    while not all(list((member / "checkpoint").glob("checkpoint-*")) for member in members):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.0)  # for their locks to go with them
    done = fedsim(*sweep, folder=folder)
    assert done.returncode == 0, done.stderr
    assert all("resumed at" in (member / "run.log").read_text() for member in members)


def test_a_sweep_with_more_values_keeps_what_is_there(folder: Path) -> None:
    assert fedsim("run", "-m", *QUICK[:4], "seed=0,1", "strategy=fedbuff", "out=sweep", folder=folder).returncode == 0
    done = fedsim("run", "-m", *QUICK[:4], "seed=0,1", "strategy=fedbuff,fedavg", "out=sweep", folder=folder)
    assert "4 runs in sweep (2 were complete already)" in done.stdout
    found = {path.parent.name for path in (folder / "sweep").glob("*/manifest.json")}
    assert found == {"seed0", "seed1", "seed0_fedavg", "seed1_fedavg"}

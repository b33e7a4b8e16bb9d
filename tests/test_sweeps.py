"""Sweeps: several at a time, none takes another down, and what is complete is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.record import RunDirectory
from fedsim.sweeps.index import Index
from fedsim.sweeps.members import NEW
from fedsim.sweeps.processes import Member, Sweep

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


PATIENT = """
import time
from pathlib import Path

from fedsim import Asynchronous

class Patient(Asynchronous):
    '''Takes its time, and says so, as long as there is a file `hold`.'''

    def on_reply(self, fed, reply):
        if Path("hold").exists():
            Path(f"working{fed.rng('name').words(1)[0]}").touch()
            time.sleep(0.1)
        fed.publish(fed.model + reply["delta"], used=[reply])
"""


def command(*arguments: str) -> list[str]:
    """A process of its own: where output of the members matters, or what a signal does."""
    return [sys.executable, "-m", "fedsim.cli", *arguments]


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test runs in a folder of its own, with two strategies in it that no other test has loaded."""
    for name, code in (("faulty", FAULTY), ("patient", PATIENT)):
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "faulty.yaml").write_text("# Fails\n_target_: faulty.Faulty\nhow: well  # or raises, or dies\n")
    (tmp_path / "patient.yaml").write_text("# Waits\n_target_: patient.Patient\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("faulty", "patient"):
        sys.modules.pop(name, None)


def test_a_member_that_fails_or_dies_takes_no_other_down_and_the_rest_is_not_run_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ["strategy=faulty", "strategy.how=raises,well,dies", "seed=0,1", "out=sweep"]
    sweep = ["run", "-m", "-j", "2", *QUICK, *faults]
    done = subprocess.run(command(*sweep), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "how-dies_seed0: its process was killed (Killed)" in done.stderr
    assert "4 of 6 runs failed: how-raises_seed0, how-raises_seed1, how-dies_seed0, how-dies_seed1" in done.stderr
    assert "2 runs in sweep" in done.stdout
    well = {seed: folder / f"sweep/how-well_seed{seed}" for seed in (0, 1)}
    before = {seed: (manifest(path), path.stat().st_mtime_ns) for seed, path in well.items()}

    # Mended: the strategy is other code now, so what was complete is kept and told of, what was stopped begins anew.
    (folder / "faulty.py").write_text(FAULTY.replace("1 / 0", "pass").replace("os.kill", "(lambda *_: 0)"))
    assert main(sweep) == 0
    said = capsys.readouterr()
    assert "6 runs in sweep (2 were complete already)" in said.out
    assert "how-well_seed0: complete, but made by something else (the code" in said.err
    assert {seed: (manifest(path), path.stat().st_mtime_ns) for seed, path in well.items()} == before
    for seed in (0, 1):
        hashes = {
            manifest(folder / f"sweep/how-{how}_seed{seed}")["model_sha256"] for how in ("raises", "well", "dies")
        }
        assert len(hashes) == 1


def test_members_equal_single_runs_whatever_the_number_of_jobs(folder: Path) -> None:
    assert main(["run", *QUICK, "seed=1", "out=single"]) == 0
    for jobs in ("1", "3"):
        assert main(["run", "-m", "-j", jobs, *QUICK, "seed=0,1,2", f"out=jobs{jobs}"]) == 0
        for key in ("model_sha256", "events_sha256", "config_sha256", "code_sha256"):
            assert manifest(folder / f"jobs{jobs}/seed1")[key] == manifest(folder / "single")[key]


def test_a_sweep_of_other_settings_in_the_same_place_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", *QUICK, "seed=0,1", "out=sweep"]) == 0
    assert main(["run", "-m", *QUICK, "seed=0,1,2", "local.lr=0.2", "out=sweep"]) == 2
    assert "out=sweep/seed0: holds a run of another configuration" in capsys.readouterr().err
    assert not (folder / "sweep/seed2").exists()
    assert main(["run", "-m", *QUICK, "seed=0,1,2", "local.lr=0.2", "out=sweep", "overwrite=true"]) == 0
    assert "3 runs in sweep;" in capsys.readouterr().out


# ---- stopped ---------------------------------------------------------------------------------------

HELD = [*QUICK[:3], "strategy=patient", "rounds=60"]
"""Twelve seconds at least as long as there is a file ``hold``, one without it."""


@contextlib.contextmanager
def held(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command whose first two members are at work and cannot end yet."""
    (folder / "hold").touch()
    pipe = subprocess.PIPE
    running = subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        wait_until(lambda: running.poll() is not None or len(list(folder.glob("working*"))) == 2)
        assert running.poll() is None, running.communicate()
        yield running
    finally:
        running.kill()
        running.communicate()
        (folder / "hold").unlink()


def test_an_interrupted_sweep_goes_on_where_it_was(folder: Path) -> None:
    sweep = ["run", "-m", "-j", "2", *HELD, "seed=0,1,2,3", "out=sweep"]
    member = folder / "sweep/seed0"
    with held(folder, *sweep) as running:
        os.killpg(running.pid, signal.SIGINT)  # as the terminal does
        _, said = running.communicate(timeout=300)
    assert running.returncode == 128 + signal.SIGINT
    assert "go on with the same command and out=sweep" in said
    assert "resumed" not in (member / "run.log").read_text()
    assert list((member / "checkpoint").glob("checkpoint-*"))
    assert not (folder / "sweep/seed3").exists()

    assert main(sweep) == 0
    assert "resumed at" in (member / "run.log").read_text()
    assert main(["run", *HELD, "out=whole"]) == 0
    for key in ("model_sha256", "events_sha256"):
        assert manifest(member)[key] == manifest(folder / "whole")[key]
    tables = [pd.read_parquet(path / "metrics.parquet") for path in (member, folder / "whole")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_sweep_that_is_told_to_stop_begins_nothing_more(folder: Path) -> None:
    began = []
    with Sweep(folder / "sweep", 2, Index(folder / "sweep", []), 1) as running:
        signal.raise_signal(signal.SIGINT)
        running.start(Member("seed0", {}, {}, NEW))
        began.append("seed0")
    assert running.interrupted == signal.SIGINT
    assert not began
    assert not (folder / "sweep").exists()


def unlocked(member: Path) -> bool:
    """Whether nobody writes to a run's directory any more."""
    try:
        RunDirectory.reopen(member).close()
    except ConfigError:
        return False
    return True


def test_members_save_themselves_when_the_sweep_is_killed_and_the_next_one_goes_on(folder: Path) -> None:
    sweep = ["run", "-m", "-j", "2", *HELD, "seed=0,1", "out=sweep"]
    members = [folder / f"sweep/seed{seed}" for seed in (0, 1)]
    with held(folder, *sweep) as running:
        running.kill()
        wait_until(lambda: all(map(unlocked, members)))
    assert all(list((member / "checkpoint").glob("checkpoint-*")) for member in members)
    assert main(sweep) == 0
    assert all("resumed at" in (member / "run.log").read_text() for member in members)


def test_a_sweep_with_more_values_keeps_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", *QUICK[:4], "seed=0,1", "strategy=fedbuff", "out=sweep"]) == 0
    assert main(["run", "-m", *QUICK[:4], "seed=0,1", "strategy=fedbuff,fedavg", "out=sweep"]) == 0
    assert "4 runs in sweep (2 were complete already)" in capsys.readouterr().out
    found = {path.parent.name for path in (folder / "sweep").glob("*/manifest.json")}
    assert found == {"seed0", "seed1", "seed0_fedavg", "seed1_fedavg"}

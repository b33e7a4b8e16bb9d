"""A sweep as a table and on a screen."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from fedsim.cli import main
from fedsim.config import compose_run
from fedsim.sweeps.index import Index
from fedsim.sweeps.screen import Screen, shortened, time_left

QUICK = ["problem=quadratic", "clients=8", "cohort=2", "rounds=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(path: Path, time: float, distance: float) -> None:
    """What the index reads of a complete run."""
    path.mkdir(parents=True, exist_ok=True)
    numbers = {"round": 2, "updates": 4, "up_bytes": 10, "down_bytes": 20}
    summary = {"stopped": "rounds", "time": time, "metrics": {"distance": distance, "loss": None}, **numbers}
    (path / "summary.json").write_text(json.dumps(summary))
    hashes = {f"{name}_sha256": name for name in ("config", "code", "model", "events")}
    (path / "manifest.json").write_text(json.dumps({"wall_seconds": 0.5, **hashes}))


# ---- the table -------------------------------------------------------------------------------------


def test_index_holds_the_numbers_of_every_members_records(folder: Path) -> None:
    sweep = ["run", "-m", *QUICK, "strategy=fedavg,fedbuff", "seed=range(1)", "local.lr=0.2", "out=sweep"]
    assert main(sweep) == 0
    table = pd.read_parquet("sweep/index.parquet")
    pd.testing.assert_frame_equal(table, pd.read_csv("sweep/index.csv"), check_dtype=False)
    assert table[["member", "strategy", "seed", "local.lr", "rounds"]].to_numpy().tolist() == [
        [strategy, strategy, 0, 0.2, 2] for strategy in ("fedavg", "fedbuff")
    ]
    for row in table.to_dict("records"):
        summary = json.loads(Path(row["path"], "summary.json").read_text())
        manifest = json.loads(Path(row["path"], "manifest.json").read_text())
        assert row["status"] == "complete"
        assert (row["virtual_seconds"], row["updates_done"]) == (summary["time"], summary["updates"])
        assert row["final_distance"] == summary["metrics"]["distance"]
        for name in ("config_sha256", "code_sha256", "model_sha256", "events_sha256"):
            assert row[name] == manifest[name]
    # Another sweep into the same folder: all that lies there has a row, also under the keys of the first.
    assert main(["run", "-m", *QUICK, "strategy=fedavg", "cohort=4", "seed=3", "out=sweep"]) == 0
    both = pd.read_parquet("sweep/index.parquet").set_index("member")
    assert sorted(both["path"]) == sorted([*table["path"], "sweep/0"])
    assert both.loc["0", ["local.lr", "cohort", "seed"]].tolist() == [0.1, 4, 3]
    assert both.loc["fedbuff", ["local.lr", "cohort", "status"]].tolist() == [0.2, 2, "complete"]


def test_index_is_whole_while_members_are_waiting_running_or_failed(folder: Path) -> None:
    index = Index(folder, ["strategy=fedavg", "seed=0,1,2", "pool.group=3", "hydra.verbose=true", "out=x"])
    for seed in range(4):
        index.add(f"seed{seed}", *compose_run([*QUICK, f"seed={seed}"], folder), "waiting")
    assert index.settings == ["strategy", "seed"]  # how it runs and where it goes make no other run
    finished(folder / "seed0", 7.5, 0.25)
    for name, status in (("seed0", "complete"), ("seed1", "failed"), ("seed2", "running")):
        index.set(name, status)
    index.write()
    table = pd.read_parquet(folder / "index.parquet")
    assert table["status"].tolist() == ["complete", "failed", "running", "waiting"]
    assert table["virtual_seconds"].isna().tolist() == [False, True, True, True]
    assert table.loc[0, ["virtual_seconds", "final_distance", "model_sha256"]].tolist() == [7.5, 0.25, "model"]
    assert {path.name for path in folder.iterdir()} == {"seed0", "index.csv", "index.parquet"}


def test_values_of_several_kinds_become_texts(folder: Path) -> None:
    index = Index(folder, ["local.steps=null,5", "problem.precision=float32", "strategy.weighting=samples"])
    for number, steps in enumerate(("null", "5")):
        index.add(str(number), *compose_run([f"local.steps={steps}"], folder), "waiting")
    index.write()
    table = pd.read_csv(folder / "index.csv")
    assert table["local.steps"].isna().tolist() == [True, False]
    assert table["strategy.weighting"].tolist() == ["samples", "samples"]


# ---- the screen ------------------------------------------------------------------------------------


def test_time_left_goes_on_as_before() -> None:
    assert time_left(60.0, 3.0, 12.0) == 180.0
    assert time_left(60.0, 2.5, 10.0) == 180.0
    assert time_left(5.0, 0.0, 10.0) is None
    assert time_left(5.0, 10.0, 10.0) == 0.0


def test_screen_counts_what_is_done_running_failed_and_waiting() -> None:
    stream = io.StringIO()
    with Screen("mine", 5, Console(file=stream, force_terminal=True, width=120)) as screen:
        assert screen.line() == "0 of 5 done · 0 running · 5 waiting"
        for name in ("a", "b", "c"):
            screen.began(name)
        screen.progressed("a", 0.5, "12.0 s · round 3")
        screen.ended("b", well=False)
        screen.ended("c", well=True)
        assert screen.line().startswith("1 of 5 done · 1 running · [red]1 failed[/red] · 2 waiting · about ")
        screen._progress.refresh()
    shown = stream.getvalue()
    assert "12.0 s · round 3" in shown
    assert "50%" in shown  # of both a and the whole: 2.5 of 5


@pytest.mark.parametrize("width", [60, 80, 200])
def test_screen_says_what_counts_whatever_the_width(width: int) -> None:
    stream = io.StringIO()
    names = [f"fedcompass_dirichlet_alpha0.1_lr0.05_seed{seed}" for seed in range(20)]
    with Screen("compass_2026-11-22", 200, Console(file=stream, force_terminal=True, width=width, height=40)) as screen:
        for name in names:
            screen.began(name)
        for name in names[:10]:
            screen.ended(name, well=name < names[5])
        for name in names[10:]:
            screen.progressed(name, 0.37, "12.3 min · round 37 · 1480 updates · staleness 3.2 · accuracy 0.8123")
        stream.truncate(0)
        screen._progress.refresh()
        line = screen.line().replace("[red]", "").replace("[/red]", "").rpartition(" · about ")[0]
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split())
    assert line in shown
    assert re.search(r" · about [\d.]+ \w+ left", shown)
    for name in names[10:]:  # by what tells it from the others, and how far it is
        assert re.search(f"{name[-6:]} .*?37% 12.3 min · round", shown), name


def test_long_names_lose_their_middle() -> None:
    assert shortened("fedavg_seed1", 12) == "fedavg_seed1"
    assert shortened("fedavg_lr0.05_seed1", 13) == "feda…05_seed1"
    assert len(shortened("a" * 99, 16)) == 16


def test_screen_is_quiet_in_a_pipe() -> None:
    stream = io.StringIO()
    with Screen("mine", 2, Console(file=stream)) as screen:
        screen.began("a")
        screen.ended("a", well=True)
    assert not screen.shown
    assert stream.getvalue() == ""


@pytest.mark.slow
def test_a_sweep_on_a_terminal_shows_all_of_it_and_lines_of_members_whole(folder: Path) -> None:
    chunks: list[bytes] = []

    def read(descriptor: int) -> bytes:
        chunks.append(os.read(descriptor, 4096))
        return chunks[-1]

    sweep = ["run", "-m", "-j", "2", *QUICK[:3], "rounds=1500", "seed=0,1,2", "out=sweep"]
    before = sys.stdin
    try:
        status = pty.spawn([sys.executable, "-m", "fedsim.cli", *sweep], read)
    finally:
        sys.stdin = before
    shown = b"".join(chunks).decode()
    assert os.waitstatus_to_exitcode(status) == 0
    assert "0 of 3 done · 2 running · 1 waiting" in shown
    assert "round " in shown  # where a member is
    assert "left" in shown
    for seed in (0, 1, 2):
        assert f"sweep/seed{seed}: stopped by rounds" in shown

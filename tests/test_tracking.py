"""Who follows a run from outside: hears every evaluation, changes nothing, and can fail without harm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fedsim
from fedsim.cli import main
from fedsim.strategies.fedbuff import FedBuff
from fedsim.tracking import tensorboard

QUICK = ["problem=quadratic", "clients=8", "cohort=2", "rounds=4", "strategy=fedbuff"]


class Listener(fedsim.Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.begun: list[tuple[Path | None, int]] = []
        self.ended: list[Any] = []

    def begin(self, folder: Path | None, config: Mapping[str, Any], first_round: int) -> None:
        self.begun.append((folder, first_round))

    def evaluated(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))

    def end(self, summary: Mapping[str, Any] | None) -> None:
        self.ended.append(summary)


def run(tracker: fedsim.Tracker | None, **more: Any) -> fedsim.Run:
    options = {"problem": fedsim.Quadratic(), "stop": fedsim.Stop(rounds=4), "clients": 8, "cohort": 2} | more
    return fedsim.simulate(FedBuff(), tracker=tracker, **options)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(rows: list[dict[str, float]]) -> pd.DataFrame:
    """What was told, the last word of each moment."""
    return pd.DataFrame(rows).drop_duplicates(["round", "time"], keep="last").reset_index(drop=True)


def test_a_tracker_hears_the_rows_of_the_metrics_and_the_end() -> None:
    tracker = Listener()
    result = run(tracker)
    pd.testing.assert_frame_equal(told(tracker.rows), result.metrics, check_dtype=False, check_like=True)
    assert tracker.begun == [(None, 0)]
    assert tracker.ended == [result.summary]


def test_a_last_row_that_says_more_is_told_again() -> None:
    tracker = Listener()
    problem = fedsim.Classification(client_test=0.2)
    result = run(tracker, problem=problem, client_eval_every=3, stop=fedsim.Stop(rounds=2))
    assert "client_accuracy" in tracker.rows[-1]
    pd.testing.assert_frame_equal(told(tracker.rows), result.metrics, check_dtype=False, check_like=True)


def test_a_tracker_is_no_part_of_what_a_run_is(folder: Path) -> None:
    for name in ("none", "tensorboard"):
        assert main(["run", *QUICK, f"tracker={name}", f"out={name}"]) == 0
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in ("none", "tensorboard")]
    for key in ("config_sha256", "events_sha256", "model_sha256"):
        assert manifests[0][key] == manifests[1][key]
    assert not (folder / "none/tensorboard").exists()
    # The files are the run's own: it may be replaced with them.
    assert main(["run", *QUICK, "out=tensorboard", "overwrite=true"]) == 0
    assert not (folder / "tensorboard/tensorboard").exists()


def test_a_tracker_that_raises_ends_no_run_and_is_told_nothing_more(folder: Path) -> None:
    class Broken(Listener):
        def evaluated(self, row: Mapping[str, float]) -> None:
            super().evaluated(row)
            raise OSError("disk full")

    tracker = Broken()
    assert run(tracker, out=folder / "run").summary["stopped"] == "rounds"
    assert len(tracker.rows) == 1
    assert tracker.ended == []
    assert "Broken is told nothing more: disk full" in (folder / "run/run.log").read_text()


def test_a_run_that_is_stopped_and_goes_on_is_told_from_where_it_was(folder: Path) -> None:
    def stop(sim: Any) -> None:
        if sim.round >= 2:
            raise KeyboardInterrupt

    first, second = Listener(), Listener()
    schedule = fedsim.CheckpointSchedule(events=1)
    with pytest.raises(KeyboardInterrupt):
        run(first, out=folder / "run", checkpoint=schedule, observer=stop)
    result = run(second, out=folder / "run", checkpoint=schedule, resume=True)
    assert first.ended == [None]
    ((_, first_round),) = second.begun
    kept = [row for row in first.rows if row["round"] < first_round]
    assert 0 < len(kept) < len(result.metrics)
    pd.testing.assert_frame_equal(told([*kept, *second.rows]), result.metrics, check_dtype=False, check_like=True)


# ---- TensorBoard -----------------------------------------------------------------------------------


def scalars(path: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, time and value of every scalar, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(path), {"scalars": 0}).Reload()
    return {
        tag: [(each.step, each.wall_time, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_every_metric_over_rounds_and_virtual_time(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(["run", *QUICK, "tracker=tensorboard", "tracker.folder=boards", "out=runs/mine"]) == 0
    found, metrics = scalars(folder / "boards/mine"), pd.read_parquet("runs/mine/metrics.parquet")
    assert not (folder / "runs/mine/tensorboard").exists()
    for column in ("loss", "distance"):
        steps, times, values = zip(*found[column], strict=True)
        assert steps == tuple(metrics["round"])
        assert times == pytest.approx(metrics["time"])
        assert values == pytest.approx(metrics[column], rel=1e-6)  # it keeps single precision
    assert [value for *_, value in found["run/updates"]] == metrics["updates"].tolist()


def test_tensorboard_missing_is_one_line_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    for command in (["run"], ["run", "-m", "seed=0,1"]):
        assert main([*command, *QUICK, "tracker=tensorboard", "out=mine"]) == 2
        said = "fedsim: tracker=tensorboard: needs an extra: pip install -c constraints.txt '.[tensorboard]'\n"
        assert capsys.readouterr().err == said
    assert list(folder.iterdir()) == []

"""What a checkpoint counts on is on the disk before the checkpoint is, and the checkpoint before it has its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.strategies.fedbuff import FedBuff


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the disk is told within a run's directory: ``written`` and ``named`` paths in their order."""
    done: list[tuple[str, str]] = []
    replace = os.replace

    def inside(path: Any) -> str:
        return Path(path).relative_to(tmp_path / "run").as_posix()

    def fsync(descriptor: int) -> None:
        done.append(("written", inside(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def named(source: Any, target: Any) -> None:
        replace(source, target)
        done.append(("named", inside(target)))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", named)
    return done


def test_parts_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, told: list[tuple[str, str]]
) -> None:
    fedsim.simulate(
        FedBuff(), fedsim.Quadratic(), stop=fedsim.Stop(updates=40), clients=8, cohort=4,
        out=tmp_path / "run", checkpoint=fedsim.CheckpointSchedule(seconds=None, events=10),
    )  # fmt: skip
    checkpoints = [at for at, (what, name) in enumerate(told) if what == "named" and "checkpoint-" in name]
    assert len(checkpoints) >= 3
    before = 0
    for at in checkpoints:
        since = told[before:at]
        drafts = [where for where, (what, name) in enumerate(since) if what == "written" and "checkpoint-" in name]
        assert len(drafts) == 1, since  # the checkpoint itself, before it has its name
        parts = [where for where, (what, name) in enumerate(since) if what == "named" and name.startswith("events")]
        assert parts, since
        for where in parts:
            assert since[where - 1][0] == "written", since
            assert where < drafts[0]
        before = at + 1
        assert told[before] == ("written", "checkpoint")  # the folder, in which the name now is

"""What takes long to import waits until it is asked for: one fresh process, from the bare command line to a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = """
import json, sys
loaded = {}

def look(stage):
    loaded[stage] = [name for name in ("pyarrow", "pandas", "ray", "flwr", "tensorboard") if name in sys.modules]

import fedsim.cli
look("command line")
fedsim.simulate, fedsim.Classification
look("in python")
fedsim.cli.main(["run", "problem=quadratic", "clients=8", "cohort=2", "rounds=4", "strategy=fedbuff", "out=run"])
look("inline run")
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What has been imported after each stage."""
    folder = tmp_path_factory.mktemp("late")
    done = subprocess.run([sys.executable, "-c", STAGES], cwd=folder, capture_output=True, text=True, check=True)
    assert Path(folder / "run/manifest.json").exists()
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_command_line_starts_without_reading_parquet(loaded: dict[str, list[str]]) -> None:
    assert loaded["command line"] == []


@pytest.mark.parametrize("stage", ["in python", "inline run"])
def test_inline_never_imports_ray(loaded: dict[str, list[str]], stage: str) -> None:
    assert "ray" not in loaded[stage]
    assert "flwr" not in loaded[stage]


def test_tensorboard_is_not_imported_unless_asked_for(loaded: dict[str, list[str]]) -> None:
    assert "tensorboard" not in loaded["inline run"]
    assert "pyarrow" in loaded["inline run"]  # so a look does see what is there

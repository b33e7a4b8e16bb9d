"""The wheel in an empty environment, started in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STRATEGY = """
from fedsim import Asynchronous

class Halfway(Asynchronous):
    def on_reply(self, fed, reply):
        fed.publish(fed.model + 0.5 * reply["delta"], used=[reply])
"""


def call(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Of a copy: setuptools builds within the folder, where another process may do the same.
    source = out / "source"
    aside = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, source, ignore=aside)
    call(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_wheel_holds_one_package_and_no_tests(wheel: Path) -> None:
    assert wheel.name.startswith("fedsim_ray-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedsim", "fedsim_ray"}
    for wanted in ("fedsim/conf/config.yaml", "fedsim/conf/strategy/fedbuff.yaml", "fedsim/strategies/fedbuff.py"):
        assert wanted in names
    assert any(name.endswith("fashion_mnist.npz") for name in names)
    assert any(name.endswith("NOTICE") for name in names)


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_wheel_runs_in_an_empty_environment_and_folder(wheel: Path, tmp_path: Path) -> None:
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    call(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    pip = [
        environment / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
    ]  # most modules are never imported
    call(*pip, "torch==2.13.0", cwd=tmp_path)
    call(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    fedsim = environment / "bin/fedsim"

    assert "accuracy" in call(fedsim, "run", "rounds=2", "out=first", cwd=folder)
    (folder / "halfway.py").write_text(STRATEGY)
    (folder / "halfway.yaml").write_text("# Mine\n_target_: halfway.Halfway\n")
    assert "mine: stopped by rounds" in call(fedsim, "run", "strategy=halfway", "rounds=2", "out=mine", cwd=folder)
    assert "halfway" in call(fedsim, "report", "first", "mine", "--format", "markdown", "--out", "table", cwd=folder)
    assert "same bits for any group size: yes" in call(fedsim, "doctor", cwd=folder)

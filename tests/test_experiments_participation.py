"""The experiment on participation: its commands are understood, and a small one of its runs leads to its tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedsim.assemble import Assembly
from fedsim.cli import main
from fedsim.config import compose_run, expand

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ is not installed

from experiments.participation import summary  # noqa: E402

README = (ROOT / "experiments" / "participation" / "README.md").read_text()


def commands() -> Iterator[list[str]]:
    for line in README.replace("\\\n", " ").splitlines():
        if line.startswith("    fedsim run "):
            yield [each for each in line.split()[2:] if each != "-m"]


def test_every_command_shown_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = list(commands())
    assert len(shown) == 1 + len(summary.METHODS)
    for arguments in shown:
        first, *_ = expand(arguments)
        assert Assembly(*compose_run(first, tmp_path)).config["clients"] == 100
    assert {next(each for each in line if each.startswith("strategy=")) for line in shown[1:]} == {
        f"strategy={method}" for method in summary.METHODS
    }


def test_final_rates_are_the_best_of_the_grid() -> None:
    """The grid's bold cells are what the final commands say."""
    rows = [
        line.strip("| \n").split(" | ") for line in (ROOT / "experiments/participation/grid.md").open() if "|" in line
    ]
    head, _, *body = rows
    for method in summary.METHODS:
        best = [row[:2] for row in body if row[head.index(method)].startswith("**")]
        ours = next(line for line in commands() if f"strategy={method}" in line)
        assert best == [[re.sub(".*=", "", next(each for each in ours if each.startswith(key))) for key in head[:2]]]


def test_small_runs_lead_to_tables_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for method in ("fedau", "average_all"):
        small = ["time_limit=6.5", "eval_every=1", "local.lr=0.1", f"strategy={method}", f"out=runs/{method}"]
        assert main(["run", "experiment=participation", *small]) == 0
    summary.main(["final", "runs", "--out", "tables"])
    text = Path("tables/report.md").read_text()
    assert re.search(r"\| bernoulli \| fedau \| 0.1 \| 1 \| 1 \| 0\.\d{4} \| 0\.\d{4} \|  \|", text)
    assert re.search(r"\| bernoulli \| average_all \| 0.1 \| 1 \| 1 \| 0\.\d{4} \| 0\.\d{4} \| [+-]0\.\d{4} \|", text)
    assert Path("tables/report.png").stat().st_size > 10_000
    (run,) = (each for each in summary.load(["runs"]) if "fedau" in str(each.path))
    assert run.column("version")[-1] == 6  # a round in every slot


def test_what_follows_from_a_grid_and_from_runs_that_do_not_fit(tmp_path: Path) -> None:
    class Fake:
        path = tmp_path
        seed = 0

        def __init__(self, method: str, lr: float, level: float) -> None:
            self.config = {"strategy": {"_target_": f"a.{method}", "server_lr": 1.0}, "local": {"lr": lr}}
            self.config["availability"] = {"pattern": "markov"}
            self.manifest = {"strategy": method}
            self.clock = "virtual"
            self.level = level

        def column(self, name: str) -> summary.plots.Floats:
            times = np.array([0.0, 300.0, 350.0, 400.0])
            return times if name == "time" else np.array([9.0, 9.0, self.level, self.level + 0.2])

    grid = [Fake(method, lr, level) for method in summary.METHODS for lr, level in ((0.1, 0.5), (0.2, 0.4))]
    text, best = summary.chosen(grid)  # type: ignore[arg-type]
    assert best == dict.fromkeys(summary.METHODS, (0.1, 1.0))
    assert text.splitlines()[2] == "| 1 | 0.1 |" + " **0.6000** |" * 4  # the two evaluations in the last 100 slots
    with pytest.raises(ValueError, match="another rate"):
        summary.grouped(grid)  # type: ignore[arg-type]

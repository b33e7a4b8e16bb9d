"""The comparison with FedCompass: its commands are understood, and a tiny member of it runs and is summed up."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from fedsim.assemble import Assembly
from fedsim.cli import main
from fedsim.config import compose_run, expand

FOLDER = Path(__file__).parent.parent / "experiments" / "compass"
METHODS = {"fedavg", "fedasync", "fedbuff", "fedcompass"}
SCHEDULED = ["strategy=fedcompass", "local.steps=null", "strategy.least_steps=6", "strategy.most_steps=30"]


def test_every_command_of_the_readme_composes_and_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("    fedsim run -m ")]
    seen: dict[str, set[str]] = {"grid": set(), "final": set()}
    for _, _, _, *arguments in commands:
        members = list(expand(arguments))
        config, choices = compose_run(members[-1], tmp_path)
        kind = str(config["out"]).split("/")[2]
        if kind == "final" and choices["strategy"] not in seen[kind]:
            Assembly(config, choices)
        seen[kind].add(choices["strategy"])
        assert (int(config["seed"]) in range(5)) == (kind == "final")  # chosen on other seeds than those shown
    assert seen == {"grid": METHODS, "final": METHODS}


def test_a_tiny_member_runs_and_is_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for options in (["strategy=fedavg"], SCHEDULED):
        out = f"out=final/{len(options)}"
        assert main(["run", "experiment=compass", *options, "model.hidden=4", "time_limit=8", out]) == 0
    monkeypatch.setattr(sys, "argv", ["summary.py", "final", "final", "--target", "0.2", "--out", "."])
    capsys.readouterr()
    runpy.run_path(str(FOLDER / "summary.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(r"class \| normal \| fedcompass \| \d/1", shown)
    assert Path("report.md").read_text() == shown
    assert Path("report.png").stat().st_size > 0

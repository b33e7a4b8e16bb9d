"""The report beside a baseline, with several targets, its warnings and its page."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from test_report import FEDAVG, FEDBUFF, groups_of, write_run

from fedsim import report, runs
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.report.command import levels

FINAL = {"fedavg": [0.70, 0.72, 0.69, 0.75], "fedbuff": [0.74, 0.73, 0.75, 0.91]}
STRATEGY = {"fedavg": FEDAVG, "fedbuff": FEDBUFF}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files for figures, in tests that do not look at them."""

    def savefig(self: Figure, target: Any, **options: Any) -> None:
        target.write(b"") if isinstance(target, io.BytesIO) else Path(target).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two methods, seeds 0 to 3; 0.5 is reached at 10 + seed seconds by FedAvg and at 5 by FedBuff."""
    for name, finals in FINAL.items():
        for seed, final in enumerate(finals):
            at = 10.0 + seed if name == "fedavg" else 5.0
            table = {"accuracy": [0.1, 0.5, final], "time": [0.0, at, 30.0]}
            write_run(tmp_path / f"{name}{seed}", seed=seed, table=table, strategy=STRATEGY[name])
    return tmp_path


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---- beside a baseline -----------------------------------------------------------------------------


def test_paired_differences_are_those_of_scipys_paired_t_test(sweep: Path) -> None:
    groups = groups_of(sweep)
    question = report.ask(groups, target=0.5)
    pair = report.paired("fedbuff", groups["fedbuff"], "fedavg", groups["fedavg"], question)
    test = stats.ttest_rel(FINAL["fedbuff"], FINAL["fedavg"])
    low, high = test.confidence_interval(0.95)
    assert pair.final.n == 4
    assert pair.final.mean - pair.final.half == pytest.approx(low)
    assert pair.final.mean + pair.final.half == pytest.approx(high)
    seconds = stats.ttest_rel([5.0] * 4, [10.0, 11.0, 12.0, 13.0]).confidence_interval(0.95)
    assert [pair.time.mean - pair.time.half, pair.time.mean + pair.time.half] == pytest.approx(list(seconds))
    assert (pair.rounds.mean, pair.bytes.mean) == (0.0, 0.0)


def test_pairs_are_by_seed_and_of_seeds_that_both_have_and_reached(tmp_path: Path) -> None:
    for seed, final in ((3, 0.9), (1, 0.5), (2, 0.8)):
        write_run(tmp_path / f"a{seed}", seed=seed, table={"accuracy": [0.1, final]})
    for seed, final in ((7, 0.0), (2, 0.85), (3, 0.6), (1, 0.9)):
        write_run(tmp_path / f"b{9 - seed}", seed=seed, table={"accuracy": [0.1, final]}, strategy=FEDBUFF)
    groups = groups_of(tmp_path)
    pair = report.paired("fedbuff", groups["fedbuff"], "fedavg", groups["fedavg"], report.ask(groups, target=0.7))
    wanted = [0.9 - 0.5, 0.85 - 0.8, 0.6 - 0.9]
    assert pair.final.n == 3
    assert pair.final.mean == pytest.approx(np.mean(wanted))
    assert pair.time.n == 1  # seed 2 alone: of seed 1 FedAvg, of seed 3 FedBuff has not reached it
    assert math.isnan(pair.time.half)


def test_a_strategy_is_the_baseline_of_groups_that_agree_in_all_else(tmp_path: Path) -> None:
    for alpha in (0.1, 1):
        write_run(tmp_path / f"avg{alpha}", partition={"alpha": alpha})
        for size in (2, 4):
            strategy = FEDBUFF | {"buffer_size": size}
            write_run(tmp_path / f"buff{alpha}{size}", partition={"alpha": alpha}, strategy=strategy)
    write_run(tmp_path / "alone", partition={"alpha": 7}, strategy=FEDBUFF | {"buffer_size": 2})
    groups = groups_of(tmp_path)
    found = report.partners(groups, "fedavg")
    assert found == {
        f"fedbuff, buffer_size={size}, partition.alpha={alpha}": f"fedavg, partition.alpha={alpha}"
        for size in (2, 4)
        for alpha in (0.1, 1)
    }
    label = "fedbuff, buffer_size=2, partition.alpha=7"
    assert set(report.partners(groups, label)) == set(groups) - {label}
    with pytest.raises(ConfigError, match="baseline=fedbuff: is several groups"):
        report.partners(groups, "fedbuff")
    with pytest.raises(ConfigError, match="baseline=fedagv: no such group, did you mean 'fedavg'"):
        report.partners(groups, "fedagv")


def test_what_cannot_be_held_against_the_baseline_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=1, partition={"alpha": 1})
    write_run(tmp_path / "b", seed=2, partition={"alpha": 1}, strategy=FEDBUFF)
    write_run(tmp_path / "c", seed=1, partition={"alpha": 7}, strategy=FEDBUFF)
    write_run(tmp_path / "d", seed=1, partition={"alpha": 8})
    groups = groups_of(tmp_path)
    no_seed, no_partner = report.unpaired(groups, "fedavg")
    assert no_seed.startswith("group fedbuff, partition.alpha=1: has no seed in common with fedavg, partition.alpha=1")
    assert no_partner.startswith("group fedbuff, partition.alpha=7: no fedavg agrees with it in all else")
    only = {"fedavg": groups["fedavg, partition.alpha=1"]}
    assert report.unpaired(only, "fedavg") == ["baseline=fedavg: there is no other group beside it"]
    paired = {**only, "fedbuff": groups["fedbuff, partition.alpha=7"]}
    assert report.unpaired(paired, "fedavg") == []


@pytest.mark.usefixtures("undrawn")
def test_differences_are_in_the_table_and_in_the_csv(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", str(sweep), "--baseline", "fedavg", "--target", "0.5"]
    assert main([*arguments, "--format", "markdown"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    mean = np.mean(np.subtract(FINAL["fedbuff"], FINAL["fedavg"]))
    assert f"| fedbuff |   fedavg | +{mean:.4f} ± " in shown
    assert "-6.50 ± 2.05 (4)" in shown
    assert main([*arguments, "--format", "csv"]) == 0
    plain, beside = rows_of(capsys.readouterr().out)
    assert plain["baseline"] == plain["final_difference"] == ""
    assert float(beside["final_difference"]) == pytest.approx(mean)
    assert (beside["baseline"], beside["final_pairs"], beside["time_difference"]) == ("fedavg", "4", "-6.5")


# ---- several targets -------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_every_target_says_how_many_seeds_reached_it(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(sweep), "--target", "0.5,0.72", "--target", "0.9", "--format", "csv"]) == 0
    rows = rows_of(capsys.readouterr().out)
    wanted = {
        (name, level): sum(final >= float(level) for final in finals)
        for name, finals in FINAL.items()
        for level in ("0.5", "0.72", "0.9")
    }
    assert {(row["group"], row["target"]): int(row["reached"]) for row in rows} == wanted
    assert main(["report", str(sweep), "--target", "0.5,0.72,0.9", "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert "target accuracy >= 0.5, 0.72, 0.9; groups differ in strategy" in shown
    for (name, level), count in wanted.items():
        (line,) = [line for line in shown.splitlines() if re.match(rf"\| {name} +\| +{level} ", line)]
        assert line.endswith(f" {count}/4 |")


def test_what_is_no_target_is_one_line(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert levels(["0.6,0.7", "0.6"]) == [0.6, 0.7]
    assert levels(None) is None
    for given in ("0.6,high", "", "nan"):
        assert main(["report", str(sweep), "--target", given]) == 2
        assert capsys.readouterr().err.startswith(f"fedsim: target={given.rpartition(',')[2]}: must be a")
    assert not (sweep / "report.csv").exists()


# ---- warnings --------------------------------------------------------------------------------------


def told(folder: Path) -> list[str]:
    lines: list[str] = []
    runs.group(runs.readable(runs.load([folder])), lines.append)
    return lines


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"code_sha256": "b" * 64}, "differ in code (aaaaaaaa, bbbbbbbb)"),
        ({"machine": "aarch64"}, "differ in machine (aarch64, x86_64)"),
        ({"python": "3.12.1"}, "differ in python (3.11.7, 3.12.1)"),
        ({"versions": {"torch": "2.9.0", "fedsim": "0.2"}}, "differ in fedsim (0.1, 0.2)"),
    ],
)
def test_other_machines_versions_or_code_are_told_within_a_group_and_between_groups(
    tmp_path: Path, manifest: dict[str, Any], said: str
) -> None:
    made = {"code_sha256": "a" * 64, "machine": "x86_64", "python": "3.11.7"}
    write_run(tmp_path / "within/a", seed=0, manifest=made)
    write_run(tmp_path / "within/b", seed=1, manifest=made | manifest)
    assert told(tmp_path / "within") == [f"group fedavg: runs {said}"]
    write_run(tmp_path / "between/a", manifest=made)
    write_run(tmp_path / "between/b", manifest=made | manifest, strategy=FEDBUFF)
    assert told(tmp_path / "between") == [f"groups {said}"]


def test_the_code_of_a_strategy_of_ones_own_is_another_one_of_course(tmp_path: Path) -> None:
    write_run(tmp_path / "a", manifest={"code_sha256": "a" * 64})
    write_run(tmp_path / "b", manifest={"code_sha256": "b" * 64}, strategy={"_target_": "mine.Mine"})
    assert told(tmp_path) == []


# ---- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are open, sources, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


ELSEWHERE = r"https?:|//[a-z]|url\(|@import|<script|<link"
"""What a page asks others with."""


@pytest.mark.slow
def test_page_holds_everything_itself(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    quick = ["problem=quadratic", "clients=6", "cohort=2", "rounds=3", "strategy=fedbuff"]
    for seed in (0, 1):
        for rate in (0.1, 0.2):
            assert main(["run", *quick, f"local.lr={rate}", f"seed={seed}", f"out={folder}/{rate}-{seed}"]) == 0
    assert main(["report", str(folder), "--html", "--baseline", "local.lr=0.1", "--target", "5,1"]) == 0
    text = (folder / "report.html").read_text()
    assert not re.search(ELSEWHERE, re.sub(r'"data:image/png;base64,[^"]*"', "", text))
    page = Page(text)
    assert page.open == []
    pictures = [
        base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in page.sources
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    # Overview, rounds, updates, staleness, timeline, participation: there are no classes, peers or examples apart.
    assert len(pictures) == 6
    for wanted in ("local.lr", "0.1", "0.2", str(folder / "0.2-1"), "group less baseline, by seed"):
        assert any(wanted in word for word in page.words), wanted
    assert "Warnings" not in page.words


@pytest.mark.usefixtures("undrawn")
def test_page_shows_warnings_and_escapes_what_it_shows(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, strategy=FEDAVG | {"name": "<b>&"})
    write_run(tmp_path / "b", seed=1, strategy=FEDAVG | {"name": "<b>&"}, manifest={"machine": "<aarch64>"})
    write_run(tmp_path / "c", seed=0, strategy=FEDBUFF)
    assert main(["report", str(tmp_path), "--html"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count(" · fedbuff</") == 2  # title and heading: labels have commas in them
    assert not re.search(ELSEWHERE, text)
    page = Page(text)
    assert "Warnings" in page.words
    assert any("runs differ in machine (<aarch64>, None)" in word for word in page.words)
    assert "<b>&" in page.words


def test_differences_of_the_configuration_are_exact(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rounds=3, partition={"alpha": 0.5})
    write_run(tmp_path / "b", rounds=3, partition={"alpha": 0.1}, strategy=FEDBUFF, seed=4)
    assert runs.configuration_differences(groups_of(tmp_path)) == {
        "strategy._target_": [FEDAVG["_target_"], FEDBUFF["_target_"]],
        "partition.alpha": ["0.5", "0.1"],
        "strategy.buffer_size": ["unset", "3"],
    }

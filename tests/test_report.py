"""The report: statistics, grouping, what becomes of damaged runs, and the files it writes."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fedsim import plots, report, runs
from fedsim.checks import ConfigError, FedsimError

FEDAVG = {"_target_": "fedsim.strategies.fedavg.FedAvg"}
FEDBUFF = {"_target_": "fedsim.strategies.fedbuff.FedBuff", "buffer_size": 3}


def write_run(
    path: Path,
    *,
    seed: int = 0,
    manifest: dict[str, Any] | None = None,
    table: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run directory made by hand; ``table`` holds the metric columns, and time, bytes where they matter."""
    columns = {"accuracy": [0.1, 0.5, 0.9]} if table is None else table
    rows = len(next(iter(columns.values())))
    steps = list(range(rows))
    base: dict[str, Any] = dict.fromkeys(("version", "round", "updates", "samples"), steps)
    base |= {"time": [10.0 * step for step in steps]}
    base |= {"up_bytes": [1_000_000 * step for step in steps], "down_bytes": [2_000_000 * step for step in steps]}
    (path / "metrics.parquet").mkdir(parents=True)
    whole = {"strategy": FEDAVG, "rounds": 2, **config, "seed": seed, "out": str(path)}
    (path / "config.yaml").write_text(json.dumps(whole))  # JSON is YAML
    versions = {"versions": {"torch": "2.9.0", "fedsim": "0.1"}, "instruction_set": "avx2", "clock": "virtual"}
    (path / "manifest.json").write_text(json.dumps(versions | (manifest or {})))
    pd.DataFrame(base | columns).to_parquet(path / "metrics.parquet" / "part-000000.parquet")
    return path


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def groups_of(*directories: Path) -> dict[str, list[runs.RunRecord]]:
    return runs.group(runs.readable(runs.load(directories)))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files for figures, in tests that do not look at them: drawing takes a second."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).write_bytes(b""))


# --- statistics


def test_interval_equals_one_worked_by_hand() -> None:
    # mean 2, s = 1, t(0.975, 2) = 4.302653 from a table, half-width 4.302653 / sqrt(3)
    mean, half, n = runs.over_seeds([1.0, 2.0, 3.0])
    assert (mean, n) == (2.0, 3)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    mean, half, _ = runs.over_seeds([0.7])
    assert mean == 0.7
    assert math.isnan(half)
    assert math.isnan(runs.over_seeds([]).mean)


def test_diverged_seed_shows_and_does_not_raise() -> None:
    assert math.isinf(runs.over_seeds([1.0, math.inf]).mean)
    assert math.isnan(runs.over_seeds([1.0, math.nan]).mean)


def test_step_function_carries_the_last_value_forward() -> None:
    at, values = np.array([0.0, 1.0, 1.0, 4.0]), np.array([5.0, 6.0, 7.0, 8.0])
    grid = np.array([-1.0, 0.0, 0.999, 1.0, 3.999, 4.0, 9.0])
    np.testing.assert_array_equal(plots.carried_forward(at, values, grid), [math.nan, 5, 5, 7, 7, 8, 8])


def test_curve_is_the_mean_of_steps_up_to_the_first_end(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, table={"accuracy": [0.0, 0.4, 0.8], "time": [0.0, 2.0, 5.0]})
    write_run(tmp_path / "b", seed=1, table={"accuracy": [0.2, 0.6, 1.0], "time": [0.0, 3.0, 9.0]})
    (members,) = groups_of(tmp_path).values()
    grid, mean, low, high = plots.curve(members, "time", "accuracy")
    np.testing.assert_array_equal(grid, [0, 2, 3, 5])
    np.testing.assert_allclose(mean, [0.1, 0.3, 0.5, 0.7])
    half = 12.706205 * np.array([0.2, 0.2, 0.2, 0.2]) / 2  # t(0.975, 1) s / sqrt(2), s = difference / sqrt(2)
    np.testing.assert_allclose([high - mean, mean - low], [half, half], rtol=1e-6)
    coarse, sampled, _, _ = plots.curve(members, "time", "accuracy", most=3)
    np.testing.assert_array_equal(coarse, [0, 2.5, 5])
    np.testing.assert_allclose(sampled, [0.1, 0.3, 0.7])
    _, geometric, _, _ = plots.curve(members, "bytes", "updates", geometric=True)
    np.testing.assert_allclose(geometric, [0, 1, 2])


# --- target and selection


def test_time_to_target_is_the_first_row_of_the_validation_column_that_meets_it(tmp_path: Path) -> None:
    table = {
        "accuracy": [0.1, 0.9, 0.7, 0.8],
        "val_accuracy": [0.1, 0.5, 0.75, 0.75],
        "time": [0.0, 1.5, 4.25, 7.0],
        "round": [0, 2, 4, 6],
    }
    groups = groups_of(write_run(tmp_path / "run", table=table))
    question = report.ask(groups, target=0.6)
    row = report.summarise("x", groups["fedavg"], question)
    assert (row.time.mean, row.rounds.mean, row.bytes.mean, row.reached) == (4.25, 4.0, 6e6, 1)
    assert row.final.mean == 0.8
    assert row.best.mean == 0.7  # where validation is best first, not the largest on the test samples, 0.9
    assert question.best_name == "accuracy at best val_accuracy"


def test_reached_counts_seeds_and_averages_over_those_alone(tmp_path: Path) -> None:
    for seed, top in enumerate([0.5, 0.9, 0.95, 0.9]):
        table = {"accuracy": [0.1, 0.2, top], "time": [0.0, 1.0, 10.0 + seed]}
        write_run(tmp_path / str(seed), seed=seed, table=table)
    groups = groups_of(tmp_path)
    question = report.ask(groups, target=0.9)
    row = report.summarise("x", groups["fedavg"], question)
    assert (row.reached, row.seeds) == (3, 4)
    assert row.time.mean == 12.0
    assert row.time.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert report.cells(row, question)[4:] == ["12.0 ± 2.5", "2.0 ± 0.0", "6.0 ± 0.0", "3/4"]
    never = report.ask(groups, target=1.0)
    assert report.cells(report.summarise("x", groups["fedavg"], never), never)[4:] == ["-", "-", "-", "0/4"]


def test_target_from_the_data_is_the_largest_multiple_every_group_reaches(tmp_path: Path) -> None:
    write_run(tmp_path / "a", table={"accuracy": [0.1, 0.99], "val_accuracy": [0.1, 0.7]})
    write_run(tmp_path / "b", table={"accuracy": [0.1, 0.99], "val_accuracy": [0.1, 0.97]}, strategy=FEDBUFF)
    groups = groups_of(tmp_path)
    question = report.ask(groups)
    assert (question.target, question.chosen) == (0.7, True)
    assert "target val_accuracy >= 0.7 (target chosen from the data)" in report.title(groups, question)
    assert all(report.summarise(label, members, question).reached for label, members in groups.items())


@pytest.mark.parametrize(
    "diverged",
    [
        {"accuracy": [0.11, 0.15, 0.1]},
        {"accuracy": [0.11, 0.15, math.nan]},
        {"accuracy": [0.11, 0.15, 0.12], "loss": [2.3, 9.0, math.inf]},
        {"accuracy": [0.11, 0.15, 0.12], "val_loss": [2.3, 9.0, math.nan]},
    ],
    ids=["worse", "no number", "infinite loss", "no loss"],
)
def test_runs_that_diverged_do_not_choose_the_target(tmp_path: Path, diverged: dict[str, list[float]]) -> None:
    well = {"accuracy": [0.1, 0.5, 0.73], "loss": [2.3, 2.0, 2.4], "val_loss": [2.3, 2.0, 2.4]}
    write_run(tmp_path / "a", table=well)
    write_run(tmp_path / "b", table={"loss": [2.3] * 3, "val_loss": [2.3] * 3, **diverged}, strategy=FEDBUFF)
    groups = groups_of(tmp_path)
    question = report.ask(groups)
    assert (question.target, question.chosen) == (0.7, True)
    assert [report.summarise(label, members, question).reached for label, members in groups.items()] == [1, 0]
    # A seed that went well speaks for its group again.
    write_run(tmp_path / "c", seed=1, table=well | {"accuracy": [0.1, 0.44, 0.42]}, strategy=FEDBUFF)
    assert report.ask(groups_of(tmp_path)).target == 0.4


@pytest.mark.parametrize(
    ("accuracy", "target"),
    [([0.1, 0.14, 0.14], None), ([0.1, 0.15, 0.14], 0.15), ([0.15, 0.19, 0.17], None), ([0.15, 0.2, 0.17], 0.2)],
)
def test_a_target_met_before_the_first_step_is_none(
    tmp_path: Path, accuracy: list[float], target: float | None
) -> None:
    write_run(tmp_path / "a", table={"accuracy": accuracy})
    write_run(tmp_path / "b", table={"accuracy": [0.02, 0.5, 0.9]}, strategy=FEDBUFF)
    question = report.ask(groups_of(tmp_path))
    assert (question.target, question.chosen) == (target, target is not None)


def test_a_target_met_by_the_first_results_is_one_where_nobody_looked_before(tmp_path: Path) -> None:
    write_run(tmp_path / "a", table={"accuracy": [0.5, 0.54, 0.53], "up_bytes": [1, 2, 3]})
    assert report.ask(groups_of(tmp_path)).target == 0.5


def test_runs_that_all_diverged_have_no_target(tmp_path: Path) -> None:
    write_run(tmp_path / "a", table={"accuracy": [0.2, 0.9, 0.1]})
    assert report.ask(groups_of(tmp_path)).target is None


def test_target_is_compared_in_stored_precision(tmp_path: Path) -> None:
    groups = groups_of(write_run(tmp_path / "a", table={"accuracy": np.array([0.1, 0.7], dtype=np.float32)}))
    assert report.first_reaching(groups["fedavg"][0], report.ask(groups, target=0.7)) == 1


def test_configured_target_counts_if_shared_and_about_the_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "a", target=0.5, table={"distance": [9.0, 0.5, 0.2], "loss": [3.0, 2.0, 1.0]})
    groups = groups_of(tmp_path)
    question = report.ask(groups)
    assert (question.metric, question.target, question.chosen) == ("distance", 0.5, False)
    assert report.first_reaching(groups["fedavg"][0], question) == 1
    assert report.ask(groups, metric="loss").target is None
    write_run(tmp_path / "b", target=0.1, table={"distance": [9.0, 0.5, 0.2], "loss": [3.0, 2.0, 1.0]})
    assert report.ask(groups_of(tmp_path)).target is None


def test_unknown_metric_and_unlike_problems_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"metric=acuracy: .*did you mean 'accuracy'"):
        report.main([str(tmp_path)], metric="acuracy")
    write_run(tmp_path / "b", seed=1, table={"distance": [1.0, 0.5]})
    with pytest.raises(ConfigError, match="none of accuracy, distance, loss in common"):
        report.main([str(tmp_path)])


# --- groups


def test_runs_that_differ_in_seed_place_and_execution_are_one_group(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, pool={"workers": 1}, overwrite=False, lr=1)
    write_run(tmp_path / "b", seed=1, pool={"workers": 8, "group": 3}, overwrite=True, progress=False, lr=1.0)
    assert [(label, len(members)) for label, members in groups_of(tmp_path).items()] == [("fedavg", 2)]


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"rounds": 3}, "rounds=3"),
        ({"local": {"lr": 0.5, "steps": [1, 2]}}, "local.lr=0.5"),
        ({"strategy": FEDBUFF}, "fedbuff"),
        ({"strategy": FEDAVG | {"server_lr": 0.1}}, "server_lr=0.1"),
        ({"strategy": FEDAVG | {"name": "fedavgm"}}, "fedavgm"),
        ({"extra": None}, "extra=null"),
        ({"manifest": {"clock": "wall"}}, "clock=wall"),
        ({"network": {"_target_": "fedsim.system.network.Constant", "rate": 5}}, "network=constant"),
    ],
)
def test_anything_else_keeps_runs_apart(tmp_path: Path, changed: dict[str, Any], label: str) -> None:
    plain = {"local": {"lr": 0.1, "steps": [1, 2]}, "network": None}
    write_run(tmp_path / "a", seed=0, **plain)
    write_run(tmp_path / "b", seed=1, **(plain | changed))
    groups = groups_of(tmp_path)
    assert sorted(len(members) for members in groups.values()) == [1, 1]
    assert label in groups


def test_labels_are_short_sorted_and_unique(tmp_path: Path) -> None:
    for index, (size, alpha) in enumerate([(10, 0.1), (2, 0.1), (2, 10), (2, 0.5)]):
        write_run(tmp_path / f"{index}", strategy=FEDBUFF | {"buffer_size": size}, partition={"alpha": alpha})
    write_run(tmp_path / "avg", partition={"alpha": 0.1})
    write_run(tmp_path / "own", partition={"alpha": 0.1}, strategy={"_target_": "mine.FedAvg"})
    labels = list(groups_of(tmp_path))
    assert labels == [
        "fedavg, partition.alpha=0.1",
        "fedavg, partition.alpha=0.1 #2",
        "fedbuff, buffer_size=2, partition.alpha=0.1",
        "fedbuff, buffer_size=2, partition.alpha=0.5",
        "fedbuff, buffer_size=2, partition.alpha=10",
        "fedbuff, buffer_size=10, partition.alpha=0.1",
    ]


def test_twins_and_unlike_machines_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", seed=0, manifest={"model_sha256": "1"})
    write_run(tmp_path / "b", seed=0, manifest={"model_sha256": "2"})
    write_run(tmp_path / "c", seed=1, manifest={"versions": {"torch": "2.5"}, "instruction_set": "avx512"})
    assert [run.path.name for run in groups_of(tmp_path)["fedavg"]] == ["a", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'a'} kept, {tmp_path / 'b'} left out, though they differ in model_sha256" in lines[0]
    assert any("differ in torch (2.5, 2.9.0)" in line for line in lines)
    assert any("differ in instruction set (avx2, avx512)" in line for line in lines)


# --- finding and reading


@pytest.mark.usefixtures("undrawn")
def test_damaged_and_unfinished_runs_are_named_and_the_rest_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "sweep" / "good")
    (write_run(tmp_path / "sweep" / "killed", seed=1) / "manifest.json").unlink()
    (write_run(tmp_path / "sweep" / "cut", seed=2) / "manifest.json").write_text('{"clock": ')
    (write_run(tmp_path / "sweep" / "yaml", seed=3) / "config.yaml").write_text("a: [1")
    (write_run(tmp_path / "sweep" / "bits", seed=4) / "metrics.parquet" / "part-000000.parquet").write_bytes(b"PAR1")
    lacking = write_run(tmp_path / "sweep" / "lacking", seed=5)
    pd.DataFrame({"time": [0.0]}).to_parquet(lacking / "metrics.parquet" / "part-000000.parquet")
    (tmp_path / "sweep" / ".hydra").mkdir()
    (tmp_path / "sweep" / ".hydra" / "config.yaml").write_text("seed: 0")
    assert report.main([str(tmp_path)], format="csv") == 0
    printed = capsys.readouterr()
    assert [row["seeds"] for row in rows_of(printed.out)] == ["1"]
    lines = printed.err.splitlines()
    assert sum("1 unfinished run left out" in line and "killed" in line for line in lines) == 1
    damaged = ["cut/manifest.json", "yaml/config.yaml", "bits/metrics.parquet", "lacking/metrics.parquet"]
    assert [sum(name in line for line in lines) for name in damaged] == [1, 1, 1, 1]
    assert len(lines) == 6  # one each, and where the figure is


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError) as caught:
            report.main([str(directory)])
        assert "\n" not in str(caught.value)
        assert directory.name in str(caught.value)
    with pytest.raises(ConfigError, match="format=pdf"):
        report.main([str(tmp_path)], format="pdf")


def test_overlapping_arguments_and_job_folders_of_hydra(tmp_path: Path) -> None:
    run = write_run(tmp_path / "strategy=fedavg" / "seed=3")
    (record,) = runs.load([run, tmp_path])
    assert "seed" not in record.metrics.columns  # the folder's name is no column
    with pytest.raises(FedsimError, match=r"events\.parquet"):
        _ = record.events


def test_rows_come_in_the_order_of_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    more = {"round": [9], "time": [99.0], "up_bytes": [1], "down_bytes": [1], "accuracy": [0.3]}
    pd.DataFrame(more).to_parquet(run / "metrics.parquet" / "part-000001.parquet")
    (record,) = runs.load([run])
    assert record.column("accuracy").tolist() == [0.1, 0.5, 0.9, 0.3]


# --- what is printed and written


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed in range(3):
        rise = {"accuracy": [0.1, 0.5 + 0.01 * seed, 0.9], "val_accuracy": [0.1, 0.6, 0.8 + 0.01 * seed]}
        write_run(tmp_path / f"a{seed}", seed=seed, table=rise)
        write_run(tmp_path / f"b{seed}", seed=seed, table=rise, strategy=FEDBUFF | {"name": "a|[b]$"})
    return tmp_path


@pytest.mark.usefixtures("undrawn")
def test_csv_and_markdown_say_the_same(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(sweep)], format="csv", target=0.8)
    text = capsys.readouterr().out
    assert text == (sweep / "report.csv").read_text(encoding="utf-8")
    report.main([str(sweep)], format="markdown", target=0.8)
    lines = capsys.readouterr().out.splitlines()
    assert "target val_accuracy >= 0.8" in lines[0]
    assert len({len(line) for line in lines[2:]}) == 1
    head, _, *body = [[cell.strip() for cell in line.replace(r"\|", "¦").split("|")[1:-1]] for line in lines[2:]]
    assert head[3:5] == ["accuracy at best val_accuracy", "time to target [virtual s]"]
    rows = rows_of(text)
    assert [row["group"].replace("|", "¦") for row in rows] == [cells[0] for cells in body]
    for row, cells in zip(rows, body, strict=True):
        assert cells[1] == row["seeds"] == "3"
        assert cells[2] == f"{float(row['final']):.4f} ± {float(row['final_half_width']):.4f}"
        assert cells[4] == f"{float(row['time']):.1f} ± {float(row['time_half_width']):.1f}"
        assert cells[6] == f"{float(row['bytes']) / 1e6:.1f} ± {float(row['bytes_half_width']) / 1e6:.1f}"
        assert cells[7] == f"{row['reached']}/3"
        assert (row["target"], row["best_selected_by"], row["time"], row["bytes"]) == (
            "0.8", "val_accuracy", "20.0", "6000000.0",
        )  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_rich_table_is_whole_in_a_pipe(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(sweep)])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "…" not in text
    (line,) = [line for line in text.splitlines() if "a|[b]$" in line]
    assert line.rstrip().endswith("3/3 |")
    assert "[virtual s]" in text
    assert text.splitlines()[-1] == f"figure: {sweep / 'report.png'} (also report.pdf, report.csv, report.md)"


def test_figure_is_written_whole_and_not_blank(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sweep / "deep" / "figures"
    report.main([str(sweep)], out=str(out))
    assert sorted(path.name for path in out.iterdir()) == ["report.csv", "report.md", "report.pdf", "report.png"]
    image = matplotlib.image.imread(out / "report.png")
    height, width = image.shape[:2]
    assert width == 1650
    assert 700 < height < 1000
    colours = {tuple(colour) for colour in (image[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours  # both groups are drawn
    assert (out / "report.pdf").read_bytes().startswith(b"%PDF")
    before = [(out / f"report.{kind}").read_bytes() for kind in ("png", "pdf")]
    report.main([str(sweep)], out=str(out))
    assert before == [(out / f"report.{kind}").read_bytes() for kind in ("png", "pdf")]


@pytest.mark.usefixtures("undrawn")
def test_where_files_go_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path / "x" / "one"), write_run(tmp_path / "x" / "two", seed=1)
    far = write_run(tmp_path / "y" / "z" / "far", seed=2)
    report.main([str(one), str(two)])
    assert (tmp_path / "x" / "report.png").exists()
    report.main([str(one)])
    assert (one / "report.png").exists()
    report.main([str(one), str(far)])
    assert "name one with --out" in capsys.readouterr().out
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FedsimError, match="cannot be written"):
        report.main([str(one)], out=str(blocked))


def test_panels_scale_with_what_they_show(tmp_path: Path) -> None:
    for seed in range(2):
        table = {"distance": [100.0, 1.0, 0.0001 * (1 + seed)], "accuracy": [0.1, 0.5, math.nan]}
        write_run(tmp_path / str(seed), seed=seed, table=table)
    groups = groups_of(tmp_path)
    figure = plots.overview(groups, "distance", targets=[0.5])
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "log"]
    assert figure.axes[0].get_ylabel() == "distance (geometric mean)"
    assert figure.axes[1].get_xlabel() == "traffic, up + down (MB)"
    np.testing.assert_allclose(np.asarray(figure.axes[1].lines[0].get_xdata(), dtype=float), [0.0, 3.0, 6.0])
    ax = plots.metric_against(groups, "round", "accuracy", Figure().subplots())
    assert (ax.get_yscale(), ax.get_xlabel()) == ("linear", "round")
    with pytest.raises(ConfigError, match="x=epoch"):
        plots.metric_against(groups, "epoch", "accuracy", ax)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="metric=speed"):
        plots.metric_against(groups, "time", "speed", ax)

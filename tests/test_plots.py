"""Figures: what is drawn is what the records hold, and it can be read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

import fedsim
from fedsim import plots
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.plots import command, timeline
from fedsim.plots.records import as_groups
from fedsim.plots.style import style
from fedsim.runs import RunRecord, load
from fedsim.strategies.dfedavg import DFedAvg
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.faults import Faults
from fedsim.system.network import Constant
from fedsim.topology import Ring


def simulated(strategy: Any, seed: int = 0, out: Path | None = None, **more: Any) -> fedsim.Run:
    system = fedsim.System(network=Constant(), faults=Faults(0.2))
    stop = fedsim.Stop(rounds=6)
    options = {"clients": 12, "cohort": 4, "stop": stop, "system": system, "problem": fedsim.Quadratic()} | more
    return fedsim.simulate(strategy, seed=seed, out=out, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedAvg and FedBuff with two seeds each, and peers on a ring."""
    path = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        simulated(FedAvg(), seed, path / f"server/fedavg{seed}")
        simulated(FedBuff(buffer_size=2), seed, path / f"server/fedbuff{seed}")
    simulated(DFedAvg(topology=Ring()), 0, path / "peers/ring", clients=6, system=fedsim.System(network=Constant()))
    return path


@pytest.fixture(scope="module")
def buffered(folder: Path) -> list[RunRecord]:
    return load([folder / "server/fedbuff0", folder / "server/fedbuff1"])


def spans(ax: Axes) -> dict[str, list[tuple[float, float, int]]]:
    """What a timeline draws: begin, end and row of each bar by stage."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for bars in ax.collections:
        if isinstance(bars, PolyCollection):
            boxes = [path.get_extents() for path in bars.get_paths()]
            found[str(bars.get_label())] = [(box.x0, box.x1, round((box.y0 + box.y1) / 2)) for box in boxes]
    return found


# ---- what is drawn ---------------------------------------------------------------------------------


def test_timeline_draws_the_times_of_the_events_table(buffered: list[RunRecord]) -> None:
    run = buffered[0]
    end = float(run.column("time")[-1])
    ax = plots.client_timeline(run, span=(0.0, end), most=12)
    names = [int(label.get_text()) for label in ax.get_yticklabels()]
    marks = {"download": ("dispatched", "started"), "compute": ("started", "computed")}
    marks["upload"] = ("upload_started", "arrived")
    whole = run.events[run.events["arrived"].notna()]
    for stage, (begin, until) in marks.items():
        wanted = {
            (task["client"], round(task[begin], 9), round(task[until], 9))
            for _, task in whole.iterrows()
            if task[until] > task[begin]
        }
        drawn = {(names[row], round(left, 9), round(right, 9)) for left, right, row in spans(ax)[stage]}
        assert wanted <= drawn
        # What is drawn beyond is what has not arrived: lost on the way, or under way at the end.
        assert len(drawn - wanted) <= len(run.events) - len(whole)
    crosses = next(line for line in ax.lines if line.get_marker() == "x")
    dropped = run.events[run.events["outcome"] == "dropped"]
    assert len(dropped)
    assert sorted(np.asarray(crosses.get_xdata(), dtype=float)) == pytest.approx(sorted(dropped["started"]))


def test_stages_of_a_task_follow_each_other_without_a_gap(buffered: list[RunRecord]) -> None:
    pieces, events = timeline.segments(buffered[0]), buffered[0].events.set_index("task")
    lengths = (pieces["end"] - pieces["begin"]).groupby(pieces["task"]).sum()
    arrived = events["arrived"].dropna()
    np.testing.assert_allclose(lengths[arrived.index], arrived - events.loc[arrived.index, "dispatched"])
    waiting = events[(events["outcome"] == "pending") & events["arrived"].isna()]
    end = float(buffered[0].column("time")[-1])
    assert len(waiting)
    np.testing.assert_allclose(lengths.reindex(waiting.index, fill_value=0.0), end - waiting["dispatched"])


def test_a_late_result_is_drawn_whole_and_crossed_out_and_a_wait_is_no_upload() -> None:
    times = {"dispatched": [0.0, 5.0], "started": [1.0, 6.0], "computed": [3.0, 8.0]}
    more = {"upload_started": [3.0, 9.0], "arrived": [4.0, 10.0], "outcome": ["late", "applied"]}
    events = pd.DataFrame({"task": [0, 1], "client": [7, 7], "applied_version": [np.nan, 0.0], **times, **more})
    run = RunRecord(Path("made by hand"), {}, {})
    run.__dict__.update(events=events, metrics=pd.DataFrame({"time": [10.0]}))
    found = {(row.stage, row.begin, row.end) for row in timeline.segments(run).itertuples()}
    late = {("download", 0.0, 1.0), ("compute", 1.0, 3.0), ("upload", 3.0, 4.0)}
    assert found == late | {("download", 5.0, 6.0), ("compute", 6.0, 8.0), ("wait", 8.0, 9.0), ("upload", 9.0, 10.0)}
    assert timeline.lost(run)[["client", "time"]].to_numpy().tolist() == [[7.0, 4.0]]
    assert timeline.server_versions(run).tolist() == [10.0]


def test_everything_on_the_timeline_is_in_its_legend(buffered: list[RunRecord]) -> None:
    labels = {str(handle.get_label()) for handle in timeline.legend([plots.client_timeline(buffered[0])])}
    assert labels >= {"download", "compute", "upload", "idle", "lost", "version"}


def test_versions_on_the_timeline_are_as_many_as_the_server_made(buffered: list[RunRecord]) -> None:
    times = timeline.server_versions(buffered[0])
    assert len(times) == buffered[0].column("version")[-1]
    assert (np.diff(times) >= 0).all()


def test_participation_sums_to_the_results_applied_from_each_client(buffered: list[RunRecord]) -> None:
    drawn = np.asarray(plots.participation(buffered).images[0].get_array())
    wanted = np.mean([run.clients["applied"] for run in buffered], axis=0)
    np.testing.assert_allclose(drawn.sum(axis=1), wanted)
    assert wanted.sum() > 0


def test_several_results_of_a_client_in_one_span_all_count() -> None:
    run = simulated(FedBuff(buffer_size=1), clients=2, cohort=2, stop=fedsim.Stop(rounds=80))
    drawn = np.asarray(plots.participation(run).images[0].get_array())
    assert drawn.max() > 1
    np.testing.assert_array_equal(drawn.sum(axis=1), run.clients["applied"])


def test_neighbours_share_a_row_beyond_five_hundred_clients() -> None:
    run = simulated(FedBuff(buffer_size=2), problem=fedsim.ScheduleOnly(10), clients=1201, cohort=400)
    drawn = np.asarray(plots.participation(run).images[0].get_array())
    assert drawn.shape[0] == 401
    applied = run.clients["applied"].to_numpy()
    np.testing.assert_array_equal(drawn.sum(axis=1), [applied[at : at + 3].sum() for at in range(0, 1201, 3)])


def test_partition_sums_to_what_clients_and_classes_hold() -> None:
    run = fedsim.simulate(FedAvg(), stop=fedsim.Stop(rounds=1), clients=9, cohort=1, eval_every=0)
    run.metrics.loc[0] = 0  # a run without an evaluation has no rows, and its clients can be drawn nevertheless
    drawn = np.asarray(plots.partition({"fedavg": run}).images[0].get_array())
    np.testing.assert_array_equal(drawn.sum(axis=0), run.clients["samples"])
    np.testing.assert_array_equal(drawn[3], run.clients["class_3"])


def test_staleness_shares_sum_to_one_and_keep_the_mean(buffered: list[RunRecord]) -> None:
    (bars, *_) = [each for each in plots.staleness(buffered).patches if isinstance(each, StepPatch)]
    heights, edges, _ = bars.get_data()
    applied = pd.concat([run.events for run in buffered]).query("outcome == 'applied'")["staleness"]
    assert heights.sum() == pytest.approx(1.0)
    assert float(heights @ (edges[:-1] + 0.5)) == pytest.approx(applied.mean())
    assert applied.mean() > 0


def test_client_accuracy_is_the_share_of_clients_up_to_it() -> None:
    run = RunRecord(Path("made by hand"), {}, {})
    run.__dict__["clients"] = pd.DataFrame({"accuracy": [0.9, np.nan, 0.5, 0.5, 0.7]})
    line = plots.client_accuracy({"x": [run]}).lines[0]
    points = list(zip(*map(np.ravel, line.get_data()), strict=True))
    assert points == [(0.5, 0.0), (0.5, 0.25), (0.5, 0.5), (0.7, 0.75), (0.9, 1.0)]
    with pytest.raises(ConfigError, match=r"problem\.client_test=0\.2"):
        plots.client_accuracy({"x": [run]}, metric="own_accuracy")


@pytest.mark.parametrize(
    ("draw", "column"),
    [
        (plots.metric_against_time, "time"),
        (plots.metric_against_rounds, "round"),
        (plots.metric_against_updates, "updates"),
    ],
)
def test_curves_hold_the_columns_of_the_metrics(folder: Path, draw: Any, column: str) -> None:
    (run,) = load([folder / "server/fedbuff0"])
    line = draw(run, metric="loss").lines[0]
    np.testing.assert_allclose(np.asarray(line.get_xdata(), dtype=float), np.unique(run.column(column)))
    assert np.asarray(line.get_ydata(), dtype=float)[-1] == run.column("loss")[-1]


def test_consensus_is_the_column_of_the_peers_and_of_nobody_else(folder: Path) -> None:
    (run,) = load([folder / "peers/ring"])
    line = plots.consensus(run).lines[0]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float)[-1], run.column("consensus")[-1])
    with pytest.raises(ConfigError, match="metric=consensus"):
        plots.consensus(folder / "server")


def test_topology_of_a_ring_has_a_line_between_neighbours(folder: Path) -> None:
    ax = plots.topology(folder / "peers")
    (lines,) = [each for each in ax.collections if isinstance(each, LineCollection)]
    lengths = [float(np.linalg.norm(segment[0] - segment[1])) for segment in map(np.asarray, lines.get_segments())]
    assert lengths == pytest.approx([1.0] * 6)  # the side of a hexagon is its radius
    with pytest.raises(ConfigError, match="a method without peers"):
        plots.topology(folder / "server/fedavg0")


def test_figures_of_one_group_refuse_several(folder: Path) -> None:
    for draw in (plots.client_timeline, plots.participation, plots.partition, plots.topology):
        with pytest.raises(ConfigError, match="draws one group of runs, got 2"):
            draw(folder / "server")


def test_runs_in_memory_are_drawn_as_those_on_disk(folder: Path) -> None:
    held = simulated(FedBuff(buffer_size=2))
    groups = as_groups([held, held])
    assert list(groups) == ["fedbuff", "fedbuff #2"]  # nothing says that they are one configuration
    assert [len(runs) for runs in as_groups({"both": [held, held]}).values()] == [2]
    (stored,) = load([folder / "server/fedbuff0"])
    drawn, wanted = (plots.metric_against_time(run).lines[0].get_ydata() for run in (held, stored))
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(wanted))


# ---- whether it can be read ------------------------------------------------------------------------


def cut_off(figure: Figure) -> list[str]:
    """Sides on which something reaches beyond the figure, and texts smaller than 6 points."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    sides = {"left": box.x0, "bottom": box.y0, "right": width - box.x1, "top": height - box.y1}
    small = [text.get_text() for text in figure.findobj(Text) if text.get_fontsize() < 6]  # type: ignore[attr-defined]
    return [side for side, room in sides.items() if room < -0.01] + small


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Labels of one axis that run into each other, in a figure that has been drawn."""
    found = []
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            shown = [label for place, label in ticks if low <= place <= high and label.get_text()]
            for one, other in itertools.pairwise(shown):
                if one.get_window_extent().overlaps(other.get_window_extent()):
                    found.append((one.get_text(), other.get_text()))
    return found


@pytest.mark.parametrize("width", [3.3, 5.5])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_nothing_is_cut_off_or_runs_into_its_neighbour(buffered: list[RunRecord], count: int, width: float) -> None:
    long = "fedbuff, buffer_size=10, partition.alpha=0.1, compute=exponential, network=mobile"
    groups = {f"{long} {number}": buffered for number in range(count)}
    for name in ("time", "staleness") if count == 9 else ("time", "staleness", "timeline", "participation"):
        figure = command.drawing(name, groups, width=width)
        assert cut_off(figure) == [], name
        assert overlaps(figure) == [], name
        assert figure.get_figwidth() == width


def test_forty_nine_groups_have_styles_of_their_own() -> None:
    assert len({style(index) for index in range(49)}) == 49


# ---- the command -----------------------------------------------------------------------------------


def test_command_writes_png_and_pdf_where_the_run_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "timeline", str(folder / "server/fedavg0")]) == 0
    figures = folder / "server/fedavg0/figures"
    assert {path.name for path in figures.iterdir()} == {"timeline.png", "timeline.pdf"}
    assert f"figure: {figures / 'timeline.png'}" in capsys.readouterr().out
    assert (figures / "timeline.pdf").read_bytes().startswith(b"%PDF")
    out = folder / "deep/er/bytes.svg"
    assert main(["plot", "bytes", str(folder / "peers/ring"), "--metric", "consensus", "--out", str(out)]) == 0
    assert out.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["timelime", "server"], "plot=timelime: unknown name, did you mean 'timeline'?"),
        (["time", "server", "--out", "figure.jpg"], "out=figure.jpg: must end with .png, .pdf or .svg"),
        (["time", "server", "--metric", "acuracy"], "metric=acuracy: not in"),
        (["timeline", "server", "--metric", "loss"], "metric=loss: the figure timeline shows none; leave it out"),
        (["time", "server", "--width", "0"], "width=0.0: must be a number >= 1.5"),
        (["partition", "server"], "has no classes"),
        (["time", "nowhere"], "fedsim: nowhere: no such directory"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(["plot", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]
    assert sorted(folder.rglob("*")) == before


def test_help_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    shown = capsys.readouterr().out
    for name, kind in command.KINDS.items():
        assert f"  {name:<16} {kind.about}" in shown

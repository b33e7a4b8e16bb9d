"""The records of a run: every file, every row, every hash, read back by other means than they were written by."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import Hooks

import fedsim
from fedsim.data import Dataset
from fedsim.pool import InlinePool
from fedsim.problems.models import Mlp
from fedsim.record import EVENT_COLUMNS, LINK_COLUMNS, METRIC_COLUMNS
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import availability, compute, faults, network

OUTCOMES = {"applied", "late", "rejected", "dropped", "interrupted", "cancelled", "failed", "pending"}
TIMES = ["dispatched", "started", "computed", "upload_started", "arrived"]
FILES = {
    ".fedsim-run",
    "config.yaml",
    "manifest.json",
    "metrics.parquet",
    "events.parquet",
    "clients.parquet",
    "model.safetensors",
    "summary.json",
    "run.log",
}


def harsh():
    """Devices to which everything happens that can happen."""
    return fedsim.System(
        compute.Lognormal(mean=1.0, jitter=0.3),
        network.Lognormal(down=0.002, up=0.001, latency=0.05),
        availability.Markov(15.0, 5.0),
        faults.Faults(dropout=0.1, when="any", detect=0.4, on_offline="pause"),
    )


def strategy_of(name):
    return {
        "rounds": lambda: FedAvg(over_selection=1.4, deadline=4.0, stragglers="late"),
        "cancelled": lambda: FedAvg(over_selection=1.4, deadline=4.0),
        "fedasync": lambda: FedAsync(max_staleness=12),
        "fedbuff": lambda: FedBuff(buffer_size=3, concurrency=9),
    }[name]()


def run_to(out=None, name="rounds", **more):
    settings = {"stop": fedsim.Stop(rounds=30), "clients": 25, "cohort": 5, **more}
    return fedsim.simulate(strategy_of(name), fedsim.Quadratic(), harsh(), out=out, **settings)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One run with records: (run, its directory)."""
    out = tmp_path_factory.mktemp("records") / "run"
    return run_to(out), out


# ---- files ---------------------------------------------------------------------------------------


def test_every_file_is_there_and_nothing_else(recorded):
    run, out = recorded
    assert run.path == out
    assert {each.name for each in out.iterdir()} == FILES
    assert not list(out.rglob("*.draft"))


@pytest.mark.parametrize("table", ["metrics", "events", "clients"])
def test_pandas_reads_a_tables_directory_as_the_runs_own_frame(recorded, table):
    run, out = recorded
    pd.testing.assert_frame_equal(pd.read_parquet(out / f"{table}.parquet"), getattr(run, table))


def test_a_table_written_in_many_parts_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.record.RunDirectory.FLUSH_SECONDS", 0.0)
    run = run_to(tmp_path / "run")
    assert len(list((tmp_path / "run" / "events.parquet").iterdir())) > 10
    for table in ("metrics", "events"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "run" / f"{table}.parquet"), getattr(run, table))


def test_columns_and_their_types(recorded):
    run, _ = recorded
    assert list(run.events) == list(EVENT_COLUMNS)
    assert list(run.metrics) == [*METRIC_COLUMNS, "loss", "distance"]
    kinds = {"int64": "iu", "float64": "f", "string": "O"}
    for name, kind in EVENT_COLUMNS.items():
        if name not in ("applied_version", "staleness") and kind != "string":
            assert run.events[name].dtype.kind in kinds[kind]
    assert list(run.links) == list(LINK_COLUMNS)
    assert len(run.links) == 0


def test_configuration_summary_and_manifest_are_what_the_run_says(recorded):
    run, out = recorded
    assert json.loads((out / "summary.json").read_text()) == run.summary
    assert json.loads((out / "manifest.json").read_text()) == run.manifest
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["seed"], config["clients"], config["cohort"]) == (0, 25, 5)
    assert config["faults"]["dropout"] == 0.1
    assert config["local"]["train"]["lr"] == 0.1
    assert {"fedsim", "versions", "instruction_set", "seed", "model_sha256", "events_sha256"} <= set(run.manifest)
    assert run.manifest["clock"] == "virtual"
    assert run.manifest["versions"]["torch"] == metadata.version("torch")
    log = (out / "run.log").read_text()
    assert "run begins" in log
    assert "run ends: rounds" in log


def test_the_summary_is_what_the_tables_say(recorded):
    run, _ = recorded
    last = run.metrics.iloc[-1]
    for name in METRIC_COLUMNS:
        assert last[name] == run.summary[name]
    assert run.summary["outcomes"] == run.events.outcome.value_counts().sort_index().to_dict()
    assert run.summary["metrics"] == {"loss": last.loss, "distance": last.distance}
    applied = run.events[run.events.outcome == "applied"]
    assert run.summary["mean_staleness"] == pytest.approx(applied.staleness.mean())


def test_the_clients_table_counts_tasks(recorded):
    run, _ = recorded
    by_client = run.events.groupby("client").size().reindex(range(25), fill_value=0)
    applied = run.events[run.events.outcome == "applied"].groupby("client").size().reindex(range(25), fill_value=0)
    assert run.clients.client.tolist() == list(range(25))
    assert run.clients.tasks.tolist() == by_client.tolist()
    assert run.clients.applied.tolist() == applied.tolist()
    assert (run.clients.seconds_per_step > 0).all()


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rounds", "cancelled", "fedasync", "fedbuff"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_task_has_one_row_one_outcome_and_times_in_order(name, seed):
    run = run_to(name=name, seed=seed)
    events = run.events
    assert events.task.tolist() == list(range(len(events)))
    assert set(events.outcome) <= OUTCOMES
    assert {"applied", "dropped", "pending"} <= set(events.outcome)
    assert events.dispatched.is_monotonic_increasing
    times = events[TIMES].to_numpy()
    known = ~np.isnan(times)
    assert known[:, 0].all()
    # A time is missing from where the task ended on, and what is there does not go back.
    assert (known[:, 1:] <= known[:, :-1]).all()
    steps = np.diff(times, axis=1)
    assert (steps[~np.isnan(steps)] >= 0).all()
    arrived = events.arrived.notna()
    assert (events.arrived[arrived] > events.dispatched[arrived]).all()
    assert np.nanmax(times) <= run.summary["time"]

    applied = events.outcome == "applied"
    assert (applied == events.applied_version.notna()).all()
    assert (applied == events.staleness.notna()).all()
    assert (events.staleness[applied] == events.applied_version[applied] - events.version[applied]).all()
    assert (events.staleness[applied] >= 0).all()
    assert events.applied_version[applied].max() == run.summary["version"] - 1
    assert arrived[applied].all()
    received = events[arrived]
    assert set(received.outcome) <= {"applied", "late", "rejected", "pending"}
    assert len(received) == run.summary["updates"]
    assert received.samples.sum() == run.summary["samples"]
    assert (received.group >= 1).all()


@pytest.mark.parametrize("name", ["rounds", "cancelled", "fedasync", "fedbuff"])
def test_a_client_has_one_task_at_a_time(name):
    events = run_to(name=name).events
    for _, own in events.groupby("client"):
        ended = own.arrived.to_numpy()[:-1]
        asked = own.dispatched.to_numpy()[1:]
        assert (asked[~np.isnan(ended)] >= ended[~np.isnan(ended)]).all()


def test_metrics_never_go_back_and_have_a_row_for_every_evaluation(recorded):
    run, _ = recorded
    for name in METRIC_COLUMNS:
        assert run.metrics[name].is_monotonic_increasing
    assert run.metrics["round"].tolist() == list(range(31))
    sparse = run_to(eval_every=10)
    assert sparse.metrics["round"].tolist() == [0, 10, 20, 30]
    assert len(run_to(eval_every=0).metrics) == 0


class Opening(FedAvg):
    """Shows more of itself after the second round."""

    def views(self, fed):
        views = {"global": fed.model}
        return views if fed.version < 2 else {**views, "half": fed.model / 2}


def test_a_view_may_come_later(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.record.RunDirectory.FLUSH_SECONDS", 0.0)
    run = fedsim.simulate(Opening(), fedsim.Quadratic(), stop=fedsim.Stop(rounds=4), out=tmp_path / "run")
    assert list(run.metrics)[-4:] == ["loss", "distance", "half_loss", "half_distance"]
    assert run.metrics.half_loss.isna().tolist() == [True, True, False, False, False]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "run" / "metrics.parquet"), run.metrics)


# ---- the model and the hashes --------------------------------------------------------------------


def hash_of_table(table, columns, left_out=()):
    """The documented law: column by column, a header, then texts, or what is missing and what is there."""
    total = hashlib.sha256()
    for name, kind in columns.items():
        if name in left_out:
            continue
        column = table[name]
        total.update(f"{name}:{kind}:{len(column)}\n".encode())
        if kind == "string":
            total.update("\n".join(column).encode())
        else:
            total.update(bytes(column.isna().to_list()))
            order = "<i8" if kind == "int64" else "<f8"
            total.update(column.fillna(0).to_numpy().astype(order).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", ["rounds", "fedbuff"])
def test_hashes_can_be_had_from_the_files_alone(tmp_path, name):
    run = run_to(tmp_path / "run", name)
    events = pd.read_parquet(tmp_path / "run" / "events.parquet")
    assert hash_of_table(events, EVENT_COLUMNS, {"group"}) == run.manifest["events_sha256"]
    changed = events.assign(up_bytes=events.up_bytes + (events.task == 7))
    assert hash_of_table(changed, EVENT_COLUMNS, {"group"}) != run.manifest["events_sha256"]
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert list(model) == ["x"]
    total = hashlib.sha256(b"torch.float64:10\n" + model["x"].numpy().tobytes())
    assert total.hexdigest() == run.manifest["model_sha256"]


def test_the_model_is_kept_by_parameter_name(tmp_path):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=generator), torch.arange(40) % 2
    problem = fedsim.Classification(Dataset(x, y, x, y, 2), Mlp(4))
    stop = fedsim.Stop(rounds=2)
    run = fedsim.simulate(FedAvg(), problem, stop=stop, clients=4, cohort=2, out=tmp_path / "run")
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert model.keys() == run.model.keys()
    assert all(torch.equal(model[name], run.model[name]) for name in model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
    assert shapes == {"1.weight": (4, 3), "1.bias": (4,), "3.weight": (2, 4), "3.bias": (2,)}
    flat = b"".join(model[name].numpy().tobytes() for name in ("1.weight", "1.bias", "3.weight", "3.bias"))
    assert hashlib.sha256(b"torch.float32:26\n" + flat).hexdigest() == run.manifest["model_sha256"]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net.load_state_dict(model)
    accuracy = (net(x).argmax(dim=1) == y).double().mean().item()
    assert run.metrics.accuracy.iloc[-1] == pytest.approx(accuracy)


def test_records_change_nothing_and_another_seed_changes_everything(tmp_path):
    with_records, without, other = run_to(tmp_path / "run"), run_to(), run_to(seed=1)
    for name in ("events_sha256", "model_sha256"):
        assert with_records.manifest[name] == without.manifest[name] != other.manifest[name]
    assert without.path is None


# ---- where to ------------------------------------------------------------------------------------


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_holds_something_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(fedsim.ConfigError, match=r"^out="):
        run_to(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    path = tmp_path / "out"
    path.write_text("a file")
    with pytest.raises(fedsim.ConfigError, match=r"^out="):
        run_to(path, overwrite=overwrite)
    assert path.read_text() == "a file"


def test_a_run_is_replaced_only_when_told_to(tmp_path):
    out = tmp_path / "run"
    first = run_to(out)
    before = contents(out)
    with pytest.raises(fedsim.ConfigError, match=r"^out=.*overwrite=true"):
        run_to(out, seed=1)
    assert contents(out) == before
    (out / "events.parquet" / "part-000009.parquet").write_bytes(b"left over")
    second = run_to(out, seed=1, overwrite=True)
    assert json.loads((out / "manifest.json").read_text())["events_sha256"] == second.manifest["events_sha256"]
    assert second.manifest["events_sha256"] != first.manifest["events_sha256"]
    pd.testing.assert_frame_equal(pd.read_parquet(out / "events.parquet"), second.events)


def test_a_wrong_argument_leaves_an_existing_run_alone_even_when_told_to_overwrite(tmp_path):
    out = tmp_path / "run"
    run_to(out)
    before = contents(out)
    with pytest.raises(fedsim.ConfigError, match="clients"):
        run_to(out, overwrite=True, clients=0)
    assert contents(out) == before


def test_an_empty_directory_may_be_written_to_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        run_to(out)
        assert {each.name for each in out.iterdir()} == FILES


# ---- a run that fails ----------------------------------------------------------------------------


class Breaking(fedsim.LocalSGD):
    """Fails in its 20th task."""

    def __post_init__(self):
        super().__post_init__()
        self.tasks = [0]  # a list: what is assigned to a rule itself is forgotten with the task

    def begin(self, ctx):
        self.tasks[0] += 1
        if self.tasks[0] == 20:
            raise RuntimeError("out of paper")


def test_a_run_that_fails_leaves_readable_tables_and_the_reason(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(fedsim.SimulationError, match="Breaking raised RuntimeError: out of paper"):
        fedsim.simulate(FedAvg(Breaking(steps=1)), fedsim.Quadratic(), clients=6, cohort=6, out=out)
    events, metrics = (pd.read_parquet(out / f"{table}.parquet") for table in ("events", "metrics"))
    # Rounds of six: the 20th task is in the fourth.
    assert events.task.tolist()[:18] == list(range(18))
    assert set(events.outcome[:18]) == {"applied"}
    assert metrics["round"].tolist() == [0, 1, 2, 3]
    log = (out / "run.log").read_text()
    assert "run failed" in log
    assert "out of paper" in log
    assert "run ends" not in log
    assert not (out / "manifest.json").exists()  # what has no manifest is not finished
    assert not list(out.rglob("*.draft"))


def test_an_evaluation_that_fails_with_the_run_hides_neither_reason_nor_tables(tmp_path):
    class Beside(InlinePool):
        """Puts off evaluations as Ray does."""

        trains_beside = True

    class Unwell(fedsim.Quadratic):
        """Can be evaluated in the beginning only."""

        evaluations = 0

        def evaluate(self, x):
            self.evaluations += 1
            if self.evaluations > 1:
                raise ValueError("evaluation broke")
            return super().evaluate(x)

    def answer(self, fed, reply):
        self.log.append(reply.client)
        if len(self.log) == 2:
            raise ZeroDivisionError("the reason")

    out = tmp_path / "run"
    hooks = Hooks(start=lambda self, fed: fed.dispatch([0, 1], steps=[1, 9]), on_reply=answer)
    with pytest.raises(ZeroDivisionError):
        fedsim.simulate(hooks, Unwell(), clients=3, cohort=1, pool=Beside(), out=out)
    assert "the reason" in (out / "run.log").read_text()
    assert len(pd.read_parquet(out / "events.parquet")) == 2


def test_evaluations_that_are_put_off_make_the_same_rows():
    class Beside(InlinePool):
        trains_beside = True

    tables = [
        fedsim.simulate(
            FedAvg(), fedsim.Quadratic(), clients=9, cohort=3, pool=pool, stop=fedsim.Stop(rounds=7)
        ).metrics
        for pool in (InlinePool(), Beside())
    ]
    assert len(tables[0]) == 8
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_failed_run_lets_go_of_its_log(tmp_path):
    with pytest.raises(fedsim.SimulationError):
        fedsim.simulate(FedAvg(Breaking(steps=1)), fedsim.Quadratic(), clients=6, cohort=6, out=tmp_path / "failed")
    before = (tmp_path / "failed" / "run.log").read_text()
    run_to(tmp_path / "next")
    assert (tmp_path / "failed" / "run.log").read_text() == before


def test_a_failed_run_keeps_what_was_finished_beside_one_slow_client(tmp_path):
    class Given(compute.Compute):
        def speeds(self, clients, draw):
            return np.array([1000.0, *[1.0] * (clients - 1)])

    out = tmp_path / "run"
    strategy = FedAsync(Breaking(steps=1), concurrency=4)
    with pytest.raises(fedsim.SimulationError, match="out of paper"):
        fedsim.simulate(strategy, fedsim.Quadratic(), fedsim.System(Given()), clients=4, cohort=4, out=out)
    events = pd.read_parquet(out / "events.parquet")
    # Client 0 is at work on task 0 all the time; the others have had theirs applied three by three.
    assert (events.outcome == "applied").sum() >= 15
    assert events.outcome.isin(OUTCOMES).all()

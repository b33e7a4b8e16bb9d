"""A run that is stopped, however, ends with the bits it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import resumable
import torch
from support import Hooks, Scripted, apply

import fedsim
from fedsim.checks import Interrupted
from fedsim.cli import main
from fedsim.identity import config_sha256
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Constant

TABLES = ("metrics", "events", "clients", "links")


class StoppedError(Exception):
    pass


def assert_same(one: Path, other: Path) -> None:
    """Hashes, tables (``group`` too), model and summary of two finished runs."""
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (one, other)]
    for key in ("model_sha256", "events_sha256", "config_sha256"):
        assert manifests[0][key] == manifests[1][key], key
    assert (one / "summary.json").read_text() == (other / "summary.json").read_text()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for table in TABLES:
        assert (one / f"{table}.parquet").exists() == (other / f"{table}.parquet").exists()
        if (one / f"{table}.parquet").exists():
            frames = [pd.read_parquet(path / f"{table}.parquet") for path in (one, other)]
            pd.testing.assert_frame_equal(*frames, check_exact=True)


def stop_after(instants: int) -> Any:
    """An observer that raises at the end of so many instants."""
    left = [instants]

    def observe(_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise StoppedError

    return observe


# ---- killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for strategy in resumable.STRATEGIES:
        resumable.simulate(strategy, folder / strategy)
    return {strategy: folder / strategy for strategy in resumable.STRATEGIES}


def killed(out: Path, *arguments: str) -> str:
    """What the script says that kills the run."""
    script = str(Path(resumable.__file__))
    done = subprocess.run(
        [sys.executable, script, str(out), *arguments], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("strategy", resumable.STRATEGIES)
def test_killed_at_random_moments(strategy: str, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    assert int(killed(tmp_path / "run", strategy, "random", "7")) >= 10
    assert_same(tmp_path / "run", undisturbed[strategy])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", resumable.STRATEGIES)
def test_killed_in_the_middle_of_writes(strategy: str, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    # The first renames are those of identity and configuration, then parts and checkpoints in turn.
    calls = ("1", "2", "3", "4", "5", "6", "7", "11", "30", "61")
    killed(tmp_path, strategy, "write", *calls)
    for call in calls:
        assert_same(tmp_path / call, undisturbed[strategy])


@pytest.mark.parametrize("strategy", resumable.STRATEGIES)
def test_stopped_after_any_instant(strategy: str, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    """Before the first checkpoint, just after one, much later; and a run that is stopped again and again."""
    schedule = fedsim.CheckpointSchedule(seconds=None, events=60)
    out = tmp_path / "run"
    for instants in (3, 40, 1, 200, 77):
        resume = out.exists()
        with pytest.raises(StoppedError):
            resumable.simulate(strategy, out, resume=resume, observer=stop_after(instants), checkpoint=schedule)
        assert not (out / "manifest.json").exists()
    resumable.simulate(strategy, out, resume=True)
    assert_same(out, undisturbed[strategy])


# ---- everything a run can hold ----------------------------------------------------------------------


class Accumulating(fedsim.LocalSGD):
    """With client state."""

    def initial_state(self, layout: fedsim.Layout) -> dict[str, torch.Tensor]:
        return {"sum": layout.zeros()}

    def finish(self, ctx: fedsim.Context, x: torch.Tensor) -> dict[str, torch.Tensor]:
        ctx.state["sum"] = ctx.state["sum"] + x - ctx.start
        return {"delta": x - ctx.start + 0.01 * ctx.state["sum"] + 0.1 * ctx.message["push"]}


class Everything(fedsim.Strategy):
    """Messages, peers, gossip, timers, states, late decisions and every kind of plain attribute."""

    def __init__(self) -> None:
        super().__init__(Accumulating(steps=2))
        self.buffer: list[fedsim.Reply] = []
        self.heard: dict[int, np.ndarray] = {}
        self.push = torch.zeros(10, dtype=torch.float64)
        self.half = torch.zeros(3, dtype=torch.bfloat16)
        self.fed: Any = None

    def start(self, fed):
        self.fed = fed  # a strategy may keep it
        fed.timer(3.0, ("tick", 1))
        fed.exchange(torch.arange(fed.clients * 10.0).reshape(fed.clients, 10), torch.full((6, 6), 1 / 6), "mix")

    def message(self, fed, task):
        return {"push": self.push}

    def settle(self, fed):
        if len(fed.idle()) and fed.in_flight < 4:
            fed.dispatch(fed.pick(4 - fed.in_flight), deadline=fed.now + 30)

    def on_timer(self, fed, timer):
        self.push = self.push + 0.5
        fed.send(int(timer.at) % 6, fedsim.SERVER, "hello", note=self.push)
        fed.timer(fed.now + 3.0, ("tick", timer.tag[1] + 1))

    def on_message(self, fed, src, dst, payload, tag):
        self.heard[src] = payload["note"].numpy().copy()

    def on_exchange(self, fed, vectors, tag):
        fed.exchange(vectors + 1, torch.full((6, 6), 1 / 6), tag)

    def on_reply(self, fed, reply):
        self.buffer.append(reply)
        if len(self.buffer) == 3:
            total = sum(each["delta"] for each in self.buffer) + sum(
                torch.from_numpy(each) for each in self.heard.values()
            )
            self.half = self.half + 1
            fed.publish(fed.model + 0.1 * total + self.half.sum().double(), used=self.buffer[:2])
            fed.reject(self.buffer[2], "spare")
            self.buffer = []


def everything(out: Path, **more: Any) -> fedsim.Run:
    return fedsim.simulate(
        Everything(),
        fedsim.Quadratic(noise=0.1),
        fedsim.System(
            Lognormal(mean=1.0, jitter=0.3),
            Constant(0.001, 0.001),
            Scripted((5.0, 2, False), (9.0, 2, True), (14.0, 4, False), (21.0, 4, True)),
            Faults(dropout=0.1, on_offline="pause", detect=0.5),
        ),
        stop=fedsim.Stop(updates=70),  # counted, so that an instant too many would show
        clients=6,
        cohort=3,
        out=out,
        checkpoint=fedsim.CheckpointSchedule(seconds=None, events=7),
        **more,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An undisturbed run, and how many instants it took."""
    out, instants = tmp_path_factory.mktemp("whole") / "run", []
    run = everything(out, observer=instants.append)
    assert len(run.links) > 50
    assert set(run.events.outcome) >= {"applied", "rejected", "dropped"}
    return out, len(instants)


@pytest.mark.parametrize("at", ["begin", "early", "middle", "last but one", "end"])
def test_everything_a_run_can_hold_is_saved(at: str, whole: tuple[Path, int], tmp_path: Path) -> None:
    out, last = whole
    instants = {"begin": 1, "early": 9, "middle": last // 2, "last but one": last - 1, "end": last}[at]

    def interrupt(sim: Any) -> None:
        nonlocal instants
        instants -= 1
        if instants == 0:
            os.kill(os.getpid(), signal.SIGINT)  # the run saves itself at this very instant

    with pytest.raises(Interrupted):
        everything(tmp_path / "run", observer=interrupt)
    everything(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", out)


def test_only_the_last_two_are_kept_and_none_of_a_complete_run(tmp_path: Path) -> None:
    seen = []

    def look(_: object) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "run/checkpoint").glob("checkpoint-*")))

    everything(tmp_path / "run", observer=look)
    assert max(map(len, seen)) == 2
    assert seen[-1][0] > seen[len(seen) // 2][1]
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_damaged_checkpoint_is_passed_over(
    whole: tuple[Path, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StoppedError):
        everything(tmp_path / "run", observer=stop_after(60))
    _, new = sorted((tmp_path / "run/checkpoint").glob("checkpoint-*"))
    new.write_bytes(new.read_bytes()[:-1] + b"?")
    with caplog.at_level("WARNING", "fedsim"):
        everything(tmp_path / "run", resume=True)
    assert f"{new}: is damaged" in caplog.text
    assert_same(tmp_path / "run", whole[0])


def test_without_any_readable_checkpoint_it_says_so_and_leaves_everything(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        everything(tmp_path / "run", observer=stop_after(60))
    for path in (tmp_path / "run/checkpoint").glob("checkpoint-*"):
        path.write_bytes(b"{}\n")
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(fedsim.FedsimError, match=r"checkpoint-0.*cannot be read"):
        everything(tmp_path / "run", resume=True)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


# ---- what cannot be saved ----------------------------------------------------------------------------


def test_a_strategy_that_cannot_be_saved_runs_all_the_same_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = Hooks(
        settle=lambda self, fed: fed.dispatch(fed.pick(3 - fed.in_flight)) if fed.in_flight < 3 else None,
        on_reply=apply,
    )
    with caplog.at_level("WARNING", "fedsim"):
        run = fedsim.simulate(
            strategy,
            fedsim.Quadratic(),
            stop=fedsim.Stop(updates=60),
            out=tmp_path / "run",
            checkpoint=fedsim.CheckpointSchedule(events=5),
        )
    assert run.summary["updates"] == 60
    told = [record.message for record in caplog.records if "cannot be saved" in record.message]
    assert len(told) == 1  # and at the beginning, not when it is needed
    assert "lambda" in told[0]


# ---- the same run? ----------------------------------------------------------------------------------


def stopped_run(out: Path) -> None:
    with pytest.raises(StoppedError):
        everything(out, observer=stop_after(30))


def test_other_versions_or_code_are_told_and_need_a_flag(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    path = tmp_path / "run/checkpoint/identity.json"
    identity = json.loads(path.read_text())
    identity["versions"]["torch"] = "1.0.0"
    identity["code_sha256"] = "0" * 64
    path.write_text(json.dumps(identity))
    with pytest.raises(fedsim.ConfigError, match=r"torch 1\.0\.0 -> .*; the code .*--allow-changes"):
        everything(tmp_path / "run", resume=True)
    identity["execution"] = {"kernel": "other"}
    path.write_text(json.dumps(identity))
    with pytest.raises(fedsim.ConfigError, match=r"give it pool\.kernel=other as before; to go on nevertheless"):
        everything(tmp_path / "run", resume=True)
    run = everything(tmp_path / "run", resume=True, allow_changes=True)
    assert len(run.manifest["changed_on_resume"]) == 3
    assert run.manifest["versions"]["torch"] == torch.__version__


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    with pytest.raises(fedsim.ConfigError, match="another configuration"):
        everything(tmp_path / "run", resume=True, seed=4)
    assert config_sha256({"seed": 1, "pool": 2, "out": "a"}) == config_sha256({"seed": 1, "pool": 3, "out": "b"})
    assert config_sha256({"seed": 1}) != config_sha256({"seed": 2})


def test_a_directory_that_another_process_writes_to_is_refused(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    from fedsim.record import RunDirectory

    held = RunDirectory.reopen(tmp_path / "run")
    with pytest.raises(fedsim.ConfigError, match="is being written by another run"):
        everything(tmp_path / "run", resume=True)
    held.close()
    everything(tmp_path / "run", resume=True)


# ---- the command line, and signals -------------------------------------------------------------------

QUICK = ["problem=quadratic", "clients=8", "cohort=2", "strategy=fedbuff", "checkpoint.seconds=null"]


def test_resume_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *QUICK, "rounds=200", "out=whole"]) == 0

    def interrupt() -> None:
        while not (tmp_path / "run/events.parquet/part-000000.parquet").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(["run", *QUICK, "rounds=200", "checkpoint.events=50", "out=run"]) == 128 + signal.SIGINT
    said = capsys.readouterr().err
    assert "go on with: fedsim resume run" in said
    assert len(list((tmp_path / "run/checkpoint").glob("checkpoint-*"))) >= 1

    for wrong, expected in (
        (["resume", "nowhere"], "nowhere: does not exist"),
        (["resume", "."], "is not a run's directory"),
        (["resume", "run", "rounds=7"], "only pool, checkpoint, tracker may change"),
        (["resume"], "the following arguments are required: DIR"),
    ):
        assert main(wrong) == 2
        assert expected in capsys.readouterr().err
    assert main(["resume", "run", "pool.group=3"]) == 0
    assert "stopped by rounds" in capsys.readouterr().out
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("run", "whole")]
    for key in ("model_sha256", "events_sha256", "config_sha256", "strategy", "problem"):
        assert manifests[0][key] == manifests[1][key]
    assert manifests[0]["pool"]["group"] == 3
    assert main(["resume", "run"]) == 0
    assert "complete already" in capsys.readouterr().out


def test_sigterm_too_and_handlers_are_given_back(whole: tuple[Path, int], tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def terminate(sim: Any) -> None:
        if sim.updates == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"interrupted at .* and saved; go on with: fedsim resume") as caught:
        everything(tmp_path / "run", observer=terminate)
    assert caught.value.signal == signal.SIGTERM
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    everything(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole[0])


# ---- what lies about a run ---------------------------------------------------------------------------


def test_a_run_completed_meanwhile_is_not_resumed(
    whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stopped_run(out)
    from fedsim.pool import InlinePool

    class Slow(InlinePool):
        def open(self, *arguments: Any) -> None:  # between the first look and the lock
            everything(out, resume=True)
            super().open(*arguments)

    with pytest.raises(fedsim.ConfigError, match="this run is complete"):
        everything(out, resume=True, pool=Slow())
    assert_same(out, whole[0])


DAMAGES = {
    "part cut": ("events.parquet/part-000000.parquet", b"PAR1", "part-000000.parquet: is damaged"),
    "part gone": ("events.parquet/part-000000.parquet", None, "part-000000.parquet: is damaged"),
    "identity": ("checkpoint/identity.json", b"[]", "identity.json: is damaged"),
    "no json": ("checkpoint/identity.json", b"{", "identity.json: is damaged"),
    "no config": ("config.yaml", None, "stopped before it had begun"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_line(case: str, tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    name, content, expected = DAMAGES[case]
    path = tmp_path / "run" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(fedsim.FedsimError, match=expected):
        everything(tmp_path / "run", resume=True)


def test_a_broken_config_or_manifest_is_no_complete_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    stopped_run(tmp_path / "run")
    (tmp_path / "run/manifest.json").write_text("{")
    identity = tmp_path / "run/checkpoint/identity.json"
    identity.write_text(identity.read_text().replace('"choices": {}', '"choices": {"pool": "inline"}'))
    for content in ("", "a: [", "- 1"):
        (tmp_path / "run/config.yaml").write_text(content)
        assert main(["resume", "run"]) == 2
        assert "config.yaml: is damaged" in capsys.readouterr().err


def test_a_full_disk_is_one_line_that_says_how_to_go_on(
    whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    write, left = pyarrow.parquet.write_table, [40]

    def full(*arguments: Any, **settings: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(*arguments, **settings)

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(fedsim.SimulationError, match=r"No space left.*go on with: fedsim resume"):
        everything(tmp_path / "run")
    assert "run failed" in (tmp_path / "run/run.log").read_text()
    monkeypatch.setattr(pyarrow.parquet, "write_table", write)
    everything(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole[0])


def test_a_helper_beside_the_strategy_is_part_of_the_code(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "factors.py").write_text("FACTOR = 0.3\n\nclass Box:\n    pass\n")
    (tmp_path / "boxed.py").write_text(
        "import os, signal\nfrom fedsim import Asynchronous\nfrom factors import FACTOR, Box\n\n"
        "class Boxed(Asynchronous):\n"
        "    def start(self, fed):\n        self.box = Box()\n        self.box.count = 0\n"
        "    def on_reply(self, fed, reply):\n        self.box.count += 1\n"
        "        fed.publish(fed.model + FACTOR / self.box.count * reply['delta'], used=[reply])\n"
        "        if self.box.count == 40:\n            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    (tmp_path / "boxed.yaml").write_text("# Boxed\n_target_: boxed.Boxed\nconcurrency: null  # tasks in flight\n")
    command = ["run", "strategy=boxed", "problem=quadratic", "rounds=6", "eval_every=0", "out=run"]
    assert main(command) == 128 + signal.SIGINT
    (tmp_path / "factors.py").write_text("FACTOR = 0.05\n\nclass Box:\n    pass\n")
    for name in ("boxed", "factors"):
        del sys.modules[name]
    assert main(["resume", "run"]) == 2
    assert "was begun with something else (the code of" in capsys.readouterr().err
    # In a process of its own, which knows the class of the box from the checkpoint only.
    again = [sys.executable, "-m", "fedsim.cli", "resume", "run", "--allow-changes", "pool.group=2"]
    assert subprocess.run(again, cwd=tmp_path, check=False).returncode == 0
    assert "resumed at" in (tmp_path / "run/run.log").read_text()
    for name in ("boxed", "factors"):
        sys.modules.pop(name, None)


def test_other_arguments_in_python_are_refused_however_deep_they_lie(tmp_path: Path) -> None:
    from fedsim.data import Dirichlet
    from fedsim.strategies.fedasync import FedAsync

    def begin(alpha: float, a: float, hidden: int = 5, **more: Any) -> None:
        from fedsim.problems.models import Mlp

        problem = fedsim.Classification(resumable.IMAGES, Mlp(hidden), Dirichlet(alpha))
        strategy = FedAsync(fedsim.LocalSGD(steps=[1] * 10), staleness_a=a)
        stop = fedsim.Stop(updates=12)
        fedsim.simulate(strategy, problem, stop=stop, clients=10, out=tmp_path / "run", **more)

    with pytest.raises(StoppedError):
        begin(0.3, 0.5, observer=stop_after(1))
    for other in ((50.0, 0.5), (0.3, 0.9), (0.3, 0.5, 6)):
        with pytest.raises(fedsim.ConfigError, match="another configuration"):
            begin(*other, resume=True)
    begin(0.3, 0.5, resume=True)

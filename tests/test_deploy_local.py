"""``fedsim deploy --local`` around stand-ins for Flower's programs: what it says, its exit status, what it leaves."""

from __future__ import annotations

import ast
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from fedsim.cli import main
from fedsim.flower import commands, local

QUICK = ["data=digits", "model=logistic", "rounds=2"]

SUPERLINK = """
import http.server, os, pathlib, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer)
server.timeout = 0.05
while not pathlib.Path("begun").exists():
    server.handle_request()
"""
"""Serves until the run begins; what it does then follows, and is each test's own."""

SUPERNODE = """
import os, pathlib, sys, time
print(sys.argv[1:], "SuperNode ID: 5", flush=True)
while not pathlib.Path("begun").exists():
    time.sleep(0.02)
"""
"""Is there until the run begins."""

GO_ON = "import time; time.sleep(600)"

FLWR = """
import json, os, pathlib, signal, sys, time, tomllib
words = sys.argv[1:]
ended = "finished:failed" if os.path.exists("failed") else "finished:completed"
if words[:2] == ["supernode", "list"]:
    print("Listing", json.dumps({"nodes": [{"status": "online"}] * 2 + [{"status": "offline"}]}))
elif words[0] == "list":
    runs = [{"run-id": "6", "status": "pending", "status-details": ""}]
    runs += [{"run-id": "7", "status": ended, "status-details": "ServerApp failed with exception: oh"}]
    print(json.dumps({"runs": runs}))
elif words[0] == "run":
    print("Successfully started run 7", flush=True)
    pathlib.Path("begun").touch()
    held = json.loads(tomllib.loads(pathlib.Path(words[words.index("--run-config") + 1]).read_text())["fedsim"])
    out = pathlib.Path(held["config"]["out"])
    def record():
        if out.exists() and any(out.iterdir()):
            out.rename(out.with_name("before"))
        out.mkdir(exist_ok=True)
        (out / ".fedsim-run").touch()
        (out / "run.log").write_text("1 INFO begins\\n2 WARNING client 1 is gone\\n3 INFO ends\\n")
        outcomes, metrics = {"applied": 4}, {"accuracy": 0.5}
        summary = {"stopped": "rounds", "time": 30, "updates": 4, "down_bytes": 2e6, "up_bytes": 1e6}
        (out / "summary.json").write_text(json.dumps({**summary, "outcomes": outcomes, "metrics": metrics}))
        manifest = {"clock": "wall", "tasks_per_second": 0.1, "peak_memory_bytes": 5e8, "wall_seconds": 31}
        manifest["model_sha256"] = ""
        (out / "manifest.json").write_text(json.dumps(manifest))
"""
"""Flower's command line; what it does in a run follows, and is each test's own."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a place for temporary ones that shows what is left there."""
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(local, "LOOK_SECONDS", 0.05)
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    after = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert [process for process in after if process.status() != psutil.STATUS_ZOMBIE] == []
    assert list((folder.parent / "temporary").iterdir()) == []


def deploy(
    monkeypatch: pytest.MonkeyPatch, run: str, *arguments: str, superlink: str = GO_ON, supernode: str = GO_ON
) -> int:
    """``fedsim deploy --local 2`` with stand-ins; what each does once the run has begun is given."""
    codes = {
        "flower-superlink": f"{SUPERLINK}{superlink}",
        "flower-supernode": f"{SUPERNODE}{supernode}",
        "flwr": f"{FLWR}    {run}",
    }

    def write_programs(programs: Path) -> None:
        for name, code in codes.items():
            (programs / f"{name}.py").write_text(code)
            starter = shlex.join([sys.executable, "-S", "-I", str(programs / f"{name}.py")])
            (programs / name).write_text(f'#!/bin/sh\nexec {starter} "$@"\n')
            (programs / name).chmod(0o755)

    monkeypatch.setattr(commands, "write_programs", write_programs)
    return main(["deploy", *QUICK, "--local", "2", *arguments])


def test_a_run_ends_with_its_summary_and_what_it_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert deploy(monkeypatch, "record()", "out=here") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("here: stopped by rounds at 30.0 s of wall time, 4 updates, 3.0 MB, accuracy 0.5")
    said = shown.err.splitlines()
    assert said[0].startswith("superlink at 127.0.0.1:")
    assert [line.partition(" (")[0] for line in said[1:]] == ["supernode 0", "supernode 1", "client 1 is gone"]
    logs = {path.name for path in (folder / "here/logs").iterdir()}
    assert logs == {"superlink.log", "supernode-0.log", "supernode-1.log", "run.log"}


def test_each_node_has_a_part_of_the_data_and_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert deploy(monkeypatch, "time.sleep(0.2); record()", "out=here") == 0
    logs = [(folder / f"here/logs/supernode-{node}.log").read_text() for node in range(2)]
    given = [ast.literal_eval(log[: log.index("]") + 1]) for log in logs]
    options = [dict(zip(each[:-1:2], each[1::2], strict=True)) for each in given]
    assert [each["--node-config"] for each in options] == [f"partition-id={n} num-partitions=2" for n in range(2)]
    assert len({each["--port"] for each in options} | {each["--superlink"].partition(":")[2] for each in options}) == 3
    assert [each[-1] for each in given] == ["--insecure", "--insecure"]


def test_what_the_server_refuses_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "failed").touch()
    run = "print('Traceback\\nfedsim.checks.ConfigError: seed=5: is no good\\nExit Code: 201')"
    assert deploy(monkeypatch, run) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "fedsim: seed=5: is no good"
    assert list((folder / "runs").iterdir()) == []  # no folder without a run in it


def test_a_run_that_fails_says_why_and_shows_its_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "failed").touch()
    assert deploy(monkeypatch, "print('ZeroDivisionError: oh')", "out=here") == 1
    said = capsys.readouterr().err
    why = "fedsim: the run has ended as finished:failed: ServerApp failed with exception: oh; its log ends:"
    assert why in said.splitlines()
    assert said.endswith("ZeroDivisionError: oh\n")
    assert not (folder / "here").exists()


def test_a_superlink_that_dies_at_once_shows_its_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "begun").touch()
    assert deploy(monkeypatch, "record()", superlink="print('address in use'); raise SystemExit(3)") == 1
    said = capsys.readouterr().err
    assert said == "fedsim: superlink ended with status 3; its log ends:\naddress in use\n"


def test_a_superlink_that_never_serves_is_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.setattr(local, "READY_SECONDS", 0.3)
    monkeypatch.setattr(local, "ANSWER_SECONDS", 0.2)
    (folder / "begun").touch()
    assert deploy(monkeypatch, "record()") == 1
    assert "fedsim: the superlink does not serve after 0.3 s" in capsys.readouterr().err


def test_a_superlink_that_dies_in_mid_run_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(monkeypatch, "time.sleep(600)", superlink="os._exit(9)") == 1
    assert "fedsim: superlink ended with status 9" in capsys.readouterr().err


def test_a_supernode_that_is_killed_is_told_of_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fragile = "os.kill(os.getpid(), 9 if 'partition-id=1 num-partitions=2' in sys.argv else 0)\n" + GO_ON
    assert deploy(monkeypatch, "time.sleep(1); record()", "out=here", supernode=fragile) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "goes on" in line] == [
        "supernode 1 was killed by SIGKILL; the run goes on without it"
    ]


def test_the_superlink_is_asked_when_the_nodes_do_not_say_that_they_are_connected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(local, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(local, "CONNECTED", "something else")
    assert deploy(monkeypatch, "record()", "out=here") == 0
    monkeypatch.setitem(globals(), "FLWR", FLWR.replace('"online"}] * 2', '"online"}] * 1'))
    os.unlink("begun")
    assert deploy(monkeypatch, "record()", "out=there") == 1
    assert "fedsim: only 1 of 2 supernodes are connected; its log ends:" in capsys.readouterr().err


def test_no_supernode_left_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy(monkeypatch, "time.sleep(600)", supernode="raise SystemExit(4)") == 1
    said = capsys.readouterr().err
    assert "supernode 0 ended with status 4" in said
    assert "fedsim: all supernodes have died" in said


def test_a_supernode_that_cannot_join_ends_the_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "SUPERNODE", "print('not registered'); raise SystemExit(5)")
    assert deploy(monkeypatch, "record()", supernode="") == 1
    assert capsys.readouterr().err.endswith("supernode 0 ended with status 5; its log ends:\nnot registered\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_mid_run_stops_everything(
    number: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert deploy(monkeypatch, f"os.kill({os.getpid()}, {int(number)}); time.sleep(600)") == status
    assert capsys.readouterr().err.endswith(": superlink and supernodes are stopped\n")


def test_a_deployment_may_be_replaced_with_its_logs_and_not_by_accident(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(monkeypatch, "record()", "out=here") == 0
    os.unlink("begun")
    assert deploy(monkeypatch, "record()", "out=here") == 2
    assert "out=here: exists already" in capsys.readouterr().err
    assert deploy(monkeypatch, "record()", "out=here", "overwrite=true") == 0


def test_a_run_that_fails_before_it_begins_is_not_taken_for_the_one_it_was_to_replace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert deploy(monkeypatch, "record()", "out=here") == 0
    log = (folder / "here/logs/run.log").read_text()
    capsys.readouterr()
    (folder / "begun").unlink()
    (folder / "failed").touch()
    assert deploy(monkeypatch, "time.sleep(0.2); print('ImportError: oh')", "out=here", "overwrite=true") == 1
    shown = capsys.readouterr()
    assert "the run has ended as finished:failed" in shown.err
    assert "client 1 is gone" not in shown.err  # that is what the other run had to say
    assert shown.out == ""
    assert (folder / "here/logs/run.log").read_text() == log

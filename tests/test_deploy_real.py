"""The real thing: one superlink and two supernodes as processes, TLS, nodes that prove who they are, two runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

from fedsim.assemble import Assembly
from fedsim.config import compose_run
from fedsim.flower import commands
from fedsim.flower.certificates import ServerFiles, issue_node_key
from fedsim.flower.local import free_ports
from fedsim.flower.processes import Process, Processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deploy")]

SMALL = ["data=digits", "model=logistic", "partition=iid"]

ENCRYPTED = ["--local", "2", "--tls"]

LONGEST_SECONDS = 400
"""A deployment that takes longer hangs."""


class Deployment:
    """``fedsim deploy`` as a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.said = folder / "said"
        command = [sys.executable, "-m", "fedsim.cli", "deploy", *SMALL, "out=out", *words]
        with self.said.open("w") as output:
            self.popen = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        self.out = folder / "out"
        self.family: dict[int, psutil.Process] = {}

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something, and get to know every process that is started meanwhile."""
        end = time.monotonic() + LONGEST_SECONDS
        while not condition():
            assert self.popen.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            self.look()
            time.sleep(0.2)

    def look(self) -> None:
        for process in psutil.Process(self.popen.pid).children(recursive=True):
            self.family[process.pid] = process

    def ended(self) -> int:
        """Its exit status; nothing that it started may be left."""
        end = time.monotonic() + LONGEST_SECONDS
        while self.popen.poll() is None:
            assert time.monotonic() < end, self.said.read_text()
            self.look()
            time.sleep(0.2)
        left = [process for process in self.family.values() if process.is_running()]
        assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
        return self.popen.returncode

    def process(self, name: str) -> int | None:
        found = re.search(rf"^{name}.* \(process (\d+)\)$", self.said.read_text(), re.MULTILINE)
        return int(found[1]) if found else None

    def events(self) -> pd.DataFrame:
        """What has been written of ``events``."""
        return pd.read_parquet(self.out / "events.parquet")

    def applied(self) -> int:
        try:
            return int((self.events()["outcome"] == "applied").sum())
        except (OSError, ValueError):
            return 0


def stranger(deployment: Deployment, folder: Path) -> Process:
    """What becomes of a supernode that trusts the superlink, but whose key nobody has made known to it."""
    deployment.until(lambda: deployment.process("supernode 1") is not None)
    superlink = psutil.Process(deployment.process("superlink")).cmdline()
    authority, port = (Path(superlink[superlink.index(word) + 1]) for word in ("--ssl-ca-certfile", "--port"))
    own = folder / "stranger"
    (own / "programs").mkdir(parents=True)
    commands.write_programs(own / "programs")
    link = commands.Superlink("127.0.0.1", int(str(port)), ServerFiles(authority, authority, authority))
    command = commands.supernode(link, 1, 2, free_ports(1)[0], issue_node_key(own, "key"))
    with Processes(own) as ours:
        process = ours.start("stranger", command, commands.environment(own, own / "programs"), own)
        process.popen.wait(LONGEST_SECONDS)
    return process


def test_two_rounds_of_fedavg_give_the_simulated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = ["strategy=fedavg", "rounds=2"]
    deployment = Deployment(tmp_path, *method, *ENCRYPTED)
    refused = stranger(deployment, tmp_path)
    assert deployment.ended() == 0, deployment.said.read_text()
    assert "out: stopped by rounds at " in deployment.said.read_text().splitlines()[-1]
    monkeypatch.chdir(tmp_path)
    simulated = Assembly(*compose_run([*SMALL, *method, "clients=2", "out=simulated"], tmp_path)).run()
    deployed = load_file(deployment.out / "model.safetensors")
    for name, tensor in simulated.model.items():
        np.testing.assert_allclose(deployed[name].numpy(), tensor.numpy(), rtol=0, atol=1e-6)
    assert simulated.summary["metrics"]["accuracy"] > 0.5  # it has learnt: two models at rest are equal, too
    log = (deployment.out / "logs/superlink.log").read_text()
    assert "Uvicorn running on https://127.0.0.1" in log
    assert "SuperNode authentication is disabled" not in log
    assert log.count("[Fleet.ActivateNode] Activated node_id=") == 2
    assert refused.status == 1
    assert "Failed to initialize the connection to the SuperLink" in refused.log.read_text()


def test_fedbuff_goes_on_when_a_supernode_is_killed(tmp_path: Path) -> None:
    # Flower takes up to a minute to notice.
    method = ["strategy=fedbuff", "strategy.buffer_size=1", "rounds=1000", "time_limit=120", "eval_every=10"]
    deployment = Deployment(tmp_path, *method, *ENCRYPTED)
    deployment.until(lambda: deployment.applied() >= 2)
    victim = deployment.process("supernode 1")
    assert victim
    os.kill(victim, signal.SIGKILL)
    assert deployment.ended() == 0, deployment.said.read_text()
    said = deployment.said.read_text()
    assert "supernode 1 was killed by SIGKILL; the run goes on without it" in said
    assert "client 1 is gone" in said
    assert "client 1 is gone" in (deployment.out / "run.log").read_text()
    assert "stopped by time_limit at 2.0 min of wall time" in said
    events = deployment.events()
    (lost,) = events[events["outcome"] == "interrupted"].to_dict("records")
    assert lost["client"] == 1
    after = events[(events["outcome"] == "applied") & (events["dispatched"] > lost["dispatched"] + 20)]
    assert set(after["client"]) == {0}
    assert len(after) >= 2


def test_ctrl_c_stops_all_of_it(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, "strategy=fedavg", "rounds=1000", "--local", "1")
    deployment.until(lambda: (deployment.out / "run.log").exists())
    deployment.popen.send_signal(signal.SIGINT)
    assert deployment.ended() == 130
    assert deployment.said.read_text().endswith("fedsim: Interrupt: superlink and supernodes are stopped\n")

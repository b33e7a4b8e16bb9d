"""A million clients: what those cost that nobody touches, and the whole experiment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

BYTES_PER_CLIENT = 200
"""Most memory for a client that nothing has been asked of yet."""

FIRST_INSTANT = """
import sys
from pathlib import Path
import fedsim
import torch
from fedsim.data.partitions import Sampled
from fedsim.data.sources import Dataset
from fedsim.problems.classification import Classification
from fedsim.problems.models import Logistic
from fedsim.strategies.fedavg import FedAvg
from fedsim.system.compute import Lognormal
from fedsim.system.network import Constant

def measured(sim):
    assert sim.in_flight == 1000
    print(Path("/proc/self/status").read_text())
    sim.stop("measured")

images, labels = torch.zeros(100, 1, 28, 28), torch.arange(100) % 10
fedsim.simulate(
    FedAvg(fedsim.LocalSGD(batch_size=20)),
    problem=Classification(Dataset(images, labels, images, labels, 10), Logistic(), Sampled()),
    system=fedsim.System(Lognormal(), Constant()),
    clients=int(sys.argv[1]),
    cohort=1000,
    eval_every=0,
    out=None,
    observer=measured,
)
"""
"""Prints what the process has used when the first cohort is at work.

Few data and no evaluation: they would take more memory than ten thousand clients, and hide what these need.
"""


def peak_bytes(status: str) -> int:
    """Peak resident memory from the text of ``/proc/<pid>/status``.

    Not ``getrusage``: its peak begins with that of the process which started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@needs_proc
def test_memory_of_a_client_that_nobody_touched() -> None:
    few, many = 10_000, 1_000_000
    peaks = []
    for clients in (few, many):
        done = python("-c", FIRST_INSTANT, str(clients))
        assert done.returncode == 0, done.stderr
        peaks.append(peak_bytes(done.stdout))
    each = (peaks[1] - peaks[0]) / (many - few)
    print(f"{each:.0f} bytes per untouched client")
    # 8 bytes hold a client's speed alone: below that, something has not been built.
    assert 8 < each <= BYTES_PER_CLIENT


WHOLE_RUN = """
import sys
from pathlib import Path
from fedsim.cli import main

status = main(["run", "experiment=million", f"out={sys.argv[1]}"])
print(Path("/proc/self/status").read_text())
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ray")  # never at the same time as the test that watches the memory of the whole machine
@needs_proc
def test_a_million_clients_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "million"
    done = python("-c", WHOLE_RUN, str(out))
    assert done.returncode == 0, done.stderr
    events = pd.read_parquet(out / "events.parquet")
    # The cohort that had just begun when the run ended is pending.
    rounds = events[events["outcome"] != "pending"]
    assert len(rounds) == 50_000
    assert (rounds["outcome"] == "applied").all()
    assert (rounds.groupby("applied_version")["client"].nunique() == 1000).all()
    assert rounds["applied_version"].nunique() == 50
    assert rounds["client"].between(0, 999_999).all()
    assert rounds["client"].nunique() > 48_000  # 48,771 expected of 50,000 draws from a million
    assert (rounds["samples"] == 20).all()
    assert json.loads((out / "summary.json").read_text())["metrics"]["val_accuracy"] > 0.7
    seconds = json.loads((out / "manifest.json").read_text())["wall_seconds"]
    peak = peak_bytes(done.stdout) / 2**20
    print(f"{seconds:.1f} s, {50_000 / seconds:.0f} tasks per second, peak memory {peak:.0f} MiB")

"""What must hold for every strategy there is, the next one included: it learns, it resumes, Ray changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import Scripted

import fedsim
from fedsim.assemble import Assembly
from fedsim.config import choices, compose_run
from fedsim.system.compute import Constant
from fedsim.system.faults import Faults

NAMES = sorted(choices("strategy", Path(__file__).parent).keys() - {"flower"})  # that one is whatever app it is given

PEERS = {"dpsgd", "dfedavg", "dfedavgm", "dfedsam", "dfedsam_mgs"}
ONLINE = {"fedau", "average_participating", "average_all", "known_probability"}
"""Those that ask whoever is there."""
CORRECTED = {"scaffold", "fedavg_m", "scaffold_m", "fedavg_m_vr", "scaffold_m_vr"}
ADMM = {"fedadmm", "fedadmm_released", "rerce", "rerce_clu"}
WAITING = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", *PEERS, *ONLINE, *CORRECTED, *ADMM}
"""Those that use no stale update."""

OTHERWISE = {
    # All work all the time, so every update is as stale as there are clients, and slow ones weigh much: small steps.
    "async_fedavg": ["clients=20", "compute=uniform", "strategy.server_lr=0.05"],
    "dfedavgm": ["local.lr=0.02"],  # momentum of 0.9 makes steps ten times as long
    "dpsgd": ["local.batch_size=20", "rounds=700", "eval_every=50"],  # one gradient per round
    **{name: ["strategy.selection=binomial"] for name in ONLINE},  # all are there, and so would all be in every round
    "average_all": ["strategy.selection=binomial", "strategy.server_lr=5"],  # a tenth of all makes a tenth of a step
    "fedcompass": ["clients=20"],  # a client's first update counts 1 / clients at once, so it is slow off the mark
    # Their server's model is the mean of those it asks.
    "rerce": ["clients=20", "cohort=20"],
    "rerce_clu": ["clients=20", "strategy.selected=20"],
}


@cache
def composed(name: str, *overrides: str) -> tuple[dict[str, Any], dict[str, str]]:
    """To compose a configuration takes as long as to run some of these."""
    return compose_run([f"strategy={name}", *overrides], Path(__file__).parent)


def assembled(name: str, *overrides: str, out: Path) -> Assembly:
    config, chosen = composed(name, *overrides)
    return Assembly({**copy.deepcopy(config), "out": str(out)}, chosen)


def run(name: str, *overrides: str, out: Path, **more: Any) -> fedsim.Run:
    return assembled(name, *overrides, out=out).run(**more)


SMALL = [
    "model=logistic",
    "topology=exponential",
    "compute=uniform",
    "clients=10",
    "cohort=5",
    "rounds=15",
    "eval_every=15",
    "local.batch_size=50",
]
SMALL_OTHERWISE = {
    "async_fedavg": ["local.steps=5", "strategy.server_lr=0.1"],
    "dpsgd": ["rounds=60", "eval_every=60"],  # one gradient per round, and no local.steps
    **{name: ["local.steps=5", "strategy.selection=binomial"] for name in ONLINE},
    "fedcompass": ["strategy.least_steps=5", "strategy.most_steps=25"],
    "rerce_clu": ["local.steps=5", "strategy.selected=10"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_on_the_images_teach_much(name: str, tmp_path: Path) -> None:
    """Quick and rough; the full guard against errors of sign or unit is the slow one below."""
    done = run(name, *SMALL, *SMALL_OTHERWISE.get(name, ["local.steps=5"]), out=tmp_path / "run")
    assert done.metrics.accuracy.iloc[0] < 0.3
    assert done.metrics.accuracy.iloc[-1] >= 0.6
    assert (done.summary["mean_staleness"] == 0) == (name in WAITING)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_seventy_percent_of_the_test_images_are_right(name: str, tmp_path: Path) -> None:
    """On the embedded images, an MLP, Dirichlet(0.3) labels, unequal speeds: no error of sign or unit survives this."""
    population = ["clients=20", "topology=exponential"] if name in PEERS else ["clients=100"]
    # The run ends early, by validation data alone.
    usual = ["network=none", "target=0.75", "rounds=60", "eval_every=5"]
    done = run(name, *population, *usual, *OTHERWISE.get(name, []), out=tmp_path / "run")
    assert done.metrics.accuracy.iloc[0] < 0.3
    assert done.metrics.accuracy.iloc[-1] >= 0.7
    assert (done.summary["mean_staleness"] == 0) == (name in WAITING)


# ---- what travels, as each strategy's file says it ------------------------------------------------------

TRAFFIC = {
    "scaffold": (2, 2, 0),
    "scaffold_m": (2, 2, 0),
    "fedavg_m": (2, 1, 0),
    "fedavg_m_vr": (2, 1, 1),  # and gamma
    "scaffold_m_vr": (3, 2, 1),
    **dict.fromkeys(PEERS, (0, 0, 0)),  # in links
}
"""Vectors down and up for each result that was used, and numbers down; of the others one vector each way."""
ASKED = {"rerce", "rerce_clu"}
"""In which some tasks are the clients' own affair: of each kind of task in ``test_rerce``."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ASKED])
def test_results_that_were_used_cost_the_vectors_that_the_file_says(name: str, tmp_path: Path) -> None:
    short = ["problem=quadratic", "problem.dimension=7", "clients=6", "cohort=3", "rounds=3", "topology=ring"]
    more = ["strategy.least_steps=2", "strategy.most_steps=9"] if name == "fedcompass" else ["local.steps=2"]
    done = run(name, *short, *([] if name == "dpsgd" else more), out=tmp_path / "run")
    down, up, numbers = TRAFFIC.get(name, (1, 1, 0))
    vector, number = 7 * 8, 8
    applied = done.events[done.events.outcome == "applied"]
    assert len(applied) >= 3
    assert set(applied.down_bytes) == {down * vector + numbers * number}
    assert set(applied.up_bytes) == {up * vector}
    if name in PEERS:
        degree, steps = 2, 4 if name == "dfedsam_mgs" else 1
        assert done.summary["up_bytes"] == done.summary["version"] * 6 * degree * steps * vector


# ---- the same bits, however it was run -----------------------------------------------------------------

LIVELY = [
    "model=logistic",
    "clients=12",
    "cohort=4",
    "rounds=9",
    "eval_every=3",
    "compute.jitter=0.3",
    "availability=markov",
    "availability.up=20",
    "availability.down=5",
    "faults=dropout",
    "topology=random",
]
"""Clients that come and go, drop out, and need another time for every task."""

QUADRATIC = [*LIVELY, "problem=quadratic", "checkpoint.events=3"]


def hashes(path: Path) -> tuple[str, str]:
    manifest = json.loads((path / "manifest.json").read_text())
    return manifest["model_sha256"], manifest["events_sha256"]


class StoppedError(Exception):
    pass


class StopAfter:
    """An observer that notes the instants it sees and raises at the ``count``-th."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.instants: list[float] = []

    def __call__(self, sim: Any) -> None:
        self.instants.append(sim.now)
        if len(self.instants) == self.count:
            raise StoppedError


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_stopped_three_times_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(name, *QUADRATIC, "checkpoint.events=null", out=whole)
    began: list[float] = []
    for _ in range(3):
        stop = StopAfter(5 + len(set(done.events.dispatched)) // 6)
        with pytest.raises(StoppedError):
            run(name, *QUADRATIC, out=parts, observer=stop, resume=parts.exists())
        began.append(stop.instants[0])
    run(name, *QUADRATIC, out=parts, resume=True)
    assert hashes(parts) == hashes(whole)
    assert (parts / "summary.json").read_text() == (whole / "summary.json").read_text()
    assert 0 == began[0] < began[1] < began[2] < done.summary["time"]  # each time it went on, none began anew


# ---- nobody there --------------------------------------------------------------------------------------

SCRIPTED_OTHERWISE = {"known_probability": ["strategy.probability=0.5"]}  # no script says how often anybody comes


@pytest.mark.parametrize("name", NAMES)
def test_a_run_to_which_nobody_comes_says_so(name: str, tmp_path: Path) -> None:
    leaving = [(2.5, client, False) for client in range(12)]
    for number, presence in enumerate((Scripted(absent=tuple(range(12))), Scripted(*leaving))):
        assembly = assembled(name, *QUADRATIC, *SCRIPTED_OTHERWISE.get(name, []), out=tmp_path / str(number))
        assembly.system = fedsim.System(Constant(mean=1.0), assembly.system.network, presence, Faults())
        with pytest.raises(fedsim.SimulationError, match="nothing is left to happen at"):
            assembly.run()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("name", NAMES)
def test_ray_gives_the_same_bits(name: str, cluster: None, tmp_path: Path) -> None:
    inline, remote = tmp_path / "inline", tmp_path / "ray"
    run(name, *LIVELY, out=inline)
    run(name, *LIVELY, "pool=ray", "pool.workers=2", "pool.group=3", out=remote)
    assert hashes(inline) == hashes(remote)

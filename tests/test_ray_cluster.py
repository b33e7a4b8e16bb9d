"""The Ray pool and the Ray around it: starting, joining and leaving one, clusters of two nodes, lost nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support import wait_until

import fedsim
from fedsim.pool import InlinePool, Pool
from fedsim.pool.ray import RayPool
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Constant

STRATEGIES = {"fedavg": FedAvg, "fedbuff": FedBuff, "fedasync": FedAsync}


pytestmark = pytest.mark.usefixtures("all_that_is_submitted_travels")


class Slow(fedsim.LocalSGD):
    """Takes long enough for something to happen meanwhile."""

    def begin(self, ctx: fedsim.Context) -> None:
        time.sleep(0.1)


class AllThere(RayPool):
    """Waits for all its workers before the run begins, so that each of them has a share of it."""

    def open(self, problem: Problem, jobs: dict[str, fedsim.LocalSGD], randomness: Randomness) -> None:
        super().open(problem, jobs, randomness)
        wait_until(lambda: self._take_in(0.1) or self._crew.joined() == len(self._crew.members))


class Noting(AllThere):
    """Notes where groups are trained."""

    def open(self, problem: Problem, jobs: dict[str, fedsim.LocalSGD], randomness: Randomness) -> None:
        self.nodes: set[str] = set()
        super().open(problem, jobs, randomness)

    def _hand_out(self) -> None:
        super()._hand_out()
        self.nodes.update(group.member.node for group in self._running.values() if group.member)

    def close(self) -> None:
        self.left = self._crew.joined()
        super().close()


def run(pool: Pool, strategy: str, rule: type[fedsim.LocalSGD] = fedsim.LocalSGD, rounds: int = 3) -> tuple[str, str]:
    """Hashes of model and events of a run with momentum, drop-outs and limited bandwidth."""
    done = fedsim.simulate(
        STRATEGIES[strategy](rule(momentum=0.9, steps=3)),
        fedsim.Classification(),
        fedsim.System(Lognormal(), Constant(down=2.0, up=0.5), faults=Faults(dropout=0.2)),
        pool,
        fedsim.Stop(rounds=rounds),
        clients=30,
        cohort=12,
        eval_every=rounds,
    )
    return done.manifest["model_sha256"], done.manifest["events_sha256"]


# ---- starting, joining and leaving ---------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_answers_is_refused_at_once(address: str) -> None:
    assert not ray.is_initialized()  # where a Ray runs already, it is used whatever the address
    with pytest.raises(fedsim.ConfigError, match=rf"^pool.address={address}: .*give auto or host:port"):
        fedsim.simulate(fedsim.Asynchronous(), fedsim.Quadratic(), pool=RayPool(address=address))


def test_a_pool_stops_the_ray_it_started_even_after_an_error(tmp_path: Path) -> None:
    """With a strategy from the user's own folder, which no worker could import."""
    (tmp_path / "own.py").write_text(
        textwrap.dedent("""
        from fedsim import Asynchronous, LocalSGD

        class OwnRule(LocalSGD):
            def direction(self, ctx, x, batch):
                if self.lr == 0.5:
                    raise RuntimeError("on purpose")
                return 2 * super().direction(ctx, x, batch)

        class Own(Asynchronous):
            def on_reply(self, fed, reply):
                fed.publish(fed.model + 0.5 * reply["delta"], used=[reply])
        """)
    )
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import ray, fedsim
        from fedsim.pool import InlinePool
        from fedsim.pool.ray import RayPool
        from own import Own, OwnRule

        if __name__ == "__main__":
            def go(pool, lr=0.1):
                stop = fedsim.Stop(updates=30)
                return fedsim.simulate(Own(OwnRule(lr=lr)), fedsim.Quadratic(), stop=stop, pool=pool).manifest

            assert go(RayPool(1))["model_sha256"] == go(InlinePool())["model_sha256"]
            assert not ray.is_initialized()
            try:
                go(RayPool(1), lr=0.5)
            except fedsim.SimulationError as error:
                assert "on purpose" in str(error)
            assert not ray.is_initialized()
            print("done")
        """)
    )
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.stdout.strip().endswith("done"), done.stdout + done.stderr


def test_work_that_is_left_over_is_dropped_in_silence_and_the_users_own_ray_goes_on(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import time
        import ray, fedsim
        from fedsim.pool.ray import RayPool
        from fedsim.strategies.fedavg import FedAvg
        from fedsim.system.compute import Lognormal

        class Slow(fedsim.LocalSGD):
            def begin(self, ctx):
                time.sleep(0.3)

        class Watched(RayPool):
            def close(self):
                print("under way:", len(self._running) > 0)
                super().close()

        ray.init(address="local", num_cpus=2, include_dashboard=False)
        strategy, system = FedAvg(Slow(steps=3), over_selection=3.0), fedsim.System(Lognormal(sigma=2.0))
        pool, stop = Watched(2, group=1), fedsim.Stop(rounds=1)
        fedsim.simulate(strategy, fedsim.Quadratic(), system, pool, stop, cohort=4)
        time.sleep(3)  # Ray's lines come late
        print("goes on:", ray.get(ray.remote(lambda: 42).remote()))
        """)
    )
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout == "under way: True\ngoes on: 42\n"
    for word in ("retr", "died", "killed", "failed", "rror"):
        assert word not in done.stderr.replace("turn off this error message", ""), done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_worker_that_ray_kills_for_its_memory_says_what_to_try(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import time
        import numpy as np
        import fedsim
        from fedsim.pool.ray import RayPool

        class Hungry(fedsim.LocalSGD):
            def begin(self, ctx):
                held = []
                for _ in range(64):  # 4 GiB if nobody minds
                    held.append(np.ones(2**26 // 8))
                    time.sleep(0.02)

        try:
            strategy, stop = fedsim.Asynchronous(Hungry(steps=1)), fedsim.Stop(updates=4)
            fedsim.simulate(strategy, fedsim.Quadratic(), pool=RayPool(1, group=4), stop=stop, cohort=4)
        except fedsim.SimulationError as error:
            print(error)
        """)
    )
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    # A node that is full once two more GiB are taken.
    full = (kib["MemTotal"] - kib["MemAvailable"] + 2 * 2**20) / kib["MemTotal"]
    limits = {"RAY_memory_usage_threshold": f"{full:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=600,
        env=os.environ | limits,
    )  # fmt: skip
    assert done.stdout.startswith("Ray worker 0: out of memory training 4 tasks together, try pool.group=2 (clients ")


# ---- the full matrix -----------------------------------------------------------------------------


@pytest.fixture
def one_node() -> Iterator[None]:
    """A Ray of this process, which pools use, whatever their address, and leave running; gone with the test."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("one_node")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_number_of_workers_and_the_size_of_groups_do_not_show(strategy: str) -> None:
    inline = {run(InlinePool(group), strategy) for group in (1, 3, 12)}
    assert len(inline) == 1
    for workers in (1, 2):  # three are those of the two nodes below, with the same strategies and groups
        for group in (1, 3, 12):
            assert run(AllThere(workers, group=group), strategy) in inline, (workers, group)


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """A head with one core and a second node with two, which nobody has joined."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("far")
def test_two_nodes_do_not_show(two_nodes: Cluster) -> None:
    for strategy in STRATEGIES:
        inline = run(InlinePool(), strategy)
        for group in (1, 3, 12):
            pool = Noting(address=two_nodes.address, group=group)
            assert run(pool, strategy) == inline, (strategy, group)
            assert len(pool.nodes) == (1 if group == 12 else 2)  # a single group has a single worker
            assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("graceful", [True, False])
def test_a_node_that_is_lost_in_mid_run_costs_nothing_but_time(
    two_nodes: Cluster, graceful: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Noting(address=two_nodes.address, group=2)
    (second,) = two_nodes.worker_nodes

    def busy() -> int:
        there = [member for member in pool._crew.members if member.node == second.node_id]
        return sum(member.load > 0 for member in there)

    def remove() -> None:
        wait_until(lambda: busy() == 2)
        two_nodes.remove_node(second, allow_graceful=graceful)

    remover = threading.Thread(target=remove)
    remover.start()
    with caplog.at_level("WARNING", "fedsim"):
        lost = run(pool, "fedbuff", Slow, rounds=8)
    remover.join()
    assert pool.left == 1
    assert f"Ray node {second.node_id[:12]}" in caplog.text
    assert "was lost, 2 of 3 workers are gone; their tasks (" in caplog.text
    assert lost == run(InlinePool(), "fedbuff", rounds=8)

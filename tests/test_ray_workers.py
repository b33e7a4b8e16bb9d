"""The workers of the Ray pool: they join late, die and are lost, their lines break, and nothing of it shows."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from support import checked, wait_until, work

import fedsim
from fedsim.pool import InlinePool, Pool
from fedsim.pool.ray import RayPool
from fedsim.pool.worker import Answer, Worker
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Constant

pytestmark = pytest.mark.usefixtures("all_that_is_submitted_travels")


def hashes(pool: Pool) -> tuple[str, str]:
    done = fedsim.simulate(
        FedBuff(fedsim.LocalSGD(momentum=0.5, steps=3)), fedsim.Classification(),
        fedsim.System(Lognormal(), Constant(), faults=Faults(dropout=0.2)), pool, fedsim.Stop(rounds=12),
        clients=20, cohort=6, eval_every=12,
    )  # fmt: skip
    return done.manifest["model_sha256"], done.manifest["events_sha256"]


def hold_cores(count: int) -> Any:
    """An actor that holds cores which workers would like to have."""

    class Holder:  # in here it travels by value: no worker could import it
        def ready(self) -> None: ...

    actor = ray.remote(Holder).options(num_cpus=count).remote()
    ray.get(actor.ready.remote())
    return actor


@pytest.mark.usefixtures("cluster")
def test_a_worker_without_a_core_does_not_hold_up_the_run(opened: Any) -> None:
    taken = hold_cores(2)
    pool = opened(workers=3, group=1)
    pool.submit([work(task) for task in range(6)])
    assert [checked(pool.result(task)).steps for task in range(6)] == [1] * 6
    assert pool._crew.joined() == 1
    assert pool._crew.missing() == "2 of 3 workers wait for a core each, Ray has 0 free"
    ray.kill(taken)
    wait_until(lambda: pool._take_in(0.1) or pool._crew.joined() == 3)
    assert pool.restarts == 0


@pytest.mark.usefixtures("cluster")
def test_a_busy_cluster_is_waited_for_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.pool.ray.PATIENCE", 0.5)
    monkeypatch.setattr("fedsim.pool.ray.SLICE", 0.2)
    taken = hold_cores(3)
    pool = opened(workers=2)
    pool.submit([work(0)])
    threading.Timer(1.5, ray.kill, [taken]).start()
    with caplog.at_level("WARNING", "fedsim"):
        assert checked(pool.result(0)).steps == 1
    assert "still waiting: 2 of 2 workers wait for a core each, Ray has 0 free" in caplog.text


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_costs_nothing_but_time(caplog: pytest.LogCaptureFixture) -> None:
    pool = RayPool(2, group=1)

    def kill_one() -> None:
        wait_until(lambda: any(member.process and member.load for member in pool._crew.members))
        os.kill(max(member.process for member in pool._crew.members), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with caplog.at_level("WARNING", "fedsim"):
        killed = hashes(pool)
    killer.join()
    assert killed == hashes(InlinePool())
    assert "they are trained again: ActorDiedError" in caplog.text


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_is_restarted_and_counted(caplog: pytest.LogCaptureFixture, opened: Any) -> None:
    pool = opened(workers=1, group=2)
    pool.submit([work(0)])
    pool.result(0)
    os.kill(pool._crew.members[0].process, signal.SIGKILL)
    pool.submit([work(task) for task in range(1, 7)])
    with caplog.at_level("WARNING", "fedsim"):
        assert [checked(pool.result(task)).steps for task in range(1, 7)] == [1] * 6
    assert pool.restarts == 1
    assert "Ray worker 0 died and was restarted" in caplog.text
    assert len(pool._store) == 0


@pytest.mark.usefixtures("cluster")
def test_tasks_of_a_lost_node_go_first_in_their_order(
    caplog: pytest.LogCaptureFixture, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's word is falsified here; test_ray_cluster.py removes a real node."""
    pool = opened(workers=1, group=1)
    wait_until(lambda: pool._take_in(0.1) or pool._crew.joined() == 1)
    pool.submit([work(task) for task in range(5)])
    assert [group.works[0].task for group in pool._queue] == [2, 3, 4]
    node, nodes = pool._crew.members[0].node, ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [{**each, "Alive": each["NodeID"] != node} for each in nodes])
    with caplog.at_level("WARNING", "fedsim"):
        pool._look_after_nodes()
    assert f"Ray node {node[:12]}" in caplog.text
    assert "was lost, 1 of 1 workers are gone; their tasks (2) are trained again" in caplog.text
    assert [group.works[0].task for group in pool._queue] == [0, 1, 2, 3, 4]
    monkeypatch.setattr("fedsim.pool.crew.HOPELESS_SECONDS", 0.0)
    with pytest.raises(fedsim.SimulationError, match="all Ray workers are lost, and for 0 s no node had a core"):
        pool._look_after_nodes()
    monkeypatch.undo()
    assert [checked(pool.result(task)).steps for task in range(5)] == [1] * 5


class Stillborn:
    """No worker process can import this file."""

    def __init__(self, *given: object) -> None:
        """Never made."""

    def hello(self) -> None:
        """Never asked."""


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_cannot_start_ends_the_run(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.pool.crew.Worker", Stillborn)
    pool = opened(workers=1)
    pool.submit([work(0)])
    with pytest.raises(fedsim.SimulationError, match="Ray worker 0 cannot be started: "):
        pool.result(0)


# ---- lines -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
def test_workers_of_this_machine_are_asked_through_lines_and_nothing_else(opened: Any) -> None:
    pool = opened(workers=2, group=1)
    wait_until(lambda: pool._take_in(0.1) or len(pool._crew.lines()) == 2)
    pool._store.references = None  # what would have to travel through Ray
    pool.submit([work(task) for task in range(4)])
    assert [checked(pool.result(task)).steps for task in range(4)] == [1] * 4
    assert all(line.is_open and not line.tickets for line in pool._crew.lines())
    assert pool._crew.off_line() == {}


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_idle_is_replaced_before_it_is_asked_anything(opened: Any) -> None:
    pool = opened(workers=2)
    pool.submit([work(task) for task in range(4)])
    assert checked(pool.result(0)).steps == 1
    wait_until(lambda: pool._take_in(0.1) or (pool._crew.joined() == 2 and not pool._running))
    os.kill(pool._crew.members[1].process, signal.SIGKILL)
    wait_until(lambda: pool._take_in(0.1) or pool.restarts == 1)
    assert pool._crew.joined() == 2
    assert [checked(pool.result(task)).steps for task in range(1, 4)] == [1] * 3


@pytest.mark.usefixtures("cluster")
def test_workers_without_a_line_are_called_through_ray(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("too many open files")

    monkeypatch.setattr("fedsim.pool.crew.Line", refuse)
    pool = opened(workers=1)
    pool.submit([work(task) for task in range(3)])
    assert [checked(pool.result(task)).steps for task in range(3)] == [1] * 3
    assert [member.near for member in pool._crew.members] == [True]
    assert pool._crew.lines() == []


@pytest.mark.usefixtures("cluster")
def test_where_a_region_finds_no_more_room_ray_goes_on_and_what_was_asked_before_is_heard(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = opened(workers=1, group=1)
    wait_until(lambda: pool._take_in(0.1) or len(pool._crew.lines()) == 1)
    pool.submit([work(0)])

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("fedsim.pool.regions.Region.seal", refuse)
    pool.submit([work(1), work(2)])
    assert [checked(pool.result(task)).steps for task in range(3)] == [1] * 3
    wait_until(lambda: pool._take_in(0.1) or pool._crew.lines() == [])
    assert pool.restarts == 0


@pytest.mark.usefixtures("cluster")
def test_a_mistake_while_a_line_is_served_ends_the_run_and_says_whose(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Worker):  # in here it travels by value: no worker could import it
        def train_near(self, letter: object) -> Answer:
            raise ArithmeticError("of the worker's own")

    monkeypatch.setattr("fedsim.pool.crew.Worker", Failing)
    pool = opened(workers=1)
    pool.submit([work(0)])
    with pytest.raises(fedsim.SimulationError, match="tasks 0: ArithmeticError: of the worker's own"):
        pool.result(0)


class Forking(fedsim.LocalSGD):
    """Has a child that holds whatever its parent held, and outlives it."""

    def begin(self, ctx: fedsim.Context) -> None:
        child = os.fork()
        time.sleep(20)
        if not child:
            os._exit(0)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_ray_has_killed_is_missed_even_if_a_child_of_its_holds_the_line_open(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.pool.ray.RETRIES", 0)
    monkeypatch.setattr("fedsim.pool.ray.SLICE", 0.2)
    pool = opened(Forking(), workers=1)
    pool.submit([work(0)])
    wait_until(lambda: pool._take_in(0.1) or any(line.is_open for line in pool._crew.lines()))
    (member,) = pool._crew.members
    wait_until(lambda: bool(Path(f"/proc/{member.process}/task/{member.process}/children").read_text()))
    ray.kill(member.actor)
    began = time.monotonic()
    with pytest.raises(fedsim.SimulationError, match="Ray worker 0 failed on clients 0, tasks 0: ActorDiedError"):
        pool.result(0)
    assert time.monotonic() - began < 15


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_cannot_open_its_line_is_called_through_ray(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Worker):  # in here it travels by value: no worker could import it
        def serve(self, ends: object) -> None:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr("fedsim.pool.crew.Worker", Short)
    pool = opened(workers=1, group=1)
    pool.submit([work(task) for task in range(4)])
    assert [checked(pool.result(task)).steps for task in range(4)] == [1] * 4
    assert pool._crew.lines() == []
    assert pool._running == {}
    assert pool.restarts == 0

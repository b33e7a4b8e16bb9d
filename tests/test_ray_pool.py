"""The Ray pool: the same bits as inline, nothing lost when a worker dies, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

import fedsim
from fedsim.pool import InlinePool, Pool
from fedsim.pool.ray import RayPool
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Constant

STRATEGIES = {"fedavg": FedAvg, "fedasync": FedAsync, "fedbuff": FedBuff}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests here; pools find it running and leave it running."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(pool: Pool, strategy: str = "fedbuff", rounds: int = 3, local: fedsim.LocalSGD | None = None) -> fedsim.Run:
    return fedsim.simulate(
        STRATEGIES[strategy](local or fedsim.LocalSGD(momentum=0.5, steps=3)),
        fedsim.Classification(),
        fedsim.System(Lognormal(), Constant(), faults=Faults(dropout=0.2)),
        pool,
        fedsim.Stop(rounds=rounds),
        clients=20,
        cohort=6,
        eval_every=rounds,
    )


def hashes(one: fedsim.Run) -> tuple[str, str]:
    return one.manifest["model_sha256"], one.manifest["events_sha256"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_workers_and_groups_do_not_show(strategy: str) -> None:
    inline = hashes(run(InlinePool(), strategy))
    for workers, group in ((1, None), (2, 1), (3, 12)):
        assert hashes(run(RayPool(workers, group=group), strategy)) == inline, (workers, group)


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_costs_nothing_but_time(caplog: pytest.LogCaptureFixture) -> None:
    pool = RayPool(2, group=1)

    def kill_one() -> None:
        while not any(pool._processes):
            time.sleep(0.02)
        os.kill(max(pool._processes), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with caplog.at_level("WARNING", "fedsim"):
        killed = run(pool, rounds=12)
    killer.join()
    assert pool.restarts == 1
    assert "died and was restarted" in caplog.text
    assert hashes(killed) == hashes(run(InlinePool(), rounds=12))


class Broken(fedsim.LocalSGD):
    def direction(self, ctx: fedsim.Context, x: torch.Tensor, batch: object) -> torch.Tensor:
        if ctx.clients[0] == 3 and ctx.step == 1:  # type: ignore[attr-defined]
            raise ZeroDivisionError("client three")
        return super().direction(ctx, x, batch)


@pytest.mark.usefixtures("cluster")
def test_client_code_that_raises_is_named_as_inline() -> None:
    texts = []
    for pool in (InlinePool(), RayPool(2)):
        with pytest.raises(fedsim.SimulationError) as caught:
            run(pool, rounds=20, local=Broken(steps=3))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    for piece in ("Broken raised ZeroDivisionError: client three", "client 3, task ", "local step 2"):
        assert piece in texts[0]


class Deadly(fedsim.LocalSGD):
    def direction(self, ctx: fedsim.Context, x: torch.Tensor, batch: object) -> torch.Tensor:
        if ctx.clients[0] == 3:
            os._exit(1)
        return super().direction(ctx, x, batch)


@pytest.mark.usefixtures("cluster")
def test_client_code_that_kills_its_worker_every_time_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.pool.ray.RETRIES", 1)
    with pytest.raises(fedsim.SimulationError, match="Ray worker 0 failed"):
        run(RayPool(1), rounds=20, local=Deadly(steps=3))


@pytest.mark.usefixtures("cluster")
def test_too_many_gpus_are_refused() -> None:
    with pytest.raises(fedsim.ConfigError, match="2 workers need 2 GPUs, Ray has 0"):
        run(RayPool(2, gpus_per_worker=1))


@pytest.mark.parametrize("group", [1, None])
@pytest.mark.usefixtures("cluster")
def test_an_error_in_a_task_nobody_waits_for_ends_no_run(group: int | None) -> None:
    def outcome(pool: Pool) -> tuple[str, str]:
        strategy = FedAvg(Broken(steps=3), over_selection=3.0)
        speeds = Lognormal(sigma=2.0)
        problem = fedsim.Quadratic()
        return hashes(fedsim.simulate(strategy, problem, fedsim.System(speeds), pool, fedsim.Stop(rounds=1), seed=seed))

    # A seed with which client 3 is asked, and called back before it answers.
    for seed in range(40):
        whole = fedsim.simulate(
            FedAvg(over_selection=3.0), fedsim.Quadratic(), fedsim.System(Lognormal(sigma=2.0)), seed=seed,
            stop=fedsim.Stop(rounds=1),
        )  # fmt: skip
        if (whole.events[whole.events.client == 3].outcome == "cancelled").any():
            break
    assert outcome(InlinePool()) == outcome(RayPool(2, group=group))


@pytest.mark.usefixtures("cluster")
def test_the_object_store_holds_no_version_that_nobody_needs() -> None:
    pool = RayPool(2)
    stored: list[int] = []

    def watch(_: object) -> None:
        stored.append(len(pool._stored))

    fedsim.simulate(
        FedAsync(), fedsim.Quadratic(), fedsim.System(Lognormal()), pool, fedsim.Stop(updates=60), observer=watch
    )
    assert 0 < max(stored) <= 10  # never more versions than tasks in flight
    assert pool._stored == {}


@pytest.mark.usefixtures("cluster")
def test_too_many_workers_for_the_ray_that_runs_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(fedsim.ConfigError, match="workers=4: the Ray it runs on has 3 cores"):
        fedsim.simulate(fedsim.Asynchronous(), fedsim.Quadratic(), pool=RayPool(4), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cluster")
def test_results_nobody_asks_for_are_not_kept() -> None:
    pool, kept = RayPool(2), []

    def watch(_: object) -> None:
        kept.append(len(pool._results) + len(pool._due))

    # Over-selection cancels every straggler, trained or not; drop-outs are never trained.
    fedsim.simulate(
        FedAvg(over_selection=2.0),
        fedsim.Quadratic(),
        fedsim.System(Lognormal(jitter=0.5), faults=Faults(dropout=0.2)),
        pool,
        fedsim.Stop(rounds=15),
        clients=30,
        observer=watch,
    )
    assert max(kept) <= 20
    assert pool._due == set()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_answers_is_refused_at_once(address: str) -> None:
    # In a process of its own: where a Ray runs already, it is used whatever the address.
    code = (
        "import fedsim\n"
        "from fedsim.pool.ray import RayPool\n"
        "try:\n"
        f"    fedsim.simulate(fedsim.Asynchronous(), fedsim.Quadratic(), pool=RayPool(address='{address}'))\n"
        "except fedsim.ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"pool.address={address}: no Ray there")


def test_inline_never_imports_ray() -> None:
    code = "import sys, fedsim; fedsim.simulate; fedsim.Classification; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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

            assert go(RayPool(2))["model_sha256"] == go(InlinePool())["model_sha256"]
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
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.stdout.strip().endswith("done"), done.stdout + done.stderr

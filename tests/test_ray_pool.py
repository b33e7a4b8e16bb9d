"""The Ray pool: the same bits as inline, nothing lost when a worker dies, nothing left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from support import checked, quadratic, wait_until, work

import fedsim
from fedsim.pool import InlinePool, Pool
from fedsim.pool.connection import _refuse_silent
from fedsim.pool.ray import RayPool
from fedsim.rng import Randomness
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedprox import FedProx
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Constant
from fedsim.training import Result
from fedsim.vectors import Layout

pytestmark = pytest.mark.usefixtures("all_that_is_submitted_travels")


class Control(fedsim.LocalSGD):
    """Steps are shifted by a message, and a state counts the client's own tasks."""

    def initial_state(self, layout: Layout) -> dict[str, torch.Tensor]:
        return {"tasks": torch.zeros(1), "last": torch.zeros(layout.size, dtype=torch.bfloat16)}

    def direction(self, ctx: fedsim.Context, x: torch.Tensor, batch: object) -> torch.Tensor:
        return ctx.grad(x, batch) + ctx.message["shift"].to(x.dtype) + 0.01 * ctx.state["tasks"]

    def finish(self, ctx: fedsim.Context, x: torch.Tensor) -> dict[str, torch.Tensor]:
        ctx.state = {"tasks": ctx.state["tasks"] + 1, "last": x.to(torch.bfloat16)}
        return super().finish(ctx, x)


class Shifting(FedBuff):
    """FedBuff that sends a message in half precision with every task."""

    def message(self, fed: fedsim.Federation, task: fedsim.Task) -> dict[str, torch.Tensor]:
        return {"shift": (0.001 * fed.model).to(torch.bfloat16)}


STRATEGIES = {"fedavg": FedAvg, "fedasync": FedAsync, "fedbuff": FedBuff, "fedprox": FedProx, "message": Shifting}


def run(pool: Pool, strategy: str = "fedbuff", rounds: int = 3, local: fedsim.LocalSGD | None = None) -> fedsim.Run:
    rule = Control if strategy == "message" else fedsim.LocalSGD
    return fedsim.simulate(
        STRATEGIES[strategy](local or rule(momentum=0.5, steps=3)),
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


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
def test_workers_and_groups_do_not_show() -> None:
    """A sample of the matrix in test_ray_cluster.py; other tests here compare one worker."""
    assert hashes(run(RayPool(2, group=2), "message")) == hashes(run(InlinePool(), "message"))


@pytest.mark.usefixtures("cluster", "far")
def test_whether_workers_reach_the_drivers_memory_does_not_show() -> None:
    assert hashes(run(RayPool(2, group=2), "message")) == hashes(run(InlinePool(), "message"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


class Echo(fedsim.LocalSGD):
    """Sends up what it was sent down, and swaps two halves of its state."""

    def run(self, ctx: fedsim.Context) -> dict[str, torch.Tensor]:
        ctx.state = {"a": ctx.state["b"], "b": ctx.state["a"]}
        return dict(ctx.message)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("way", ["near", "far"])
def test_tensors_of_every_precision_come_back_to_the_bit(
    way: str, opened: Callable[..., RayPool], request: pytest.FixtureRequest
) -> None:
    if way == "far":
        request.getfixturevalue("far")
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # every bfloat16 there is, NaNs included
    message = {
        "brain": patterns.view(torch.bfloat16),
        "half": patterns.view(torch.float16),
        "single": torch.randn(3, 5),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    }
    state = {"a": patterns.view(torch.bfloat16)[::2], "b": torch.randn(7)}
    pool = opened(Echo(), workers=1, group=2)
    # The second has nothing to share a stack with.
    pool.submit([work(0, message=message, state=state), work(1, message={"brain": message["brain"]}, state=state)])
    for task, sent in ((0, message), (1, {"brain": message["brain"]})):
        result = checked(pool.result(task))
        for got, expected in ((result.payload, sent), (result.state, {"a": state["b"], "b": state["a"]})):
            assert got.keys() == expected.keys()
            for name, tensor in expected.items():
                assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
                assert torch.equal(bits(got[name]), bits(tensor)), name


def test_a_rule_changed_in_mid_run_changes_nothing_inline_either() -> None:
    rule, results = fedsim.LocalSGD(steps=1), []
    for momentum in (0.0, 0.9):
        pool, rule.momentum = InlinePool(), 0.0
        pool.open(quadratic(), {"main": rule}, Randomness(0))
        rule.momentum = momentum
        rule.weight_decay = momentum
        pool.submit([work(0)])
        results.append(pool.result(0).payload["delta"])
    assert torch.equal(*results)


# ---- what is asked of a pool ---------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 0, 1.5, "all", True, -1])
@pytest.mark.parametrize("make", [InlinePool, RayPool])
def test_group_is_auto_or_a_whole_number(make: Callable[..., Pool], group: object) -> None:
    with pytest.raises(fedsim.ConfigError, match=rf"^group={group}: must be auto or a whole number >= 1$"):
        make(group=group)
    assert make().group == "auto"  # type: ignore[attr-defined]
    assert make(group=3.0).group == 3  # type: ignore[attr-defined]


@pytest.mark.usefixtures("cluster")
def test_ready_never_waits_and_hands_over_once(opened: Callable[..., RayPool]) -> None:
    pool, inline = opened(workers=1, group=1), InlinePool()
    inline.open(quadratic(), {"main": fedsim.LocalSGD(steps=1)}, Randomness(0))
    for each in (inline, pool):
        each.submit([work(0), work(1)])
        each.forget(1)
    began = time.monotonic()
    assert pool.ready([0]) == {}  # its worker has yet to start
    assert time.monotonic() - began < 2.0
    found: dict[int, Result] = {}

    def there() -> bool:
        found.update(pool.ready([0]))
        return bool(found)

    wait_until(there)
    assert torch.equal(inline.ready([0])[0].payload["delta"], found[0].payload["delta"])
    for each in (inline, pool):
        for task in (0, 1, 7):  # handed over, forgotten, never submitted
            assert each.ready([task]) == {}
            with pytest.raises(fedsim.SimulationError, match=f"no result of task {task} to come"):
                each.result(task)


@pytest.mark.usefixtures("cluster")
def test_an_error_comes_with_the_result_and_is_not_raised(opened: Callable[..., RayPool]) -> None:
    pool, inline = opened(Hungry(), workers=1), InlinePool()
    inline.open(quadratic(), {"main": Hungry()}, Randomness(0))
    for each in (inline, pool):
        each.submit([work(task) for task in range(4)])
        result = each.result(1)
        assert "Hungry raised MemoryError: out of memory training 4 tasks together, try pool.group=2" in str(
            result.error
        )
        assert "(client 1, task 1, job 'main', local step 0)" in str(result.error)
        each.submit([work(9)])
        with pytest.raises(fedsim.SimulationError, match="out of memory: one task alone does not fit"):
            checked(each.result(9))


class Hungry(fedsim.LocalSGD):
    def begin(self, ctx: fedsim.Context) -> None:
        raise MemoryError


class HungryTorch(fedsim.LocalSGD):
    def begin(self, ctx: fedsim.Context) -> None:
        torch.empty(2**52)


def test_what_the_allocator_of_torch_says_is_out_of_memory_too() -> None:
    pool = InlinePool()
    pool.open(quadratic(), {"main": HungryTorch()}, Randomness(0))
    pool.submit([work(0), work(1)])
    assert "out of memory training 2 tasks together, try pool.group=1 (" in str(pool.result(0).error)


# ---- mistakes ------------------------------------------------------------------------------------


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
    with pytest.raises(
        fedsim.SimulationError, match=r"Ray worker 0 failed on clients .*\b3\b.*, tasks .*: ActorDiedError"
    ):
        run(RayPool(1), rounds=20, local=Deadly(steps=3))


@pytest.mark.usefixtures("cluster")
def test_too_many_gpus_are_refused() -> None:
    with pytest.raises(fedsim.ConfigError, match="2 workers need 2 GPUs, Ray has 0"):
        run(RayPool(2, gpus_per_worker=1))


@pytest.mark.parametrize("group", [1, "auto"])
@pytest.mark.usefixtures("cluster")
def test_an_error_in_a_task_nobody_waits_for_ends_no_run(group: int | str) -> None:
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
    assert outcome(InlinePool()) == outcome(RayPool(1, group=group))


@pytest.mark.usefixtures("cluster", "far")
def test_the_object_store_holds_no_version_that_nobody_needs() -> None:
    pool = RayPool(2)
    stored: list[int] = []

    def watch(_: object) -> None:
        stored.append(len(pool._store))

    fedsim.simulate(
        FedAsync(), fedsim.Quadratic(), fedsim.System(Lognormal()), pool, fedsim.Stop(updates=60), observer=watch
    )
    assert 0 < max(stored) <= 10  # never more versions than tasks in flight
    assert len(pool._store) == 0


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


@pytest.mark.usefixtures("cluster")
def test_the_head_of_a_ray_that_runs_is_taken_and_another_port_of_its_is_not() -> None:
    head = ray.get_runtime_context().gcs_address
    refused = []
    for address in (head, f"{head.rpartition(':')[0]}:1"):
        try:
            _refuse_silent(address)
        except fedsim.ConfigError:
            refused.append(address)
    assert refused == [f"{head.rpartition(':')[0]}:1"]


@pytest.mark.usefixtures("cluster")
def test_a_model_in_half_precision_runs_to_its_end_with_the_same_bits() -> None:
    def half() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).to(torch.bfloat16)

    def go(pool: Pool) -> fedsim.Run:
        problem, stop = fedsim.Classification(model=half), fedsim.Stop(rounds=2)
        return fedsim.simulate(FedAvg(fedsim.LocalSGD(steps=2)), problem, pool=pool, stop=stop, clients=8, cohort=4)

    inline = go(InlinePool())
    assert hashes(go(RayPool(1))) == hashes(inline)
    assert next(iter(inline.model.values())).dtype == torch.bfloat16

"""Stacks of any module, as a GPU trains them, tried on the CPU against the general path; devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import checked
from test_general import SEED, odd, prepared
from torch import Tensor, nn

import fedsim
from fedsim.checks import ConfigError
from fedsim.identity import differences, identify
from fedsim.local import Context, LocalSGD
from fedsim.pool import InlinePool
from fedsim.pool.crew import shared_out
from fedsim.pool.ray import RayPool
from fedsim.problems.classification import Classification
from fedsim.problems.models import CharLstm, LeNet, Mlp
from fedsim.problems.quadratic import Quadratic
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.training import GeneralTrainer, StackedTrainer, Trainer, VmapTrainer, Work, trainer_for
from fedsim.training.devices import reproducible
from fedsim.training.vmapped import Vmapped

RULES = {
    "plain": LocalSGD(lr=0.05, batch_size=4),
    "momentum": LocalSGD(lr=0.05, batch_size=4, momentum=0.9, weight_decay=0.01, prox=0.1, clip=1.0),
    "all": LocalSGD(lr=0.05, batch_size=None),
}


class Normalised(nn.Module):
    """A residual block with GroupNorm, small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = nn.functional.adaptive_avg_pool2d(x + self.second(x), 1)
        logits: Tensor = self.last(x.flatten(1))
        return logits


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "lenet": (LeNet(), (1, 16, 16)),
    "lstm": (CharLstm(4, 6), (5,)),
    "normalised": (Normalised(), (3, 6, 6)),
}


def works(problem: Classification, *steps: int) -> list[Work]:
    found = []
    for client, count in enumerate(steps):
        start = problem.initial() * (1 + 0.01 * client)
        message, state = {"shift": torch.full_like(start, 0.1)}, {"own": torch.full_like(start, float(client))}
        found.append(Work(client, client, 0, "train", start, message, state, 0.05, count))
    return found


def trained(trainer: Trainer, group: list[Work]) -> list[dict[str, Tensor]]:
    return [{**each.payload, **{f"state {key}": value for key, value in each.state.items()}} for each in
            (checked(result) for result in trainer.train(group))]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_a_stack_gives_what_each_client_gives_alone(name: str, rule: str) -> None:
    model, shape = MODELS[name]
    problem, jobs = prepared(model, shape, 9, 4, 1, 0, 6), {"train": RULES[rule]}
    group = works(problem, 5, 2, 3, 0, 1)
    stacked = trained(VmapTrainer(problem, jobs, Randomness(SEED)), group)
    alone = trained(GeneralTrainer(problem, jobs, Randomness(SEED)), group)
    for one, other in zip(stacked, alone, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-5)
    assert alone[0]["delta"].abs().max() > 1e-3


class Wide(LocalSGD):
    """Uses all of a context: message, state, the gradient over all data, and randomness."""

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        ctx.state["own"] = ctx.freeze(ctx.state["own"] + 1, ctx.state["own"])
        return ctx.grad(x, batch) + ctx.grad(x) + ctx.message["shift"] + ctx.rng("own").uniform(1).mean() * 0


def test_a_rule_of_ones_own_sees_the_same_in_a_stack() -> None:
    problem, jobs = prepared(LeNet(), (1, 16, 16), 9, 4, 1), {"train": Wide(lr=0.05, batch_size=4)}
    group = works(problem, 5, 2, 3)
    stacked = trained(VmapTrainer(problem, jobs, Randomness(SEED)), group)
    alone = trained(GeneralTrainer(problem, jobs, Randomness(SEED)), group)
    for one, other in zip(stacked, alone, strict=True):
        torch.testing.assert_close(one["delta"], other["delta"], rtol=0, atol=1e-5)
        assert torch.equal(one["state own"], other["state own"])


def test_a_stack_in_bfloat16_is_close_to_one_client_in_it() -> None:
    problem = prepared(LeNet(), (1, 16, 16), 9, 4, precision="bfloat16")
    jobs, group = {"train": RULES["plain"]}, works(problem, 5, 2)
    stacked = trained(VmapTrainer(problem, jobs, Randomness(SEED)), group)
    alone = trained(GeneralTrainer(problem, jobs, Randomness(SEED)), group)
    for one, other in zip(stacked, alone, strict=True):
        # Products round to 0.4 % each and gradients are small differences: 10 % was seen; other batches give 100 %.
        assert (one["delta"] - other["delta"]).norm() < 0.3 * other["delta"].norm()


def test_what_only_fills_a_batch_cannot_reach_the_gradient() -> None:
    problem = prepared(LeNet(), (1, 16, 16), 5, 3)
    jobs = {"train": LocalSGD(lr=0.05, batch_size=4)}
    expected = trained(VmapTrainer(problem, jobs, Randomness(SEED)), works(problem, 2, 1))[0]
    other = copy.copy(problem)
    other.train_x = problem.train_x.clone()
    other.train_x[problem.rows(1)] = float("nan")
    stacked = trained(VmapTrainer(other, jobs, Randomness(SEED)), works(problem, 2, 1))
    assert torch.equal(stacked[0]["delta"], expected["delta"])
    assert stacked[1]["delta"].isnan().any()


class Peeking(nn.Module):
    """Looks at a value, which no stack of clients has one of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits if logits.sum().item() > 0 else 2 * logits


def test_models_that_cannot_be_stacked_are_known() -> None:
    for model, shape, expected in ((Peeking(), (4,), False), (Normalised(), (3, 6, 6), True)):
        network = prepared(model, shape, 3).network()
        assert network is not None
        assert Vmapped(network, "cpu").takes() == expected
    assert prepared(odd, (2, 10, 12), 3).network() is None  # it draws
    assert prepared(LeNet(), (1, 16, 16), 3, precision="bfloat16").network() is not None


# ---- devices -----------------------------------------------------------------------------------------


def test_on_a_cpu_the_kind_of_trainer_is_the_problems_alone() -> None:
    jobs = {"train": RULES["plain"]}
    assert type(trainer_for(prepared(LeNet(), (1, 16, 16), 3), jobs, Randomness(0))) is GeneralTrainer
    assert type(trainer_for(prepared(Mlp(4), (1, 4, 4), 3), jobs, Randomness(0))) is StackedTrainer
    assert (
        type(trainer_for(prepared(Mlp(4), (1, 4, 4), 3, precision="bfloat16"), jobs, Randomness(0))) is GeneralTrainer
    )


@pytest.mark.parametrize(
    ("kind", "model", "rule"),
    [(VmapTrainer, *each) for each in (("lenet", "plain"), ("lstm", "all"), ("normalised", "momentum"))]
    + [(GeneralTrainer, *each) for each in (("lenet", "momentum"), ("normalised", "momentum"))]
    + [(StackedTrainer, "mlp", each) for each in RULES],
)
def test_no_operation_of_a_task_mixes_devices(kind: Any, model: str, rule: str) -> None:
    # The device "meta" holds no values, but refuses tensors of another: all goes well until results are to come back.
    made, shape = {**MODELS, "mlp": (Mlp(4), (1, 4, 4))}[model]
    problem, jobs = prepared(made, shape, 9, 4), {"train": RULES[rule]}
    results = kind(problem, jobs, Randomness(SEED), "meta").train(works(problem, 5, 2))
    for result, steps in zip(results, (5, 2), strict=True):
        assert f"Cannot copy out of meta tensor; no data! (client {result.error.task}," in str(result.error)
        assert f"local step {steps})" in str(result.error)


def test_a_copy_on_a_device_trains_the_same_and_is_apart() -> None:
    problem = prepared(LeNet(), (1, 16, 16), 6)
    x = problem.initial()
    expected = problem.gradient(x, 0, torch.arange(3), 0)
    other = problem.on(torch.device("cpu"))
    other.descend(x.clone(), 0, None, 0, torch.tensor([0.5]))
    assert torch.equal(other.gradient(x, 0, torch.arange(3), 0), expected)
    assert other._flat.module is not problem._flat.module
    assert torch.equal(problem._flat.values, x)


def test_problems_in_main_memory_say_so() -> None:
    with pytest.raises(ConfigError, match=r"^device=cuda: Quadratic is trained in main memory only, use device=cpu$"):
        Quadratic().on(torch.device("cuda"))


def test_a_device_that_is_not_there_is_one_clear_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"^device=cuda: torch finds no GPU here; use device=cpu$"):
        InlinePool(device="cuda")


def test_devices_have_names() -> None:
    for pool in (InlinePool, RayPool):
        with pytest.raises(ConfigError, match=r"^device=gpu: unknown name, "):
            pool(device="gpu")
    with pytest.raises(ConfigError, match=r"^gpus_per_worker=0: must be > 0 with device=cuda, or null$"):
        RayPool(device="cuda", gpus_per_worker=0)


def test_all_gpus_are_shared_out_and_every_worker_fits_on_one() -> None:
    assert shared_out(3, None) == (3, 1.0)
    assert shared_out(2, 2) == (2, 1.0)
    for gpus, workers, each in ((1, 2, 0.5), (1, 3, 0.3333), (2, 3, 0.5), (4, 2, 1.0), (2, 7, 0.25)):
        assert shared_out(gpus, workers) == (workers, each)
        assert gpus * int(1 / each) >= workers
    with pytest.raises(ConfigError, match=r"^pool.device=cuda: the Ray it runs on has no GPU; use device=cpu$"):
        shared_out(0, 2)


def test_on_a_gpu_device_and_group_are_part_of_what_a_run_is() -> None:
    assert InlinePool(3, kernel="torch").identity() == {"kernel": "torch"} == RayPool(2, kernel="torch").identity()
    pool = RayPool(2, group=5, device="cuda")
    assert pool.identity() == {"pool": "ray", "device": "cuda", "group": 5, "workers": 2}
    plain, other = identify({}, {}, []), identify({}, {}, [], pool.identity())
    assert "execution" not in plain
    assert other["execution"]["group"] == 5
    assert differences(plain, plain) == [] == differences(other, other)
    assert "device None -> cuda" in differences(plain, other)
    assert differences(other, identify({}, {}, [], {**pool.identity(), "group": 6})) == ["group 5 -> 6"]


def test_a_runs_manifest_names_the_kernel_and_no_device_on_a_cpu() -> None:
    run = fedsim.simulate(FedAvg(), Quadratic(), stop=fedsim.Stop(rounds=1))
    assert run.manifest["execution"].keys() == {"kernel"}


def test_reproducible_algorithms_are_asked_for_on_a_gpu_only_and_given_up_again() -> None:
    for kind, wanted in (("cpu", False), ("cuda", True)):
        with reproducible(torch.device(kind)):
            assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not torch.are_deterministic_algorithms_enabled()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@needs_gpu
@pytest.mark.parametrize("name", [*MODELS, "mlp", "odd"])
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    model, shape = {**MODELS, "mlp": (Mlp(4), (1, 4, 4)), "odd": (odd, (2, 10, 12))}[name]
    problem, jobs = prepared(model, shape, 9, 4, 1, 0, 6), {"train": RULES["momentum"]}
    group = works(problem, 5, 2, 3, 0, 1)
    first, again = (trained(trainer_for(problem, jobs, Randomness(SEED), "cuda"), group) for _ in range(2))
    expected = trained(trainer_for(problem, jobs, Randomness(SEED)), group)
    for one, same, other in zip(first, again, expected, strict=True):
        assert one["delta"].device.type == "cpu"
        assert torch.equal(one["delta"], same["delta"])
        if name != "odd":  # a GPU draws other noise
            torch.testing.assert_close(one["delta"], other["delta"], rtol=0, atol=1e-4)


@needs_gpu
def test_a_run_on_a_gpu_names_device_and_group() -> None:
    pool = InlinePool(4, "cuda")
    run = fedsim.simulate(FedAvg(), Classification(model=LeNet()), pool=pool, stop=fedsim.Stop(rounds=1))
    assert run.manifest["execution"] == {"pool": "inline", "device": "cuda", "group": 4}

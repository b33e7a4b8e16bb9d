"""The general path: any module on a CPU, client by client, against autograd and hand-written loops."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import checked
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.checks import ConfigError
from fedsim.data.partitions import Indices, Partition, Table
from fedsim.data.sources import Dataset
from fedsim.local import Context, LocalSGD
from fedsim.problems.classification import Classification
from fedsim.problems.models import CharLstm, Cnn, LeNet, Mlp, Model, ResNet18Gn
from fedsim.problems.modules import FlatModule, as_new, torch_seeded
from fedsim.problems.sequential import Sequential, sequential_of
from fedsim.rng import Randomness
from fedsim.training import GeneralTrainer, Work, trainer_for

SEED = 4


class Sizes(Partition):
    """The first client holds the first so many examples, and so on."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        return np.repeat(np.arange(clients), self.sizes)


def prepared(model: Any, shape: tuple[int, ...], *sizes: int, classes: int = 3, **more: Any) -> Classification:
    generator = torch.Generator().manual_seed(1)
    n = sum(sizes) + 4
    codes = len(shape) == 1 and isinstance(model, CharLstm)
    x = (
        torch.randint(classes, (n, *shape), generator=generator).float()
        if codes
        else torch.randn(n, *shape, generator=generator)
    )
    data = Dataset(x[:-4], torch.arange(n - 4) % classes, x[-4:], torch.arange(4) % classes, classes)
    problem = Classification(data, model, Sizes(*sizes), validation=0, **more)
    problem.prepare(len(sizes), Randomness(SEED))
    return problem


def works(problem: Classification, *steps: int, lr: float = 0.05) -> list[Work]:
    start = problem.initial()
    return [Work(i, i, 0, "train", start, {}, {}, lr, count) for i, count in enumerate(steps)]


def deltas(problem: Classification, rule: LocalSGD, *steps: int) -> list[Tensor]:
    trainer = GeneralTrainer(problem, {"train": rule}, Randomness(SEED))
    return [checked(result).payload["delta"] for result in trainer.train(works(problem, *steps, lr=rule.lr))]


def batches(client: int, samples: int, size: int, steps: int) -> list[Tensor]:
    """The mini-batches of a client's first task, from the keys alone."""
    found: list[Tensor] = []
    for epoch in range(steps):
        order = torch.from_numpy(Randomness(SEED)("batches", client, 0, epoch).permutation(samples))
        found += list(order.split(size))
    return found[:steps]


# ---- derivatives written down ----------------------------------------------------------------------


def odd() -> nn.Module:
    """Every layer there is a derivative of, in unusual forms."""
    return nn.Sequential(
        nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        nn.Tanh(),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Dropout(0.3),
        nn.Sequential(nn.Identity(), nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2), nn.ReLU()),
        nn.MaxPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(24, 7, bias=False),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(7, 3),
    )


def first_relu() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Dropout(1.0), nn.Linear(200, 3))


WRITTEN: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (odd, (2, 10, 12)),
    (first_relu, (1, 10, 20)),
    (lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)), (5,)),
    (lambda: LeNet().build((3, 16, 16), 3), (3, 16, 16)),
    (lambda: Cnn().build((1, 9, 12), 3), (1, 9, 12)),
]


@pytest.mark.parametrize(("make", "shape"), WRITTEN, ids=["odd", "first relu", "mlp", "lenet", "cnn"])
@pytest.mark.parametrize("size", [1, 7])
def test_derivatives_written_down_are_those_of_autograd(
    make: Callable[[], nn.Module], shape: tuple[int, ...], size: int
) -> None:
    with torch_seeded(3):
        module = make().double()
        images, labels = torch.randn(size, *shape, dtype=torch.float64), torch.randint(3, (size,))
    flat, given = FlatModule(module), images.clone()
    written = sequential_of(module, flat.layout, shape)
    assert written is not None
    x = flat.values.clone()
    expected = flat.gradient(x, images, labels, 11)
    gradient = written.gradient(x, images, labels, 11)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    moved = x.clone()
    written.descend(moved, images, labels, 0.3, 11)
    torch.testing.assert_close(moved, x - 0.3 * expected, rtol=0, atol=1e-12)
    assert torch.equal(images, given)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Linear(3, 3))
    module[1].weight.requires_grad_(False)
    return module


def shared() -> nn.Module:
    square = nn.Linear(48, 48)
    return nn.Sequential(nn.Flatten(), square, nn.Dropout(0.1), square, nn.Linear(48, 3))


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(48, 3))
    module[2].register_forward_hook(lambda _, __, output: 2 * output)
    return module


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(Twice(), nn.Flatten(), nn.Linear(48, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(64, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(64, 3)),
        nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(36, 3)),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.1).eval(), nn.Linear(48, 3)),
        frozen(),
        shared(),
        hooked(),
    ],
    ids=["unknown", "same", "circular", "linear on images", "eval", "frozen", "shared", "hooked"],
)
def test_what_has_no_derivative_written_down_is_left_to_autograd(module: nn.Module) -> None:
    trained = FlatModule(copy.deepcopy(module)).layout
    assert sequential_of(module, trained, (3, 4, 4)) is None


# ---- whole tasks -----------------------------------------------------------------------------------

RULES = [LocalSGD(lr=0.05, batch_size=4), LocalSGD(lr=0.05, batch_size=4, momentum=0.9, weight_decay=0.01)]
MODELS: list[tuple[Any, tuple[int, ...]]] = [
    (LeNet(), (1, 16, 16)),
    (Cnn(), (3, 8, 8)),
    (ResNet18Gn(), (3, 8, 8)),
    (CharLstm(4, 6), (5,)),
]


@pytest.mark.parametrize(("model", "shape"), MODELS, ids=["lenet", "cnn", "resnet", "lstm"])
@pytest.mark.parametrize("rule", RULES, ids=["plain", "momentum"])
def test_a_task_is_the_loop_anybody_would_write(model: Model, shape: tuple[int, ...], rule: LocalSGD) -> None:
    problem = prepared(model, shape, 6)
    with torch_seeded(0):
        module = model.build(shape, 3)
    parameters = dict(module.named_parameters())
    for name, value in problem.layout.split(problem.initial()).items():
        parameters[name].data.copy_(value)
    optimiser = torch.optim.SGD(module.parameters(), rule.lr, rule.momentum, weight_decay=rule.weight_decay)
    images, labels = problem.examples(0)
    for batch in batches(0, 6, 4, 3):
        optimiser.zero_grad()
        cross_entropy(module(images[batch]), labels[batch]).backward()
        optimiser.step()
    expected = problem.layout.join(parameters) - problem.initial()
    torch.testing.assert_close(deltas(problem, rule, 3)[0], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("model", "shape"), [*MODELS, (odd, (2, 10, 12))], ids=["lenet", "cnn", "resnet", "lstm", "odd"]
)
@pytest.mark.parametrize("rule", RULES, ids=["plain", "momentum"])
def test_what_was_trained_before_does_not_show(model: Any, shape: tuple[int, ...], rule: LocalSGD) -> None:
    problem = prepared(model, shape, 5, 1, 0, 6)
    together = deltas(problem, rule, 3, 2, 0, 2)
    trainer = GeneralTrainer(problem, {"train": rule}, Randomness(SEED))
    for i in (3, 0, 1, 2):
        problem.evaluate(problem.initial() + i)
        alone = checked(trainer.train([works(problem, 3, 2, 0, 2)[i]])[0])
        assert torch.equal(alone.payload["delta"], together[i])
    assert torch.equal(deltas(pickle.loads(pickle.dumps(problem)), rule, 3, 2, 0, 2)[0], together[0])
    assert problem.evaluate(problem.initial()) == prepared(model, shape, 5, 1, 0, 6).evaluate(problem.initial())


@pytest.mark.parametrize(("model", "shape"), [(odd, (2, 10, 12)), (CharLstm(4, 6), (5,))], ids=["written", "autograd"])
def test_how_a_vector_lies_in_memory_does_not_show(model: Any, shape: tuple[int, ...]) -> None:
    problem = prepared(model, shape, 5)
    x, lr, batch = problem.initial(), torch.tensor([0.1]), torch.tensor([3, 1, 4])
    shifted = torch.empty(len(x) + 1)[1:].copy_(x)
    strided = torch.empty(len(x), 2)[:, 0].copy_(x)
    expected = problem.gradient(x, 0, batch, 5)
    for other in (shifted, strided):
        assert torch.equal(problem.gradient(other, 0, batch, 5), expected)
        assert torch.equal(other, x)
    problem.descend(x, 0, batch, 5, lr)
    assert as_new(x) is x
    assert all(as_new(other).is_contiguous() and as_new(other).data_ptr() % 64 == 0 for other in (shifted, strided))
    for other in (shifted, strided):
        problem.descend(other, 0, batch, 5, lr)
        assert torch.equal(other, x)


@pytest.mark.parametrize("model", [odd, lambda: nn.Sequential(Twice(), odd())], ids=["written", "autograd"])
def test_two_gradients_of_one_step_share_their_noise_and_two_steps_do_not(model: Any) -> None:
    seen: list[Tensor] = []

    class Both(LocalSGD):
        def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
            first, second = ctx.grad(x, batch), ctx.grad(x, batch)
            assert torch.equal(first, second)
            seen.append(first)
            return 0 * first

    deltas(prepared(model, (2, 10, 12), 3), Both(batch_size=3), 2)
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


def test_torchs_generator_is_left_as_it_was() -> None:
    for model in (odd, lambda: nn.Sequential(Twice(), odd())):
        problem = prepared(model, (2, 10, 12), 5)
        before = torch.get_rng_state()
        deltas(problem, RULES[0], 2)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_step_takes_the_rate_that_the_rule_has_set() -> None:
    class Halved(LocalSGD):
        def begin(self, ctx: Context) -> None:
            ctx.lr = ctx.lr / 2

    problem = prepared(LeNet(), (1, 16, 16), 6)
    halved = deltas(problem, Halved(lr=0.1, batch_size=6), 1)[0]
    assert torch.equal(halved, deltas(problem, LocalSGD(lr=0.05, batch_size=6), 1)[0])


def test_the_kind_of_model_decides_how_it_is_trained() -> None:
    rules = {"train": RULES[0]}
    for model, shape in MODELS[:2]:
        assert isinstance(prepared(model, shape, 3)._form, Sequential)
    for model, shape in MODELS[2:]:
        problem = prepared(model, shape, 3)
        assert isinstance(problem._form, FlatModule)
        assert isinstance(trainer_for(problem, rules, Randomness(0)), GeneralTrainer)


# ---- precision and compile -------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32_learns_and_differs() -> None:
    plain, rounded = (prepared(LeNet(), (1, 16, 16), 30, precision=each) for each in ("float32", "bfloat16"))
    x, batch = plain.initial(), torch.arange(30)
    expected, gradient = plain.gradient(x, 0, batch, 0), rounded.gradient(x, 0, batch, 0)
    assert gradient.dtype is torch.float32
    assert not torch.equal(gradient, expected)
    # bfloat16 has 8 bits: each of a dozen products in a row rounds to 0.4 %, and a gradient is a small difference of
    # many such. 7 % was seen; a gradient of other examples is 100 % off.
    assert (gradient - expected).norm() < 0.2 * expected.norm()
    rule = LocalSGD(lr=0.2, batch_size=10)
    before = _loss(plain, x)
    assert _loss(plain, x + deltas(rounded, rule, 150)[0]) < 0.7 * before
    assert _loss(plain, x + deltas(plain, rule, 150)[0]) < 0.7 * before


def _loss(problem: Classification, x: Tensor) -> float:
    """On the first client's own examples."""
    images, labels = problem.examples(0)
    module = copy.deepcopy(problem._flat)
    module.values.copy_(x)
    with torch.no_grad():
        return float(cross_entropy(module.module(images), labels))


def test_chains_leave_the_fast_path_for_other_precisions() -> None:
    assert prepared(nn.Linear(4, 3), (4,), 3).chain() is not None
    assert prepared(nn.Linear(4, 3), (4,), 3, precision="bfloat16").chain() is None
    assert prepared(nn.Linear(4, 3), (4,), 3, compile=True).chain() is None


def test_settings_that_cannot_work_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^precision=half: unknown name, "):
        Classification(precision="half")
    with pytest.raises(ConfigError, match=r"^compile=1: must be true or false$"):
        Classification(compile=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^precision=bfloat16: needs a model of float32 parameters, .* are float64$"):
        prepared(nn.Linear(4, 3).double(), (4,), 3, precision="bfloat16")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"^compile=true: needs a C\+\+ compiler, .* use false$"):
        Classification(compile=True)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_model_trains_as_it_does_otherwise_whatever_came_before() -> None:
    plain, compiled = (prepared(Mlp(5), (1, 4, 4), 11, 5, 1, compile=each) for each in (False, True))
    rule = LocalSGD(lr=0.1, batch_size=4)
    together = deltas(compiled, rule, 3, 2, 1)
    for one, other in zip(together, deltas(plain, rule, 3, 2, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    fresh = pickle.loads(pickle.dumps(compiled))
    trainer = GeneralTrainer(fresh, {"train": rule}, Randomness(SEED))
    for work in reversed(works(fresh, 3, 2, 1, lr=0.1)):
        assert torch.equal(checked(trainer.train([work])[0]).payload["delta"], together[work.client])


def test_who_seeds_torchs_generators_has_them_alone_whatever_other_threads_do() -> None:
    drawn: dict[int, Tensor] = {}
    seeded, done = threading.Event(), threading.Event()

    def first() -> None:
        with torch_seeded(1):
            other.start()
            seeded.wait(0.5)
            drawn[1] = torch.rand(3)
        done.set()
        other.join()

    def second() -> None:
        with torch_seeded(2):
            seeded.set()
            done.wait(0.5)
            drawn[2] = torch.rand(3)

    other = threading.Thread(target=second)
    first()
    assert set(drawn) == {1, 2}
    for seed, numbers in drawn.items():
        assert torch.equal(numbers, torch.rand(3, generator=torch.Generator().manual_seed(seed)))

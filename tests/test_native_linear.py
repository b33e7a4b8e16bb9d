"""Linear layers in C within models that are no chains: torch's numbers, the same bits on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.checks import ConfigError
from fedsim.local import Context, LocalSGD
from fedsim.problems.models import Cnn, LeNet
from fedsim.problems.modules import FlatModule, torch_seeded
from fedsim.problems.sequential import Into, Linear, Sequential, Views, sequential_of
from fedsim.rng import Randomness
from fedsim.training import GeneralTrainer, Trainer, trainer_for
from fedsim.training.native import NativeLinear, built, instruction_sets
from tests.test_general import SEED, Twice, deltas, odd, prepared, works

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="was not built, or this processor has no AVX2")

LAYERS = [(each, lambda weight, bias, name=each: NativeLinear(weight, bias, name)) for each in instruction_sets()]


def views_of(vector: Tensor, inputs: int, outputs: int, bias: bool, bias_first: bool) -> Views:
    """A layer's parameters somewhere in a vector, with strangers around them."""
    sizes = {"w": outputs * inputs, "b": outputs * bias}
    order = ["b", "w"] if bias_first else ["w", "b"]
    views, place = {}, 3
    for name in order:
        views[name] = vector[place : place + sizes[name]]
        place += sizes[name] + 5
    return {"w": views["w"].view(outputs, inputs), "b": views["b"]}


def both_ways(layer: Linear, vector: Tensor, shape: tuple[Any, ...], x: Tensor, slope: Tensor, lr: float) -> Any:
    """The output, the slope below, and the vector after a gradient was written to another and after a step."""
    written, stepped = torch.full_like(vector, 7.0), vector.clone()
    views = views_of(vector, *shape)
    out, kept = layer.forward(views, x, None)
    below = layer.backward(views, kept, slope.clone(), Into(views_of(written, *shape), 0.0, 1.0), True)
    own = views_of(stepped, *shape)
    layer.backward(own, kept, slope.clone(), Into(own, 1.0, -lr), False)
    return out.clone(), below.clone(), written, stepped


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 23), inputs=st.integers(1, 300), outputs=st.integers(1, 90), bias=st.booleans(),
    bias_first=st.booleans(), turned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_layer_gives_torchs_numbers_and_one_set_of_bits(
    size: int, inputs: int, outputs: int, bias: bool, bias_first: bool, turned: bool, seed: int
) -> None:
    shape = inputs, outputs, bias, bias_first
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(outputs * (inputs + 1) + 20, generator=generator)
    x, slope = (torch.randn(size, columns, generator=generator) for columns in (inputs, outputs))
    if turned:  # laid out the other way round
        x, slope = x.t().contiguous().t(), slope.t().contiguous().t()
    name = "b" if bias else None
    made = [both_ways(layer("w", name), vector, shape, x, slope, 0.3) for _, layer in LAYERS]  # type: ignore[no-untyped-call]
    exact = both_ways(Linear("w", name), vector.double(), shape, x.double(), slope.double(), 0.3)
    for each in made:
        for mine, other, first in zip(each, exact, made[0], strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5 * (1 + float(other.abs().max())))
            assert torch.equal(mine, first)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(odd, (2, 10, 12)), (lambda: LeNet().build((3, 16, 16), 3), (3, 16, 16)),
     (lambda: Cnn().build((1, 9, 12), 3), (1, 9, 12))],
    ids=["odd", "lenet", "cnn"],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 7])
def test_gradients_and_steps_of_whole_models_are_those_of_autograd(make: Any, shape: Any, size: int) -> None:
    with torch_seeded(3):
        module = make()
        images, labels = torch.randn(size, *shape), torch.randint(3, (size,))
    flat = FlatModule(module)
    torchs = sequential_of(module, flat.layout, shape)
    assert torchs is not None
    native = torchs.with_linear(NativeLinear)
    assert [type(each) for each in native.stages].count(NativeLinear) >= 2
    assert not any(isinstance(each, NativeLinear) for each in torchs.stages)
    x = flat.values.clone()
    expected = flat.gradient(x, images, labels, 11).clone()
    torch.testing.assert_close(native.gradient(x, images, labels, 11), expected, rtol=0, atol=1e-6)
    moved = x.clone()
    native.descend(moved, images, labels, 0.3, 11)
    torch.testing.assert_close(moved, x - 0.3 * expected, rtol=0, atol=1e-6)
    assert not torch.equal(moved, x)


def test_a_step_in_one_go_is_the_gradient_subtracted_to_the_bit() -> None:
    """With a rate that is a power of two, whose products are exact; a convolution's gradient is subtracted anyway."""
    with torch_seeded(5):
        module, images, labels = LeNet().build((1, 16, 16), 3), torch.randn(9, 1, 16, 16), torch.randint(3, (9,))
    flat = FlatModule(module)
    written = sequential_of(module, flat.layout, (1, 16, 16))
    assert written is not None
    native, x = written.with_linear(NativeLinear), flat.values.clone()
    for _ in range(5):
        expected = x - 0.125 * native.gradient(x, images, labels, None)
        native.descend(x, images, labels, 0.125, None)
        assert torch.equal(x, expected)


def test_large_batches_of_large_layers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "LARGE_CHAIN", 11)
    shape, generator = (4, 3, True, False), torch.Generator().manual_seed(0)
    vector = torch.randn(40, generator=generator)
    called: list[int] = []
    real = built.compiled()

    class Counted:
        def __getattr__(self, name: str) -> Any:
            called.append(1)
            return getattr(real, name)

    monkeypatch.setattr("fedsim.training.native.linear.compiled", lambda: Counted())
    for size, native in ((built.LARGE_BATCH, True), (built.LARGE_BATCH + 1, False)):
        x, slope = (torch.randn(size, columns, generator=generator) for columns in (4, 3))
        mine, torchs = (both_ways(layer("w", "b"), vector, shape, x, slope, 0.1) for layer in (NativeLinear, Linear))
        assert bool(called) is native
        assert native or all(torch.equal(a, b) for a, b in zip(mine, torchs, strict=True))
        called.clear()


def form_of(trainer: Trainer) -> Any:
    assert isinstance(trainer, GeneralTrainer)
    return trainer.problem._form  # type: ignore[attr-defined]


def test_the_kernel_decides_who_makes_the_products_and_the_problem_stays_as_it_is() -> None:
    problem = prepared(LeNet(), (1, 16, 16), 12)
    rules = {"train": LocalSGD(lr=0.1, batch_size=5)}
    kinds = {
        kernel: {type(each) for each in form_of(trainer_for(problem, rules, Randomness(SEED), kernel=kernel)).stages}
        for kernel in ("auto", "native", "torch")
    }
    assert NativeLinear in kinds["auto"]
    assert Linear not in kinds["auto"]
    assert kinds["native"] == kinds["auto"]
    assert Linear in kinds["torch"]
    assert NativeLinear not in kinds["torch"]
    assert isinstance(problem._form, Sequential)
    assert not any(isinstance(each, NativeLinear) for each in problem._form.stages)
    native = trainer_for(problem, rules, Randomness(SEED), kernel="native").train(works(problem, 7, lr=0.1))[0]
    torchs = deltas(problem, rules["train"], 7)[0]
    torch.testing.assert_close(native.payload["delta"], torchs, rtol=0, atol=1e-5)
    assert not torch.equal(native.payload["delta"], torchs)


def test_double_precision_stays_with_torch() -> None:
    problem = prepared(lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)).double(), (1, 16, 16), 4)
    trainer = trainer_for(problem, {"train": LocalSGD()}, Randomness(SEED), kernel="native")
    assert not any(isinstance(each, NativeLinear) for each in form_of(trainer).stages)


class Elsewhere(LocalSGD):
    """Asks for gradients at vectors of another kind."""

    kind = torch.float32

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        return ctx.grad(x.to(self.kind), batch).to(x.dtype)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_gradients_at_vectors_of_another_kind_are_torchs_affair(kind: torch.dtype) -> None:
    problem = prepared(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3)), (1, 4, 4), 4)
    rule = Elsewhere(lr=0.1)
    rule.kind = kind
    errors = []
    for kernel in ("native", "torch"):
        trainer = trainer_for(problem, {"train": rule}, Randomness(SEED), kernel=kernel)
        errors.append(str(trainer.train(works(problem, 2, lr=0.1))[0].error))
    assert errors[0] == errors[1]
    assert "same dtype" in errors[0]


def test_a_layer_without_inputs_gives_its_bias() -> None:
    views = {"w": torch.empty(3, 0), "b": torch.tensor([1.0, 2.0, 3.0])}
    out, _ = NativeLinear("w", "b").forward(views, torch.empty(2, 0), None)
    assert out.tolist() == [[1.0, 2.0, 3.0]] * 2


def test_only_models_with_linear_layers_that_are_known_need_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may lack it though the driver has it."""
    monkeypatch.setattr("fedsim.training.instruction_sets", lambda: ())
    rules = {"train": LocalSGD()}
    for free in (
        nn.Sequential(Twice(), nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()),
    ):
        made = prepared(lambda free=free: free, (1, 4, 4), 4)
        assert isinstance(trainer_for(made, rules, Randomness(SEED), kernel="native"), GeneralTrainer)
    with pytest.raises(ConfigError, match="kernel=native: is not there"):
        trainer_for(prepared(LeNet(), (1, 16, 16), 4), rules, Randomness(SEED), kernel="native")

"""Chains of linear layers as stacks: the numbers are autograd's, the bits show no grouping, the structure is seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import fedsim
from fedsim.data.partitions import Iid, Partition, Spread, Table
from fedsim.data.partitions.base import Divided
from fedsim.data.sources import Dataset
from fedsim.problems.chain import layers_of
from fedsim.problems.models import Logistic, Mlp
from fedsim.rng import Randomness
from fedsim.training import GeneralTrainer, Result, StackedTrainer, Work, batches, closed_form, trainer_for
from fedsim.training.batches import StackBatches, padded_size
from fedsim.training.native import instruction_sets
from fedsim.vectors import Layout

RANDOM = Randomness(5)


KERNELS = ["torch", "native"] if instruction_sets() else ["torch"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def stacked(made: fedsim.Problem, rule: fedsim.LocalSGD, kernel: str) -> StackedTrainer:
    return StackedTrainer(made, {"train": rule}, RANDOM, kernel=kernel)


class Given(Partition):
    """As many examples for each client as listed."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def split(self, table: Table, clients: int, randomness: Randomness) -> Spread:
        holder = np.repeat(np.arange(clients), self.sizes)
        return Divided(np.concatenate([holder, np.full(len(table.labels) - len(holder), -1)]), clients)


def problem(sizes: Sequence[int], model: object = None, shape: tuple[int, ...] = (7,), classes: int = 4,
            dtype: torch.dtype = torch.float32) -> fedsim.Classification:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(sizes))
    n = sum(sizes) + 3
    x = torch.randn(n, *shape, generator=generator)
    y = torch.randint(0, classes, (n,), generator=generator)
    data = Dataset(x, y, x[:2], y[:2], classes)
    made = fedsim.Classification(data, model or Mlp([6, 5]), Given(sizes), validation=0)
    if dtype != torch.float32:
        made.model = made._build(data).to(dtype)
    made.prepare(len(sizes), RANDOM)
    return made


def works(made: fedsim.Problem, steps: Sequence[int], lr: float = 0.1, **tensors: Tensor) -> list[Work]:
    generator = torch.Generator().manual_seed(1)
    start = made.initial()
    starts = start + 0.1 * torch.randn(len(steps), len(start), generator=generator, dtype=start.dtype)
    states = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(steps))]
    return [
        Work(10 + i, i, 2 + i % 3, "train", starts[i].clone(), {}, states[i], lr, count)
        for i, count in enumerate(steps)
    ]


def both(
    made: fedsim.Problem, rule: fedsim.LocalSGD, todo: Sequence[Work], kernel: str
) -> tuple[list[Result], list[Result]]:
    trainers = (stacked(made, rule, kernel), GeneralTrainer(made, {"train": rule}, RANDOM))
    results = [trainer.train(todo) for trainer in trainers]
    for one in (*results[0], *results[1]):
        if one.error is not None:
            raise one.error
    return results[0], results[1]


def assert_close(
    made: fedsim.Problem, rule: fedsim.LocalSGD, todo: Sequence[Work], kernel: str, tolerance: float = 1e-5
) -> None:
    for fast, slow in zip(*both(made, rule, todo, kernel), strict=True):
        assert fast.payload.keys() == slow.payload.keys()
        assert fast.state.keys() == slow.state.keys()
        for name, tensor in {**slow.payload, **slow.state}.items():
            mine = {**fast.payload, **fast.state}[name]
            scale = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(mine, tensor, rtol=0, atol=tolerance * scale)


# ---- the numbers are autograd's ------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    widths=st.lists(st.integers(1, 20), min_size=0, max_size=3),
    activation=st.sampled_from([nn.ReLU, nn.Tanh]),
    bias=st.booleans(),
    batch_size=st.one_of(st.none(), st.integers(1, 17)),
    steps=st.lists(st.integers(0, 4), min_size=9, max_size=9),
    double=st.booleans(),
    kernel=st.sampled_from(KERNELS),
)
def test_steps_are_those_of_autograd_for_any_shape_batch_and_mask(
    sizes: list[int], widths: list[int], activation: type[nn.Module], bias: bool, batch_size: int | None,
    steps: list[int], double: bool, kernel: str,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip([7, *widths], widths, strict=False):
        layers += [nn.Linear(before, after, bias=bias), activation()]
    model = nn.Sequential(*layers, nn.Linear([7, *widths][-1], 4))
    dtype = torch.float64 if double else torch.float32
    made = problem(sizes, model.to(dtype), dtype=torch.float32)
    assert made.chain() is not None
    rule = fedsim.LocalSGD(lr=0.1, batch_size=batch_size)
    assert_close(made, rule, works(made, steps[: len(sizes)]), kernel, 1e-12 if double else 1e-5)


def test_half_precision_chains_are_chains_like_others() -> None:
    made = problem(SIZES, nn.Sequential(nn.Linear(7, 4)).to(torch.bfloat16))
    rule = fedsim.LocalSGD(lr=0.1, batch_size=5)
    assert_close(made, rule, works(made, STEPS), "native", 0.05)  # eight bits of mantissa, up to eight steps
    trainer = stacked(made, rule, "native")
    whole, alone = trainer.train(works(made, STEPS)), [trainer.train([each])[0] for each in works(made, STEPS)]
    assert all(map(torch.equal, vectors(alone), vectors(whole)))


class Sharpness(fedsim.LocalSGD):
    """Two gradients a step, at points that are stacks of their own."""

    def direction(self, ctx, x, batch):
        gradient = ctx.grad(x, batch)
        norm = gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return ctx.grad(x + 0.05 * gradient / norm, batch)


class Remembering(fedsim.LocalSGD):
    """A mean gradient under the mask, kept as state; the client's whole gradient in the end; keyed noise."""

    def begin(self, ctx):
        self.mean = torch.zeros_like(ctx.start)

    def direction(self, ctx, x, batch):
        gradient = ctx.grad(x, batch)
        self.mean = ctx.freeze(self.mean + gradient, self.mean)
        noise = torch.from_numpy(ctx.rng("noise").normal(x.shape[-1])).to(x)
        return gradient - ctx.state["control"] + 0.01 * noise

    def finish(self, ctx, x):
        ctx.state["control"] = self.mean / torch.from_numpy(np.maximum(ctx.steps, 1)).to(x)[:, None]
        return {"delta": x - ctx.start + 0.1 * ctx.grad(x)}


RULES = [
    fedsim.LocalSGD(lr=0.1, batch_size=5, momentum=0.9),
    fedsim.LocalSGD(lr=0.1, batch_size=5, weight_decay=0.1, prox=0.3, clip=0.5, keep=True),
    fedsim.LocalSGD(lr=0.1, batch_size=None).replace(sends="model"),
    Sharpness(lr=0.1, batch_size=5),
    Remembering(lr=0.1, batch_size=5),
]

SIZES, STEPS = [12, 1, 30, 7, 5, 12, 13, 9, 2, 4, 40, 12], [3, 1, 6, 2, 1, 3, 4, 2, 5, 0, 8, 3]


@pytest.mark.parametrize("rule", RULES, ids=["momentum", "penalties", "models", "sharpness", "state"])
@each_kernel
def test_every_hook_sees_the_same_numbers(rule: fedsim.LocalSGD, kernel: str) -> None:
    made = problem(SIZES)
    control = 0.1 * torch.randn(len(SIZES), made.layout.size, generator=torch.Generator().manual_seed(2))
    assert_close(made, rule, works(made, STEPS, control=control), kernel)


@pytest.mark.parametrize(
    "made", [fedsim.LeastSquares(l2=0.1), fedsim.LogisticRegression(l2=0.1)], ids=["squared", "binary"]
)
def test_convex_problems_are_chains_too(made: fedsim.Problem) -> None:
    if isinstance(made, fedsim.LogisticRegression):
        x, y = torch.randn(90, 6), torch.randint(0, 4, (90,))
        made = fedsim.LogisticRegression(Dataset(x, y, x, y, 4), Iid(), l2=0.1)
    made.prepare(6, RANDOM)
    for rule in (fedsim.LocalSGD(lr=0.05, batch_size=4), fedsim.LocalSGD(lr=0.05, batch_size=None, momentum=0.5)):
        assert_close(made, rule, works(made, [3, 5, 1, 2, 2, 7], 0.05), "native", 1e-13)


# ---- the bits show no grouping -------------------------------------------------------------------


def vectors(results: Sequence[Result]) -> list[Tensor]:
    return [tensor for one in results for tensor in (*one.payload.values(), *one.state.values())]


@pytest.mark.parametrize("model", [Mlp(17), Mlp([10, 62]), Logistic(), Mlp(1)], ids=["17", "10-62", "logistic", "1"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 10, 16, 50, None])
@each_kernel
def test_the_group_does_not_show_in_the_bits(model: object, batch_size: int | None, kernel: str) -> None:
    sizes = [50, 1, 23, 100, 50, 3, 10, 50, 64, 2, 11, 50]
    made = problem(sizes, model, (1, 5, 5), 10)
    rule = fedsim.LocalSGD(lr=0.1, batch_size=batch_size)
    todo = works(made, np.minimum(rule.local_steps(np.arange(12), made.samples), 9).tolist())
    trainer = stacked(made, rule, kernel)
    whole = vectors(trainer.train(todo))
    for group in (1, 2, 3, 5):
        parts = [each for first in range(0, 12, group) for each in vectors(trainer.train(todo[first : first + group]))]
        assert all(map(torch.equal, parts, whole)), group
    assert all(map(torch.equal, vectors(trainer.train(todo[::-1]))[::-1], whole))


@pytest.mark.parametrize("rule", RULES, ids=["momentum", "penalties", "models", "sharpness", "state"])
@pytest.mark.parametrize(("kernel", "least"), [("torch", None), ("torch", 2), ("torch", 0), (KERNELS[-1], 1)])
def test_the_group_does_not_show_with_any_hook_whatever_the_machine_can_do(
    rule: fedsim.LocalSGD, kernel: str, least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if least is not None:
        monkeypatch.setattr(closed_form.ClosedForm, "least_lanes", lambda self, size: least)
    made = problem(SIZES)
    control = 0.1 * torch.randn(len(SIZES), made.layout.size, generator=torch.Generator().manual_seed(2))
    todo, trainer = works(made, STEPS, control=control), stacked(made, rule, kernel)
    results = trainer.train(todo)
    alone = [trainer.train([work])[0] for work in todo]
    assert all(map(torch.equal, vectors(alone), vectors(results)))
    assert {one.group for one in alone} == {1}
    assert (max(one.group for one in results) > 1) is (least != 0)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 6, 7, 8, 10, 16, None])
@pytest.mark.parametrize("loss", ["squared", "binary"])
def test_the_group_does_not_show_with_one_output(loss: str, batch_size: int | None) -> None:
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    binary = fedsim.LogisticRegression(Dataset(x, torch.arange(600) % 4, x, torch.arange(600) % 4, 4), Iid(), l2=0.1)
    made: fedsim.Problem = binary if loss == "binary" else fedsim.LeastSquares(l2=0.1)
    made.prepare(40, RANDOM)
    rule = fedsim.LocalSGD(lr=0.05, batch_size=batch_size)
    todo = works(made, rule.local_steps(np.arange(40), made.samples).tolist())
    trainer = stacked(made, rule, "native")  # in double precision, which is not native
    whole = vectors(trainer.train(todo))
    for group in (1, 2, 3, 5, 7, 12):
        parts = [each for first in range(0, 40, group) for each in vectors(trainer.train(todo[first : first + group]))]
        assert all(map(torch.equal, parts, whole)), group


class Tail(fedsim.LocalSGD):
    """Goes on after the last batch, where all clients are there again."""

    def finish(self, ctx, x):
        x = ctx.follow(x, ctx.grad(x))
        return {"delta": ctx.freeze(2 * x, x) - ctx.start}


class Listing(fedsim.LocalSGD):
    """Takes all batches before it uses them."""

    def run(self, ctx):
        x = ctx.point()
        for batch in list(ctx.batches()):
            x = ctx.follow(x, ctx.grad(x, batch))
        return {"delta": ctx.change(x)}


class Writing(fedsim.LocalSGD):
    """Writes to what it gets."""

    def begin(self, ctx):
        ctx.start.mul_(0.5)
        ctx.start = ctx.start + 0.1

    def direction(self, ctx, x, batch):
        gradient = ctx.grad(x, batch)
        x.mul_(0.9)
        return gradient.mul_(2)


@pytest.mark.parametrize("rule", [Tail, Listing, Writing])
@each_kernel
def test_what_a_rule_does_beside_its_steps_does_not_show_the_group(rule: type[fedsim.LocalSGD], kernel: str) -> None:
    made, job = problem(SIZES), rule(lr=0.1, batch_size=5, prox=0.1)
    assert_close(made, job, works(made, STEPS), kernel)
    trainer = stacked(made, job, kernel)
    whole, alone = trainer.train(works(made, STEPS)), [trainer.train([each])[0] for each in works(made, STEPS)]
    assert all(map(torch.equal, vectors(alone), vectors(whole)))


def test_products_whose_bits_show_the_stack_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    form = closed_form.ClosedForm(problem([9, 9]).chain())  # type: ignore[arg-type]
    assert form.least_lanes(4) in (1, 2)
    product = torch.bmm

    def showing(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        product(a, b, out=out)
        return out.mul_(1 + (len(a) in bad) * 2**-20)

    monkeypatch.setattr(torch, "bmm", showing)
    bad: tuple[int, ...] = (1,)
    assert form.least_lanes(4) == 2
    bad = (3,)
    assert form.least_lanes(4) == 0


@each_kernel
def test_a_client_with_a_nan_spoils_nobody_else(kernel: str) -> None:
    made = problem(SIZES)
    rule = fedsim.LocalSGD(lr=0.1, batch_size=5)
    clean, _ = both(made, rule, works(made, STEPS), kernel)
    made.train_x[made.rows(2)[0]] = float("nan")
    spoilt = stacked(made, rule, kernel).train(works(made, STEPS))
    for client, (one, other) in enumerate(zip(clean, spoilt, strict=True)):
        assert torch.equal(one.payload["delta"], other.payload["delta"]) is (client != 2)
    assert spoilt[2].payload["delta"].isnan().any()


class Failing(fedsim.LocalSGD):
    """The task of client 4 raises in its first step, whoever is beside it."""

    def direction(self, ctx, x, batch):
        if (ctx.clients == 4).any():
            raise ZeroDivisionError("on purpose")
        return ctx.grad(x, batch)


@each_kernel
def test_an_error_is_the_error_of_its_task_alone(kernel: str) -> None:
    made, rule = problem(SIZES), Failing(lr=0.1, batch_size=5)
    results = stacked(made, rule, kernel).train(works(made, STEPS))
    assert [one.error is not None for one in results] == [client == 4 for client in range(12)]
    assert "client 4, task 14, job 'train', local step 1" in str(results[4].error)
    clean = stacked(made, fedsim.LocalSGD(lr=0.1, batch_size=5), kernel).train(works(made, STEPS))
    torch.testing.assert_close(results[3].payload["delta"], clean[3].payload["delta"], rtol=0, atol=1e-6)


# ---- which examples, in which order --------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 60, 2**16])
@pytest.mark.parametrize("batch_size", [3, None])
def test_batches_follow_the_keys_of_each_client_epoch_by_epoch_and_whole_ones_lie_as_they_are(
    at_once: int, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "AT_ONCE", at_once)
    samples = np.array([7, 8, 8, 7]) if batch_size is None else np.array([11, 3, 30, 8])
    steps, clients, nth = np.array([9, 7, 7, 2]), np.array([4, 0, 9, 2]), np.array([0, 5, 1, 1])
    held = {4: 100, 0: 200, 9: 300, 2: 400}

    def rows(ids: NDArray[np.int64]) -> Tensor:
        return torch.cat([held[i] + torch.arange(int(n)) for i, n in zip(ids.tolist(), samples, strict=True)])

    made = StackBatches(clients, nth, samples, steps, batch_size, rows, RANDOM)
    seen = list(made.each(torch.empty(0, dtype=torch.float64)))
    assert len(seen) == 9
    for step, batch in enumerate(seen):
        assert len(batch.rows) == len(batch.scale) == (steps > step).sum()
        for lane in range(len(batch.rows)):
            size = batch_size or int(samples[lane])
            epoch, position = divmod(step, -(-int(samples[lane]) // size))
            order = RANDOM("batches", int(clients[lane]), int(nth[lane]), epoch).permutation(int(samples[lane]))
            if len(order) <= size:  # the whole of them in every step
                order = np.arange(len(order))
            wanted = held[int(clients[lane])] + order[position * size : (position + 1) * size]
            scale = batch.scale[lane, :, 0]
            assert batch.rows[lane][: len(wanted)].tolist() == wanted.tolist()
            assert set(batch.rows[lane][len(wanted) :].tolist()) <= set(wanted.tolist())
            assert scale.tolist() == [1 / len(wanted)] * len(wanted) + [0.0] * (len(scale) - len(wanted))


@given(st.integers(0, 10**6), st.one_of(st.none(), st.integers(1, 10**4)))
def test_a_batch_is_filled_up_by_less_than_a_third_and_to_few_sizes(samples: int, batch_size: int | None) -> None:
    needed = samples if batch_size is None else min(samples, batch_size)
    size = padded_size(batch_size, samples)
    assert max(needed, 2) <= size <= max(needed + 2, needed * 4 / 3)
    if batch_size is not None and samples >= batch_size:
        assert size == max(batch_size, 2)
    assert len({padded_size(None, each) for each in range(1, 1024)}) <= 36


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 99))
def test_permutations_of_many_keys_are_those_of_each(sizes: list[int], seed: int) -> None:
    keys = Randomness(seed)("order", np.arange(len(sizes)))
    together = keys.permutations(np.array(sizes))
    alone = [Randomness(seed)("order", i).permutation(size) for i, size in enumerate(sizes)]
    assert together.tolist() == np.concatenate(alone).tolist()


# ---- the structure is seen -----------------------------------------------------------------------


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 4))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def masked() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 4))
    model[0].weight.register_hook(lambda gradient: 0 * gradient)
    return model


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 4))
    model[0].forward = lambda x: 2 * nn.functional.linear(x, model[0].weight, model[0].bias)  # type: ignore[assignment]
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4))
    model[0].weight.requires_grad_(False)
    return model


def shared() -> nn.Module:
    one = nn.Linear(7, 7)
    return nn.Sequential(one, nn.ReLU(), one, nn.Linear(7, 4))


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (nn.Sequential(nn.Linear(7, 4)), 1),
        (nn.Linear(7, 4), 1),
        (nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(7, 5), nn.Tanh()), nn.Flatten(), nn.Linear(5, 4)), 2),
        (nn.Sequential(nn.Linear(7, 4), nn.ReLU()), 1),
        (nn.Sequential(nn.ReLU(), nn.Linear(7, 4)), None),
        (nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Tanh(), nn.Linear(5, 4)), None),
        (nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4)), None),
        (nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.1), nn.Linear(5, 4)), None),
        (nn.Sequential(Odd(7, 4)), None),
        (hooked(), None),
        (masked(), None),
        (patched(), None),
        (frozen(), None),
        (shared(), None),
    ],
)
def test_only_plain_chains_take_the_fast_path(model: nn.Module, layers: int | None) -> None:
    layout = Layout.of({name: each for name, each in model.named_parameters() if each.requires_grad})
    found = layers_of(model, layout, (7,))
    assert (None if found is None else len(found)) == layers


def test_a_layer_over_the_last_axis_of_an_image_is_no_chain() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Flatten(), nn.Linear(15, 4))
    assert problem([9, 9], model, (5, 5)).chain() is None


def test_the_structure_decides_the_path() -> None:
    assert isinstance(trainer_for(problem([9]), {}, RANDOM), StackedTrainer)
    opaque = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4))
    assert isinstance(trainer_for(problem([9], opaque), {}, RANDOM), GeneralTrainer)

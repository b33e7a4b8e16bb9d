"""Flat vectors: their layout, sums in a fixed order, and what they cost on the wire."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.local import LocalSGD, TensorSpec
from fedsim.problems.schedule_only import ScheduleOnly
from fedsim.rng import Randomness
from fedsim.vectors import Layout, mean, weighted_sum
from fedsim.wire import message_bytes

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def named(wanted: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"t{i}": random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(wanted)}


# ---- layout --------------------------------------------------------------------------------------


@given(shapes, st.sampled_from([torch.float32, torch.float64, torch.float16]))
@settings(deadline=None)
def test_joining_and_splitting_gives_the_same_tensors(wanted: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = named(wanted, dtype)
    layout = Layout.of(tensors)
    vector = layout.join(tensors)
    assert vector.shape == (layout.size,) == (sum(map(prod, wanted)),)
    assert (vector.dtype, layout.dtype) == (dtype, dtype)
    parts = layout.split(vector)
    assert list(parts) == list(layout.names) == list(tensors)
    for name, part in parts.items():
        assert part.shape == tensors[name].shape
        assert torch.equal(part, tensors[name])
    assert torch.equal(layout.join(parts), vector)


def test_items_lie_in_the_order_of_names_row_by_row() -> None:
    layout = Layout.of({"w": torch.zeros(2, 3), "s": torch.zeros(()), "b": torch.zeros(2)})
    parts = layout.split(torch.arange(9.0))
    assert parts["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parts["s"] == 6
    assert parts["b"].tolist() == [7, 8]


def test_joining_takes_names_in_the_layouts_order_and_strides_as_they_are() -> None:
    layout = Layout.of({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
    strided = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T
    assert layout.join({"b": torch.tensor([5.0]), "unknown": torch.ones(9), "a": strided}).tolist() == [1, 2, 3, 4, 5]


def test_writing_to_a_part_writes_to_the_vector() -> None:
    layout = Layout.of({"a": torch.zeros(2, 2), "b": torch.zeros(3)})
    vector = layout.zeros()
    layout.split(vector)["b"][1] = 7.0
    layout.split(vector)["a"].fill_(1.0)
    assert vector.tolist() == [1, 1, 1, 1, 0, 7, 0]


def test_a_joined_vector_has_memory_of_its_own_and_no_history() -> None:
    for wanted in ([(3,)], [(3,), (2,)]):
        tensors = {name: tensor.requires_grad_() for name, tensor in named(wanted).items()}
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        vector = Layout.of(tensors).join(tensors)
        assert not vector.requires_grad
        vector.zero_()
        assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_a_layout_refuses_dtypes_it_cannot_hold() -> None:
    for tensors in (
        {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)},
        {"a": torch.zeros(1, dtype=torch.int64)},
        {},
    ):
        with pytest.raises(ValueError, match="one floating-point dtype"):
            Layout.of(tensors)


def test_a_vector_of_another_size_cannot_be_split() -> None:
    layout = Layout.flat(5)
    for size in (4, 6):
        with pytest.raises((RuntimeError, ValueError)):
            layout.split(torch.zeros(size, dtype=torch.float64))


def test_a_missing_name_cannot_be_joined() -> None:
    with pytest.raises(KeyError, match="b"):
        Layout.of({"a": torch.zeros(1), "b": torch.zeros(1)}).join({"a": torch.zeros(1)})


def test_bytes_are_items_times_their_size_unless_declared() -> None:
    for dtype, each in ((torch.float16, 2), (torch.float32, 4), (torch.float64, 8)):
        assert Layout.flat(7, dtype).nbytes == 7 * each == Layout.flat(7, dtype).zeros().nbytes
    assert Layout(("x",), ((0,),), declared_bytes=400).nbytes == 400
    assert Layout(("x",), ((9,),), declared_bytes=0).nbytes == 0


# ---- sums ----------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_weighted_sum_is_close_to_exact_arithmetic(count: int, size: int, seed: int) -> None:
    vectors = random(count, size, seed=seed)
    weights = random(count, seed=seed + 100, dtype=torch.float64).tolist()
    exact = sum(w * v.double() for w, v in zip(weights, vectors, strict=True))
    bound = sum(abs(w) * v.double().abs() for w, v in zip(weights, vectors, strict=True))
    got = weighted_sum(list(vectors), weights)
    assert got.dtype == torch.float32
    assert bool(((got.double() - exact).abs() <= (count + 1) * 2.0**-23 * bound).all())


def test_a_weighted_sum_adds_from_first_to_last() -> None:
    big, one = torch.tensor([1e8]), torch.tensor([1.0])
    assert weighted_sum([big, one, -big], [1, 1, 1]).item() == 0.0  # 1e8 + 1 is 1e8 in float32
    assert weighted_sum([big, -big, one], [1, 1, 1]).item() == 1.0
    vectors, weights = list(random(9, 33)), [0.1 * i for i in range(9)]
    total = torch.zeros(33)
    for vector, weight in zip(vectors, weights, strict=True):
        total = torch.add(total, vector, alpha=weight)
    assert torch.equal(weighted_sum(vectors, weights), total)


def test_an_item_of_a_sum_does_not_depend_on_its_neighbours() -> None:
    vectors, weights = random(5, 67), [0.3, -1.7, 0.01, 2.0, 1 / 3]
    whole = weighted_sum(list(vectors), weights)
    for first in (0, 1, 3, 8, 30):
        for size in (1, 7, 8, 17, 37):
            part = weighted_sum([each[first : first + size] for each in vectors], weights)
            assert torch.equal(part, whole[first : first + size])


def test_a_sum_is_a_new_vector_and_leaves_its_terms_alone() -> None:
    vectors = list(random(3, 4))
    before = [each.clone() for each in vectors]
    for terms in (vectors, vectors[:1]):
        weighted_sum(terms, [1.0] * len(terms)).zero_()
        mean(terms).zero_()
        assert all(torch.equal(one, other) for one, other in zip(vectors, before, strict=True))


def test_weights_may_be_any_numbers_in_any_iterable() -> None:
    vectors = [torch.ones(2, dtype=torch.float64)] * 3
    assert weighted_sum(vectors, (w for w in (1, torch.tensor(0.5), -2.25))).tolist() == [-0.75, -0.75]


def test_the_mean_is_the_mean() -> None:
    assert mean([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]).tolist() == [2, 4]
    assert mean([torch.tensor([0.1])]).item() == torch.tensor(0.1).item()


def test_sums_need_as_many_weights_as_vectors_and_at_least_one() -> None:
    for vectors, weights in (([], []), ([torch.ones(1)], []), ([torch.ones(1)], [1.0, 2.0])):
        with pytest.raises(ValueError, match="one weight per vector"):
            weighted_sum(vectors, weights)


# ---- the wire ------------------------------------------------------------------------------------


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(shape, dtype)


def test_a_message_costs_its_items_times_their_size() -> None:
    layout = Layout.flat(10, torch.float32)
    assert message_bytes([], layout) == 0
    for specs in (
        [spec(10)],
        [spec()],
        [spec(1), spec(3, 7)],
        [spec(10), spec(10)],
        [spec(5, 10), spec(4, dtype=torch.int64), spec(10, dtype=torch.float64), spec(9, dtype=torch.bool)],
        [spec(0), spec(0, 10)],
    ):
        assert message_bytes(specs, layout) == sum(torch.zeros(each.shape, dtype=each.dtype).nbytes for each in specs)


def test_what_is_as_long_as_the_model_costs_what_the_problem_declares() -> None:
    problem = ScheduleOnly(parameters=1_000)
    problem.prepare(3, Randomness(0))
    layout = problem.layout
    assert layout.nbytes == 4_000
    assert message_bytes(LocalSGD().payload_spec(layout).values(), layout) == 4_000
    assert message_bytes([spec(0), spec(0)], layout) == 8_000  # two vectors, as SCAFFOLD sends
    assert message_bytes([spec(3, 0)], layout) == 12_000  # a stack of three
    assert message_bytes([spec(), spec(2, dtype=torch.int64)], layout) == 4 + 16  # anything else costs itself


@pytest.mark.parametrize("sends", ["delta", "model"])
def test_a_local_rule_declares_one_vector(sends: str) -> None:
    for dtype, nbytes in ((torch.float32, 28), (torch.float64, 56)):
        layout = Layout.flat(7, dtype)
        declared = LocalSGD().replace(sends=sends).payload_spec(layout)
        assert declared == {sends: TensorSpec((7,), dtype)}
        assert message_bytes(declared.values(), layout) == nbytes

"""What a rule returns for a whole stack becomes the results of single tasks: apart, as each would be alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsim.training.base import divided, finite_rows, unstacked
from fedsim.vectors import ALIGNED, aligned_stack, is_aligned

ROWS, SIZE = 5, 7


def stack() -> Tensor:
    return aligned_stack(ROWS, torch.empty(SIZE)).copy_(torch.arange(float(ROWS * SIZE)).view(ROWS, SIZE))


def test_rows_may_stay_where_they_were_made() -> None:
    made = stack()
    rows = divided({"delta": made}, "the payload", ROWS)
    assert all(torch.equal(row["delta"], made[i]) for i, row in enumerate(rows))
    assert all(row["delta"].untyped_storage().data_ptr() == made.untyped_storage().data_ptr() for row in rows)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("one row for all", stack()[:1].expand(ROWS, -1)),
        ("dense, so that rows begin anywhere", torch.randn(ROWS, SIZE)),
        ("transposed", torch.randn(SIZE, ROWS).t()),
        ("numbers", torch.randn(ROWS)),
        ("matrices", torch.randn(ROWS, 16, 16)),
    ],
)
def test_rows_that_would_share_memory_or_lie_otherwise_are_copied(name: str, made: Tensor) -> None:
    rows = divided({"delta": made}, "the payload", ROWS)
    assert all(torch.equal(row["delta"], made[i]) for i, row in enumerate(rows))
    assert len({row["delta"].untyped_storage().data_ptr() for row in rows}) == ROWS
    assert all(row["delta"].data_ptr() % ALIGNED == 0 and row["delta"].is_contiguous() for row in rows)


def test_one_tensor_under_two_names_becomes_two() -> None:
    made = stack()
    rows = divided({"delta": made, "model": made}, "the payload", ROWS)
    rows[0]["delta"].zero_()
    assert torch.equal(rows[0]["model"], made[0])


def test_what_clients_keep_never_holds_a_whole_stack_in_memory() -> None:
    rows = unstacked({"control": stack()}, "ctx.state", ROWS)
    assert all(row["control"].untyped_storage().nbytes() < 2 * ALIGNED for row in rows)


def test_a_row_is_called_finite_only_if_it_is() -> None:
    made = torch.zeros(ROWS, SIZE)
    made[1, 3], made[2, 0], made[3, 6] = math.nan, math.inf, -math.inf
    assert finite_rows({"delta": torch.ones(ROWS), "other": made}, ROWS) == [True, None, None, None, True]


def test_finite_numbers_with_an_infinite_sum_are_left_to_be_looked_at() -> None:
    large = torch.finfo(torch.float32).max
    assert finite_rows({"delta": torch.full((2, 3), large)}, 2) == [None, None]


def test_whole_numbers_are_finite() -> None:
    assert finite_rows({"count": torch.ones(2, dtype=torch.int64)}, 2) == [True, True]


def test_rows_of_a_stack_are_aligned_and_apart() -> None:
    assert is_aligned(stack())
    assert not is_aligned(stack()[:1].expand(2, -1))
    assert not is_aligned(stack()[:, 1:])

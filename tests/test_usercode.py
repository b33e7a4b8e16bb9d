"""What all tasks share, on its way to the workers: the same values, in memory of its own, large tensors beside it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.checks import ConfigError
from fedsim.pool.usercode import LARGE, pickled_with_user_code, unpickled

pytest.importorskip("ray")

LONG = LARGE // 4


@dataclass
class Holder:
    """A class of a module that no worker could import."""

    value: Any


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_large_tensor_travels_beside_the_pickle_bit_for_bit(dtype: torch.dtype) -> None:
    sent = torch.randint(0, 2**7, (LARGE, 3, 1)).to(dtype)
    parts = pickled_with_user_code(sent)
    assert len(parts[0]) < 1000
    assert [each.nbytes for each in parts[1:]] == [sent.nbytes]
    got = unpickled(parts)
    assert got.dtype == dtype
    assert torch.equal(got, sent)


def test_what_arrives_can_be_written_to_and_what_was_sent_stays() -> None:
    sent = {"tensor": torch.zeros(LONG), "array": np.zeros(LONG), "small": np.zeros(3)}
    parts = pickled_with_user_code(sent)
    for part in parts:
        part.flags.writeable = False  # as they come out of a store that workers share
    got = unpickled(parts)
    for name in sent:
        got[name] += 1
        assert not sent[name].any()
        assert got[name].all()


def test_arrays_keep_their_form_order_and_identity() -> None:
    array, tensor = np.asfortranarray(np.arange(2.0 * LONG).reshape(2, LONG)), torch.arange(float(LONG))
    got = unpickled(pickled_with_user_code([array, array, tensor, tensor]))
    assert got[0] is got[1]
    assert got[2] is got[3]
    assert np.array_equal(got[0], array)
    assert got[0].flags.f_contiguous
    assert torch.equal(got[2], tensor)


def odd_tensors() -> dict[str, Tensor]:
    base = torch.arange(4.0 * LONG)
    return {
        "transposed": base.view(4, LONG).t(),
        "expanded": torch.ones(1).expand(2 * LONG),
        "learnt": nn.Parameter(base.clone()),
        "needs gradient": base.clone().requires_grad_(),
        "complex": torch.complex(base, base),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("name", sorted(odd_tensors()))
def test_other_tensors_travel_as_they_always_do(name: str) -> None:
    sent = odd_tensors()[name]
    got = unpickled(pickled_with_user_code(sent))
    assert type(got) is type(sent)
    assert got.stride() == sent.stride()
    assert got.requires_grad == sent.requires_grad
    assert torch.equal(got, sent)


def test_objects_of_a_users_own_class_hold_their_tensors() -> None:
    sent = Holder([torch.ones(LONG)])
    got = unpickled(pickled_with_user_code(sent))
    assert torch.equal(got.value[0], sent.value[0])


def test_what_cannot_be_sent_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"cannot be sent to workers: .*generator"):
        pickled_with_user_code(each for each in ())


@pytest.mark.parametrize(("folder", "by_value"), [("mine", True), ("site-packages", False)])
def test_only_code_outside_every_installed_package_travels(
    folder: str, by_value: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / folder
    home.mkdir()
    (home / f"sent_{by_value}.py").write_text("class Thing:\n    size = 3\n")
    monkeypatch.syspath_prepend(home)
    module = importlib.import_module(f"sent_{by_value}")
    parts = pickled_with_user_code(module.Thing())
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(home)])
    if by_value:
        assert unpickled(parts).size == 3
    else:
        with pytest.raises(ModuleNotFoundError):
            unpickled(parts)

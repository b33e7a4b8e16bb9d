"""What a checkpoint can hold, and that nothing a stranger writes into one is called."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fedsim
from fedsim.checkpoint import CheckpointFolder
from fedsim.encoding import UnreadableError


@dataclasses.dataclass(frozen=True)
class Note:
    text: str
    twin: Any = None


class Colour(enum.Enum):
    RED = (1,)


class Slotted:
    __slots__ = ("x", "y")


class Pair(NamedTuple):
    left: int
    right: Any


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "payload",
    [
        Evil.__reduce__,
        os.system,
        subprocess.Popen,
        getattr,
        fedsim.simulate,
        fedsim.Quadratic(),
        Path("x"),
        threading.Lock(),
        np.array([None, "x"], dtype=object),
        np.zeros(2, dtype=[("a", "i4"), ("b", "O")]),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(2, requires_grad=True) * 2,
        type("Mine", (dict,), {})(a=1),
    ],
    ids=lambda payload: type(payload).__name__,
)
def test_what_could_not_be_read_back_is_not_written(payload: Any, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, {}, [Note("a")])
    with pytest.raises(UnreadableError, match="holds "):
        folder.write({"state": payload}, {})
    assert list(tmp_path.iterdir()) == []


def craft(folder: Path, tree: Any, blocks: tuple[bytes, ...] = (), **about: Any) -> None:
    """A stranger's checkpoint."""
    text = json.dumps(tree).encode()
    digest = hashlib.sha256(text + b"".join(blocks)).hexdigest()
    header = {"format": 2, "tree": len(text), "blocks": [len(each) for each in blocks], "sha256": digest, **about}
    (folder / "checkpoint-000001").write_bytes(json.dumps(header).encode() + b"\n" + text + b"".join(blocks))


REFUSED = {
    "a class": ["object", 0, "subprocess", "Popen", {"args": "touch pwned"}],
    "a function": ["object", 0, "os", "system", {}],
    "a class of ours": ["object", 0, "fedsim.record", "RunDirectory", {}],
    "a builtin": ["object", 0, "builtins", "object", {}],
    "an enum that is none": ["enum", "fedsim.simulation.tasks", "LiveTask", "work"],
    "a tuple that is none": ["named", "fedsim.simulation.tasks", "LiveTask", []],
    "an attribute that calls": ["object", 0, "fedsim.simulation.tasks", "LiveTask.row", {}],
    "an unloaded module": ["object", 0, "antigravity", "fly", {}],
    "objects": ["array", 0, 0, "|O", 0, [1], [8], True],
    "a structure": ["array", 0, 0, "V8", 0, [1], [8], True],
    "beyond its memory": ["array", 0, 0, "<f8", 0, [9], [8], True],
    "before its memory": ["array", 0, 0, "<f8", -8, [1], [8], True],
    "a tensor beyond": ["tensor", 0, 0, "float32", 0, [2], [1000], False],
    "a tensor of what": ["tensor", 0, 0, "load", 0, [1], [1], False],
    "no kind": ["__init__", 0],
    "nobody": ["shared", "nobody"],
    "a loop": ["ref", 5],
    "deep": eval("[" * 90 + "]" * 90),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_strangers_checkpoint_is_refused_and_calls_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = CheckpointFolder(tmp_path, {"federation": object()}, [Note("a")])
    craft(tmp_path, ["list", 9, [REFUSED[case]]], (bytes(8),))
    with pytest.raises(UnreadableError, match="checkpoint-000001: "):
        folder.newest()
    assert not (tmp_path / "pwned").exists()
    assert "antigravity" not in sys.modules


HEADERS = {
    "list": "[]",
    "empty": "{}",
    "old": '{"format": 1}',
    "large": '{"format": 2, "tree": 1e15, "blocks": [], "sha256": ""}',
    "negative": '{"format": 2, "tree": -1, "blocks": [3], "sha256": ""}',
    "deep": "[" * 10000,
    "nothing": "",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_says_anything_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000001").write_text(HEADERS[case] + "\n..")
    with pytest.raises(UnreadableError, match="checkpoint-000001: "):
        CheckpointFolder(tmp_path, {}, []).newest()


def test_every_kind_of_plain_state_comes_back_and_what_was_shared_is_shared(tmp_path: Path) -> None:
    tensor, array = torch.arange(12.0), np.arange(6.0).reshape(2, 3)
    slotted = Slotted()
    slotted.x = [1]
    loop: list[Any] = [1]
    loop.append(loop)
    note = Note("a", slotted)
    grad = torch.ones(3, requires_grad=True)
    state = {
        "views": [tensor[2:], tensor.view(3, 4).t(), tensor.numpy()],
        "arrays": [array, array[1], array.T[::-1], torch.from_numpy(array)],
        "notes": [note, note, Colour.RED, Pair(1, note), slotted, loop],
        "containers": [deque([1, 2], maxlen=2), defaultdict(list, {1: [2]}), Counter("aab"), OrderedDict(a=1)],
        "odd": [..., NotImplemented, b"\x00", range(3), np.dtype("int8"), grad, np.zeros((0, 3)), {(1, "a"), 2}],
    }
    folder = CheckpointFolder(tmp_path, {}, [note])
    folder.write(state, {})
    found = folder.newest()
    assert found is not None
    back = found[1]
    back["views"][0][0] = 77.0
    assert back["views"][1][2, 0] == 77.0
    assert back["views"][2][2] == 77.0
    assert back["views"][1].stride() == tensor.view(3, 4).t().stride()
    back["arrays"][0][1, 0] = -5.0
    assert back["arrays"][1][0] == back["arrays"][2][2, 1] == back["arrays"][3][1, 0] == -5.0
    first, second, colour, pair, slots, circle = back["notes"]
    assert first is second is pair.right
    assert colour is Colour.RED
    assert type(pair) is Pair
    assert slots is first.twin
    assert slots.x == [1]
    assert not hasattr(slots, "y")
    assert circle[1] is circle
    assert back["containers"] == state["containers"]
    assert [type(each) for each in back["containers"]] == [type(each) for each in state["containers"]]
    assert back["containers"][0].maxlen == 2
    assert back["odd"][:4] == state["odd"][:4]
    assert back["odd"][5].requires_grad
    assert back["odd"][6].shape == (0, 3)
    assert back["odd"][7] == {(1, "a"), 2}


def test_memory_that_overlaps_in_other_ways_is_refused(tmp_path: Path) -> None:
    array = np.arange(6.0)
    with pytest.raises(UnreadableError, match="overlap in memory"):
        CheckpointFolder(tmp_path, {}, []).write([array, torch.from_numpy(array[2:])], {})


def test_plain_values_and_tensors_come_back_to_the_bit_and_shared_ones_once(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    federation = object()
    state = {
        "view": tensor.t(),
        "row": tensor[1],
        "twice": [tensor, tensor],
        "kinds": [torch.tensor(3), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16), torch.empty(0)],
        "array": np.arange(5)[::2],
        "numbers": [np.float64(0.1), np.int32(4), 1 << 70, float("nan"), None, 1.5 + 2j],
        "sets": {frozenset({1}), ("a", 2)},
        "dtype": (torch.bfloat16, np.dtype("int8")),
        "fed": federation,
    }
    folder = CheckpointFolder(tmp_path, {"federation": federation}, [])
    folder.write(state, {"at": 5})
    found = folder.newest()
    assert found is not None
    about, back = found
    assert about["at"] == 5
    assert torch.equal(back["view"], tensor.t())
    assert torch.equal(back["row"], tensor[1])
    assert back["twice"][0] is back["twice"][1]
    for one, other in zip(back["kinds"], state["kinds"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert back["array"].tolist() == [0, 2, 4]
    assert repr(back["numbers"]) == repr(state["numbers"])
    assert back["sets"] == state["sets"]
    assert back["dtype"] == state["dtype"]
    assert back["fed"] is federation

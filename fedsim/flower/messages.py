"""What travels between the server and its nodes, and what is looked at before it is used. No pickle on the wire.

Tensors travel as Flower's arrays, which are NumPy's npy format, everything else as plain values in a ``ConfigRecord``.
Whoever reads checks the header of an array against its bytes, and against what is expected, before any memory is
taken. What must not be used raises a :class:`WireError`; whether numbers are finite is seen by whoever knows what they
are for.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedsim.checks import FedsimError, said
from fedsim.local import TensorSpec

INTRODUCE = "query.introduce"
"""The type of the message that asks a node who it is."""

WORK = "train.work"
"""The type of the message that asks a node for a task."""

RAISED = 2
"""Flower's code for client code that raised."""

DTYPES = {
    name: getattr(torch, name) for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
}
"""What can travel, by the name that NumPy and PyTorch share."""

Values = Mapping[str, Any]

Plain = TypeVar("Plain", bound="PlainRecord")


class WireError(FedsimError):
    """A message that must not be used; its text says why."""


# ---- plain values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainRecord:
    """Plain values that travel in one ``ConfigRecord``."""

    def record(self) -> ConfigRecord:
        """What travels."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return ConfigRecord({name: list(each) if isinstance(each, tuple) else each for name, each in values.items()})

    @classmethod
    def read(cls: type[Plain], content: RecordDict, name: str) -> Plain:
        """What came as ``content[name]``.

        Raises:
            WireError: for another set of values, or a value of another kind.
        """
        found = content.get(name)
        if not isinstance(found, ConfigRecord):
            raise WireError(f"it has no plain values '{name}'")
        wanted = {each.name: str(each.type) for each in fields(cls)}
        if set(found) != set(wanted):
            raise WireError(f"'{name}' holds {sorted(found)}, expected {sorted(wanted)}")
        values = {key: _fit(f"{name}.{key}", found[key], kind) for key, kind in wanted.items()}
        return cls(**values)


def _fit(name: str, value: Any, kind: str) -> Any:
    if kind == "tuple[int, ...]":
        if isinstance(value, list) and all(type(each) is int for each in value):
            return tuple(value)
    elif kind == "float":
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value).__name__ == kind:
        return value
    raise WireError(f"'{name}' is {str(value)[:40]!r}, expected {kind}")


@dataclass(frozen=True)
class Order(PlainRecord):
    """What a node is asked to do, beside its tensors."""

    task: int
    client: int
    nth: int
    """Which of this client's own tasks this is: the key of its draws."""
    job: str
    lr: float
    steps: int
    accepted: tuple[int, ...]
    """Tasks of this client whose results have been used, in that order, as far as the node may not know it yet."""
    undecided: tuple[int, ...]
    """Tasks of this client whose results the server has and has not used so far."""


@dataclass(frozen=True)
class Report(PlainRecord):
    """What a node says of a task it has done, beside its tensors."""

    task: int
    client: int
    steps: int
    """Local steps it has made."""
    samples: int
    """Training examples it holds."""
    seconds: float
    """How long it trained."""
    commits: int
    """How often it has changed what it keeps: fewer than before means that it has lost that."""
    pause: float
    """Seconds until it is ready for another task."""
    next_steps: int
    """Local steps it will make in its next task where clients choose them; -1 leaves that to the server."""


@dataclass(frozen=True)
class Greeting(PlainRecord):
    """What a node is asked for when it appears: who it is."""

    client: int
    """Who it is to be if it has no number of its own."""
    clients: int


@dataclass(frozen=True)
class Introduction(PlainRecord):
    """Who a node says it is."""

    client: int
    clients: int
    """How many there are as far as it knows; -1 if it does not."""
    samples: int
    parameters: int
    """Items of a model's vector."""
    seconds_per_gradient: float
    """Measured; one local step of a plain rule takes one gradient."""
    pause: float
    next_steps: int
    fedsim: str
    """The version it runs."""


# ---- tensors ---------------------------------------------------------------------------------------


def arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as they travel.

    Raises:
        WireError: for a dtype that cannot travel.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        dtype_name(tensor.dtype)
        # ascontiguousarray would make a vector of a single number.
        record[name] = Array.from_numpy_ndarray(np.asarray(tensor.detach().cpu().contiguous().numpy(), order="C"))
    return record


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype on the wire.

    Raises:
        WireError: for a dtype that cannot travel.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WireError(f"tensors of {name} cannot travel; those of {', '.join(DTYPES)} can")
    return name


def tensors(content: RecordDict, name: str, specs: Mapping[str, TensorSpec] | None = None) -> dict[str, Tensor]:
    """The tensors that came as ``content[name]``, in memory of their own.

    Args:
        content: of a message.
        name: of the record.
        specs: what it must hold, by name; None takes whatever is sound.

    Raises:
        WireError: naming what does not fit.
    """
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise WireError(f"it has no tensors '{name}'")
    if specs is not None and set(record) != set(specs):
        raise WireError(f"'{name}' holds {sorted(record)[:10]}, expected {sorted(specs)}")
    return {key: _tensor(array, key, None if specs is None else specs[key]) for key, array in record.items()}


def _tensor(array: Array, name: str, spec: TensorSpec | None) -> Tensor:
    """One tensor, after a look at its header and the number of its bytes."""
    if array.stype != "numpy.ndarray":
        raise WireError(f"'{name}' is a {array.stype[:40]}, not a NumPy array")
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, OverflowError, SyntaxError, TypeError) as error:
        raise WireError(f"'{name}' is no npy array ({said(error)[:80]})") from None
    if dtype.name not in DTYPES or not dtype.isnative:
        raise WireError(f"'{name}' is of {dtype}, which cannot travel")
    if spec is not None and (tuple(shape) != spec.shape or DTYPES[dtype.name] != spec.dtype):
        raise WireError(f"'{name}' is {tuple(shape)} torch.{dtype.name}, expected {spec.shape} {spec.dtype}")
    held = len(array.data) - stream.tell()
    if held != prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise WireError(f"'{name}' holds {held} bytes, which are not {tuple(shape)} {dtype}")
    flat = np.frombuffer(array.data, dtype=dtype, offset=stream.tell())
    return torch.from_numpy(np.array(flat.reshape(shape, order="F" if fortran else "C"), order="C"))


# ---- whole messages --------------------------------------------------------------------------------


def work_message(node: int, order: Order, start: Tensor, told: Mapping[str, Tensor], ttl: float) -> Message:
    """The message that asks a node for a task.

    Args:
        node: its id in Flower.
        order: what to do.
        start: ``[d]`` to start from.
        told: extra tensors.
        ttl: seconds after which nobody waits for the answer.
    """
    content = RecordDict({"order": order.record(), "start": arrays({"start": start}), "message": arrays(told)})
    return Message(content, node, WORK, ttl=ttl, group_id=str(order.task))


def greeting_message(node: int, greeting: Greeting, ttl: float) -> Message:
    """The message that asks a node who it is."""
    return Message(RecordDict({"greeting": greeting.record()}), node, INTRODUCE, ttl=ttl)


def content_of(message: Message) -> RecordDict:
    """The content of a message.

    Raises:
        WireError: if there is none.
    """
    if not message.has_content():
        raise WireError("it is empty")
    return message.content

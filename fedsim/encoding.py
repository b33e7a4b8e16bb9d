"""Plain state as bytes and back: values, containers, arrays and tensors, and objects of classes that are allowed.

No pickle: nothing a file says is called. An object is made by its class's ``__new__`` and gets its attributes, as
they were; what refers to one object, or shares one piece of memory, does so again afterwards.
"""

from __future__ import annotations

import ctypes
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import FedsimError

FindClass = Callable[[str, str], type]
"""The class of a module and a name, or :class:`UnreadableError` if no state may hold it."""

DICTS = {each.__name__: each for each in (dict, OrderedDict, Counter, defaultdict)}
FACTORIES = {each.__name__: each for each in (list, dict, set, int, float, str, tuple, bool)}
CONSTANTS = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
ARRAY_KINDS = "biufcSUmM"
"""Kinds of NumPy dtypes that hold values and no references."""


class UnreadableError(FedsimError):
    """State that cannot be saved, or bytes that are no state."""


class Encoder:
    """Turns state into a tree that JSON can hold, and the blocks of memory its arrays and tensors lie in.

    Args:
        find: decides which classes may occur.
        shared: objects that are named and not saved.
    """

    def __init__(self, find: FindClass, shared: Mapping[str, Any]) -> None:
        self.blocks: list[bytes] = []
        self._find = find
        self._shared = {id(each): name for name, each in shared.items()}
        self._known: dict[int, tuple[int, Any]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """Number and length of each block by its address."""

    def encode(self, value: Any) -> Any:
        """The tree of a value.

        Raises:
            UnreadableError: naming what cannot be saved.
        """
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self._shared:
            return ["shared", self._shared[id(value)]]
        if type(value) is tuple:
            return ["tuple", [self.encode(each) for each in value]]
        if id(value) in self._known:
            return ["ref", self._known[id(value)][0]]
        simple = self._simple(value)
        if simple is not None:
            return simple
        number = len(self._known)
        self._known[id(value)] = (number, value)  # held, so that its identity is not given to another
        return self._compound(value, number)

    def _simple(self, value: Any) -> Any:
        """Values without identity."""
        kind = type(value)
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind is complex:
            return ["complex", [value.real, value.imag]]
        if isinstance(value, enum.Enum):
            return ["enum", *self._name(kind), value.name]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return ["named", *self._name(kind), [self.encode(each) for each in value]]
        if kind is torch.Size:
            return ["size", list(value)]
        if isinstance(value, np.generic) and value.dtype.kind in ARRAY_KINDS:
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        if isinstance(value, torch.dtype):
            return ["torch", str(value).removeprefix("torch.")]
        if isinstance(value, np.dtype) and value.kind in ARRAY_KINDS:
            return ["dtype", value.str]
        if kind is range:
            return ["range", [value.start, value.stop, value.step]]
        constant = next((name for name, each in CONSTANTS.items() if each is value), None)
        return None if constant is None else ["constant", constant]

    def _compound(self, value: Any, number: int) -> list[Any]:
        """Whatever has an identity."""
        kind = type(value)
        if kind in (list, set, frozenset):
            return [kind.__name__, number, [self.encode(each) for each in value]]
        if kind is deque:
            return ["deque", number, value.maxlen, [self.encode(each) for each in value]]
        if kind in DICTS.values():
            factory = getattr(value, "default_factory", None)
            if factory is not None and factory not in FACTORIES.values():
                raise UnreadableError(f"holds a defaultdict of {_what(factory)}")
            pairs = [[self.encode(key), self.encode(each)] for key, each in value.items()]
            return ["dict", number, kind.__name__, None if factory is None else factory.__name__, pairs]
        if isinstance(value, Tensor):
            return ["tensor", number, *self._tensor(value)]
        if isinstance(value, np.ndarray):
            return ["array", number, *self._array(value)]
        if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
            raise UnreadableError(f"holds {_what(value)}, which no checkpoint may hold")
        if isinstance(value, (list, dict, set, frozenset, deque, tuple, int, float, str, bytes)):
            raise UnreadableError(f"holds a {_what(kind)}; keep plain containers and values")
        text = [str(value)] if isinstance(value, BaseException) else []
        attributes = {name: self.encode(each) for name, each in attributes_of(value).items()}
        return ["object", number, *self._name(kind), attributes, *text]

    def _name(self, kind: type) -> tuple[str, str]:
        if self._find(kind.__module__, kind.__qualname__) is not kind:
            raise UnreadableError(f"holds a {_what(kind)} of a class that has been replaced since")
        return kind.__module__, kind.__qualname__

    # ---- memory ------------------------------------------------------------------------------------

    def _tensor(self, tensor: Tensor) -> list[Any]:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise UnreadableError(
                f"holds a {tensor.layout} {type(tensor).__name__} on {tensor.device}; keep plain tensors"
            )
        if tensor.grad_fn is not None or tensor.is_conj() or tensor.is_neg():
            raise UnreadableError("holds a tensor that is part of a computation; detach and resolve it")
        block = self._storage(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [block, dtype, tensor.storage_offset(), list(tensor.shape), list(tensor.stride()), tensor.requires_grad]

    def _array(self, array: NDArray[Any]) -> list[Any]:
        if type(array) is not np.ndarray or array.dtype.kind not in ARRAY_KINDS:
            raise UnreadableError(f"holds a {type(array).__name__} of {array.dtype}; keep arrays of numbers")
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if isinstance(owner.base, Tensor):  # tensor.numpy()
            start, block = owner.base.untyped_storage().data_ptr(), self._storage(owner.base)
        else:
            start, end = np.lib.array_utils.byte_bounds(owner)
            block = self._block(start, end - start)
        offset = array.__array_interface__["data"][0] - start if array.size else 0
        return [block, array.dtype.str, offset, list(array.shape), list(array.strides), bool(array.flags.writeable)]

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        return self._block(storage.data_ptr(), storage.nbytes())

    def _block(self, address: int, length: int) -> int:
        """The number of a piece of memory; each is saved once, whoever looks at it."""
        address = address if length else 0
        known = self._places.get(address)
        if known is None:
            if any(address < other + size and other < address + length for other, (_, size) in self._places.items()):
                raise UnreadableError("holds arrays that overlap in memory without being views of one of them")
            known = self._places[address] = (len(self.blocks), length)
            self.blocks.append(ctypes.string_at(address, length) if length else b"")
        if known[1] != length:
            raise UnreadableError("holds arrays that overlap in memory without being views of one of them")
        return known[0]


class Decoder:
    """Makes state again of what :class:`Encoder` gave.

    Args:
        find: decides which classes may occur.
        shared: objects by the names they were saved under; they are referred to and never written to.
        blocks: the pieces of memory.
    """

    def __init__(self, find: FindClass, shared: Mapping[str, Any], blocks: Sequence[bytes]) -> None:
        self._find, self._shared = find, shared
        # Cloned, so that they begin where every tensor does: that can show in the last bit of a sum over one.
        self._blocks = [_bytes_tensor(each).clone() for each in blocks]
        self._known: dict[int, Any] = {}

    def decode(self, tree: Any) -> Any:
        """The value of a tree.

        Raises:
            UnreadableError: if it names a class that no state may hold.
            Exception: of many kinds, if it is no tree that an encoder made.
        """
        if not isinstance(tree, list):
            return tree
        kind, *rest = tree
        return getattr(self, f"_read_{kind}")(*rest)

    def _all(self, trees: Sequence[Any]) -> list[Any]:
        return [self.decode(each) for each in trees]

    def _keep(self, number: int, value: Any) -> Any:
        """Remember what others refer to, before its own parts are read: they may refer to it, too."""
        self._known[number] = value
        return value

    # ---- values without identity ---------------------------------------------------------------------

    def _read_shared(self, name: str) -> Any:
        return self._shared[name]

    def _read_ref(self, number: int) -> Any:
        return self._known[number]

    def _read_tuple(self, items: list[Any]) -> Any:
        return tuple(self._all(items))

    def _read_bytes(self, text: str) -> bytes:
        return bytes.fromhex(text)

    def _read_complex(self, parts: list[float]) -> complex:
        return complex(*parts)

    def _read_enum(self, module: str, name: str, member: str) -> Any:
        return self._subclass(module, name, enum.Enum).__members__[member]

    def _read_named(self, module: str, name: str, items: list[Any]) -> Any:
        return tuple.__new__(self._subclass(module, name, tuple), self._all(items))

    def _read_size(self, items: list[int]) -> Any:
        return torch.Size(items)

    def _read_scalar(self, dtype: str, text: str) -> Any:
        return np.frombuffer(bytes.fromhex(text), _dtype(dtype))[0]

    def _read_dtype(self, dtype: str) -> Any:
        return _dtype(dtype)

    def _read_torch(self, name: str) -> torch.dtype:
        return _torch_dtype(name)

    def _read_range(self, parts: list[int]) -> range:
        return range(*parts)

    def _read_constant(self, name: str) -> Any:
        return CONSTANTS[name]

    # ---- values with identity ------------------------------------------------------------------------

    def _read_list(self, number: int, items: list[Any]) -> Any:
        value = self._keep(number, [])
        value.extend(self._all(items))
        return value

    def _read_set(self, number: int, items: list[Any]) -> Any:
        value = self._keep(number, set())
        value.update(self._all(items))
        return value

    def _read_frozenset(self, number: int, items: list[Any]) -> Any:
        return self._keep(number, frozenset(self._all(items)))

    def _read_deque(self, number: int, maxlen: int | None, items: list[Any]) -> Any:
        value = self._keep(number, deque(maxlen=maxlen))
        value.extend(self._all(items))
        return value

    def _read_dict(self, number: int, kind: str, factory: str | None, pairs: list[list[Any]]) -> Any:
        value = self._keep(number, DICTS[kind]() if factory is None else defaultdict(FACTORIES[factory]))
        for key, each in pairs:
            value[self.decode(key)] = self.decode(each)
        return value

    def _read_tensor(
        self, number: int, block: int, dtype: str, offset: int, shape: list[int], stride: list[int], grad: bool
    ) -> Any:
        kind = _torch_dtype(dtype)
        memory = self._blocks[block]
        items = memory[: len(memory) // kind.itemsize * kind.itemsize].view(kind)
        tensor = items.as_strided(shape, stride, offset)  # which sees to it that it lies within
        return self._keep(number, tensor.requires_grad_() if grad else tensor)

    def _read_array(
        self, number: int, block: int, dtype: str, offset: int, shape: list[int], strides: list[int], writeable: bool
    ) -> Any:
        if 0 in shape:
            array: NDArray[Any] = np.empty(shape, _dtype(dtype))
        else:
            memory = self._blocks[block].numpy()
            array = np.ndarray(shape, _dtype(dtype), memory, offset, strides)  # which sees to it that it lies within
        array.flags.writeable = writeable
        return self._keep(number, array)

    def _read_object(self, number: int, module: str, name: str, attributes: dict[str, Any], *text: str) -> Any:
        kind = self._find(module, name)
        value = BaseException.__new__(kind, *text) if issubclass(kind, BaseException) else object.__new__(kind)
        self._keep(number, value)
        slots = _slots(kind)
        for key, each in attributes.items():
            if key in slots:
                object.__setattr__(value, key, self.decode(each))
            else:
                value.__dict__[key] = self.decode(each)
        return value

    def _subclass(self, module: str, name: str, of: type) -> Any:
        kind = self._find(module, name)
        if not issubclass(kind, of):
            raise UnreadableError(f"takes {module}.{name} for a {of.__name__}")
        return kind


def attributes_of(value: Any) -> dict[str, Any]:
    """All that an object holds, in its ``__dict__`` or in slots."""
    held = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return held | getattr(value, "__dict__", {})


def _slots(kind: type) -> list[str]:
    named = [vars(each).get("__slots__", ()) for each in kind.__mro__]
    each_name = [name for names in named for name in ([names] if isinstance(names, str) else names)]
    return [name for name in each_name if name not in ("__dict__", "__weakref__")]


def _dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(str(text))
    if dtype.kind not in ARRAY_KINDS:
        raise UnreadableError(f"holds an array of {dtype}")
    return dtype


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError(f"holds a tensor of {name}")
    return dtype


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _what(value: Any) -> str:
    """A class or function by its full name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", type(value).__name__)
    return f"{module}.{name}" if module else str(name)

"""Pickles of plain data, read without running anything they name.

A pickle is a program: it may name any function of any module and call it. This reader knows six names only, those by
which NumPy's numbers and arrays are written, and puts functions of its own in their places; NumPy's own would take the
file's word for what an array's memory holds. Everything else that is named is refused, so what comes out are dicts,
lists, tuples, sets, numbers, strings, bytes and arrays of numbers. Nothing the file says is run, but a crafted file can
still ask for much memory, more than it is long.
"""

from __future__ import annotations

import pickle
import re
from typing import Any, BinaryIO

import numpy as np

from fedsim.checks import ConfigError, said


class _DType:
    """Stands for ``numpy.dtype``: a kind and a byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = _text(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])

    def known(self) -> np.dtype[Any]:
        """The dtype, if it is one of numbers."""
        if re.fullmatch(r"b1|[iu][1248]|f[248]", self.code) is None or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds an array of {self.code}")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """Stands for ``numpy.ndarray``: what the file says of it."""

    def __init__(self, *_: Any) -> None:
        self.shape: Any = ()
        self.dtype: Any = None
        self.by_columns: Any = False
        self.memory: Any = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.by_columns, self.memory = state

    def value(self) -> Any:
        """The array, or a flat list for one of objects: those are what the file holds, resolved in their turn."""
        if self.dtype.code == "O8" and isinstance(self.memory, list):
            return _resolved(self.memory)
        flat = np.frombuffer(_bytes(self.memory), self.dtype.known())
        return flat.reshape(self.shape, order="F" if self.by_columns else "C").copy()


def _text(value: Any) -> str:
    """Text that Python 2 may have written as bytes."""
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> Any:
    """Bytes that Python 2 may have written as text."""
    return value.encode("latin-1") if isinstance(value, str) else value


def _frombuffer(content: Any, dtype: _DType, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.shape, array.dtype, array.by_columns, array.memory = shape, dtype, _text(order) == "F", content
    return array


def _scalar(dtype: _DType, content: Any) -> Any:
    return np.frombuffer(_bytes(content), dtype.known())[0].item()


def _encode(text: str, _: Any) -> bytes:
    """Stands for ``_codecs.encode``, by which old pickles write bytes."""
    return text.encode("latin-1")


KNOWN = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
"""What stands for each name that a pickle may use."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only plain values and arrays are allowed")
        return KNOWN[module, name]


def _resolved(value: Any) -> Any:
    """``value`` with arrays in place of what stands for them."""
    if isinstance(value, _Array):
        return value.value()
    if isinstance(value, dict):
        return {key: _resolved(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each) for each in value]
    return tuple(_resolved(each) for each in value) if isinstance(value, tuple) else value


def unpickled(file: BinaryIO, encoding: str = "ASCII") -> Any:
    """The plain data in an open pickle.

    Args:
        file: where it begins.
        encoding: of what Python 2 wrote as strings, as :func:`pickle.load` takes it.

    Raises:
        Exception: of any kind, if it is no pickle, is broken, or asks for anything else.
    """
    return _resolved(_PlainUnpickler(file, encoding=encoding).load())


def load_plain(key: str, path: str) -> Any:
    """The data in a pickle file.

    Args:
        key: what error lines call it, such as ``--capacity``.
        path: the file.

    Raises:
        ConfigError: if it cannot be read, or asks for anything else.
    """
    try:
        with open(path, "rb") as file:
            return unpickled(file)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever bytes can bring about
        raise ConfigError(f"{key}={path}: refused as a pickle of plain data: {said(error)}") from None

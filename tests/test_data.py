"""Where examples come from: the embedded images, users' files, and what is refused."""

from __future__ import annotations

import gzip
import pickle
import runpy
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.checks import ConfigError
from fedsim.data.sources import EMBEDDED_MEAN, EMBEDDED_STD, Dataset, Embedded, NpzFile

SCRIPT = Path(__file__).parents[1] / "experiments" / "embedded_data.py"
ORIGINAL = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def embedded() -> Dataset:
    return Embedded().load()


def arrays(**changes: object) -> dict[str, object]:
    """Six training and three test examples of two features in three classes."""
    made: dict[str, object] = {
        "x_train": np.arange(12.0).reshape(6, 2),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": np.ones((3, 2)),
        "y_test": np.array([2, 1, 0]),
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def npz(folder: Path, **changes: object) -> str:
    path = folder / "own.npz"
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]
    return str(path)


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_embedded_shapes_and_balance(embedded: Dataset) -> None:
    assert embedded.train_x.shape == (6000, 1, 28, 28)
    assert embedded.test_x.shape == (1000, 1, 28, 28)
    assert embedded.train_x.dtype == torch.float32
    assert embedded.train_y.dtype == torch.int64
    assert embedded.train_y.bincount().tolist() == [600] * 10
    assert embedded.test_y.bincount().tolist() == [100] * 10
    assert embedded.shape == (1, 28, 28)


def test_embedded_is_standardised_by_the_train_images(embedded: Dataset) -> None:
    with resources.files("fedsim.data.embedded").joinpath("fashion_mnist.npz").open("rb") as file:
        images = np.load(file)["x_train"]
    assert images.mean() / 255 == pytest.approx(EMBEDDED_MEAN, abs=1e-10)
    assert images.std() / 255 == pytest.approx(EMBEDDED_STD, abs=1e-10)
    expected = (images[17] / 255 - EMBEDDED_MEAN) / EMBEDDED_STD
    np.testing.assert_allclose(embedded.train_x[17, 0], expected, atol=1e-6)


def test_embedded_notice_travels_with_the_images() -> None:
    notice = resources.files("fedsim.data.embedded").joinpath("NOTICE").read_text()
    assert "2017 Zalando SE" in notice
    assert "WITHOUT WARRANTY OF ANY KIND" in notice


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_script_reads_idx_and_takes_the_first_of_each_class(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    labels = np.array([1, 0, 1, 1, 0, 0, 0], dtype=np.uint8)
    images = np.arange(7 * 6, dtype=np.uint8).reshape(7, 2, 3)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    x, y = script["subset"](tmp_path, "train", 2)
    np.testing.assert_array_equal(x, images[[0, 1, 2, 4]])
    np.testing.assert_array_equal(y, [1, 0, 1, 0])


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_embedded_file_is_what_the_script_makes() -> None:
    script = runpy.run_path(str(SCRIPT))
    with resources.files("fedsim.data.embedded").joinpath("fashion_mnist.npz").open("rb") as file:
        held = dict(np.load(file))
    for part, source, count in (("train", "train", 600), ("test", "t10k", 100)):
        images, labels = script["subset"](ORIGINAL, source, count)
        np.testing.assert_array_equal(held[f"x_{part}"], images)
        np.testing.assert_array_equal(held[f"y_{part}"], labels)


def test_npz_numbers_are_used_as_they_stand(tmp_path: Path) -> None:
    data = NpzFile(npz(tmp_path, y_train=np.array([0.0, 1, 2, 0, 1, 2]))).load()
    assert data.classes == 3
    assert data.train_x.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    assert data.train_y.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test_y.tolist() == [2, 1, 0]


def test_npz_bytes_are_images(tmp_path: Path) -> None:
    train = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
    test = np.full((3, 4, 5), 255, dtype=np.uint8)
    data = NpzFile(npz(tmp_path, x_train=train, x_test=test)).load()
    scaled = train / 255
    assert data.shape == (1, 4, 5)
    np.testing.assert_allclose(data.train_x[:, 0], (scaled - scaled.mean()) / scaled.std(), atol=1e-6)
    np.testing.assert_allclose(data.test_x, (1 - scaled.mean()) / scaled.std(), atol=1e-6)
    flat = NpzFile(npz(tmp_path, x_train=np.zeros_like(train), x_test=np.zeros_like(test))).load()
    assert flat.train_x.abs().max() == 0  # no division by a standard deviation of 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, ["no array y_test"]),
        ({"x_train": np.array([[1.0, np.nan], [np.inf, 1]] * 3)}, ["x_train", "6 values", "not finite"]),
        ({"x_test": np.array([[1e300, 0.0]] * 3)}, ["x_test", "3 values", "not finite"]),
        ({"x_train": np.ones((5, 2))}, ["5 examples", "6 labels"]),
        ({"x_test": np.ones((3, 4))}, ["(2,)", "(4,)"]),
        ({"x_test": np.ones((0, 2)), "y_test": np.ones(0)}, ["empty"]),
        ({"x_test": np.ones(3)}, ["x_test", "must be [examples, ...]"]),
        ({"x_train": np.ones((6, 2), dtype=np.uint8)}, ["uint8", "float64"]),
        ({"x_train": np.array([["a", "b"]] * 6)}, ["x_train", "not numbers"]),
        ({"x_train": np.ones((6, 2), dtype=complex)}, ["x_train", "not numbers"]),
        ({"y_train": np.array([0, 1, 2, 0, 1.5, np.nan])}, ["y_train", "2 labels", "not whole", "1.5"]),
        ({"y_test": np.array([0, 3, 9])}, ["test_y", "2 labels out of range", "3", "0 to 2"]),
        ({"y_train": np.array([0, 1, 2, 0, -1, 2])}, ["train_y", "1 labels out of range", "-1"]),
        ({"y_train": np.array([0, 1, 2, 0, 1, 999])}, ["999", "number from 0"]),
        ({"y_train": np.zeros((6, 1))}, ["y_train", "(6, 1)"]),
        ({"y_train": np.array(list("abcdef"))}, ["y_train", "not whole numbers"]),
        ({"y_train": np.array([2**63] * 6, dtype=np.uint64)}, ["y_train", "2^31"]),
    ],
)
def test_npz_refuses(tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    source = NpzFile(npz(tmp_path, **changes))
    with pytest.raises(ConfigError) as error:
        source.load()
    text = one_line(error)
    assert text.startswith(f"data.path={source.path}")
    for word in words:
        assert word in text


SPRUNG: list[int] = []


def spring() -> None:
    SPRUNG.append(1)


class Trap:
    """Its unpickling would leave a mark."""

    def __reduce__(self) -> tuple[object, ...]:
        return spring, ()


@pytest.mark.parametrize("kind", ["object array", "pickle", "text", "bare array", "cut off"])
def test_npz_never_unpickles_and_names_the_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "own.npz"
    if kind == "object array":
        np.savez(path, **arrays(x_train=np.array([Trap()] * 6, dtype=object)))  # type: ignore[arg-type]
    elif kind == "pickle":
        path.write_bytes(pickle.dumps([1, 2, 3]))
    elif kind == "text":
        path.write_text("a,b\n1,2\n")
    elif kind == "bare array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    else:
        np.savez(path, **arrays())  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot be read") as error:
        NpzFile(str(path)).load()
    assert str(path) in one_line(error)
    assert not SPRUNG


def test_npz_needs_a_path() -> None:
    with pytest.raises(ConfigError, match="path=null"):
        NpzFile()
    with pytest.raises(ConfigError, match=r"path=/nowhere\.npz: no such file") as error:
        NpzFile("/nowhere.npz")
    one_line(error)


def test_dataset_takes_arrays_and_needs_two_classes() -> None:
    given = arrays()
    x, y = given["x_train"], given["y_train"]
    data = Dataset(x, y, x, y, 3)  # type: ignore[arg-type]
    assert data.train_x.dtype == torch.float32
    assert data.test_y.dtype == torch.int64
    with pytest.raises(ConfigError, match="classes=1"):
        Dataset(x, y, x, y, 1)  # type: ignore[arg-type]

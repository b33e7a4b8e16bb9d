"""Images from their own files: every pixel of hand-made ones in the true formats, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.checks import ConfigError
from fedsim.config import build
from fedsim.data.images import Cifar10, FashionMnist, FashionMnistRgb, Femnist, Mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def refused(act) -> str:
    with pytest.raises(ConfigError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def standardised(train: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``other [n, channels, h, w]`` by the moments of each channel of ``train``."""
    mean, std = train.mean(axis=(0, 2, 3), keepdims=True), train.std(axis=(0, 2, 3), keepdims=True)
    return (other - mean) / std


# ---- IDX -----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_folder(folder: Path, packed: bool = True) -> dict[str, np.ndarray]:
    """Seven training and four test images of 6x5 pixels."""
    rng = np.random.default_rng(1)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (7, 6, 5), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.array([9, 0, 3, 3, 1, 2, 8], dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (4, 6, 5), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.array([5, 4, 9, 0], dtype=np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize(
    ("source", "inside"),
    [(FashionMnist, ""), (FashionMnist, "FashionMNIST/raw"), (Mnist, ""), (Mnist, "MNIST/raw")],
)
def test_idx_files_are_read_to_the_pixel(tmp_path, source, inside, packed):
    arrays = idx_folder(tmp_path / inside, packed)
    data = source(str(tmp_path)).load()
    train, test = (arrays[f"{part}-images-idx3-ubyte"][:, None] / 255 for part in ("train", "t10k"))
    np.testing.assert_allclose(data.train_x, standardised(train, train), atol=1e-6)
    np.testing.assert_allclose(data.test_x, standardised(train, test), atol=1e-6)
    assert data.train_y.tolist() == [9, 0, 3, 3, 1, 2, 8]
    assert data.test_y.tolist() == [5, 4, 9, 0]
    assert (data.classes, data.shape, data.train_ids) == (10, (1, 6, 5), None)


def test_without_a_path_the_working_directory_is_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = "download it and give data.path=FOLDER, or take data=mnist5k"
    assert refused(Mnist) == f"path=null: MNIST is not in ./data: {hint}"
    idx_folder(tmp_path / "data" / "MNIST" / "raw")
    assert len(Mnist().load().train_y) == 7


def test_the_line_for_missing_fashion_mnist_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(FashionMnist, "places", (f"{tmp_path}/a", f"{tmp_path}/b"))
    node = {"_target_": "fedsim.data.images.FashionMnist", "path": None}
    assert refused(lambda: build(node, "data")) == (
        f"data.path=null: Fashion-MNIST is not in {tmp_path}/a or {tmp_path}/b: "
        "apt-get install dataset-fashion-mnist, or data.path=FOLDER"
    )
    line = refused(lambda: build({**node, "path": str(tmp_path)}, "data"))
    assert line.startswith(f"data.path={tmp_path}: must be a folder that holds train-images-idx3-ubyte or ")


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BROKEN_IDX = {
    "cut gzip": (IMAGES, lambda data: data[: len(data) // 2], "Compressed file ended"),
    "not gzip": (IMAGES, lambda data: b"hello", "Not a gzipped file"),
    "damaged": (IMAGES, lambda data: data[:60] + bytes(8) + data[68:], ""),
    "cut items": (IMAGES, lambda data: gzip.compress(gzip.decompress(data)[:-1]), "announces items [7, 6, 5], 209"),
    "too many items": (IMAGES, lambda data: gzip.compress(gzip.decompress(data) + b"x"), "[7, 6, 5], 211 bytes"),
    "cut sizes": (IMAGES, lambda data: gzip.compress(gzip.decompress(data)[:9]), "3 sizes"),
    "other kind": (IMAGES, lambda data: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(data)[4:]), "0 0 8 3"),
    "no images": (IMAGES, lambda data: gzip.compress(idx(np.empty((0, 6, 5), np.uint8))), "[0, 6, 5]"),
    "nothing": (IMAGES, lambda data: b"", "0 0 8 3"),
    "images as labels": (LABELS, lambda data: gzip.compress(idx(np.zeros((7, 2, 2), np.uint8))), "0 0 8 1"),
}


@pytest.mark.parametrize("how", BROKEN_IDX)
def test_a_broken_idx_file_gives_one_line_that_names_it(tmp_path, how):
    name, spoil, words = BROKEN_IDX[how]
    idx_folder(tmp_path)
    path = tmp_path / name
    path.write_bytes(spoil(path.read_bytes()))
    line = refused(FashionMnist(str(tmp_path)).load)
    assert line.startswith(f"data.path={path}: cannot be read as an IDX file of bytes (")
    assert words in line


def test_labels_that_do_not_fit_are_refused(tmp_path):
    idx_folder(tmp_path)
    path = tmp_path / LABELS
    path.write_bytes(gzip.compress(idx(np.zeros(6, np.uint8))))
    assert "train_x holds 7 examples, train_y 6 labels" in refused(FashionMnist(str(tmp_path)).load)
    path.write_bytes(gzip.compress(idx(np.array([0, 1, 2, 3, 4, 5, 10], np.uint8))))
    line = refused(FashionMnist(str(tmp_path)).load)
    assert line.startswith(f"data.path={tmp_path}: train_y has 1 labels out of range, the first is 10")
    path.unlink()
    assert "there is neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz" in refused(
        FashionMnist(str(tmp_path)).load
    )


def test_rgb_is_fashion_mnist_on_a_black_ground_in_three_equal_channels(tmp_path):
    arrays = idx_folder(tmp_path)
    data = FashionMnistRgb(str(tmp_path)).load()
    assert data.shape == (3, 10, 9)
    train, test = (np.zeros((n, 3, 10, 9)) for n in (7, 4))
    train[:, :, 2:8, 2:7] = arrays["train-images-idx3-ubyte"][:, None] / 255
    test[:, :, 2:8, 2:7] = arrays["t10k-images-idx3-ubyte"][:, None] / 255
    np.testing.assert_allclose(data.train_x, standardised(train, train), atol=1e-6)
    np.testing.assert_allclose(data.test_x, standardised(train, test), atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_standardising_takes_no_more_memory_than_the_images_themselves():
    code = """
from pathlib import Path
import numpy as np, torch
from fedsim.data.images import standardised_by_channel
from fedsim.data.sources import Dataset
train, test = (np.full((n, 1, 100, 100), 7, dtype=np.uint8) for n in (6000, 10))
def peak():  # not ru_maxrss, which begins with the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
x = standardised_by_channel(train, test)
Dataset(x[0], torch.zeros(6000).long(), x[1], torch.zeros(10).long(), 10)
print((peak() - before) / x[0].nbytes)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 1.3  # 240 MB of float32, and what counts 1,000 images at once


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_all_of_fashion_mnist_is_what_its_authors_published():
    data = FashionMnist().load()
    assert data.train_y.bincount().tolist() == [6000] * 10
    assert data.test_y.bincount().tolist() == [1000] * 10
    assert (data.shape, len(data.test_x)) == ((1, 28, 28), 10000)
    assert data.train_y[:5].tolist() == [9, 0, 0, 3, 0]
    assert data.test_y[:5].tolist() == [9, 2, 1, 1, 6]
    # Black and white come out as -mean / std and (1 - mean) / std of the published 0.2860 and 0.3530.
    low, high = float(data.train_x.min()), float(data.train_x.max())
    assert 1 / (high - low) == pytest.approx(0.3530, abs=5e-5)
    assert -low / (high - low) == pytest.approx(0.2860, abs=5e-5)
    images = gzip.decompress((DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    back = ((data.test_x - low) / (high - low) * 255).round().to(torch.uint8)
    assert back.numpy().tobytes() == images


# ---- CIFAR-10 --------------------------------------------------------------------------------------


def python2(value) -> bytes:
    """The opcodes Python 2's cPickle writes in protocol 2, where text is bytes and arrays are numpy 1's."""
    if isinstance(value, bytes):
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(each) for key, each in value.items()) + b"u"
    rows, columns = value.shape
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + python2(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + python2(b"u1") + b"K\0K\x01\x87R(K\x03" + python2(b"|") + b"NNNJ\xff\xff\xff\xff"
    state = b"(K\x01" + python2(rows) + python2(columns) + b"\x86" + dtype + b"J\xff\xff\xff\xffK\0tb\x89"
    return made + state + python2(value.tobytes()) + b"tb"


def cifar_batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Six batches of 2, 1, 3, 1, 1 and 2 images."""
    rng = np.random.default_rng(2)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    sizes = [2, 1, 3, 1, 1, 2]
    return {
        name: (rng.integers(0, 256, (size, 3072), dtype=np.uint8), rng.integers(0, 10, size).tolist())
        for name, size in zip(names, sizes, strict=True)
    }


def write_pickles(folder: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    batches = cifar_batches()
    for name, (images, labels) in batches.items():
        held = {b"batch_label": b"a batch", b"labels": labels, b"data": images, b"filenames": [b"x.png"] * len(labels)}
        (folder / name).write_bytes(b"\x80\x02" + python2(held) + b".")
    return batches


def write_binary(folder: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    batches = cifar_batches()
    for name, (images, labels) in batches.items():
        records = b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))
        (folder / f"{name}.bin").write_bytes(records)
    return batches


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("write", "folder"), [(write_pickles, "py"), (write_binary, "bin")])
def test_cifar_is_read_to_the_pixel(tmp_path, write, folder, inside):
    batches = write(tmp_path / f"cifar-10-batches-{folder}" if inside else tmp_path)
    data = Cifar10(str(tmp_path)).load()
    *training, (test, test_labels) = batches.values()
    train = np.concatenate([images for images, _ in training]).reshape(-1, 3, 32, 32) / 255
    np.testing.assert_allclose(data.train_x, standardised(train, train), atol=1e-5)
    np.testing.assert_allclose(data.test_x, standardised(train, test.reshape(-1, 3, 32, 32) / 255), atol=1e-5)
    assert data.train_y.tolist() == [label for _, labels in training for label in labels]
    assert data.test_y.tolist() == test_labels
    # Planes of red, green and blue, each by rows: byte 1024 + 32 * 4 + 7 of a record is green at row 4, column 7.
    green = train[:, 1]
    expected = (training[0][0][1, 1024 + 32 * 4 + 7] / 255 - green.mean()) / green.std()
    assert float(data.train_x[1, 1, 4, 7]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("protocol", [3, 4])
def test_batches_pickled_again_by_a_new_numpy_are_read(tmp_path, protocol):
    images, labels = write_pickles(tmp_path)["test_batch"]
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": images, b"labels": labels}, protocol=protocol))
    data = Cifar10(str(tmp_path)).load()
    assert data.test_y.tolist() == labels
    order = data.test_x[0].flatten(1).argsort(dim=1, stable=True)
    assert order.tolist() == np.argsort(images[0].reshape(3, 1024), axis=1, kind="stable").tolist()


class Calls:
    """Pickled, it calls ``function`` when it is read."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["whole", "item", "key"])
def test_a_pickle_that_calls_something_is_refused_before_it_does(tmp_path, protocol, where):
    write_pickles(tmp_path)
    mark = tmp_path / "mark"
    evil = Calls(os.mkdir, str(mark))
    held = {"whole": evil, "item": {"labels": [0], "data": [evil]}, "key": {evil: 1}}[where]
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(held, protocol=protocol))
    line = refused(Cifar10(str(tmp_path)).load)
    assert line.startswith(f"data.path={tmp_path}/data_batch_3: cannot be read as a batch of CIFAR-10's Python version")
    assert f"it asks for {os.mkdir.__module__}.mkdir, only plain values and arrays are allowed" in line
    assert not mark.exists()


@pytest.mark.parametrize("name", ["numpy\nload", "numpy\nmemmap", "builtins\neval", "__builtin__\neval", "os\nsystem"])
def test_other_names_are_refused_even_from_numpy(tmp_path, name):
    write_pickles(tmp_path)
    (tmp_path / "test_batch").write_bytes(b"\x80\x02c" + name.encode() + b"\n(U\x01xtR.")
    assert f"it asks for {name.replace(chr(10), '.')}," in refused(Cifar10(str(tmp_path)).load)


IMAGE = np.zeros((1, 3072), dtype=np.uint8)
BROKEN_PICKLES = {
    "cut": (b"\x80\x02" + python2({b"data": IMAGE, b"labels": [0]})[:900], "truncated"),
    "empty": (b"", "Ran out of input"),
    "not a pickle": (b"hello", ""),
    "not a dict": (b"\x80\x02" + python2([1]) + b".", "needs the keys data and labels"),
    "no labels": (b"\x80\x02" + python2({b"data": IMAGE}) + b".", "needs the keys data and labels"),
    "a list for data": (b"\x80\x02" + python2({b"data": [1], b"labels": [0]}) + b".", "must be bytes [images, 3072]"),
    "small images": (b"\x80\x02" + python2({b"data": IMAGE[:, :8], b"labels": [0]}) + b".", "is [1, 8]"),
    "no images": (b"\x80\x02" + python2({b"data": IMAGE[:0], b"labels": []}) + b".", "is [0, 3072]"),
    "too many labels": (b"\x80\x02" + python2({b"data": IMAGE, b"labels": [0, 1]}) + b".", "a list of 1 classes"),
    "text for labels": (b"\x80\x02" + python2({b"data": IMAGE, b"labels": [b"cat"]}) + b".", "a list of 1 classes"),
    "negative label": (b"\x80\x02" + python2({b"data": IMAGE, b"labels": [-1]}) + b".", "a list of 1 classes"),
}


@pytest.mark.parametrize("how", BROKEN_PICKLES)
def test_a_broken_batch_gives_one_line_that_names_it(tmp_path, how):
    content, words = BROKEN_PICKLES[how]
    write_pickles(tmp_path)
    (tmp_path / "data_batch_4").write_bytes(content)
    line = refused(Cifar10(str(tmp_path)).load)
    assert line.startswith(f"data.path={tmp_path}/data_batch_4: cannot be read as a batch of CIFAR-10's Python version")
    assert words in line


@pytest.mark.parametrize("left", [0, 1, 3072, 3074])
def test_binary_batches_hold_whole_records(tmp_path, left):
    write_binary(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(bytes(left))
    line = refused(Cifar10(str(tmp_path)).load)
    assert line.startswith(f"data.path={path}: ")
    assert f"{left} bytes are not whole records of 3073" in line


def test_a_missing_batch_of_the_python_version_is_named(tmp_path):
    write_pickles(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    line = refused(Cifar10(str(tmp_path)).load)
    assert line.startswith(f"data.path={tmp_path}/data_batch_4: ")
    assert "data_batch_4.bin" not in line


def test_a_folder_of_both_versions_is_refused(tmp_path):
    write_pickles(tmp_path)
    write_binary(tmp_path / "other")
    (tmp_path / "other" / "data_batch_4.bin").rename(tmp_path / "data_batch_4.bin")
    assert refused(Cifar10(str(tmp_path)).load) == (
        f"data.path={tmp_path}: mixes both versions of CIFAR-10 (data_batch_1 and data_batch_4.bin); keep one of them"
    )


def test_a_missing_batch_is_named(tmp_path):
    write_binary(tmp_path)
    (tmp_path / "data_batch_5.bin").unlink()
    assert f"{tmp_path}/data_batch_5.bin" in refused(Cifar10(str(tmp_path)).load)
    (tmp_path / "data_batch_1.bin").unlink()
    assert refused(lambda: Cifar10(str(tmp_path))).startswith(f"path={tmp_path}: must be a folder that holds ")


# ---- FEMNIST ---------------------------------------------------------------------------------------


def leaf(users: dict[str, tuple[np.ndarray, list[int]]]) -> dict:
    return {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x.tolist(), "y": y} for user, (x, y) in users.items()},
    }


@pytest.fixture
def leaf_folder(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two training files with three users, one of them in both, and one test file."""
    rng = np.random.default_rng(3)
    x = {name: np.round(rng.random((n, 784)), 6) for name, n in {"a": 2, "b": 1, "c": 3, "b2": 2, "t": 2}.items()}
    files = {
        "train/all_data_0.json": {"f0002_a": (x["a"], [0, 61]), "f0001_b": (x["b"], [7]), "nothing": (x["a"][:0], [])},
        "train/all_data_1.json": {"f0000_c": (x["c"], [1, 2, 3]), "f0001_b": (x["b2"], [8, 9])},
        "test/all_data_0.json": {"f9999_new": (x["t"], [10, 60])},
    }
    for name, users in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(leaf(users)))
    return tmp_path, x


def test_leaf_json_is_read_to_the_pixel(leaf_folder):
    folder, x = leaf_folder
    data = Femnist(str(folder)).load()
    train = np.concatenate([x["a"], x["b"], x["c"], x["b2"]]).reshape(-1, 1, 28, 28)
    np.testing.assert_allclose(data.train_x, standardised(train, train), atol=1e-5)
    np.testing.assert_allclose(data.test_x, standardised(train, x["t"].reshape(-1, 1, 28, 28)), atol=1e-5)
    assert data.train_y.tolist() == [0, 61, 7, 1, 2, 3, 8, 9]
    assert data.test_y.tolist() == [10, 60]
    assert data.train_ids.tolist() == [0, 0, 1, 2, 2, 2, 1, 1]  # numbered as they come, one user in two files
    assert (data.classes, data.shape) == (62, (1, 28, 28))


BROKEN_LEAF = {
    "not json": (lambda held: "{", "Expecting"),
    "a list": (lambda held: "[]", "needs the keys users, num_samples and user_data"),
    "no user_data": (lambda held: json.dumps({**held, "user_data": None}), "user f0002_a: TypeError"),
    "no such user": (lambda held: json.dumps({**held, "users": ["z", "y", "x"]}), "user z: KeyError"),
    "fewer counts": (lambda held: json.dumps({**held, "num_samples": [2]}), "lists of one length"),
    "other counts": (lambda held: json.dumps({**held, "num_samples": [3, 1, 0]}), "user f0002_a: needs 3 times 784"),
    "class 1.5": (lambda held: json.dumps(held).replace("61]", "1.5]"), "user f0002_a: needs 2 times 784"),
    "ragged": (lambda held: json.dumps(held).replace('"x": [[', '"x": [[1.0, ', 1), "user f0002_a: ValueError"),
}


@pytest.mark.parametrize("how", BROKEN_LEAF)
def test_a_broken_leaf_file_gives_one_line_that_names_it(leaf_folder, how):
    spoil, words = BROKEN_LEAF[how]
    path = leaf_folder[0] / "train" / "all_data_0.json"
    path.write_text(spoil(json.loads(path.read_text())))
    line = refused(Femnist(str(leaf_folder[0])).load)
    assert line.startswith(f"data.path={path}: cannot be read as LEAF's json (")
    assert words in line


def test_leaf_folders_without_data_are_refused(leaf_folder, tmp_path):
    assert refused(Femnist).startswith("path=null: give LEAF's folder")
    assert refused(lambda: Femnist(str(tmp_path / "train"))).endswith("there is no train/ in it")
    (tmp_path / "test" / "all_data_0.json").write_text(json.dumps(leaf({})))
    assert refused(Femnist(str(tmp_path)).load) == f"data.path={tmp_path}: no user in test/ has an example"
    (tmp_path / "test" / "all_data_0.json").unlink()
    assert refused(Femnist(str(tmp_path)).load) == f"data.path={tmp_path}/test: holds no json file"

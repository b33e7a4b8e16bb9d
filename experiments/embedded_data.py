"""Make the embedded subset of Fashion-MNIST anew from the original IDX files.

python experiments/embedded_data.py [--source FOLDER] [--out FILE]

The subset is the first 600 training and the first 100 test images of each class, in file order.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SOURCE = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
OUT = Path(__file__).parents[1] / "fedsim" / "data" / "embedded" / "fashion_mnist.npz"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in a gzipped IDX file of unsigned bytes: magic 0 0 8 ndim, big-endian sizes, then the items."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(tuple(shape))


def first_of_each(labels: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """The positions of the first ``count`` items of each class, in file order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def subset(source: Path, part: str, per_class: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``[10 * per_class, 28, 28]`` and labels of one part (``train`` or ``t10k``)."""
    images = read_idx(source / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
    chosen = first_of_each(labels, per_class)
    return images[chosen], labels[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded subset of Fashion-MNIST anew.")
    parser.add_argument("--source", type=Path, default=SOURCE, help=f"folder of the four IDX .gz files ({SOURCE})")
    parser.add_argument("--out", type=Path, default=OUT, help="the npz file to write")
    arguments = parser.parse_args()
    x_train, y_train = subset(arguments.source, "train", 600)
    x_test, y_test = subset(arguments.source, "t10k", 100)
    np.savez_compressed(arguments.out, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    scaled = x_train / 255.0
    print(f"{arguments.out}: train mean {scaled.mean():.10f}, standard deviation {scaled.std():.10f}")


if __name__ == "__main__":
    main()

"""Stands for data that are at the nodes already: python make_data.py FOLDER NODES writes FOLDER/0.npz, 1.npz, ..."""

import sys
from pathlib import Path

import numpy as np

from fedsim.data.images import Digits


def main(folder: Path, nodes: int) -> None:
    """Give every node another part of scikit-learn's digits, each with some classes more often than others."""
    data = Digits().load()
    order = np.argsort(data.train_y.numpy(), kind="stable")
    folder.mkdir(parents=True, exist_ok=True)
    for node, mine in enumerate(np.array_split(order, nodes)):
        np.savez(folder / f"{node}.npz", x=data.train_x.numpy()[mine], y=data.train_y.numpy()[mine])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

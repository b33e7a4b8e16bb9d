"""Movements of a smart watch: which exercise of the shoulder a person does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.checks import ConfigError, optional_whole, said, whole
from fedsim.data.packages import package_path
from fedsim.data.sources import Dataset
from fedsim.rng import Randomness
from fedsim.unpickling import unpickled

EXERCISES, SUBJECTS, AXES = 7, 10, 6

TEST_PART = 5
"""One of so many parts of each recording is for testing, where no subject is left out."""


class Watch:
    """Which of 7 exercises a person does, from windows of a watch's readings; the natural client is the person.

    140 recordings (10 persons, 7 exercises, two arms) of acceleration and rotation about three axes at 50 Hz, from the
    package seglearn 1.2.5 (BSD). Windows of 100 samples, every 50: 4,677, float32 ``[6, 100]``, standardised per axis
    by the training windows' mean and standard deviation. Source: Burns et al. 2018 (arXiv:1802.01489).

    Either one person's windows are the test set, or a fifth of each recording's: a run of neighbouring windows at a
    place that is drawn once for all (the same in every run), and the training windows that overlap it are left out. A
    recording of fewer than five windows has none for testing.

    Args:
        width: samples in a window (20 ms each), 2 to 200.
        stride: samples between the starts of windows, 1 to ``width``.
        held_out: the person to test on, 0 to 9; None for a part of every recording.

    Raises:
        ConfigError: from :meth:`load` if the package is missing or its file is not as expected.
    """

    package = "seglearn"
    """The distribution they come from."""

    def __init__(self, width: int = 100, stride: int = 50, held_out: int | None = None) -> None:
        self.width = whole("width", width, least=2, most=200)
        self.stride = whole("stride", stride, least=1, most=self.width)
        self.held_out = optional_whole("held_out", held_out, most=SUBJECTS - 1)

    def load(self) -> Dataset:
        """All windows, recording by recording and in the order of time."""
        path = package_path("watch", "seglearn", "data/watch_dataset.npy", "seglearn==1.2.5")
        recordings, exercises, subjects = read_recordings(path)
        windows, tested, used = [], [], []
        for number, recording in enumerate(recordings):
            all_of_it = np.lib.stride_tricks.sliding_window_view(recording, self.width, axis=0)[:: self.stride]
            windows.append(all_of_it.astype(np.float32))
            test, train = self._split(len(all_of_it), number, int(subjects[number]))
            tested.append(test)
            used.append(train)
        lengths = [len(each) for each in windows]
        x = torch.from_numpy(np.concatenate(windows))
        y, ids = (torch.from_numpy(np.repeat(each, lengths)) for each in (exercises, subjects))
        test_rows, train_rows = (torch.from_numpy(np.concatenate(each)) for each in (tested, used))
        spread, mean = torch.std_mean(x[train_rows].double(), dim=(0, 2), correction=0, keepdim=True)
        x = ((x.double() - mean) / spread).float()
        return Dataset(
            x[train_rows], y[train_rows], x[test_rows], y[test_rows], EXERCISES, "watch", train_ids=ids[train_rows]
        )

    def _split(self, windows: int, recording: int, subject: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of one recording's windows are for testing and which for training, bool ``[windows]`` each."""
        if self.held_out is not None:
            return np.full(windows, subject == self.held_out), np.full(windows, subject != self.held_out)
        tested = windows // TEST_PART
        if not tested:
            return np.zeros(windows, dtype=np.bool_), np.ones(windows, dtype=np.bool_)
        first = int(Randomness(0)("watch test", recording).integers(windows - tested + 1))
        last = first + tested - 1
        start = np.arange(windows) * self.stride
        apart = (start + self.width <= start[first]) | (start >= start[last] + self.width)
        position = np.arange(windows)
        return (position >= first) & (position <= last), apart


def read_recordings(path: Path) -> tuple[list[NDArray[np.float64]], NDArray[np.int64], NDArray[np.int64]]:
    """The recordings ``[samples, 6]`` each, and the exercise ``0 .. 6`` and the person ``0 .. 9`` of each.

    The file is a pickle, which could run any code: it is read by a reader that calls nothing it names.

    Raises:
        ConfigError: if the file is not the one described.
    """
    try:
        with path.open("rb") as file:
            content = _read(file)
        recordings = [_array(each, "<f8") for each in content["X"]]
        exercises, people = _array(content["y"], "<i8"), _array(content["subject"], "<i8")
    except Exception as error:  # a broken pickle may raise anything
        raise ConfigError(
            f"data=watch: {path} cannot be read ({said(error)}): pip install --no-deps seglearn==1.2.5"
        ) from None
    subjects = people - 1
    shapes = {each.shape[1:] for each in recordings} | {(len(recordings),) == exercises.shape == subjects.shape}
    if (
        shapes != {(AXES,), True}
        or set(exercises.tolist()) != set(range(EXERCISES))
        or set(subjects.tolist()) != set(range(SUBJECTS))
    ):
        raise ConfigError(f"data=watch: {path} is not the file of seglearn 1.2.5")
    return recordings, exercises, subjects


def _read(file: BinaryIO) -> dict[str, Any]:
    """The dictionary in an npy file that holds one object."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the npy format")
    np.lib.format.read_array_header_1_0(file)
    content = unpickled(file)[0]
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
    return content


def _array(read: Any, dtype: str) -> NDArray[Any]:
    """An array of one kind."""
    if not isinstance(read, np.ndarray) or read.dtype != np.dtype(dtype):
        raise TypeError(f"it holds {type(read).__name__} {getattr(read, 'dtype', '')}, not an array of {dtype}")
    return read

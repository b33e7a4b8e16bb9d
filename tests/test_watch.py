"""The watch by person: against the package's file read in another way."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.checks import ConfigError
from fedsim.data import watch
from fedsim.data.packages import package_path
from fedsim.data.sources import Dataset
from fedsim.data.watch import Watch, read_recordings

needs_seglearn = pytest.mark.skipif(find_spec("seglearn") is None, reason="needs the package seglearn")


# ---- the watch -----------------------------------------------------------------------------------


def watch_file() -> Path:
    return package_path("watch", "seglearn", "data/watch_dataset.npy", "seglearn==1.2.5")


@needs_seglearn
def test_recordings_are_those_that_numpy_reads() -> None:
    recordings, exercises, subjects = read_recordings(watch_file())
    content = np.load(watch_file(), allow_pickle=True).item()  # the file that was installed, for a second reading
    assert len(recordings) == len(content["X"]) == 140
    assert all(np.array_equal(ours, numpys) for ours, numpys in zip(recordings, content["X"], strict=True))
    assert np.array_equal(exercises, content["y"])
    assert np.array_equal(subjects + 1, content["subject"])


@needs_seglearn
def test_watch_has_4677_windows_standardised_and_told_apart_by_their_nearest_neighbour() -> None:
    data = Watch().load()
    assert (len(data.train_y), len(data.test_y), data.shape) == (3529, 881, (6, 100))
    torch.testing.assert_close(data.train_x.mean(dim=(0, 2)), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train_x.square().mean(dim=(0, 2)), torch.ones(6), rtol=0, atol=1e-5)
    nearest = torch.cdist(data.test_x.flatten(1), data.train_x.flatten(1)).argmin(dim=1)
    assert float((data.train_y[nearest] == data.test_y).float().mean()) > 0.9
    left_out = Watch(held_out=3).load()
    assert len(left_out.train_y) + len(left_out.test_y) == 4677


PLACE, PERSON, EXERCISE, RECORDING = range(4)
"""What the axes of the recordings below say of each sample; its place is that in its recording."""

LENGTHS = [300 + 13 * number for number in range(21)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """21 recordings whose readings say where they come from."""
    exercises, subjects = np.arange(21) % 7, np.arange(21) % 10
    recordings = []
    for number, length in enumerate(LENGTHS):
        recording = np.empty((length, 6))
        recording[:, PLACE] = np.arange(length)
        recording[:, PERSON], recording[:, EXERCISE] = subjects[number], exercises[number]
        recording[:, RECORDING:] = number
        recordings.append(recording)
    monkeypatch.setattr(watch, "package_path", lambda *_: Path())
    monkeypatch.setattr(watch, "read_recordings", lambda _: (recordings, exercises, subjects))


def read_back(data: Dataset, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The readings of one axis before they were standardised, of training and test windows ``[windows, width]``."""
    both = torch.cat([data.train_x[:, axis], data.test_x[:, axis]]).double()
    steps = both.diff(dim=1) if axis == PLACE else both.unique().diff()
    raw = (both - both.min()) / steps[steps > 1e-3].mean()
    assert (raw - raw.round()).abs().max() < 0.01
    return raw.round().long().split([len(data.train_y), len(data.test_y)])


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("width", "stride"), [(20, 10), (20, 20), (16, 3), (50, 1)])
def test_a_fifth_of_each_recording_is_tested_on_and_none_of_its_samples_trained_on(width: int, stride: int) -> None:
    data = Watch(width=width, stride=stride).load()
    assert data.shape == (6, width)
    (train_place, test_place), (train_of, test_of) = read_back(data, PLACE), read_back(data, RECORDING)
    for place in (train_place, test_place):
        assert torch.equal(place, place[:, :1] + torch.arange(width))
    for number, length in enumerate(LENGTHS):
        train, test = train_place[train_of[:, 0] == number], test_place[test_of[:, 0] == number]
        assert not set(train.flatten().tolist()) & set(test.flatten().tolist())
        count = (length - width) // stride + 1
        starts = test[:, 0].tolist()
        assert starts == list(range(starts[0], starts[0] + count // 5 * stride, stride))
        touched = range(starts[0] - width + 1, starts[-1] + width)
        assert train[:, 0].tolist() == [at for at in range(0, count * stride, stride) if at not in touched]


@pytest.mark.usefixtures("counted")
def test_a_recording_too_short_for_a_test_window_is_trained_on() -> None:
    data = Watch(width=100, stride=100).load()  # 3 to 5 windows of each recording
    counts = np.array([length // 100 for length in LENGTHS])
    train, test = read_back(data, RECORDING)
    assert {3, 4, 5} == set(counts)
    assert np.bincount(train[:, 0], minlength=21).tolist() == (counts - counts // 5).tolist()
    assert np.bincount(test[:, 0], minlength=21).tolist() == (counts // 5).tolist()


@pytest.mark.usefixtures("counted")
def test_watch_windows_carry_their_person_and_their_exercise() -> None:
    data = Watch(width=20, stride=10).load()
    person, (exercise, exercise_tested) = read_back(data, PERSON)[0], read_back(data, EXERCISE)
    assert data.train_ids is not None
    assert torch.equal(data.train_ids, person[:, 0])
    assert torch.equal(data.train_y, exercise[:, 0])
    assert torch.equal(data.test_y, exercise_tested[:, 0])


@pytest.mark.usefixtures("counted")
def test_a_person_left_out_is_the_test_set_and_nothing_else_is() -> None:
    data = Watch(width=20, stride=10, held_out=4).load()
    train, test = read_back(data, PERSON)
    assert set(test.flatten().tolist()) == {4}
    assert set(train.flatten().tolist()) == set(range(10)) - {4}
    assert data.train_ids is not None
    assert torch.equal(data.train_ids, train[:, 0])
    assert len(data.train_y) + len(data.test_y) == sum((length - 20) // 10 + 1 for length in LENGTHS)


def test_watch_refuses_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^stride=101: must be a whole number from 1 to 100$"):
        Watch(stride=101)
    with pytest.raises(ConfigError, match=r"^held_out=10: must be a whole number from 0 to 9$"):
        Watch(held_out=10)


class Runs:
    """Unpickled by a trusting reader, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def npy(content: bytes) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    return header.getvalue() + content


def as_seglearn(readings: np.ndarray) -> bytes:
    """A pickle by the names that seglearn's file has."""
    content = {"X": [readings], "y": np.zeros(1, dtype=np.int64), "subject": np.ones(1, dtype=np.int64)}
    return pickle.dumps(np.array(content, dtype=object), protocol=2).replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("kind", ["code", "nested", "memory", "other class", "truncated", "empty", "number"])
def test_a_strangers_npy_runs_nothing_and_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    made = tmp_path / "made"
    content = {
        "code": pickle.dumps(Runs(made), protocol=2),
        "nested": pickle.dumps({"X": [Runs(made)], "y": [1]}, protocol=4),
        # numpy would take these numbers for the addresses of objects
        "memory": as_seglearn(np.zeros((4, 6))).replace(b"f8", b"O8"),
        "other class": pickle.dumps(np.random.default_rng(0)),
        "truncated": b"\x80\x02cnumpy.core.multiarray\n_recons",
        "empty": b"",
        "number": pickle.dumps(3),
    }[kind]
    path = tmp_path / "watch_dataset.npy"
    path.write_bytes(npy(content))
    with pytest.raises(ConfigError) as raised:
        read_recordings(path)
    assert not made.exists()
    line = str(raised.value)
    assert line.startswith(f"data=watch: {path} cannot be read (")
    assert line.endswith("): pip install --no-deps seglearn==1.2.5")
    assert "\n" not in line
    if kind in ("code", "nested"):
        assert f"{os.mkdir.__module__}.mkdir" in line
    if kind == "memory":
        assert "it holds an array of O8" in line


def test_the_stranger_above_would_run_code_in_numpy(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy(pickle.dumps(Runs(tmp_path / "made"), protocol=2)))
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert (tmp_path / "made").exists()


@needs_seglearn
def test_a_file_that_is_not_seglearns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = watch._read

    def fewer(file: io.BufferedReader) -> dict[str, object]:
        content = real(file)
        return content | {"X": content["X"][:-1]}

    monkeypatch.setattr(watch, "_read", fewer)
    with pytest.raises(ConfigError, match=r"^data=watch: .* is not the file of seglearn 1.2.5$"):
        read_recordings(watch_file())

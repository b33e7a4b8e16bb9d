"""Memory that the driver shares with workers of its own machine."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import tempfile
from multiprocessing.connection import Listener
from pathlib import Path

import numpy as np
import pytest
from support import opened_files

from fedsim.pool.regions import GROWTH, Address, Region
from fedsim.vectors import ALIGNED


def test_arrays_come_out_as_they_went_in_and_lie_where_new_vectors_would() -> None:
    made = Region.create()
    sent = {
        "one": np.arange(7, dtype=np.float32),
        "none": np.empty((0, 3)),
        "scalar": np.array(2.5),
        "turned": np.arange(12, dtype=np.int16).reshape(3, 4).T,
        "strided": np.arange(20)[::3],
    }
    letter = made.seal(("small", sent))
    word, got = Region.attach(made.address).unsealed(letter)
    assert word == "small"
    # What is not dense travels as text.
    assert [got[name].ctypes.data % ALIGNED for name in ("one", "scalar", "turned")] == [0, 0, 0]
    for name, array in sent.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(got[name], array)


def test_a_letter_is_small_whatever_it_is_about() -> None:
    made = Region.create()
    for value in ([np.ones(10**6), np.ones(10**6)], list(map(str, range(10**5))), [np.ones(3)] * 10**4):
        letter = made.seal(value)
        assert len(pickle.dumps(letter)) < 300
        assert str(made.unsealed(letter)) == str(value)


CHILD = """
import sys
from fedsim.pool.regions import Region
from multiprocessing.connection import Client

with Client(sys.argv[1]) as line:
    letter = line.recv()
    assert letter.address.leads_there()
    region = Region.attach(letter.address)
    line.send(region.seal([array * 2 for array in region.unsealed(letter)] + [range(3)]))
"""


def test_another_process_reads_grows_and_answers_in_the_same_memory(tmp_path: Path) -> None:
    region, numbers = Region.create(), np.arange(GROWTH // 8)
    with Listener(str(tmp_path / "line")) as listener:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "line")])
        with listener.accept() as line:
            line.send(region.seal([numbers]))
            one, rest = region.unsealed(line.recv())
            np.testing.assert_array_equal(one, 2 * numbers)
            assert rest == range(3)
        assert child.wait(60) == 0


def test_a_region_is_used_again_and_grows_only_when_it_must() -> None:
    region = Region.create()
    lengths = []
    for size in (10, 1000, GROWTH - 1000, 10, GROWTH - 10, 10):  # the contents need some bytes more
        letter = region.seal(np.full(size, size % 251, dtype=np.uint8))
        assert set(region.unsealed(letter).tolist()) == {size % 251}
        lengths.append(os.stat(region.address.path).st_size)
    assert lengths == [GROWTH] * 4 + [2 * GROWTH] * 2


def test_nothing_is_left_when_it_is_dropped() -> None:
    region = Region.create()
    region.seal(np.ones(1000))  # imports what it needs
    del region
    before = opened_files()
    region = Region.create()
    other, address = Region.attach(region.address), region.address
    other.unsealed(region.seal(np.ones(1000)))
    assert address.leads_there()
    assert opened_files() == before + 4  # a file and its mapping in each
    del region, other
    assert opened_files() == before
    assert not address.leads_there()


def test_an_address_that_leads_elsewhere_is_known_for_it() -> None:
    made = Region.create().address
    kept = Region.create()
    assert not Address("/proc/1/fd/999999", made.name).leads_there()
    assert not Address(kept.address.path, made.name).leads_there()
    with tempfile.TemporaryFile() as file:
        assert not Address(f"/proc/{os.getpid()}/fd/{file.fileno()}", kept.address.name).leads_there()
    assert kept.address.leads_there()


def test_a_lack_of_memory_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region.create()
    letter = region.seal(np.arange(5))

    def refuse(*_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="no space left"):
        region.seal(np.zeros(2 * GROWTH))
    np.testing.assert_array_equal(region.unsealed(letter), np.arange(5))


def test_what_has_taken_the_place_of_a_region_is_left_alone(tmp_path: Path) -> None:
    region = Region.create()
    address, before = region.address, opened_files()
    del region
    gc.collect()
    with open(tmp_path / "held", "w+") as file:
        assert file.fileno() == int(address.path.rpartition("/")[2])
        with pytest.raises(FileNotFoundError, match="is another file by now"):
            Region.attach(address)
        assert opened_files() == before

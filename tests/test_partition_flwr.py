"""The adapter to flwr-datasets' partitioners."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from spreads import Array, balanced, counted, parts_of

from fedsim.checks import ConfigError
from fedsim.data.partitions import (
    FlwrDatasets,
    Linear,
    Pathological,
    Square,
    Table,
)
from fedsim.rng import Randomness

# ---- flwr-datasets ---------------------------------------------------------------------------------


class FakeDataset:
    def __init__(self, columns: dict[str, Array]) -> None:
        self.columns = columns

    @classmethod
    def from_dict(cls, columns: dict[str, Array]) -> FakeDataset:
        return cls(columns)

    def __getitem__(self, rows: slice) -> dict[str, list[int]]:
        return {name: column[rows].tolist() for name, column in self.columns.items()}

    def select(self, rows: Array) -> FakeDataset:
        return FakeDataset({name: column[rows] for name, column in self.columns.items()})


class EveryOtherPartitioner:
    """Deals the rows in turn, leaving out those of label ``skip``."""

    dataset: FakeDataset

    def __init__(
        self, num_partitions: int, partition_by: str, skip: int = -1, overlap: int = 0, seed: int = 42
    ) -> None:
        if skip > 5:
            raise ValueError("skip is\ntoo large")
        self.num_partitions, self.partition_by = num_partitions, partition_by
        self.skip, self.overlap, self.seed = skip, overlap, seed

    def load_partition(self, partition_id: int) -> FakeDataset:
        rows = np.flatnonzero(self.dataset.columns[self.partition_by] != self.skip)
        return self.dataset.select(rows[max(partition_id - self.overlap, 0) :: self.num_partitions])


class TwoPartitioner(EveryOtherPartitioner):
    def __init__(self) -> None:
        super().__init__(2, "label")


@pytest.fixture
def fake_flwr(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, holds in (
        ("datasets", {"Dataset": FakeDataset}),
        ("flwr_datasets", {}),
        ("flwr_datasets.partitioner", {one.__name__: one for one in (EveryOtherPartitioner, TwoPartitioner)}),
    ):
        module = ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")


@pytest.mark.usefixtures("fake_flwr")
def test_flwr_partitioners_decide_who_holds_what() -> None:
    table = balanced(101, 4)
    parts, again, other = (
        parts_of(FlwrDatasets("EveryOtherPartitioner", {"skip": 2}).split(table, 3, Randomness(seed)))
        for seed in (0, 0, 1)
    )
    held = np.concatenate(parts)
    assert sorted(held.tolist()) == [row for row in range(101) if row % 4 != 2]
    assert [len(part) for part in parts] == [26, 25, 25]
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))
    own = FlwrDatasets(f"{__name__}.EveryOtherPartitioner").split(
        Table(table.labels, 4, np.arange(101)), 3, Randomness(0)
    )
    assert own.sizes.tolist() == [34, 34, 33]
    by_client = FlwrDatasets("EveryOtherPartitioner", {"partition_by": "client", "skip": 4})
    left = by_client.split(Table(table.labels, 4, np.arange(101)), 3, Randomness(0))
    assert 4 not in np.concatenate(parts_of(left))


@pytest.mark.usefixtures("fake_flwr")
def test_flwr_is_told_to_keep_quiet_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    seen = []
    monkeypatch.setattr(
        "fedsim.data.partitions.flwr.import_module",
        lambda name: seen.append((name, os.environ["FLWR_TELEMETRY_ENABLED"])) or sys.modules[name],
    )
    FlwrDatasets("TwoPartitioner").split(balanced(10), 2, Randomness(0))
    assert seen == [("datasets", "0"), ("flwr_datasets.partitioner", "0")]
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.usefixtures("fake_flwr")
@pytest.mark.parametrize(
    ("partitioner", "given", "words"),
    [
        ("EveryOtherPartitionr", {}, "partition.partitioner=EveryOtherPartitionr: unknown name, did you mean"),
        ("nowhere.At", {}, "partition.partitioner=nowhere.At: No module named 'nowhere'"),
        ("EveryOtherPartitioner", {"skp": 1}, "partition.settings.skp=1: unknown key, did you mean 'skip'?"),
        ("EveryOtherPartitioner", {"skip": 9}, "partition.partitioner=EveryOtherPartitioner: skip is"),
        ("EveryOtherPartitioner", {"overlap": 1}, "gives an example to two clients"),
        ("EveryOtherPartitioner", {"partition_by": "client"}, "partition.partitioner=EveryOtherPartitioner: 'client'"),
        ("TwoPartitioner", {}, "partition.partitioner=TwoPartitioner: makes 2 parts for clients=3"),
    ],
)
def test_flwr_partitioners_that_do_not_fit(partitioner: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlwrDatasets(partitioner, given).split(balanced(20), 3, Randomness(0))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["datasets", "flwr_datasets.partitioner"])
def test_flwr_without_the_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^partition=flwr: needs flwr-datasets: pip install flwr-datasets$"):
        FlwrDatasets().split(balanced(20), 3, Randomness(0))


def test_flwr_agrees_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    pytest.importorskip("flwr_datasets")
    table = balanced(5500)
    for name, kind in (("Linear", Linear), ("Square", Square)):
        theirs, ours = (
            one.split(table, 10, Randomness(0)).sizes for one in (FlwrDatasets(f"{name}Partitioner"), kind())
        )
        assert abs(theirs - ours)[:-1].max() <= 1  # theirs rounds down and gives the last client the rest
        assert theirs.sum() == ours.sum() == 5500
    given = {"num_classes_per_partition": 3, "class_assignment_mode": "deterministic"}
    counts = counted(FlwrDatasets("PathologicalPartitioner", given), table, 20)
    assert np.array_equal(counts > 0, counted(Pathological(3, "deterministic"), table, 20) > 0)
    assert abs(counts - counted(Pathological(3, "deterministic"), table, 20)).max() <= 1

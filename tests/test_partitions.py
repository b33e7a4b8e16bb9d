"""How examples are spread: nothing lost or held twice, and the laws the shares should follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedsim.checks import ConfigError
from fedsim.data.partitions import Dirichlet, Iid, Partition, Shard, _topped_up
from fedsim.rng import Randomness

BALANCED = np.arange(6000) % 10


def table(parts: list[NDArray[np.int64]], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """``[clients, classes]`` counts."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Partition, NDArray[np.int64], int, int]:
    """A partition with labels and clients that it can spread."""
    classes = draw(st.integers(1, 6))
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=80)), dtype=np.int64)
    clients = draw(st.integers(1, 90))
    enough = len(labels) // clients
    alpha = draw(st.sampled_from([1e-9, 0.05, 1.0, 1e9]))
    options: list[Partition] = [Iid(), Iid(enough), Dirichlet(alpha, 0), Dirichlet(alpha, enough)]
    if enough:
        options.append(Shard(draw(st.integers(1, enough))))
    return draw(st.sampled_from(options)), labels, clients, classes


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_no_example_is_lost_or_held_twice(case: tuple[Partition, NDArray[np.int64], int, int], seed: int) -> None:
    partition, labels, clients, classes = case
    parts = partition.split(labels, clients, classes, Randomness(seed))
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert len(part) >= getattr(partition, "minimum", 1)


@pytest.mark.parametrize("partition", [Iid(), Dirichlet(), Shard()])
def test_a_function_of_the_seed(partition: Partition) -> None:
    first, again, other = (partition.split(BALANCED, 20, 10, Randomness(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("clients", [1, 7, 600, 6000, 9000])
def test_iid_counts_differ_by_at_most_one(clients: int) -> None:
    sizes = [len(part) for part in Iid().split(BALANCED, clients, 10, Randomness(0))]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 6000


def test_iid_takes_no_heed_of_order() -> None:
    counts = table(Iid().split(np.sort(BALANCED), 10, 10, Randomness(3)), np.sort(BALANCED), 10)
    assert counts.min() >= 35  # 60 expected, standard deviation 7
    assert counts.max() <= 85


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_second_moment_of_their_law(alpha: float) -> None:
    # sum_i p_i^2 of a symmetric Dirichlet law over N clients has mean (alpha + 1) / (N alpha + 1).
    clients, found = 20, []
    for seed in range(40):
        counts = table(Dirichlet(alpha, 0).split(BALANCED, clients, 10, Randomness(seed)), BALANCED, 10)
        found += ((counts / 600) ** 2).sum(axis=0).tolist()
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx((alpha + 1) / (clients * alpha + 1), abs=4 * error + 1e-3)


def test_dirichlet_limits() -> None:
    even = table(Dirichlet(1e9, 0).split(BALANCED, 25, 10, Randomness(0)), BALANCED, 10)
    assert set(even.reshape(-1).tolist()) <= {23, 24, 25}
    alone = table(Dirichlet(1e-9, 0).split(BALANCED, 25, 10, Randomness(0)), BALANCED, 10)
    assert ((alone == 0) | (alone == 600)).all()


def test_dirichlet_rounding_favours_no_client() -> None:
    # 15 clients share 10 examples of each class: cut in one order, the same 5 would get nothing of any class.
    labels = np.arange(100) % 10
    sizes = [len(part) for part in Dirichlet(1e9, 0).split(labels, 15, 10, Randomness(5))]
    assert min(sizes) > 0


def test_dirichlet_redraws_before_it_tops_up() -> None:
    labels = np.arange(400) % 10
    first = Dirichlet(0.3, 0).split(labels, 10, 10, Randomness(0))
    least = min(len(part) for part in first)
    redrawn = Dirichlet(0.3, least + 1).split(labels, 10, 10, Randomness(0))
    assert min(len(part) for part in redrawn) > least
    stayed = sum(len(np.intersect1d(a, b)) for a, b in zip(first, redrawn, strict=True))
    assert stayed < 200  # topping up would have moved a handful of the 400
    same = Dirichlet(0.3, least).split(labels, 10, 10, Randomness(0))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))


def test_dirichlet_tops_up_from_the_largest() -> None:
    # One class, all of it with one client: 9 clients take 5 each from it, and only from it.
    labels = np.zeros(100, dtype=np.int64)
    sizes = sorted(len(part) for part in Dirichlet(1e-9, 5).split(labels, 10, 1, Randomness(0)))
    assert sizes == [5] * 9 + [55]
    everyone = Dirichlet(1e-9, 10).split(labels, 10, 1, Randomness(0))
    assert [len(part) for part in everyone] == [10] * 10


def test_topping_up_takes_turns_among_the_largest() -> None:
    holder = _topped_up(np.repeat([0, 1, 3], [50, 49, 1]), 4, 20, Randomness(0)("order").permutation(100))
    assert sorted(np.bincount(holder).tolist()) == [20, 20, 30, 30]


def test_shards_are_equal_and_hold_few_labels() -> None:
    counts = table(Shard(2).split(BALANCED, 100, 10, Randomness(0)), BALANCED, 10)
    assert (counts.sum(axis=1) == 60).all()
    assert ((counts == 0) | (counts == 30) | (counts == 60)).all()  # 200 shards of 30, each of one label
    assert 0 < (counts == 60).sum() < 30  # two of a kind are dealt by chance: 9.5 expected
    ragged = [len(part) for part in Shard(3).split(BALANCED[:1000], 7, 10, Randomness(0))]
    assert max(ragged) - min(ragged) <= 3


@pytest.mark.parametrize(
    ("partition", "clients", "words"),
    [
        (Iid(1), 51, ["minimum=1", "clients=51", "51 training", "50"]),
        (Dirichlet(), 51, ["minimum=1", "clients=51", "50"]),
        (Dirichlet(0.3, 26), 2, ["minimum=26", "52"]),
        (Shard(2), 26, ["shards_per_client=2", "clients=26", "52", "50"]),
        (Iid(), 0, ["clients=0"]),
    ],
)
def test_impossible_shapes_are_refused(partition: Partition, clients: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        partition.split(np.zeros(50, dtype=np.int64), clients, 1, Randomness(0))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_wrong_arguments_are_refused() -> None:
    for alpha in (0, -1, float("nan"), float("inf"), "much", True):
        with pytest.raises(ConfigError, match="alpha="):
            Dirichlet(alpha)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="minimum="):
        Dirichlet(0.3, -1)
    with pytest.raises(ConfigError, match="minimum="):
        Iid(1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shards_per_client="):
        Shard(0)
    with pytest.raises(ConfigError, match="0 to 2"):
        Iid().split(np.array([0, 3]), 1, 3, Randomness(0))

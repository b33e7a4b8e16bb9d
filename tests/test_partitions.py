"""How examples are spread: nothing lost or held twice, and the laws the shares should follow."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import betabinom, chisquare

from fedsim.checks import ConfigError
from fedsim.data.partitions import Dirichlet, Divided, Drawn, Iid, Partition, Sampled, Shard, Spread, Table
from fedsim.data.partitions.base import topped_up
from fedsim.rng import Randomness

BALANCED = np.arange(6000) % 10


def parts_of(spread: Spread) -> list[NDArray[np.int64]]:
    """The positions each client holds."""
    return [spread.of(client) for client in range(len(spread.sizes))]


def table(spread: Spread, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """``[clients, classes]`` counts."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts_of(spread)])


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
    spread = partition.split(Table(labels, classes), clients, Randomness(seed))
    parts = parts_of(spread)
    assert spread.sizes.dtype == np.int64
    assert spread.sizes.tolist() == [len(part) for part in parts]
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert len(part) >= getattr(partition, "minimum", 1)


@pytest.mark.parametrize("partition", [Iid(), Dirichlet(), Shard(), Sampled()])
def test_a_function_of_the_seed(partition: Partition) -> None:
    first, again, other = (parts_of(partition.split(Table(BALANCED, 10), 20, Randomness(seed))) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("clients", [1, 7, 600, 6000, 9000])
def test_iid_counts_differ_by_at_most_one(clients: int) -> None:
    sizes = Iid().split(Table(BALANCED, 10), clients, Randomness(0)).sizes.tolist()
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 6000


def test_iid_takes_no_heed_of_order() -> None:
    counts = table(Iid().split(Table(np.sort(BALANCED), 10), 10, Randomness(3)), np.sort(BALANCED), 10)
    assert counts.min() >= 35  # 60 expected, standard deviation 7
    assert counts.max() <= 85


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_second_moment_of_their_law(alpha: float) -> None:
    # sum_i p_i^2 of a symmetric Dirichlet law over N clients has mean (alpha + 1) / (N alpha + 1).
    clients, found = 20, []
    for seed in range(40):
        counts = table(Dirichlet(alpha, 0).split(Table(BALANCED, 10), clients, Randomness(seed)), BALANCED, 10)
        found += ((counts / 600) ** 2).sum(axis=0).tolist()
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx((alpha + 1) / (clients * alpha + 1), abs=4 * error + 1e-3)


def test_dirichlet_limits() -> None:
    even = table(Dirichlet(1e9, 0).split(Table(BALANCED, 10), 25, Randomness(0)), BALANCED, 10)
    assert set(even.reshape(-1).tolist()) <= {23, 24, 25}
    alone = table(Dirichlet(1e-9, 0).split(Table(BALANCED, 10), 25, Randomness(0)), BALANCED, 10)
    assert ((alone == 0) | (alone == 600)).all()


def test_dirichlet_rounding_favours_no_client() -> None:
    # 15 clients share 10 examples of each class: cut in one order, the same 5 would get nothing of any class.
    labels = np.arange(100) % 10
    assert Dirichlet(1e9, 0).split(Table(labels, 10), 15, Randomness(5)).sizes.min() > 0


def test_dirichlet_redraws_before_it_tops_up() -> None:
    labels = np.arange(400) % 10
    first = parts_of(Dirichlet(0.3, 0).split(Table(labels, 10), 10, Randomness(0)))
    least = min(len(part) for part in first)
    redrawn = parts_of(Dirichlet(0.3, least + 1).split(Table(labels, 10), 10, Randomness(0)))
    assert min(len(part) for part in redrawn) > least
    stayed = sum(len(np.intersect1d(a, b)) for a, b in zip(first, redrawn, strict=True))
    assert stayed < 200  # topping up would have moved a handful of the 400
    same = parts_of(Dirichlet(0.3, least).split(Table(labels, 10), 10, Randomness(0)))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))


def test_dirichlet_tops_up_from_the_largest() -> None:
    # One class, all of it with one client: 9 clients take 5 each from it, and only from it.
    labels = np.zeros(100, dtype=np.int64)
    sizes = sorted(Dirichlet(1e-9, 5).split(Table(labels, 1), 10, Randomness(0)).sizes.tolist())
    assert sizes == [5] * 9 + [55]
    everyone = Dirichlet(1e-9, 10).split(Table(labels, 1), 10, Randomness(0))
    assert everyone.sizes.tolist() == [10] * 10


def test_topping_up_takes_turns_among_the_largest() -> None:
    holder = topped_up(np.repeat([0, 1, 3], [50, 49, 1]), 4, 20, Randomness(0)("order").permutation(100))
    assert sorted(np.bincount(holder).tolist()) == [20, 20, 30, 30]


def test_shards_are_equal_and_hold_few_labels() -> None:
    counts = table(Shard(2).split(Table(BALANCED, 10), 100, Randomness(0)), BALANCED, 10)
    assert (counts.sum(axis=1) == 60).all()
    assert ((counts == 0) | (counts == 30) | (counts == 60)).all()  # 200 shards of 30, each of one label
    assert 0 < (counts == 60).sum() < 30  # two of a kind are dealt by chance: 9.5 expected
    ragged = Shard(3).split(Table(BALANCED[:1000], 10), 7, Randomness(0)).sizes
    assert max(ragged) - min(ragged) <= 3


def test_draws_are_what_they_have_always_been() -> None:
    # Committed results rest on these bits.
    made = {}
    for partition in (Iid(), Dirichlet(), Dirichlet(0.01, 5), Shard(2), Sampled()):
        parts = parts_of(partition.split(Table(BALANCED, 10), 50, Randomness(5)))
        made[f"{type(partition).__name__}{len(made)}"] = hashlib.sha256(np.concatenate(parts).tobytes()).hexdigest()[
            :12
        ]
    assert made == {
        "Iid0": "5cf177b357b9",
        "Dirichlet1": "2bf22e05a541",
        "Dirichlet2": "6eee1d136cc8",
        "Shard3": "c3381ef7ef48",
        "Sampled4": "4c6e721a5c3f",
    }


def test_divided_leaves_out_what_no_one_holds() -> None:
    spread = Divided(np.array([1, -1, 0, 1, -1, 1, 3]), 5)
    assert [part.tolist() for part in parts_of(spread)] == [[2], [0, 3, 5], [], [6], []]
    assert spread.sizes.tolist() == [1, 3, 0, 1, 0]
    assert spread.order.tolist() == [2, 0, 3, 5, 6]


def test_divided_holds_one_order() -> None:
    spread = Iid().split(Table(BALANCED, 10), 100, Randomness(0))
    assert isinstance(spread, Divided)
    assert spread.starts.tolist() == [0, *np.cumsum(spread.sizes).tolist()]
    assert all(np.shares_memory(part, spread.order) for part in parts_of(spread))


# ---- sampled -------------------------------------------------------------------------------------


def counted(alpha: float | None, labels: NDArray[np.int64], samples: int, clients: int) -> NDArray[np.int64]:
    """``[clients, classes]`` counts under :class:`Sampled`."""
    classes = int(labels.max()) + 1
    spread = Sampled(samples, alpha).split(Table(labels, classes), clients, Randomness(11))
    assert isinstance(spread, Drawn)
    drawn = labels[spread.draw(np.arange(clients))]
    return (drawn[:, :, None] == np.arange(classes)).sum(axis=1)


@pytest.mark.parametrize("alpha", [0.3, None])
def test_sampled_clients_are_the_same_in_any_population(alpha: float | None) -> None:
    few, many = (Sampled(20, alpha).split(Table(BALANCED, 10), clients, Randomness(4)) for clients in (50, 1_000_000))
    assert isinstance(many, Drawn)
    assert many.sizes.shape == (1_000_000,)
    assert (many.sizes == 20).all()
    ascending = np.stack(parts_of(few))
    assert ascending.dtype == np.int64
    assert ascending.shape == (50, 20)
    assert np.array_equal(np.stack([many.of(client) for client in range(49, -1, -1)])[::-1], ascending)
    mixed = np.array([7, 49, 0, 7, 31])
    assert np.array_equal(many.draw(mixed), ascending[mixed])
    assert len({tuple(row) for row in ascending.tolist()}) == 50
    assert len(many.of(999_999)) == 20


def test_sampled_clients_keep_their_examples_when_they_hold_more() -> None:
    few, many = (Sampled(samples).split(Table(BALANCED, 10), 10, Randomness(0)) for samples in (5, 30))
    assert all(np.array_equal(few.of(client), many.of(client)[:5]) for client in range(10))


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 10.0])
def test_sampled_class_shares_have_the_moments_of_their_law(alpha: float) -> None:
    # Of m examples c are of class k: c / m and c (c - 1) / (m (m - 1)) have the means of q_k and of its square.
    classes, samples, clients = 10, 20, 20_000
    counts = counted(alpha, BALANCED, samples, clients)
    variance = (1 / classes) * (1 - 1 / classes) / (alpha * classes + 1)
    for found, expected in (
        (counts / samples, 1 / classes),
        (counts * (counts - 1) / (samples * (samples - 1)), variance + 1 / classes**2),
    ):
        error = found.std(axis=0) / np.sqrt(clients)
        assert (abs(found.mean(axis=0) - expected) < 4.5 * error).all()


@pytest.mark.parametrize(("alpha", "classes"), [(1e-3, 2), (0.1, 3), (1.0, 2), (2.5, 4), (50.0, 3)])
def test_sampled_counts_have_their_exact_law(alpha: float, classes: int) -> None:
    # The count of one class is beta-binomial.
    samples, clients = 6, 20_000
    counts = counted(alpha, np.arange(60) % classes, samples, clients)
    law = clients * betabinom.pmf(np.arange(samples + 1), samples, alpha, (classes - 1) * alpha)
    for label in range(classes):
        assert chisquare(np.bincount(counts[:, label], minlength=samples + 1), law).pvalue > 1e-4


def test_sampled_limits() -> None:
    alone = counted(1e-9, BALANCED, 20, 5000)  # gamma variates far below the smallest float
    assert ((alone == 0) | (alone == 20)).all()
    assert chisquare((alone == 20).sum(axis=0)).pvalue > 1e-4
    even = counted(1e9, BALANCED, 20, 5000)
    assert chisquare(even.sum(axis=0)).pvalue > 1e-4
    assert even.max() < 20


def test_sampled_without_alpha_has_the_frequencies_of_the_data() -> None:
    labels = np.repeat([0, 1, 2, 3], [5, 20, 0, 75])
    spread = Sampled(50, None).split(Table(labels, 4), 2000, Randomness(2))
    assert isinstance(spread, Drawn)
    drawn = spread.draw(np.arange(2000)).reshape(-1)
    # Every example is as likely as any other, so classes come in the data's shares.
    assert chisquare(np.bincount(drawn, minlength=100)).pvalue > 1e-4
    found, share = np.bincount(labels[drawn], minlength=4) / 100_000, np.array([0.05, 0.2, 0, 0.75])
    assert (abs(found - share) <= 4 * np.sqrt(share * (1 - share) / 100_000)).all()


@pytest.mark.parametrize("alpha", [0.3, None])
def test_sampled_takes_any_example_of_a_class(alpha: float | None) -> None:
    labels = np.arange(60) % 3
    spread = Sampled(20, alpha).split(Table(labels, 3), 3000, Randomness(5))
    assert isinstance(spread, Drawn)
    times = np.bincount(spread.draw(np.arange(3000)).reshape(-1), minlength=60)
    for label in range(3):
        assert chisquare(times[labels == label]).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.1, 1e9, None])
def test_sampled_never_draws_of_an_empty_class(alpha: float | None) -> None:
    labels = np.repeat([1, 4], [30, 10])
    spread = Sampled(20, alpha).split(Table(labels, 7), 3000, Randomness(1))
    drawn = np.stack(parts_of(spread))
    assert drawn.min() == 0
    assert drawn.max() == 39
    expected = 0.5 if alpha else 0.25  # of the two classes there are, or of the data
    share = (labels[drawn] == 4).mean(axis=1)
    assert share.mean() == pytest.approx(expected, abs=4.5 * share.std() / np.sqrt(3000))


def test_sampled_is_light() -> None:
    spread = Sampled().split(Table(BALANCED, 10), 1_000_000, Randomness(0))
    sent = pickle.dumps(spread)
    assert len(sent) < 8 * 1_000_000 + 10 * len(BALANCED)  # the sizes and one order
    assert np.array_equal(pickle.loads(sent).of(123_456), spread.of(123_456))


def test_a_rule_of_ones_own_needs_a_method() -> None:
    with pytest.raises(NotImplementedError, match="Partition must have holders"):
        Partition().split(Table(BALANCED, 10), 3, Randomness(0))


# ---- refused -------------------------------------------------------------------------------------


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
        partition.split(Table(np.zeros(50, dtype=np.int64), 1), clients, Randomness(0))
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
    for alpha in (0, 1e-10, 1e10, float("nan"), "much"):
        with pytest.raises(ConfigError, match="alpha="):
            Sampled(alpha=alpha)  # type: ignore[arg-type]
    for samples in (0, 2.5, None):
        with pytest.raises(ConfigError, match="samples="):
            Sampled(samples)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no training examples"):
        Sampled().split(Table(np.zeros(0, dtype=np.int64), 2), 3, Randomness(0))
    with pytest.raises(ConfigError, match="0 to 2"):
        Iid().split(Table(np.array([0, 3]), 3), 1, Randomness(0))

"""Every partition: nothing lost, nothing twice, whole sizes, and what is refused."""

from __future__ import annotations

import inspect
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from spreads import Array, balanced, counted, law_holds, parts_of

from fedsim import config
from fedsim.checks import ConfigError
from fedsim.data import partitions
from fedsim.data.partitions import (
    AppflClass,
    Continuous,
    Dirichlet,
    Distribution,
    DualDirichlet,
    Exponential,
    FlwrDatasets,
    Iid,
    InnerDirichlet,
    Linear,
    Natural,
    Partition,
    Pathological,
    Sampled,
    Shard,
    Size,
    Square,
    Table,
)
from fedsim.data.partitions.base import apportioned
from fedsim.rng import Randomness

CONF = Path(__file__).parent.parent / "conf" / "partition"


# ---- all of them -----------------------------------------------------------------------------------


def every(clients: int, examples: int, classes: int, minimum: int) -> list[Partition]:
    """One or more of every kind that fit ``examples`` of ``classes`` classes."""
    some = min(2, classes)
    sizes = [(3 * client + 1) % (examples // clients + 1) for client in range(clients)]
    return [
        Iid(minimum),
        Dirichlet(0.2, minimum),
        Shard(1),
        *(kind(minimum) for kind in (Linear, Square, Exponential)),
        Size(sizes),
        Size(fractions=[1 / clients] * clients),
        *(Pathological(some, mode) for mode in ("random", "deterministic", "first-deterministic")),
        Distribution(some, 1),
        InnerDirichlet(0.3),
        InnerDirichlet(1e-9),
        InnerDirichlet(2.0, sizes),
        Continuous(1, 0.7, minimum),
        AppflClass(1, classes),
        DualDirichlet(minimum=minimum),
        DualDirichlet(1e-9, 1e-9, minimum),
        Natural(1),
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Partition, Table, int]:
    """A partition, and a table and clients that it can spread."""
    classes, clients = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    first = draw(st.integers(0, 2))  # classes without examples before it, and one after
    extra = draw(st.lists(st.integers(0, classes - 1), max_size=60))
    labels = np.array([*(list(range(classes)) * 8), *extra], dtype=np.int64)[:: draw(st.sampled_from([1, -1]))] + first
    ids = np.arange(len(labels)) % draw(st.integers(8, 8 * classes)) * draw(st.sampled_from([1, 7, 11]))
    table = Table(labels, classes + first + 1, ids, lambda position: np.sin(np.arange(len(labels)) * position))
    options = every(clients, len(labels), classes, draw(st.integers(0, len(labels) // clients)))
    return draw(st.sampled_from(options)), table, clients


def check_left_over(partition: Partition, table: Table, parts: list[Array]) -> None:
    """Examples no one holds are those that the rule leaves out, and no others."""
    held = np.concatenate(parts)
    left = np.setdiff1d(np.arange(len(table)), held)
    if isinstance(partition, Size | InnerDirichlet) and partition.sizes:
        assert len(left) == len(table) - sum(partition.sizes)
    elif isinstance(partition, Pathological | Distribution):
        assert not set(table.labels[left]) & set(table.labels[held])
    elif isinstance(partition, Natural):
        assert table.ids is not None
        assert not set(table.ids[left]) & set(table.ids[held])
        assert [len(set(table.ids[part])) for part in parts] == [1] * len(parts)
    else:
        assert len(left) == 0


@settings(max_examples=400, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_nothing_is_lost_or_held_twice(case: tuple[Partition, Table, int], seed: int) -> None:
    partition, table, clients = case
    spread = partition.split(table, clients, Randomness(seed))
    parts = parts_of(spread)
    held = np.concatenate(parts)
    assert len(parts) == clients
    assert spread.sizes.dtype == held.dtype == np.int64
    assert spread.sizes.tolist() == [len(part) for part in parts]
    assert len(np.unique(held)) == len(held)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert spread.sizes.min() >= getattr(partition, "minimum", 0)
    check_left_over(partition, table, parts)


WIDE = balanced(3000, ids=np.arange(3000) // 30, feature=lambda position: np.arange(3000.0))


@pytest.mark.parametrize("partition", every(20, 3000, 10, 3), ids=lambda one: type(one).__name__)
def test_a_function_of_the_seed(partition: Partition) -> None:
    first, again, other = (parts_of(partition.split(WIDE, 20, Randomness(seed))) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_kind_is_tried_here() -> None:
    kinds = {one for one in vars(partitions).values() if inspect.isclass(one) and issubclass(one, Partition)}
    assert {type(one) for one in every(2, 100, 5, 1)} == kinds - {Partition, Sampled, FlwrDatasets}


def test_every_yaml_agrees_with_its_constructor() -> None:
    files = sorted(CONF.glob("*.yaml"))
    assert len(files) >= 16
    for file in files:
        text = file.read_text()
        keys = yaml.safe_load(text)
        made = config.locate(keys.pop("_target_"), file.stem)
        assert keys == {name: one.default for name, one in inspect.signature(made).parameters.items()}, file.stem
        assert text.startswith("# ")
        assert all("  # " in line for line in text.splitlines()[2:])
        assert getattr(partitions, made.__name__) is made


def test_a_table_refuses_ids_of_another_length() -> None:
    with pytest.raises(ConfigError, match="ids to split by must be 3"):
        Table(np.zeros(3, dtype=np.int64), 1, np.zeros(2, dtype=np.int64))


# ---- whole numbers ---------------------------------------------------------------------------------


def largest_remainder(total: int, weights: list[int]) -> list[int]:
    """The textbook's, in fractions."""
    exact = [Fraction(weight * total, sum(weights)) for weight in weights]
    shares = [int(each) for each in exact]
    order = sorted(range(len(weights)), key=lambda place: (shares[place] - exact[place], place))
    for place in order[: total - sum(shares)]:
        shares[place] += 1
    return shares


@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_whole_shares_follow_the_largest_remainders(total: int, weights: list[int]) -> None:
    shares = apportioned(total, np.array(weights, dtype=np.float64))
    assert shares.sum() == total
    exact = np.array(weights) * total / sum(weights)
    assert (abs(shares - exact) < 1 + 1e-9).all()
    remainders = exact - np.floor(exact)
    up = shares > exact + 1e-6
    down = (shares < exact - 1e-6) & ~up
    if up.any() and down.any():
        assert remainders[up].min() >= remainders[down].max() - 1e-6


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), st.integers(0, 20), st.integers(0, 99))
def test_small_shares_are_raised_at_the_cost_of_the_largest(weights: list[int], least: int, more: int) -> None:
    total = least * len(weights) + more
    free, shares = (apportioned(total, np.array(weights, dtype=np.float64), low) for low in (0, least))
    assert shares.sum() == total
    assert shares.min() >= least
    assert (shares[free <= least] == least).all()
    paid = shares < free
    if paid.any():  # who paid ends level with the largest that is left
        assert shares.max() - shares[paid].min() <= 1


@pytest.mark.parametrize(("kind", "power"), [(Linear, 1), (Square, 2)])
@pytest.mark.parametrize(("clients", "examples"), [(10, 5500), (10, 3850), (7, 1000), (30, 9455 * 2)])
def test_sizes_grow_with_the_clients_number(kind: type, power: int, clients: int, examples: int) -> None:
    sizes = kind(0).split(balanced(examples), clients, Randomness(0)).sizes.tolist()
    weights = [number**power for number in range(1, clients + 1)]
    assert sizes == largest_remainder(examples, weights)
    if examples % sum(weights) == 0:
        assert sizes == [weight * examples // sum(weights) for weight in weights]


def test_exponential_sizes() -> None:
    exact = 5500 * np.exp(np.arange(1, 9)) / np.exp(np.arange(1, 9)).sum()
    sizes = Exponential(0).split(balanced(5500), 8, Randomness(0)).sizes
    assert sizes.tolist() == [3, 9, 23, 64, 173, 471, 1279, 3478]
    assert (abs(sizes - exact) < 1).all()
    many = Exponential(2).split(balanced(5500), 1000, Randomness(0)).sizes  # e^1000 is no float
    assert many.min() == 2
    assert many[-1] > many[-2] > many[-3] > 3


@pytest.mark.parametrize("kind", [Linear, Square, Exponential])
def test_who_gets_which_example_has_nothing_to_do_with_labels(kind: type) -> None:
    counts = counted(kind(0), Table(np.sort(np.arange(20_000) % 4), 4), 6)
    rows = counts[counts.sum(axis=1) > 100]
    assert law_holds(chi2_contingency(rows).pvalue)


def test_given_sizes_and_fractions() -> None:
    table = balanced(1000)
    assert Size([10, 0, 700]).split(table, 3, Randomness(0)).sizes.tolist() == [10, 0, 700]
    assert Size(fractions=[0.5, 0, 0.25]).split(table, 3, Randomness(0)).sizes.tolist() == [500, 0, 250]
    assert Size(fractions=[0.1] * 10).split(table, 10, Randomness(0)).sizes.tolist() == [100] * 10
    assert Size(fractions=[1 / 3] * 3).split(table, 3, Randomness(0)).sizes.tolist() == [334, 333, 333]
    held = np.concatenate(parts_of(Size([400]).split(table, 1, Randomness(0))))
    assert law_holds(chisquare(np.bincount(held // 250, minlength=4)).pvalue)  # any 400, not the first


# ---- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Size(), "sizes: give one of two lists"),
        (lambda: Size([1], [0.5]), "sizes: give one of two lists"),
        (lambda: Size([]), "sizes=[]: must be a list of whole numbers"),
        (lambda: Size("12"), "sizes=12: must be a list"),
        (lambda: Size([3, -1]), "sizes[1]=-1: must be a whole number >= 0"),
        (lambda: Size([3, 1.5]), "sizes[1]=1.5: must be a whole number"),
        (lambda: Size(fractions=[0.5, 1.5]), "fractions[1]=1.5: must be a number >= 0 and <= 1"),
        (lambda: Size(fractions=[0.5, 0.6]), "fractions: must sum to a number > 0 and <= 1, they sum to 1.1"),
        (lambda: Size(fractions=[0, 0]), "fractions: must sum"),
        (lambda: Linear(-1), "minimum=-1"),
        (lambda: Pathological(0), "classes_per_client=0: must be a whole number >= 1"),
        (lambda: Pathological(2, "randm"), "assignment=randm: unknown name, did you mean 'random'?"),
        (lambda: Distribution(sigma=-1), "sigma=-1"),
        (lambda: Distribution(preassigned=-1), "preassigned=-1"),
        (lambda: Distribution(table=[1, 2]), "table[0]=1: must be a list of numbers"),
        (lambda: Distribution(table=[[1, 2], [0, 0]]), "table[1]=[0, 0]: must not be all zero"),
        (lambda: Distribution(table=[[1, -2]]), "table[0][1]=-2"),
        (lambda: InnerDirichlet(0), "alpha=0"),
        (lambda: InnerDirichlet(1, [1, "x"]), "sizes[1]=x"),
        (lambda: Natural(0), "minimum=0"),
        (lambda: Continuous(-1), "feature=-1"),
        (lambda: Continuous(0, 1.5), "strictness=1.5: must be a number >= 0 and <= 1"),
        (lambda: AppflClass(0), "minimum_classes=0"),
        (lambda: DualDirichlet(0), "alpha1=0"),
        (lambda: DualDirichlet(1, float("nan")), "alpha2=nan"),
        (lambda: FlwrDatasets("X", 3), "settings=3: must be names and values"),
    ],
)
def test_wrong_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


PLAIN = balanced(50, 5)
SAME = Table(np.arange(50) % 5, 5, np.arange(50) % 6, lambda position: np.full(50, 0.1) if position else [][position])


@pytest.mark.parametrize(
    ("partition", "table", "clients", "words"),
    [
        (Linear(), PLAIN, 51, "partition.minimum=1: clients=51 need 51 training examples, there are 50"),
        (DualDirichlet(minimum=6), PLAIN, 9, "partition.minimum=6: clients=9 need 54"),
        (Continuous(minimum=6), PLAIN, 9, "partition.minimum=6: clients=9 need 54"),
        (Size([10, 20]), PLAIN, 3, "partition.sizes: 2 numbers for clients=3"),
        (Size([10, 41]), PLAIN, 2, "partition.sizes: sum to 51, there are 50 training examples"),
        (Size(fractions=[1]), PLAIN, 2, "partition.fractions: 1 numbers for clients=2"),
        (InnerDirichlet(sizes=[10, 41]), PLAIN, 2, "partition.sizes: sum to 51"),
        (InnerDirichlet(sizes=[10]), PLAIN, 2, "partition.sizes: 1 numbers for clients=2"),
        (Pathological(6), PLAIN, 2, "partition.classes_per_client=6: the training examples have 5 classes"),
        (Pathological(5), PLAIN, 11, "clients=11: 11 of them would hold the same class, which has only 10"),
        (Distribution(6), PLAIN, 2, "partition.classes_per_client=6"),
        (Distribution(2, 6), PLAIN, 5, "partition.preassigned=6: takes 12 examples of a class that has 10"),
        (Distribution(2, 0, table=[[1]] * 5), PLAIN, 5, "partition.table: its rows have [1, 1, 1, 1, 1] numbers"),
        (AppflClass(6), PLAIN, 3, "partition.minimum_classes=6: the training examples have 5"),
        (AppflClass(2, 6), PLAIN, 3, "partition.maximum_classes=6"),
        (AppflClass(3, 2), PLAIN, 3, "partition.minimum_classes=3: must not be above maximum_classes=2"),
        (AppflClass(1, 1), PLAIN, 4, "partition.maximum_classes=1: clients=4 do not come to hold all 5 classes"),
        (Natural(), PLAIN, 3, "partition=natural: these data do not say who made an example"),
        (Natural(9), SAME, 3, "clients=3: partition=natural has 2 with minimum=9 training examples"),
        (Continuous(), PLAIN, 3, "partition=continuous: the examples of these data cannot be looked at"),
        (Continuous(0), SAME, 3, "partition.feature=0: an example has no such position"),
        (Continuous(1), SAME, 3, "partition.feature=1: is the same in every example"),
        (InnerDirichlet(), Table(np.zeros(0, dtype=np.int64), 2), 3, "partition: there are no training examples"),
    ],
)
def test_impossible_shapes_are_refused(partition: Partition, table: Table, clients: int, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        partition.split(table, clients, Randomness(0))
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)

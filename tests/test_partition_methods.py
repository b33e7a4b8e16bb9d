"""Every partition after the first four: nothing lost, nothing twice, and each one's own law."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta, betabinom, chi2_contingency, chisquare, kstest, spearmanr

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
    Spread,
    Square,
    Table,
)
from fedsim.data.partitions.base import apportioned, log_dirichlet
from fedsim.data.partitions.by_label import _drawn_labels, _turns
from fedsim.rng import Randomness

CONF = Path(__file__).parent.parent / "conf" / "partition"
Array = NDArray[Any]


def parts_of(spread: Spread) -> list[Array]:
    return [spread.of(client) for client in range(len(spread.sizes))]


def counted(partition: Partition, table: Table, clients: int, seed: int = 0) -> Array:
    """``[clients, classes]`` counts."""
    parts = parts_of(partition.split(table, clients, Randomness(seed)))
    return np.stack([np.bincount(table.labels[part], minlength=table.classes) for part in parts])


def balanced(examples: int, classes: int = 10, **more: Any) -> Table:
    return Table(np.arange(examples) % classes, classes, **more)


def law_holds(pvalue: float) -> bool:
    """One test in ten thousand would fail by chance; the draws are keyed, so none does twice."""
    return bool(pvalue > 1e-4)


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


# ---- by label --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["random", "deterministic", "first-deterministic"])
@pytest.mark.parametrize("classes_per_client", [1, 3, 10])
def test_pathological_clients_hold_exactly_so_many_classes(mode: str, classes_per_client: int) -> None:
    counts = counted(Pathological(classes_per_client, mode), balanced(6007), 40)
    held = counts > 0
    assert (held.sum(axis=1) == classes_per_client).all()
    for label in range(10):
        cut = counts[held[:, label], label]
        assert len(cut) == 0 or cut.max() - cut.min() <= 1
        assert cut.sum() in (0, 600, 601)
    wanted = (np.arange(40)[:, None] + np.arange(classes_per_client)) % 10
    if mode == "deterministic":
        assert np.array_equal(np.sort(wanted, axis=1), np.nonzero(held)[1].reshape(40, -1))
    if mode == "first-deterministic":
        assert held[np.arange(40), np.arange(40) % 10].all()


@pytest.mark.parametrize(("mode", "others"), [("random", 10), ("first-deterministic", 9)])
def test_pathological_classes_are_any(mode: str, others: int) -> None:
    held = counted(Pathological(3, mode), balanced(40_000), 4000) > 0
    if mode != "random":
        held[np.arange(4000), np.arange(4000) % 10] = False
    # Without replacement every class has the same chance; pairs too.
    assert law_holds(chisquare(held.sum(axis=0)).pvalue)
    pairs = (held[:, :, None] & held[:, None, :]).sum(axis=0)[np.triu_indices(10, 1)]
    left = 3 if mode == "random" else 2
    expected = 4000 * left * (left - 1) / (others * (others - 1))
    if mode != "random":
        expected *= 0.8  # neither of the two may be the first
    assert abs(pairs - expected).max() < 4.5 * np.sqrt(expected)


def test_pathological_clients_have_the_same_classes_in_any_population() -> None:
    few, many = (counted(Pathological(2), balanced(6000), clients) > 0 for clients in (30, 300))
    assert np.array_equal(few, many[:30])


def test_pathological_rounding_favours_no_client() -> None:
    # 20 clients share 110 examples of each class: cut in one order, the same ten would get one more every time.
    sizes = Pathological(10, "deterministic").split(balanced(1100), 20, Randomness(0)).sizes
    assert sizes.min() > 50
    assert sizes.max() < 60


def test_distribution_gives_consecutive_classes_by_a_table() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(1, 50, (10, 4)).tolist()
    counts = counted(Distribution(2, 5, table=table), balanced(5003), 20)
    for label in range(10):
        holders = np.flatnonzero(counts[:, label])
        # flwr-datasets documents: class 0 goes to clients 0, 9, 10 and 19, class 3 to 2, 3, 12 and 13
        assert holders.tolist() == sorted({(label - back) % 10 + turn for back in (0, 1) for turn in (0, 10)})
        size = 501 if label < 3 else 500
        exact = (size - 20) * np.array(table[label]) / sum(table[label])
        assert counts[:, label].sum() == size
        assert (abs(counts[holders, label] - 5 - exact) < 1).all()


def test_distribution_weights_are_log_normal() -> None:
    sizes = Distribution(1, 7, 0.5).split(balanced(300_000, 1), 300, Randomness(1)).sizes - 7
    logs = np.log(sizes)
    assert kstest((logs - logs.mean()) / 0.5, "norm").pvalue > 1e-3
    assert logs.std() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(600))
    even = counted(Distribution(2, 0, 0.0), balanced(4000), 20)
    assert set(even.reshape(-1).tolist()) == {0, 100}


@pytest.mark.parametrize(("alpha", "classes"), [(0.1, 3), (1.0, 2), (20.0, 4)])
def test_inner_dirichlet_counts_have_their_exact_law_while_nothing_runs_out(alpha: float, classes: int) -> None:
    # Of 6 examples each, 2,000 clients take a quarter at most of any class.
    counts = counted(InnerDirichlet(alpha, [6] * 2000), balanced(12_000 * classes, classes), 2000)
    law = 2000 * betabinom.pmf(np.arange(7), 6, alpha, (classes - 1) * alpha)
    for label in range(classes):
        found = np.bincount(counts[:, label], minlength=7)
        kept = law > 3  # a chi-square needs some of each
        rest = [[found[~kept].sum()], [law[~kept].sum()]] if (~kept).any() else [[], []]
        assert law_holds(chisquare([*found[kept], *rest[0]], [*law[kept], *rest[1]]).pvalue)


def turn_by_turn(sizes: list[int], class_sizes: list[int], alpha: float, rng: np.random.Generator) -> Array:
    """``[clients, classes]``: InnerDirichlet as its source writes it, one example after the other."""
    shares = rng.dirichlet(np.full(len(class_sizes), alpha), len(sizes))
    counts, room, left = np.zeros(shares.shape, dtype=int), list(sizes), np.array(class_sizes)
    while any(room):
        client = rng.choice([one for one, free in enumerate(room) if free])
        chances = shares[client] * (left > 0)
        label = rng.choice(len(left), p=chances / chances.sum())
        counts[client, label] += 1
        room[client] -= 1
        left[label] -= 1
    return counts


def test_inner_dirichlet_is_what_drawing_one_by_one_would_be() -> None:
    sizes, class_sizes, trials = [2, 4, 3], [3, 2, 4], 800
    table = Table(np.repeat([0, 1, 2], class_sizes), 3)
    rng, partition = np.random.default_rng(5), InnerDirichlet(0.8, sizes)
    found: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    for seed in range(trials):
        found[0][tuple(counted(partition, table, 3, seed)[:2].reshape(-1).tolist())] += 1
        found[1][tuple(turn_by_turn(sizes, class_sizes, 0.8, rng)[:2].reshape(-1).tolist())] += 1
    kept = [key for key in found[0] | found[1] if found[0][key] + found[1][key] >= 20]
    assert len(kept) > 10
    assert law_holds(chi2_contingency([[each[key] for key in kept] for each in found]).pvalue)


def chance(labels: tuple[int, ...], turns: list[int], shares: list[list[float]], left: list[int]) -> float:
    """That the turns draw exactly these labels."""
    found, free = 1.0, list(left)
    for label, client in zip(labels, turns, strict=True):
        found *= (
            shares[client][label]
            * (free[label] > 0)
            / sum(share for share, room in zip(shares[client], free, strict=True) if room)
        )
        free[label] -= 1
    return found


def test_classes_run_out_in_their_order() -> None:
    turns, shares, left = [0, 1, 0, 0, 1], [[0.48, 0.48, 0.04], [0.6, 0.37, 0.03]], [1, 2, 9]
    found = Counter(
        tuple(
            _drawn_labels(np.array(turns), np.log(shares), np.array(left), Randomness(seed)("x").generator()).tolist()
        )
        for seed in range(4000)
    )
    law = {labels: 4000 * chance(labels, turns, shares, left) for labels in product(range(3), repeat=5)}
    assert sum(law.values()) == pytest.approx(4000)
    assert not any(found[labels] for labels, expected in law.items() if expected == 0)
    kept = [labels for labels, expected in law.items() if expected > 5]
    rest = [4000 - sum(each[labels] for labels in kept) for each in (found, law)]
    counts, expected = (
        [*(each[labels] for labels in kept), over] for each, over in zip((found, law), rest, strict=True)
    )
    assert law_holds(chisquare(counts, expected).pvalue)


def test_a_turn_goes_to_any_client_that_is_not_full() -> None:
    sizes = np.array([1, 0, 3])
    turns = np.array([_turns(sizes, Randomness(seed)("turns").generator()) for seed in range(4000)])
    place = np.argmax(turns == 0, axis=1)  # 1/2, 1/4, then 1/8 twice; dealing out slots would make them equal
    assert law_holds(chisquare(np.bincount(place), [2000, 1000, 500, 500]).pvalue)


def test_log_dirichlet_has_the_moments_of_its_law() -> None:
    concentration = np.array([0.05, 0.5, 2.0])
    total = concentration.sum()
    shares = np.exp(log_dirichlet(np.tile(concentration, (40_000, 1)), Randomness(0)("x").generator()))
    assert np.allclose(shares.sum(axis=1), 1)
    for found, expected in (
        (shares, concentration / total),
        (shares**2, concentration * (concentration + 1) / (total * (total + 1))),
    ):
        assert (abs(found.mean(axis=0) - expected) < 4.5 * found.std(axis=0) / 200).all()
    tiny = log_dirichlet(np.full((9, 4), 1e-9), Randomness(1)("x").generator())
    assert np.isfinite(tiny).all()


# ---- by what else is known -------------------------------------------------------------------------


def test_natural_clients_are_the_ids() -> None:
    ids = np.array([5, 9, 5, 2, 9, 9, 2, 5, 7])
    table = Table(np.zeros(9, dtype=np.int64), 1, ids)
    parts = parts_of(Natural().split(table, 4, Randomness(0)))
    assert {tuple(part) for part in parts} == {(0, 2, 7), (1, 4, 5), (3, 6), (8,)}
    parts = parts_of(Natural(2).split(table, 3, Randomness(0)))
    assert {tuple(part) for part in parts} == {(0, 2, 7), (1, 4, 5), (3, 6)}
    parts = parts_of(Natural(3).split(table, 1, Randomness(0)))
    assert tuple(parts[0]) in {(0, 2, 7), (1, 4, 5)}


def test_natural_clients_are_the_same_in_any_population_and_any_of_them() -> None:
    table = Table(np.zeros(60, dtype=np.int64), 1, np.arange(60) % 12)
    taken = np.zeros(12)
    for seed in range(600):
        few, many = (parts_of(Natural().split(table, clients, Randomness(seed))) for clients in (4, 9))
        assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
        taken[[part[0] % 12 for part in few]] += 1
    assert law_holds(chisquare(taken).pvalue)


def test_continuous_of_full_strictness_cuts_the_sorted_examples() -> None:
    values = np.random.default_rng(0).permutation(1000) / 7.0
    table = balanced(1000, feature=lambda position: values if position == 3 else -values)
    for client, part in enumerate(parts_of(Continuous(3, 1.0).split(table, 8, Randomness(0)))):
        assert sorted(values[part] * 7) == pytest.approx(range(client * 125, (client + 1) * 125))


def test_continuous_breaks_ties_at_random() -> None:
    table = Table(np.arange(4000) // 1000, 4, feature=lambda _: (np.arange(4000) == 0).astype(np.float64))
    counts = counted(Continuous(0, 1.0), table, 10)
    assert law_holds(chi2_contingency(counts).pvalue)


def test_continuous_without_strictness_does_not_look() -> None:
    blind = parts_of(Continuous(0, 0.0).split(balanced(900), 9, Randomness(1)))
    seeing = Continuous(0, 0.0).split(balanced(900, feature=lambda _: np.arange(900.0)), 9, Randomness(1))
    assert all(np.array_equal(a, b) for a, b in zip(blind, parts_of(seeing), strict=True))
    counts = counted(Continuous(0, 0.0), Table(np.arange(9000) // 3000, 3), 10)
    assert law_holds(chi2_contingency(counts).pvalue)


@pytest.mark.parametrize("strictness", [0.25, 0.5, 0.8])
def test_continuous_mixes_feature_and_noise(strictness: float) -> None:
    # One example each: the client's number is the rank of the score, and z and score are bivariate normal.
    values = 5 + 3 * Randomness(9)("feature").normal(20_000)
    spread = Continuous(0, strictness).split(balanced(20_000, feature=lambda _: values), 20_000, Randomness(0))
    by_rank = np.concatenate(parts_of(spread))
    correlation = strictness / np.hypot(strictness, 1 - strictness)
    found = spearmanr(values[by_rank], np.arange(20_000)).statistic
    assert found == pytest.approx(6 / np.pi * np.arcsin(correlation / 2), abs=4 / np.sqrt(20_000))


# ---- APPFL -----------------------------------------------------------------------------------------

BOUNDS = {1: (10, 10), 2: (7, 8), 3: (6, 8), 4: (5, 7), 5: (5, 6), 6: (4, 6), 7: (4, 5), 8: (3, 5), 100: (3, 5)}


@pytest.mark.parametrize("clients", BOUNDS)
def test_appfl_clients_keep_to_the_table_and_hold_all_classes(clients: int) -> None:
    seen = set()
    for seed in range(40):
        held = counted(AppflClass(), balanced(6000), clients, seed) > 0
        assert held.any(axis=0).all()
        seen |= set(held.sum(axis=1).tolist())
    least, most = BOUNDS[clients]
    assert seen == set(range(least, most + 1))


def test_appfl_clients_have_any_number_of_classes_within_the_bounds_and_any_classes() -> None:
    held = counted(AppflClass(2, 6), balanced(60_000), 3000) > 0
    assert law_holds(chisquare(np.bincount(held.sum(axis=1), minlength=7)[2:]).pvalue)
    assert abs(held.mean(axis=0) - 0.4).max() < 4.5 * np.sqrt(0.4 * 0.6 / 3000)


def test_appfl_draws_until_every_class_is_held() -> None:
    # One class each, as many clients as classes: only permutations are left, all of them as likely.
    found = Counter(
        tuple(counted(AppflClass(1, 1), balanced(9, 3), 3, seed).argmax(axis=1).tolist()) for seed in range(500)
    )
    assert set(found) == set(permutations(range(3)))
    assert law_holds(chisquare(list(found.values())).pvalue)


def test_appfl_cuts_by_normal_weights() -> None:
    sizes = AppflClass().split(balanced(400_000, 1), 2000, Randomness(0)).sizes
    weights = sizes * 10 / 200  # N(10, 3) but for one in two thousand
    assert kstest(weights, "norm", args=(10, 3)).pvalue > 1e-3
    # As many holders as examples: one for each, whatever the weights.
    assert AppflClass().split(balanced(50, 1), 50, Randomness(0)).sizes.tolist() == [1] * 50


def test_appfl_given_bounds_move_the_other() -> None:
    assert AppflClass(maximum_classes=2).bounds(100, 10) == (2, 2)
    assert AppflClass(minimum_classes=8).bounds(100, 10) == (8, 8)
    assert AppflClass().bounds(100, 4) == (3, 4)
    assert AppflClass().bounds(1, 2) == (2, 2)


def test_dual_dirichlet_sizes_of_one_class_are_a_beta_law() -> None:
    # One class, two clients: the share of the first is Beta(alpha1 / 2, alpha1 / 2), exactly.
    table = balanced(10_000, 1)
    shares = [DualDirichlet(5.0, minimum=0).split(table, 2, Randomness(seed)).sizes[0] / 10_000 for seed in range(300)]
    assert kstest(shares, beta(2.5, 2.5).cdf).pvalue > 1e-3


def test_dual_dirichlet_with_even_mixes_has_dirichlet_sizes() -> None:
    clients, found = 20, []
    for seed in range(150):
        sizes = DualDirichlet(8.0, 1e9, 0).split(balanced(5000), clients, Randomness(seed)).sizes / 5000
        found.append((sizes**2).sum())
    a = 8.0 / clients
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx((a + 1) / (clients * a + 1), abs=4 * error + 1e-3)


def test_dual_dirichlet_mixes_follow_the_class_frequencies() -> None:
    # Even sizes and many clients: sum_k p_k q_kj is the frequency, and each client's mix is its q_i.
    sizes, alpha = np.array([85_000, 10_000, 5_000]), 4.0
    prior = sizes / 100_000
    counts = counted(DualDirichlet(1e9, alpha, 0), Table(np.repeat([0, 1, 2], sizes), 3), 1000)
    mix = counts / counts.sum(axis=1, keepdims=True)
    expected = prior * (1 - prior) / (alpha + 1) + prior**2
    error = (mix**2).std(axis=0) / np.sqrt(1000)
    assert (abs((mix**2).mean(axis=0) - expected) < 4 * error).all()
    assert counts.sum(axis=0).tolist() == sizes.tolist()


def test_dual_dirichlet_treats_clients_alike() -> None:
    sizes = np.array([DualDirichlet().split(balanced(600), 6, Randomness(seed)).sizes for seed in range(600)])
    error = sizes.std(axis=0) / np.sqrt(600)
    assert (abs(sizes.mean(axis=0) - 100) < 4 * error).all()


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

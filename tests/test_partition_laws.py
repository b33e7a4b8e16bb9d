"""The laws of the partitions by label and by what else is known: each one against its own."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import beta, betabinom, chi2_contingency, chisquare, kstest, spearmanr
from spreads import Array, balanced, counted, law_holds, parts_of

from fedsim.data.partitions import (
    AppflClass,
    Continuous,
    Distribution,
    DualDirichlet,
    InnerDirichlet,
    Natural,
    Pathological,
    Table,
)
from fedsim.data.partitions.base import log_dirichlet
from fedsim.data.partitions.by_label import _drawn_labels, _turns
from fedsim.rng import Randomness

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

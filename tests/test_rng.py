"""Keyed randomness: draws depend on their key alone, arrays equal scalars, and the laws are what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedsim.rng import Draw, Randomness

COUNT = 200_000
ids = st.integers(-(2**63), 2**63 - 1)


class Fixed(Draw):
    """A draw whose words are given."""

    __slots__ = ("given",)

    def __init__(self, given: list[int]) -> None:
        super().__init__(0)
        self.given = np.array(given, dtype=np.uint64)

    def words(self, size: int | tuple[int, ...] = ()) -> NDArray[np.uint64]:
        return self.given


def key(*arguments: object, seed: int = 0) -> int:
    return int(Randomness(seed)(*arguments).key)  # type: ignore[arg-type]


# ---- keys ----------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_key_alone() -> None:
    fresh = Randomness(3)("speed", 7).normal(4)
    used = Randomness(3)
    for client in range(50):
        used("speed", client).uniform(client)
        used("other", client).permutation(5)
    draw = used("speed", 7)
    for _ in range(2):  # asking twice is asking the same
        np.testing.assert_array_equal(draw.normal(4), fresh)


def test_more_words_begin_with_the_same_words() -> None:
    draw = Randomness(0)("long")
    np.testing.assert_array_equal(draw.words(1000)[:10], draw.words(10))
    np.testing.assert_array_equal(draw.words((25, 40)).reshape(-1), draw.words(1000))
    assert draw.words() == draw.words(1)[0]


def test_drawing_leaves_global_generators_alone() -> None:
    np_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    draw = Randomness(0)("any")
    draw.generator().normal()
    torch.rand(3, generator=torch.Generator().manual_seed(draw.torch_seed()))
    np.testing.assert_array_equal(np.random.get_state()[1], np_before)  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_before)


@given(st.integers(0, 2**64), st.text(max_size=8), st.lists(ids, min_size=1, max_size=4), ids)
@settings(max_examples=30, deadline=None)
def test_array_ids_draw_what_each_scalar_id_draws(seed: int, purpose: str, many: list[int], other: int) -> None:
    randomness = Randomness(seed)
    array = np.array(many)
    for bulk, single in (
        (randomness(purpose, array), [randomness(purpose, one) for one in many]),
        (randomness(purpose, array, other), [randomness(purpose, one, other) for one in many]),
        (randomness(purpose, other, array), [randomness(purpose, other, one) for one in many]),
        (randomness(purpose, array, array), [randomness(purpose, one, one) for one in many]),
    ):
        for law in ("words", "uniform", "normal", "exponential"):
            np.testing.assert_array_equal(getattr(bulk, law)(3), [getattr(one, law)(3) for one in single])
            np.testing.assert_array_equal(getattr(bulk, law)(), [getattr(one, law)() for one in single])
        np.testing.assert_array_equal(bulk.integers(17), [one.integers(17) for one in single])


def test_ids_broadcast_against_each_other() -> None:
    randomness = Randomness(1)
    table = randomness("pair", np.arange(3)[:, None], np.arange(4)).uniform(2)
    assert table.shape == (3, 4, 2)
    np.testing.assert_array_equal(table[2, 3], randomness("pair", 2, 3).uniform(2))


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8, np.array, lambda value: torch.tensor(value)])
def test_the_type_of_an_id_does_not_matter(kind: type) -> None:
    assert key("any", kind(5), kind(2)) == key("any", 5, 2)


def test_every_part_of_a_key_counts() -> None:
    keys = [key(purpose, *each, seed=seed) for seed in (0, 1, -1, 2**40) for purpose in ("a", "b", "", "ab")
            for each in ((), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))]  # fmt: skip
    assert len(set(keys)) == len(keys) == 4 * 4 * 8


def test_a_million_tasks_have_a_million_keys() -> None:
    keys = Randomness(0)("task", np.arange(1000)[:, None], np.arange(1000)).key
    assert len(np.unique(keys)) == keys.size == 1_000_000


def test_draws_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from fedsim.rng import Randomness; r = Randomness(5);"
        "print(r('speed', 3).words(3).tolist(), r('x', 1, 2).permutation(9).tolist(), sep=';', end=';');"
        "print(r('g').generator().random())"
    )
    other = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": other}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = Randomness(5)
    assert there.stdout.split(";") == [
        str(here("speed", 3).words(3).tolist()),
        str(here("x", 1, 2).permutation(9).tolist()),
        str(here("g").generator().random()) + "\n",
    ]


def test_generators_of_one_key_agree_and_of_two_differ() -> None:
    one, same, other = (Randomness(0)("law", n) for n in (1, 1, 2))
    assert one.generator().random() == same.generator().random() != other.generator().random()
    assert one.torch_seed() == same.torch_seed() != other.torch_seed()
    assert 0 <= one.torch_seed() < 2**63


# ---- laws ----------------------------------------------------------------------------------------


def over_keys() -> Draw:
    return Randomness(11)("law", np.arange(COUNT))


def within_key() -> Draw:
    return Randomness(11)("law")


def both(law: str) -> list[NDArray[np.float64]]:
    """A law's values over neighbouring keys, and over the words of one key."""
    return [getattr(over_keys(), law)(), getattr(within_key(), law)(COUNT)]


@pytest.mark.parametrize("source", [0, 1], ids=["over keys", "within a key"])
def test_uniform_fills_its_interval_evenly(source: int) -> None:
    values = both("uniform")[source]
    counts, _ = np.histogram(values, bins=1000, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3
    low_bits = (values * 2**52).astype(np.uint64) % 256  # not only the leading digits
    assert stats.chisquare(np.bincount(low_bits.astype(np.int64), minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("source", [0, 1], ids=["over keys", "within a key"])
def test_every_bit_of_a_word_is_fair(source: int) -> None:
    words = [over_keys().words(), within_key().words(COUNT)][source]
    ones = [int((words >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(64)]
    assert max(abs(count - COUNT / 2) for count in ones) < 4.5 * np.sqrt(COUNT) / 2


def test_uniform_stays_inside_the_open_interval() -> None:
    extremes = Fixed([0, 2**64 - 1, 2**63]).uniform()
    assert extremes[0] == 2.0**-53
    assert extremes[1] == 1 - 2.0**-53 < 1
    assert np.isfinite(Fixed([0, 2**64 - 1]).exponential()).all()
    assert (Fixed([0, 2**64 - 1]).exponential() > 0).all()
    assert np.isfinite(Fixed([0, 0]).normal(1)).all()
    assert Fixed([0, 2**64 - 1]).integers(10).tolist() == [0, 9]
    assert Fixed([2**64 - 1]).integers(2**62) == [2**62 - 2**9]  # never `high` itself, at the float's resolution


@pytest.mark.parametrize("source", [0, 1], ids=["over keys", "within a key"])
def test_normal_is_standard_normal(source: int) -> None:
    values = both("normal")[source]
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - moment) < 4.5 * np.sqrt(variance / COUNT)


@pytest.mark.parametrize("source", [0, 1], ids=["over keys", "within a key"])
def test_exponential_has_mean_one(source: int) -> None:
    values = both("exponential")[source]
    assert stats.kstest(values, "expon").pvalue > 1e-3
    for power, moment, variance in ((1, 1, 1), (2, 2, 20), (3, 6, 684)):
        assert abs((values**power).mean() - moment) < 4.5 * np.sqrt(variance / COUNT)


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_are_uniform_below_high(high: int) -> None:
    values = over_keys().integers(high)
    assert values.dtype == np.int64
    counts = np.bincount(values, minlength=high)
    assert len(counts) == high
    assert high == 1 or stats.chisquare(counts).pvalue > 1e-3


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return abs(float(np.corrcoef(a, b)[0, 1])) * np.sqrt(len(a))


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbouring_ids_are_not_correlated(lag: int) -> None:
    randomness = Randomness(2)
    by_client = randomness("draw", np.arange(COUNT)).uniform()
    by_task = randomness("draw", 5, np.arange(COUNT)).uniform()
    by_word = randomness("draw").uniform(COUNT)
    for values in (by_client, by_task, by_word):
        assert correlation(values[:-lag], values[lag:]) < 4.5


def test_seeds_purposes_and_words_are_not_correlated() -> None:
    everybody = np.arange(COUNT)
    columns = [Randomness(seed)(purpose, everybody).uniform() for seed in (0, 1, 2) for purpose in ("up", "down")]
    columns += list(Randomness(0)("up", everybody).uniform(3).T[1:])
    for i, one in enumerate(columns):
        for other in columns[i + 1 :]:
            assert correlation(one, other) < 4.5


# ---- orders and choices --------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_permutation_holds_everything_once(n: int, each: int) -> None:
    order = Randomness(0)("order", each).permutation(n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_all_orders_are_equally_likely() -> None:
    orders = [tuple(Randomness(0)("order", each).permutation(4)) for each in range(12_000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


@given(st.integers(0, 400), st.data())
@settings(max_examples=100, deadline=None)
def test_a_choice_holds_k_different_integers_below_n(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    chosen = Randomness(0)("choice", n).choice(n, k)
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == len(chosen) == k
    assert k == 0 or (chosen.min() >= 0 and chosen.max() < n)


def test_a_choice_of_few_among_a_million_is_made_without_a_list_of_them() -> None:
    draw = Randomness(0)("choice")
    for k in (1, 10, 1000, 100_000):
        chosen = draw.choice(1_000_000, k)
        assert len(np.unique(chosen)) == k
    widths = [draw.choice(10**12, 5).max() for draw in (Randomness(0)("wide", each) for each in range(20))]
    assert max(widths) > 5 * 10**11


@pytest.mark.parametrize("k", [3, 9], ids=["few", "many"])
def test_everybody_is_chosen_equally_often_at_every_place(k: int) -> None:
    chosen = np.array([Randomness(4)("choice", each).choice(13, k) for each in range(5_000)])
    for place in range(k):
        assert stats.chisquare(np.bincount(chosen[:, place], minlength=13)).pvalue > 1e-4


def test_choosing_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot choose 6 of 5"):
        Randomness(0)("choice").choice(5, 6)


def test_consecutive_draws_choose_differently() -> None:
    chosen = [tuple(Randomness(0)("pick", each).choice(100, 10)) for each in range(50)]
    assert all(one != other for one, other in pairwise(chosen))

"""Keyed randomness: every draw is a pure function of (seed, purpose, ids), never of what was drawn before.

A key is a 64-bit word made by hashing the seed, the purpose's name and the ids; the n-th random word
of a key is the SplitMix64 output ``mix(key + (n + 1) * golden)``. Ids may be arrays: one call then
draws for all of them, each element getting exactly what it would have got alone. Nothing here holds a
stream, so nothing has to be saved, replayed or seeded globally.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CHILD = 0xD1B54A32D192ED03
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(word: int) -> int:
    """SplitMix64's finaliser on one Python int."""
    word = (word ^ word >> 30) * _M1 & _MASK
    word = (word ^ word >> 27) * _M2 & _MASK
    return word ^ word >> 31


def _mix_array(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_M1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_M2)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=4096)
def _purpose_key(root: int, purpose: str) -> int:
    word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    return _mix(root ^ word)


class Draw:
    """The random words of one key, or of an array of keys.

    ``size`` is the shape drawn *per key*; results have the keys' shape followed by ``size``.
    """

    __slots__ = ("key",)

    def __init__(self, key: int | NDArray[np.uint64]) -> None:
        self.key = key

    def words(self, size: int | tuple[int, ...] = ()) -> NDArray[np.uint64]:
        """Uniform 64-bit words."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        keys = np.asarray(self.key, dtype=np.uint64)  # [..., 1] below is an array even for one key
        count = int(np.prod(shape, dtype=np.int64))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return _mix_array(keys[..., None] + steps).reshape(keys.shape + shape)

    def uniform(self, size: int | tuple[int, ...] = ()) -> NDArray[np.float64]:
        """Uniform in the open interval (0, 1)."""
        # 52 bits and a half: the largest value is 1 - 2^-53, exactly representable and below 1.
        return ((self.words(size) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def nth_uniform(self, n: int) -> float:
        """What ``uniform(n + 1)[n]`` is, in plain Python: for one number that costs a tenth (one key only)."""
        return ((_mix((int(self.key) + (n + 1) * _GOLDEN) & _MASK) >> 12) + 0.5) * 2.0**-52

    def nth_normal(self, n: int) -> float:
        """What ``normal(n + 1)[n]`` is (one key only)."""
        radius = math.sqrt(-2.0 * float(np.log(self.nth_uniform(2 * n))))
        return radius * float(np.cos(2.0 * math.pi * self.nth_uniform(2 * n + 1)))

    def nth_integer(self, high: int, n: int) -> int:
        """What ``integers(high, n + 1)[n]`` is (one key only)."""
        number = int(self.nth_uniform(n) * high)
        return number if number < high else high - 1

    def exponential(self, size: int | tuple[int, ...] = ()) -> NDArray[np.float64]:
        """Exponential with mean 1."""
        return -np.log(self.uniform(size))

    def normal(self, size: int | tuple[int, ...] = ()) -> NDArray[np.float64]:
        """Standard normal (Box-Muller on two words per value)."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        pair = self.uniform((*shape, 2))
        return np.sqrt(-2.0 * np.log(pair[..., 0])) * np.cos(2.0 * np.pi * pair[..., 1])

    def integers(self, high: int, size: int | tuple[int, ...] = ()) -> NDArray[np.int64]:
        """Integers 0 .. high - 1."""
        return np.minimum(np.floor(self.uniform(size) * high), high - 1).astype(np.int64)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A random order of 0 .. n - 1 (one key only)."""
        return np.argsort(self.words(n), kind="stable").astype(np.int64)

    def permutations(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """A random order of ``0 .. sizes[i] - 1`` for each key ``i``, one after another, ``[sum of sizes]``.

        Each is what :meth:`permutation` gives for its key alone.
        """
        starts = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(sizes)), sizes)
        position = np.arange(len(owner)) - starts[owner]
        keys = np.asarray(self.key, dtype=np.uint64)
        words = _mix_array(keys[owner] + (position + 1).astype(np.uint64) * np.uint64(_GOLDEN))
        if len(sizes) and sizes.min() == sizes.max():  # sorted row by row, which costs half
            return np.argsort(words.reshape(len(sizes), -1), axis=1, kind="stable").ravel().astype(np.int64)
        orders: NDArray[np.int64] = np.lexsort((words, owner)) - starts[owner]
        return orders

    def choice(self, n: int, k: int) -> NDArray[np.int64]:
        """``k`` different integers below ``n`` in random order (one key only).

        Raises:
            ValueError: if ``k > n``.
        """
        if k > n:
            raise ValueError(f"cannot choose {k} of {n}")
        if 4 * k >= n:
            return self.permutation(n)[:k]
        tries = 2 * k  # draws with repeats, first appearance kept; doubled until enough
        while True:
            drawn = self.integers(n, tries)
            _, first = np.unique(drawn, return_index=True)
            if len(first) >= k:
                return drawn[np.sort(first)[:k]]
            tries *= 2

    def generator(self) -> np.random.Generator:
        """A numpy generator of its own for laws not offered here. Costs 20 us: for set-up, never per task."""
        return np.random.Generator(np.random.Philox(key=int(self.key)))

    def torch_seed(self) -> int:
        """A 63-bit seed for torch (one key only)."""
        return int(self.key) >> 1


class Randomness:
    """All randomness of one run: ``randomness("speed", client)`` gives the :class:`Draw` of that key."""

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        self._root = _mix((self.seed + _GOLDEN) & _MASK)

    def __call__(self, purpose: str, *ids: Any) -> Draw:
        """The key of ``purpose`` and ``ids`` (ints or integer arrays, broadcast against each other)."""
        key: Any = _purpose_key(self._root, purpose)
        for each in ids:
            if isinstance(key, int) and (type(each) is int or np.ndim(each) == 0):
                key = _mix(key ^ _mix((int(each) + _CHILD) & _MASK))
            else:
                # At least one dimension: numpy warns of the wanted overflow in scalars, not in arrays.
                words = np.atleast_1d(np.asarray(each).astype(np.int64).astype(np.uint64)) + np.uint64(_CHILD)
                key = _mix_array(np.asarray(key, dtype=np.uint64) ^ _mix_array(words))
        return Draw(key)

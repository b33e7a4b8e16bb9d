"""What the tests of devices share: models made ready, watched, and held against stated moments."""

from __future__ import annotations

import math

import numpy as np

from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.system.availability import Availability

MANY = 100_000
COUNTS = np.random.default_rng(5).multinomial(50, np.random.default_rng(6).dirichlet(np.full(10, 0.3), 20_000))
"""How many examples of ten classes each of many clients holds: 50 in all."""


def prepared(model, clients=MANY, seed=1):
    if isinstance(model, Availability):
        model.meet(lambda: COUNTS[:clients])
    model.prepare(clients, Randomness(seed))
    return model


def within(values, mean, deviation=None, sigmas=5.0):
    """Whether the mean of independent values is ``mean``, within so many standard errors."""
    spread = np.std(values) if deviation is None else deviation
    return abs(np.mean(values) - mean) <= sigmas * spread / math.sqrt(np.size(values)) + 1e-12


def has_moments(values, mean, variance):
    return within(values, mean) and within((np.asarray(values) - mean) ** 2, variance)


def watch(model, slots, length=600.0):
    """Who is online at the beginning of each slot: ``[slots, clients]``."""
    seen = [model.online.copy()]
    for slot in range(1, slots):
        model.advance(round(slot * length * NS))
        seen.append(model.online.copy())
    return np.array(seen)

"""One task at a time: what the models say of a batch of one, bit for bit, without arrays.

A server that never waits replaces one client after another, so most of its batches hold one task. An array of one
costs as much as an array of fifty, some sixty calls of NumPy; here the same few multiplications are made in Python.
Logarithms, exponentials and cosines are NumPy's nevertheless: the last bit of another library's may differ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedsim.kernel import NS
from fedsim.rng import Draw
from fedsim.system.base import LONGEST
from fedsim.system.compute import Compute
from fedsim.system.faults import STAGES, Faults, Stage
from fedsim.system.network import SLOWEST, Network

if TYPE_CHECKING:
    from fedsim.system import System

FEW = 16
"""Up to so many tasks one after another cost less than an array of them."""

BEYOND = float(LONGEST)
"""Exactly as much, and Python is slow to compare a float with a large whole number."""


def applies(system: System) -> bool:
    """Whether the models of a system are those that this module repeats: no subclass counts spans in its own way."""
    network, compute, faults = type(system.network), type(system.compute), type(system.faults)
    return (
        (network.down, network.up) == (Network.down, Network.up)
        and (compute.durations, compute._jitter_factors) == (Compute.durations, Compute._jitter_factors)
        and faults.draw is Faults.draw
    )


def spans(
    network: Network,
    compute: Compute,
    faults: Faults,
    client: int,
    nth: int,
    steps: int,
    down_bytes: int,
    up_bytes: int,
) -> tuple[int, int, int, int, float]:
    """Download, local work and upload of one task in ns, at which stage it is lost, and the share of its work by then.

    Repeats ``network.down``, ``compute.durations``, ``network.up`` and ``faults.draw``.
    """
    latency = network.latency_ns
    seconds = compute.seconds_per_step.item(client) * steps
    if compute.jitter > 0:
        seconds *= _jitter_factor(compute, compute.jitter_draw(client, nth))
    stage, fraction = (0, 1.0) if faults.dropout == 0 else _fate(faults, faults.dropout_draw(client, nth))
    there, back = network.down_bytes_per_second.item(client), network.up_bytes_per_second.item(client)
    down = down_bytes / (there if there > SLOWEST else SLOWEST) * NS
    work = seconds * NS
    up = up_bytes / (back if back > SLOWEST else SLOWEST) * NS
    return (
        latency + (round(down) if down < BEYOND else LONGEST),
        round(work) if work < BEYOND else LONGEST,
        latency + (round(up) if up < BEYOND else LONGEST),
        stage,
        fraction,
    )


def _fate(faults: Faults, draw: Draw) -> tuple[int, float]:
    """Whether and where one task is lost."""
    if draw.nth_uniform(0) > faults.dropout:
        return Stage.NONE, 1.0
    stage = Stage.BEFORE + min(int(3 * draw.nth_uniform(1)), 2) if faults.when == "any" else STAGES[faults.when]
    if stage == Stage.DURING:
        return stage, draw.nth_uniform(2)
    return stage, 0.0 if stage == Stage.BEFORE else 1.0


def _jitter_factor(compute: Compute, draw: Draw) -> float:
    jitter = compute.jitter
    if compute.jitter_law == "exponential":
        return 1.0 - jitter + jitter * -float(np.log(draw.nth_uniform(0)))
    if compute.jitter_law == "normal":
        attempt = 0
        while (factor := 1.0 + jitter * draw.nth_normal(attempt)) <= 0:
            attempt += 1
        return factor
    variance = math.log1p(jitter**2)
    return float(np.exp(math.sqrt(variance) * draw.nth_normal(0) - variance / 2))

"""What the system models share: array types, and the one place where seconds become nanoseconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.kernel import NS
from fedsim.rng import Draw

Ids = NDArray[np.int64]
"""Client numbers, int64 ``[k]``."""

Nanoseconds = NDArray[np.int64]
"""Points or spans of virtual time, int64."""

LONGEST = 2**60
"""The longest span a model gives, in ns (about 36 years): a heavy tail must not overflow the clock."""

WIDEST = 20.0
"""The largest standard deviation of a logarithm: beyond it nothing but zeros and infinities is drawn."""

SHORTEST = 1e-9
"""The shortest span a slot or a period may be told to have, in seconds: one nanosecond."""


def nanoseconds(seconds: NDArray[np.float64]) -> Nanoseconds:
    """Seconds (>= 0, any shape, infinity allowed) as whole nanoseconds, to the nearest and at most ``LONGEST``."""
    return np.rint(np.minimum(seconds * NS, float(LONGEST))).astype(np.int64)


def positive_normals(draw: Draw, deviation: float) -> NDArray[np.float64]:
    """Normal with mean 1 and standard deviation ``deviation``, drawn again until above 0: float64 ``[k]``.

    An element's n-th attempt is the n-th normal of its own key, so nobody's redraw changes what others get.

    Args:
        draw: one key per element.
        deviation: of the law before it is cut off at 0.
    """
    values = 1.0 + deviation * draw.normal(1)[..., 0]
    attempt = 1
    while len(below := np.flatnonzero(values <= 0)):
        attempt += 1
        again = Draw(np.asarray(draw.key)[below])
        values[below] = 1.0 + deviation * again.normal(attempt)[..., -1]
    return values

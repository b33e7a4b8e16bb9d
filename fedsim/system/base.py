"""What the system models share: array types, and the one place where seconds become nanoseconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.kernel import NS

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

"""The compiled module, and when it is the fastest there is."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

REVISION = 3
"""Of the C text: what was built from an older one is left alone. To be raised, in ``chain.h`` too, when bits change or
what a function takes."""

LARGE_BATCH, LARGE_CHAIN = 64, 300_000
"""Examples of a batch, and parameters, beyond which a library of matrix products is up to a third faster."""


@cache
def compiled() -> Any:
    """The compiled module, or None."""
    try:
        from fedsim.training.native import _steps
    except ImportError:  # no compiler when fedsim was installed
        return None
    return _steps if _steps.REVISION == REVISION else None


def why_not() -> str:
    """Why there is no kernel, if :func:`instruction_sets` is empty."""
    if compiled() is not None:
        return "the processor has no AVX2"
    if importlib.util.find_spec("fedsim.training.native._steps") is None:
        return "there was no C compiler when fedsim was installed"
    return "what was built does not fit this fedsim, install it again"


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those it can run with here, the fastest first; none if it was not built or the processor is too old."""
    module = compiled()
    return () if module is None else tuple(module.variants())


def at_its_best(size: int, parameters: int) -> bool:
    """Whether nothing is faster for batches of ``size`` examples: of large ones on large layers a library is."""
    return size <= LARGE_BATCH or parameters <= LARGE_CHAIN

"""Where training runs: behind one interface, so that a run does not depend on it."""

from fedsim.pool.base import Pool
from fedsim.pool.inline import InlinePool

__all__ = ["InlinePool", "Pool"]

"""Who follows a run from outside: an interface, and TensorBoard behind it. What it does shows in no result."""

from fedsim.tracking.base import Tracker, Tracking

__all__ = ["Tracker", "Tracking"]

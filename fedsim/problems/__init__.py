"""What is learnt: problems with data and models, convex ones with a known optimum, or nothing at all."""

from fedsim.problems.base import Problem

__all__ = ["Problem"]

"""Local steps on chains of linear layers, and linear layers of other models, in C: where that was built and the
processor can run it."""

from fedsim.training.native.built import instruction_sets, why_not
from fedsim.training.native.form import NativeForm
from fedsim.training.native.linear import NativeLinear

__all__ = ["NativeForm", "NativeLinear", "instruction_sets", "why_not"]

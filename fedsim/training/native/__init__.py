"""Local steps on chains of linear layers in C, where that was built and the processor can run it."""

from fedsim.training.native.form import NativeForm, instruction_sets, why_not

__all__ = ["NativeForm", "instruction_sets", "why_not"]

"""Sweeps: Hydra expands and composes, every member runs in a process of its own, several at a time.

A member that fails, or whose process is killed, takes no other one down. A sweep that is run again leaves complete
members alone and goes on with those that were stopped. ``grid`` runs every combination, ``search`` lets Optuna choose;
``members`` says what there is already, ``processes`` runs, ``screen`` shows and ``index`` lists them.
"""

from fedsim.sweeps.grid import sweep
from fedsim.sweeps.members import Composed
from fedsim.sweeps.multirun import hydra_main

__all__ = ["Composed", "hydra_main", "sweep"]

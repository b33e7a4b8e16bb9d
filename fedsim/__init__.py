"""fedsim: federated learning in virtual time, asynchronous, parallel and reproducible to the bit.

The public names, imported when first used so that ``fedsim --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsim.version import __version__

if TYPE_CHECKING:
    from fedsim.aggregate import StalenessWeight, expected_seconds, mean_direction, mean_update, reply_weights
    from fedsim.app import simulate
    from fedsim.checkpoint import CheckpointSchedule
    from fedsim.checks import (
        ConfigError,
        FedsimError,
        SimulationError,
        flag,
        number,
        one_of,
        optional_number,
        optional_seconds,
        optional_whole,
        whole,
    )
    from fedsim.compass import Compass
    from fedsim.federation import SERVER, Federation, Reply, Task, Timer
    from fedsim.kernel import whole_periods
    from fedsim.local import SAM, Context, ControlVariateSGD, LocalSGD, TensorSpec
    from fedsim.problems.base import Problem, objective_weights
    from fedsim.problems.classification import Classification
    from fedsim.problems.least_squares import LeastSquares
    from fedsim.problems.logistic import LogisticRegression
    from fedsim.problems.quadratic import Quadratic
    from fedsim.problems.schedule_only import ScheduleOnly
    from fedsim.recording import Run
    from fedsim.server import Momentum, PlainStep
    from fedsim.simulation.stop import Stop
    from fedsim.strategy import Anarchic, Asynchronous, Peers, Round, Strategy, Synchronous, idle_with_data
    from fedsim.system import System
    from fedsim.topology import Topology
    from fedsim.tracking import Tracker
    from fedsim.vectors import Layout, mean, weighted_sum
    from fedsim.wire.quantisation import Quantiser

_HOME = {
    "fedsim.aggregate": "StalenessWeight expected_seconds mean_direction mean_update reply_weights",
    "fedsim.app": "simulate",
    "fedsim.checkpoint": "CheckpointSchedule",
    "fedsim.recording": "Run",
    "fedsim.checks": "ConfigError FedsimError SimulationError flag number one_of optional_number "
    "optional_seconds optional_whole whole",
    "fedsim.compass": "Compass",
    "fedsim.federation": "SERVER Federation Reply Task Timer",
    "fedsim.kernel": "whole_periods",
    "fedsim.local": "SAM Context ControlVariateSGD LocalSGD TensorSpec",
    "fedsim.problems.base": "Problem objective_weights",
    "fedsim.problems.classification": "Classification",
    "fedsim.problems.least_squares": "LeastSquares",
    "fedsim.problems.logistic": "LogisticRegression",
    "fedsim.problems.quadratic": "Quadratic",
    "fedsim.problems.schedule_only": "ScheduleOnly",
    "fedsim.server": "Momentum PlainStep",
    "fedsim.simulation.stop": "Stop",
    "fedsim.strategy": "Anarchic Asynchronous Peers Round Strategy Synchronous idle_with_data",
    "fedsim.system": "System",
    "fedsim.topology": "Topology",
    "fedsim.tracking": "Tracker",
    "fedsim.vectors": "Layout mean weighted_sum",
    "fedsim.wire.quantisation": "Quantiser",
}
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "SAM",
    "SERVER",
    "Anarchic",
    "Asynchronous",
    "CheckpointSchedule",
    "Classification",
    "Compass",
    "ConfigError",
    "Context",
    "ControlVariateSGD",
    "Federation",
    "FedsimError",
    "Layout",
    "LeastSquares",
    "LocalSGD",
    "LogisticRegression",
    "Momentum",
    "Peers",
    "PlainStep",
    "Problem",
    "Quadratic",
    "Quantiser",
    "Reply",
    "Round",
    "Run",
    "ScheduleOnly",
    "SimulationError",
    "StalenessWeight",
    "Stop",
    "Strategy",
    "Synchronous",
    "System",
    "Task",
    "TensorSpec",
    "Timer",
    "Topology",
    "Tracker",
    "__version__",
    "expected_seconds",
    "flag",
    "idle_with_data",
    "mean",
    "mean_direction",
    "mean_update",
    "number",
    "objective_weights",
    "one_of",
    "optional_number",
    "optional_seconds",
    "optional_whole",
    "reply_weights",
    "simulate",
    "weighted_sum",
    "whole",
    "whole_periods",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""The federation on a virtual clock: kernel, system models, pool and records put together."""

from fedsim.simulation.engine import Simulation
from fedsim.simulation.stop import Stop

__all__ = ["Simulation", "Stop"]

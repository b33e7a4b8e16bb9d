"""One deployment from its configuration to its records: what the ``ServerApp`` does."""

from __future__ import annotations

import time
from importlib import metadata

from flwr.serverapp import Grid

from fedsim.app import Observer, directory_for, one_thread, recorded
from fedsim.assemble import Assembly, new_folder
from fedsim.checkpoint import CheckpointSchedule
from fedsim.flower.configuration import Configuration
from fedsim.flower.deployment import Clock, Deployment, Sleep
from fedsim.identity import identify, parts_of
from fedsim.recording import Recording, Run
from fedsim.rng import Randomness
from fedsim.tracking import Tracking


def deploy(
    grid: Grid,
    configuration: Configuration,
    observer: Observer | None = None,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
) -> Run:
    """Run a configuration on the nodes of a grid and write its records, with a wall clock, to its ``out``.

    The configuration's devices (compute, network, availability, faults) are those of a simulation that predicts this
    run; here they are what they are.

    Args:
        grid: of the Flower run.
        configuration: what the nodes are told, too.
        observer: called at the end of every look at the grid.
        clock: of the server.
        sleep: how to wait.

    Raises:
        ConfigError: if the configuration is wrong or cannot be deployed; nothing has been written then.
        SimulationError: if the run cannot go on; what was recorded so far is in ``out``.
        Interrupted: after a signal; a KeyboardInterrupt.
    """
    assembly = Assembly(configuration.config, configuration.choices)
    assembly.check_out()
    with one_thread():
        assembly.prepare()
        deployment = Deployment(
            grid,
            assembly.strategy,
            assembly.problem,
            assembly.stop,
            Randomness(assembly.seed),
            min(assembly.cohort, assembly.clients),
            assembly.eval_every,
            assembly.client_eval_every,
            configuration.settings,
            bool(configuration.loader),
            clock,
            sleep,
        )
        assembly.strategy.check_federation(deployment)
        parts = parts_of(assembly.strategy, assembly.problem, deployment.system)
        identity = identify(assembly.config, assembly.choices, parts)
        identity["versions"]["flwr"] = metadata.version("flwr")
        deployment.pool.open(assembly.problem, assembly.strategy.jobs, deployment.randomness)
        try:
            out = new_folder if assembly.out is None else assembly.out
            directory = directory_for(out, assembly.overwrite)
            recording = Recording(directory, assembly.config, identity, CheckpointSchedule(None))
            return recorded(deployment, recording, Tracking(assembly.tracker), observer)
        finally:
            deployment.pool.close()

"""Starting a Ray of our own, joining one that runs, and leaving either as it should be left."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from fedsim.checks import ConfigError

CONNECT_SECONDS = 5.0
"""How long a cluster's head may take to accept a connection."""


def import_ray() -> Any:
    """The ray package, told to keep quiet. Importing it takes a moment, so only a run that needs it does."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def connect(ray: Any, address: str | None, workers: int | None) -> bool:
    """Start a Ray (no address) or join the one at ``address``; one this process uses already is taken as it is.

    Returns:
        Whether this call connected, so that ``ray.shutdown`` has to follow in the end.

    Raises:
        ConfigError: if there is no Ray at ``address``.
    """
    if ray.is_initialized():  # somebody's own, in a notebook say: used, and left running
        return False
    if address not in (None, "auto"):
        _refuse_silent(str(address))
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(address="local", num_cpus=max(workers or 0, os.cpu_count() or 1), **quiet)
        else:
            ray.init(address=address, **quiet)
    except BaseException as error:
        ray.shutdown()  # whatever had been started by then
        if isinstance(error, (ConnectionError, ValueError, RuntimeError)):
            first = str(error).partition("\n")[0]
            raise ConfigError(f"pool.address={address}: no Ray there ({first})") from None
        raise
    return True


def _refuse_silent(address: str) -> None:
    """Ray itself would wait for minutes where nobody answers.

    Raises:
        ConfigError: if nobody does.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"pool.address={address}: no Ray there ({error}), give auto or host:port") from None

"""Starting a Ray of our own, joining one that runs, and leaving either as it should be left."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from fedsim.checks import ConfigError

CONNECT_SECONDS = 5.0
"""How long a cluster's head may take to accept a connection."""


SETTINGS = 4
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
"""How HTTP/2 begins, which Ray's head speaks: it answers with its own settings, a frame of kind 4 (RFC 9113, 3.4)."""

MOST_PER_CORE = 8
"""Most workers of a Ray of our own for each core: each costs seconds to start and a process of 300 MB."""


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
        ConfigError: if there is no Ray at ``address``, or ``workers`` are far more than this machine has cores.
    """
    if ray.is_initialized():  # somebody's own, in a notebook say: used, and left running
        return False
    if address not in (None, "auto"):
        _refuse_silent(str(address))
    cores = os.cpu_count() or 1
    if address is None and workers is not None and workers > MOST_PER_CORE * cores:
        most = MOST_PER_CORE * cores
        raise ConfigError(f"pool.workers={workers}: must be from 1 to {most} here, {MOST_PER_CORE} for each core")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(address="local", num_cpus=max(workers or 0, cores), **quiet)
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
    """Ray itself would wait for minutes where nobody answers, or somebody else does.

    Raises:
        ConfigError: if it is so.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"pool.address={address}: give auto or host:port of a running Ray")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as line:
            line.settimeout(CONNECT_SECONDS)
            line.sendall(HELLO)
            answer = line.recv(9)  # a frame's header: three bytes of length, then its kind
    except (OSError, OverflowError) as error:
        raise ConfigError(f"pool.address={address}: no Ray there ({error}), give auto or host:port") from None
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise ConfigError(f"pool.address={address}: no Ray there (something else answers), give auto or host:port")

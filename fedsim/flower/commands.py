"""Flower's own commands for a deployment, and what they have to be told by their environment and files.

Options and keys are those of Flower 1.41 (their ``--help``).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from fedsim.flower.certificates import NodeKey, ServerFiles

CONNECTION = "fedsim"
"""The name of the superlink in Flower's own configuration."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Otherwise every app process makes an environment of its own and installs the app's dependencies into it.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment of every Flower process."""


@dataclass(frozen=True)
class Superlink:
    """Where a superlink is reached.

    Args:
        host: name or address.
        port: of its one HTTP interface.
        files: its certificate; None for a connection that is not encrypted, and nodes that prove nothing.
    """

    host: str
    port: int
    files: ServerFiles | None = None

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def health(self) -> str:
        """The address that answers 200 once it serves."""
        return f"{'http' if self.files is None else 'https'}://{self.address}/health"


def superlink(link: Superlink, listen: str) -> list[str]:
    """The superlink itself, listening on the address ``listen``."""
    command = ["flower-superlink", "--host", listen, "--port", str(link.port), "--isolation", "subprocess"]
    command.append("--disable-runtime-dependency-installation")
    if link.files is None:
        return [*command, "--insecure"]
    files = link.files
    return [
        *command,
        *("--ssl-ca-certfile", str(files.authority)),
        *("--ssl-certfile", str(files.certificate)),
        *("--ssl-keyfile", str(files.key)),
        "--enable-supernode-auth",
    ]


def supernode(link: Superlink, partition: int, partitions: int, port: int, key: NodeKey | None) -> list[str]:
    """One supernode.

    Args:
        link: the superlink to join.
        partition: which part of the data the node holds, from 0.
        partitions: of how many.
        port: for its own processes, on 127.0.0.1.
        key: proves to the superlink which node it is; goes with an encrypted connection.
    """
    command = ["flower-supernode", "--superlink", link.address, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--node-config", f"partition-id={partition} num-partitions={partitions}"]
    if link.files is None:
        return [*command, "--insecure"]
    assert key is not None
    return [
        *command,
        *("--root-certificates", str(link.files.authority)),
        *("--auth-supernode-private-key", str(key.private)),
    ]


def register(key: NodeKey) -> list[str]:
    """Make a node's public key known to the superlink."""
    return ["flwr", "supernode", "register", str(key.public), CONNECTION]


def list_nodes() -> list[str]:
    """All supernodes, as JSON."""
    return ["flwr", "supernode", "list", CONNECTION, "--format", "json"]


def list_runs() -> list[str]:
    """All runs, as JSON."""
    return ["flwr", "list", CONNECTION, "--format", "json"]


def run(app: Path, settings: Path) -> list[str]:
    """Start the app with the run configuration in ``settings`` and follow what it says."""
    return ["flwr", "run", str(app), CONNECTION, "--run-config", str(settings), "--stream"]


def connection(link: Superlink) -> str:
    """What ``config.toml`` in ``FLWR_HOME`` says about the superlink, for the ``flwr`` commands."""
    security = "insecure = true" if link.files is None else f"root-certificates = {_toml(str(link.files.authority))}"
    return f'[superlink.{CONNECTION}]\naddress = "{link.address}"\n{security}\n'


def settings(run_config: Mapping[str, str]) -> str:
    """The file for ``--run-config``; Flower takes values for keys that the app's own configuration has."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in run_config.items())


def environment(home: Path, programs: Path) -> dict[str, str]:
    """The environment of a Flower process on this machine.

    Args:
        home: Flower's folder for this process alone: two that unpack an app into one folder get in each other's way.
        programs: the folder of Flower's programs, which start one another by name.
    """
    path = os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def write_programs(folder: Path) -> None:
    """Write a starter for each of Flower's programs into ``folder``: this interpreter, with what it can import.

    Those on ``PATH`` may belong to another environment, or be on none.
    """
    for entry in distribution("flwr").entry_points.select(group="console_scripts"):
        # The folder that the process begins in is searched last: the user's own strategies lie there.
        code = (
            f"import os, sys; sys.path.append(os.getcwd()); sys.argv[0] = {entry.name!r}; "
            f"from {entry.module} import {entry.attr} as main; sys.exit(main())"
        )
        path = folder / entry.name
        path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-P", "-c", code])} "$@"\n')
        path.chmod(0o755)


def shown(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """A command as people paste it into a shell."""
    before = [f"{name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    return " ".join([*before, shlex.join(command)])


def _toml(text: str) -> str:
    """A basic string of TOML: JSON's, which writes what is not ASCII as itself, and DEL escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

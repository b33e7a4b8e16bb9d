"""A whole federation on this machine: one superlink and its supernodes as processes on loopback, and one run on them.

Everything is started by us and stopped by us, whatever happens in between; its files lie in one folder, which the
caller makes and removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fedsim.checks import ConfigError, SimulationError
from fedsim.flower import commands
from fedsim.flower.certificates import NodeKey, issue_node_key, issue_server
from fedsim.flower.commands import Superlink
from fedsim.flower.following import FollowedRun
from fedsim.flower.processes import Process, Processes
from fedsim.recording import is_complete

HOST = "127.0.0.1"

READY_SECONDS = 120.0
"""How long a superlink may take until it serves; on an idle machine it takes two to four."""

CONNECT_SECONDS = 120.0
"""How long the supernodes together may take until they are connected, and as many for each of them."""

ANSWER_SECONDS = 5.0
"""How long it may take to answer that it serves."""

ASK_SECONDS = 10.0
"""How often the superlink is asked who is connected."""

CONNECTED = "SuperNode ID:"
"""What a supernode says when it is."""

COMMAND_SECONDS = 120.0
"""How long one of Flower's commands may take."""

LOOK_SECONDS = 0.5
"""How often it is looked whether all processes are still there."""

POLL_SECONDS = "0.2"
"""How often Flower's launchers ask for tasks; Flower's own 1 s would be most of a short task's time."""


class LocalFederation:
    """One superlink and its supernodes on loopback; started by :meth:`start`, stopped when it is left.

    Args:
        folder: an empty one for its files.
        nodes: how many supernodes.
        partitions: into how many parts the data are divided; node i holds part i.
        encrypted: TLS with an authority of its own, and nodes that prove who they are.
        say: is told what happens, in single lines.
    """

    def __init__(self, folder: Path, nodes: int, partitions: int, encrypted: bool, say: Callable[[str], None]) -> None:
        self.folder, self.nodes, self.partitions, self.encrypted = folder, nodes, partitions, encrypted
        self.say = say
        self.supernodes: list[Process] = []
        self.logs = folder / "logs"
        self._programs = folder / "programs"
        self._gone: set[str] = set()

    def __enter__(self) -> LocalFederation:
        self.logs.mkdir()
        self._programs.mkdir()
        commands.write_programs(self._programs)
        self.processes = Processes(self.logs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.processes.__exit__(kind, error, trace)

    # ---- beginning ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the superlink, make the nodes known to it, start them and wait until all are connected.

        Raises:
            SimulationError: with the end of the log of what died or took too long.
        """
        port, *node_ports = free_ports(1 + self.nodes)
        link = Superlink(HOST, port, issue_server(self.folder, []) if self.encrypted else None)
        self._home("flwr").joinpath("config.toml").write_text(commands.connection(link))
        self.superlink = self._start("superlink", commands.superlink(link, HOST))
        self._wait_for(link)
        self.say(f"superlink at {link.address} (process {self.superlink.pid})")
        keys = [self._registered(node) for node in range(self.nodes)] if self.encrypted else [None] * self.nodes
        for node, (node_port, key) in enumerate(zip(node_ports, keys, strict=True)):
            command = commands.supernode(link, node, self.partitions, node_port, key)
            process = self._start(f"supernode {node}", command)
            self.supernodes.append(process)
            self.say(f"{process.name} (process {process.pid})")
        self._wait_for_nodes()

    def _home(self, name: str) -> Path:
        home = self.folder / "homes" / name.replace(" ", "-")
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _start(self, name: str, command: list[str], home: str | None = None) -> Process:
        environment = {
            **commands.environment(self._home(home or name), self._programs),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_SECONDS,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # the nodes share this machine's cores
            # A proxy for the world outside is none for loopback.
            "NO_PROXY": f"{HOST},localhost",
            "no_proxy": f"{HOST},localhost",
        }
        # In the user's folder: strategies of their own lie there.
        return self.processes.start(name, command, environment, Path.cwd())

    def _ask(self, name: str, command: list[str]) -> str:
        """What one of the ``flwr`` commands prints."""
        process = self._start(name, command, home="flwr")
        self.processes.finish(process, COMMAND_SECONDS)
        output = process.log.read_text(errors="replace")
        process.log.unlink()
        return output

    def _wait_for(self, link: Superlink) -> None:
        trust = None if link.files is None else ssl.create_default_context(cafile=str(link.files.authority))
        direct = urllib.request.ProxyHandler({})
        opener = urllib.request.build_opener(direct, urllib.request.HTTPSHandler(context=trust))
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                with opener.open(link.health, timeout=ANSWER_SECONDS):
                    return
            except OSError as error:
                if self.superlink.status is not None:
                    raise _broken(self.superlink.died(), self.superlink) from None
                if time.monotonic() > end:
                    why = f"the superlink does not serve after {READY_SECONDS:g} s ({error})"
                    raise _broken(why, self.superlink) from None
            time.sleep(0.1)

    def _registered(self, node: int) -> NodeKey:
        key = issue_node_key(self.folder, f"node-{node}")
        self._ask(f"register {node}", commands.register(key))
        return key

    def _wait_for_nodes(self) -> None:
        """Wait for what the nodes say themselves, and now and then for what the superlink says, which takes longer."""
        began = asked = time.monotonic()
        while not all(CONNECTED in process.log.read_text(errors="replace") for process in self.supernodes):
            for process in (self.superlink, *self.supernodes):
                if process.status is not None:
                    raise _broken(process.died(), process)
            if time.monotonic() - asked > ASK_SECONDS:
                connected, asked = self._connected(), time.monotonic()
                if connected >= self.nodes:
                    break
                if asked - began > CONNECT_SECONDS * (1 + self.nodes):
                    raise _broken(f"only {connected} of {self.nodes} supernodes are connected", self.supernodes[-1])
            time.sleep(0.1)

    def _connected(self) -> int:
        listed = _json(self._ask("list of nodes", commands.list_nodes()))
        return sum(node["status"] == "online" for node in listed["nodes"])

    # ---- one run -----------------------------------------------------------------------------------

    def run(self, app: Path, run_config: Mapping[str, str], following: FollowedRun) -> None:
        """Run an app to its end.

        A supernode that dies meanwhile is told of, and the run goes on with the others.

        Args:
            app: the folder of its ``pyproject.toml``.
            run_config: what it is given.
            following: looks at the run's directory twice a second.

        Raises:
            ConfigError: if the server found fault with the configuration.
            SimulationError: if the run has failed, or the superlink or all supernodes have died.
        """
        settings = self.folder / "run.toml"
        settings.write_text(commands.settings(run_config))
        process = self._start("run", commands.run(app, settings), home="flwr")
        while process.status is None:
            self.processes.look()
            self._watch()
            following.look()
            time.sleep(LOOK_SECONDS)
        following.look()
        if process.status != 0:
            raise _broken(process.died(), process)
        if not (following.begun and is_complete(following.path)):
            self._blame(process)

    def _blame(self, process: Process) -> None:
        """Find out why a run has left no complete records."""
        output = process.log.read_text(errors="replace")
        status, details = self._ended(output)
        wrong = re.findall(r"^fedsim\.checks\.ConfigError: (.+)$", output, re.MULTILINE)
        if wrong:
            raise ConfigError(wrong[-1])
        raise _broken(f"the run has ended as {status}: {details}", process)

    def _watch(self) -> None:
        if self.superlink.status is not None:
            raise _broken(self.superlink.died(), self.superlink)
        for process in self.supernodes:
            if process.status is not None and process.name not in self._gone:
                self._gone.add(process.name)
                self.say(f"{process.died()}; the run goes on without it")
        if len(self._gone) == self.nodes:
            raise _broken("all supernodes have died", self.supernodes[-1])

    def _ended(self, output: str) -> tuple[str, str]:
        """How Flower says that the run has ended."""
        found = re.search(r"Successfully started run (\d+)", output)
        listed = _json(self._ask("list of runs", commands.list_runs()))
        for run in listed["runs"]:
            if found and run["run-id"] == found[1]:
                return run["status"], run["status-details"] or "no reason given"
        return "unknown", "the superlink does not know it"

    def keep_logs(self, following: FollowedRun) -> None:
        """Copy what the processes have said to ``logs`` in the run's directory, if the run has begun one."""
        if following.begun:
            shutil.copytree(self.logs, following.path / "logs", dirs_exist_ok=True)


def _broken(why: str, process: Process) -> SimulationError:
    return SimulationError(f"{why}; its log ends:\n{process.tail()}")


def _json(output: str) -> dict[str, Any]:
    """What a command with ``--format json`` says, behind lines for people.

    Raises:
        SimulationError: if that is no JSON.
    """
    try:
        found: dict[str, Any] = json.loads(output[output.index("{") :])
    except ValueError:
        raise SimulationError(f"Flower's answer cannot be read: {output.strip()[:200]}") from None
    return found


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on, on loopback; unlike one another."""
    with contextlib.ExitStack() as held:
        return [held.enter_context(socket.create_server((HOST, 0))).getsockname()[1] for _ in range(count)]

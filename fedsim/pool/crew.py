"""The Ray pool's workers: actors that join when they find a core, die, and are replaced."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from fedsim.checks import ConfigError, SimulationError, said
from fedsim.pool.lines import Line
from fedsim.pool.regions import Region
from fedsim.pool.worker import Worker

logger = logging.getLogger("fedsim")

STARTS = 3
"""How often in a row a worker may fail to start."""

HOPELESS_SECONDS = 60.0
"""How long to wait for a node with room for a worker when all workers are gone."""


@dataclass(slots=True, eq=False)
class Member:
    """One worker: an actor, and the one started in its place when it dies or is lost."""

    number: int
    actor: Any
    greeting: Any
    """The reference of its answer to ``hello``; None once it has joined."""
    node: str = ""
    """Ray's id of the machine it is on, or was on when it died."""
    process: int = 0
    """Its process there; 0 as long as it has not joined."""
    load: int = 0
    """Room taken by the groups it has."""
    died: bool = False
    """Whether it has yet to come back from a death of its process."""
    failed_starts: int = 0
    near: bool = False
    """Whether it reaches the driver's memory."""
    line: Line | None = None
    """Through which it is asked if it is near."""
    serving: Any = None
    """The reference of its answer to ``serve``, which comes when it has left the line; None if it is not there."""
    regions: list[Region] = field(default_factory=list)
    """Those that lie idle between the driver and it."""

    @property
    def joined(self) -> bool:
        """Whether it can be given work."""
        return self.greeting is None

    def lent(self) -> Region | None:
        """A region that only it and the driver use, until it is put back; None if there can be none."""
        if self.line is None or not self.line.takes:
            return None
        return self.regions.pop() if self.regions else new_region()

    def connect(self) -> None:
        """Open a line to it; it goes without if there can be no more files."""
        try:
            self.line = Line()
        except OSError:
            return
        self.serving = self.actor.serve.remote(self.line.ends)

    def disconnect(self) -> None:
        """Leave the line, whatever is still to come."""
        if self.line is not None:
            self.line.close()
        self.line = self.serving = None


@dataclass(slots=True, eq=False)
class LostNode:
    """A node that has left the cluster, and the workers that lived there."""

    name: str
    members: list[Member]


class Crew:
    """Hires the workers, knows which of them have joined, and replaces those that are lost.

    Args:
        gpus: fraction of a GPU each worker reserves; None shares out all there are.
    """

    def __init__(self, gpus: float | None) -> None:
        self.members: list[Member] = []
        self.restarts = 0
        """Workers whose process died and came back."""
        self._wanted = gpus
        self._gpus = 0.0
        self._ray: Any = None
        self._actor: Any = None
        self._given: tuple[Any, ...] = ()
        """What every worker is made of."""
        self._probe: Region | None = None
        self._hopeless_since: float | None = None

    def hire(self, ray: Any, count: int | None, shared: Any) -> None:
        """Start the workers, without waiting for them.

        Args:
            ray: the ray package, connected.
            count: how many; None takes a worker per core.
            shared: the reference of what all tasks share.

        Raises:
            ConfigError: if Ray has fewer cores or GPUs than the workers need.
        """
        total = ray.cluster_resources()
        cores, there = int(total.get("CPU", 0)), total.get("GPU", 0)
        if self._wanted is None:
            count, gpus = shared_out(int(there), count)
        else:
            count, gpus = max(1, cores) if count is None else count, self._wanted
        if count > cores:
            raise ConfigError(f"pool.workers={count}: the Ray it runs on has {cores} cores")
        if count * gpus > there:
            needed = f"{count} workers need {count * gpus:g} GPUs"
            raise ConfigError(f"pool.gpus_per_worker={gpus:g}: {needed}, Ray has {there:g}")
        self._ray, self._gpus = ray, gpus
        # Not restarted by Ray, which then would neither say why a worker died (of a lack of memory, say) nor let it
        # go without printing lines about retries. The members do that themselves.
        self._actor = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._probe = new_region()
        self._given = shared, None if self._probe is None else self._probe.address
        self.members = [Member(number, *self._hired()) for number in range(count)]

    def _hired(self) -> tuple[Any, Any]:
        """A new actor, and the reference of its greeting."""
        actor = self._actor.remote(*self._given)
        return actor, actor.hello.remote()

    # ---- who is there ----------------------------------------------------------------------------

    def greetings(self) -> dict[Any, Member]:
        """Those who have not joined, by the reference of the greeting they owe."""
        return {member.greeting: member for member in self.members if not member.joined}

    def lines(self) -> list[Line]:
        """The lines through which something may come."""
        return [each.line for each in self.members if each.line is not None and not each.line.has_ended]

    def serving(self) -> dict[Any, Member]:
        """Those who serve a line, by the reference that tells when, or why, they have left it."""
        return {each.serving: each for each in self.members if each.serving is not None}

    def off_line(self) -> dict[Any, Member]:
        """Those of them who have not opened it, or are not there any more: nothing else can tell why."""
        return {at: each for at, each in self.serving().items() if each.line is not None and not each.line.is_open}

    def joined(self) -> int:
        """How many workers can be given work."""
        return sum(member.joined for member in self.members)

    def least_loaded(self) -> Member | None:
        """The worker with the least to do; None as long as nobody has joined."""
        there = (member for member in self.members if member.joined)
        return min(there, key=lambda member: (member.load, member.number), default=None)

    def missing(self) -> str:
        """What the workers that have not joined wait for."""
        waiting = len(self.members) - self.joined()
        free = self._ray.available_resources().get("CPU", 0)
        return f"{waiting} of {len(self.members)} workers wait for a core each, Ray has {free:g} free"

    # ---- joining ---------------------------------------------------------------------------------

    def welcome(self, member: Member) -> None:
        """Take in a greeting that is there.

        Raises:
            SimulationError: if this worker failed to start too often.
        """
        try:
            place = self._ray.get(member.greeting)
        except self._ray.exceptions.RayError as error:
            member.failed_starts += 1
            if member.failed_starts >= STARTS:
                raise SimulationError(f"Ray worker {member.number} cannot be started: {said(error)}") from error
            self._renew(member)
            return
        member.node, member.process, member.near = place
        member.greeting, member.failed_starts = None, 0
        if member.near:
            member.connect()
        if member.died:
            member.died = False
            self.restarts += 1
            logger.warning("Ray worker %d died and was restarted; its tasks are trained again", member.number)

    # ---- leaving ---------------------------------------------------------------------------------

    def bury(self, actor: Any) -> None:
        """An actor has died: another one is started in its place, unless it has been already."""
        for member in self.members:
            if member.actor is actor:
                member.died = True
                self._renew(member)

    def replace_lost(self, unreachable: str = "") -> list[LostNode]:
        """Give up the workers of nodes that are no longer alive, and start others in their place.

        Args:
            unreachable: a node to take for lost as well: Ray needs some time to notice.

        Returns:
            The nodes that had workers; these workers have no work any more.
        """
        nodes = self._ray.nodes()
        alive = {node["NodeID"] for node in nodes if node["Alive"]} - {unreachable}
        lost: dict[str, LostNode] = {}
        for member in self.members:
            if member.node and member.node not in alive:
                lost.setdefault(member.node, LostNode(_name(member.node, nodes), [])).members.append(member)
                member.node, member.died = "", False
                if member.joined:
                    self._renew(member)
        return list(lost.values())

    def _renew(self, member: Member) -> None:
        self._ray.kill(member.actor)
        member.disconnect()
        member.actor, member.greeting = self._hired()
        member.process = member.load = 0
        member.near, member.regions = False, []  # its process may still write to them

    def check_hope(self) -> None:
        """See that some worker is there or may yet come.

        Raises:
            SimulationError: if for ``HOPELESS_SECONDS`` there was neither a worker nor a node with room for one.
        """
        if self.joined() or any(self._has_room(node) for node in self._ray.nodes()):
            self._hopeless_since = None
            return
        now = time.monotonic()
        if self._hopeless_since is None:
            self._hopeless_since = now
        if now - self._hopeless_since >= HOPELESS_SECONDS:
            raise SimulationError(
                f"all Ray workers are lost, and for {HOPELESS_SECONDS:.0f} s no node had a core for another"
            )

    def _has_room(self, node: dict[str, Any]) -> bool:
        """Whether a worker could ever run on this node, however busy it is now."""
        resources = node["Resources"]
        return bool(node["Alive"] and resources.get("CPU", 0) >= 1 and resources.get("GPU", 0) >= self._gpus)

    def dismiss(self) -> None:
        """Stop all workers, whatever they are doing."""
        for member in self.members:
            self._ray.kill(member.actor)
            member.disconnect()
        self.members, self._given, self._probe = [], (), None


def new_region() -> Region | None:
    """Memory that workers of this machine reach; None if there is no such thing here."""
    try:
        return Region.create()
    except OSError:
        return None


def shared_out(gpus: int, workers: int | None) -> tuple[int, float]:
    """How many workers there are, and how much of a GPU each has, where all GPUs are to be used.

    Args:
        gpus: how many there are.
        workers: how many are to share them; None takes one for each.

    Raises:
        ConfigError: if there is no GPU.
    """
    if not gpus:
        raise ConfigError("pool.device=cuda: the Ray it runs on has no GPU; use device=cpu")
    if workers is None:
        return gpus, 1.0
    # Ray counts GPUs in steps of 0.0001, and a worker must fit on one.
    return workers, math.floor(10_000 / -(-workers // gpus)) / 10_000


def _name(node: str, nodes: list[dict[str, Any]]) -> str:
    """A node as the log calls it: the beginning of Ray's id, and its host if that is still known."""
    hosts = [each["NodeManagerHostname"] for each in nodes if each["NodeID"] == node]
    return f"{node[:12]} ({hosts[0]})" if hosts else node[:12]

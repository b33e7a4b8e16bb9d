"""Messages between nodes: one at a time, and a whole gossip step in bulk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.federation import SERVER
from fedsim.kernel import NS, Phase
from fedsim.local import TensorSpec
from fedsim.record import LINK_COLUMNS, Log
from fedsim.wire import message_bytes

if TYPE_CHECKING:
    from fedsim.simulation.engine import Simulation


@dataclass(slots=True)
class Letter:
    """A message under way."""

    src: int
    dst: int
    tag: Any
    payload: dict[str, Tensor]
    nbytes: int
    sent: int


@dataclass(slots=True)
class Gossip:
    """A gossip step under way."""

    vectors: Tensor
    mixing_matrix: Tensor
    tag: Any


class Links:
    """What travels between nodes, and its log. Bytes are counted when a message is sent."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.log = Log(LINK_COLUMNS)
        self.bytes_sent = 0

    def send(self, src: int, dst: int, tag: Any, tensors: dict[str, Tensor]) -> None:
        """``Federation.send``."""
        sim = self.sim
        for node in (src, dst):
            if node != SERVER and not 0 <= node < sim.clients:
                raise ValueError(f"no node {node}: clients are 0 to {sim.clients - 1}, the server is {SERVER}")
        if src == dst:
            raise ValueError(f"node {src} cannot send to itself")
        payload = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        specs = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in payload.values()]
        nbytes = message_bytes(specs, sim.layout)
        due = sim.kernel.now + max(1, self._travel(src, dst, nbytes))
        self.bytes_sent += nbytes
        letter = Letter(src, dst, tag, payload, nbytes, sim.kernel.now)
        sim.kernel.schedule(due, Phase.MESSAGE, ("message", letter), dst, src)

    def _travel(self, src: int, dst: int, nbytes: int) -> int:
        network = self.sim.system.network
        if src == SERVER:
            return int(network.down(np.array([dst]), nbytes)[0])
        if dst == SERVER:
            return int(network.up(np.array([src]), nbytes)[0])
        return int(network.link(np.array([src]), np.array([dst]), nbytes)[0])

    def deliver(self, letter: Letter) -> None:
        """Hand a message over, unless its receiver is offline."""
        sim = self.sim
        there = letter.dst == SERVER or bool(sim.system.availability.online[letter.dst])
        arrived = sim.now if there else None
        self.log.append((letter.src, letter.dst, letter.sent / NS, arrived, letter.nbytes, _text(letter.tag)))
        if there:
            sim.strategy.on_message(sim, letter.src, letter.dst, letter.payload, letter.tag)

    def exchange(self, vectors: Tensor, mixing_matrix: Tensor, tag: Any) -> None:
        """``Federation.exchange``: nodes that are offline keep their vector, and their neighbours do without them."""
        sim = self.sim
        count, size = sim.clients, sim.layout.size
        if tuple(vectors.shape) != (count, size) or tuple(mixing_matrix.shape) != (count, count):
            raise ValueError(
                f"exchange needs vectors [{count}, {size}] and a mixing matrix [{count}, {count}], "
                f"got {tuple(vectors.shape)} and {tuple(mixing_matrix.shape)}"
            )
        weights = _among_online(mixing_matrix.detach().to(sim.layout.dtype), sim.system.availability.online)
        dst, src = (edge.numpy() for edge in torch.nonzero(weights, as_tuple=True))
        dst, src = dst[dst != src], src[dst != src]
        nbytes = sim.layout.nbytes
        now = sim.kernel.now
        due = now + np.maximum(1, sim.system.network.link(src, dst, nbytes))
        end = int(due.max(initial=now + 1))
        self.bytes_sent += nbytes * len(src)
        for one_src, one_dst, one_due in zip(src.tolist(), dst.tolist(), due.tolist(), strict=True):
            self.log.append((one_src, one_dst, now / NS, one_due / NS, nbytes, _text(tag)))
        gossip = Gossip(vectors.detach().to(sim.layout.dtype).clone(), weights, tag)
        sim.kernel.schedule(end, Phase.MESSAGE, ("exchange", gossip))

    def deliver_exchange(self, gossip: Gossip) -> None:
        """Mix and hand over."""
        mixed = gossip.mixing_matrix @ gossip.vectors
        self.sim.strategy.on_exchange(self.sim, mixed, gossip.tag)


def _among_online(mixing_matrix: Tensor, online: NDArray[np.bool_]) -> Tensor:
    """Move the weight of edges that touch an offline node to the diagonal: rows (and columns) still sum to 1."""
    here = torch.from_numpy(online.copy())
    usable = here[:, None] & here[None, :] | torch.eye(len(here), dtype=torch.bool)
    kept = torch.where(usable, mixing_matrix, 0)
    kept.diagonal().add_((mixing_matrix - kept).sum(dim=1))
    return kept


def _text(tag: Any) -> str:
    return "" if tag is None else str(tag)

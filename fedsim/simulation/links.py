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
    import pyarrow as pa

    from fedsim.simulation.engine import Simulation


@dataclass(slots=True, eq=False)
class Letter:
    """A message under way."""

    src: int
    dst: int
    tag: Any
    payload: dict[str, Tensor]
    nbytes: int
    sent: int


@dataclass(slots=True, eq=False)
class Gossip:
    """A gossip step under way: ``nbytes`` along each directed edge ``src[e] -> dst[e]``, there at ``due[e]``."""

    vectors: Tensor
    mixing_matrix: Tensor
    tag: Any
    src: NDArray[np.int64]
    dst: NDArray[np.int64]
    due: NDArray[np.int64]
    nbytes: int
    sent: int


class Links:
    """What travels between nodes, and its log."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.log = Log(LINK_COLUMNS)
        self._bytes_done = 0
        self._letters: dict[Letter, None] = {}
        self._gossip: dict[Gossip, None] = {}
        """What is under way, in the order it was sent."""

    # ---- single messages -------------------------------------------------------------------------

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
        letter = Letter(src, dst, tag, payload, message_bytes(specs, sim.layout), sim.kernel.now)
        due = sim.kernel.now + max(1, self._travel(letter))
        self._letters[letter] = None
        sim.kernel.schedule(due, Phase.MESSAGE, ("message", letter), dst, src)

    def _travel(self, letter: Letter) -> int:
        network, src, dst = self.sim.system.network, np.array([letter.src]), np.array([letter.dst])
        if letter.src == SERVER:
            return int(network.down(dst, letter.nbytes)[0])
        if letter.dst == SERVER:
            return int(network.up(src, letter.nbytes)[0])
        return int(network.link(src, dst, letter.nbytes)[0])

    def _moved(self, letter: Letter) -> int:
        network, src, dst = self.sim.system.network, np.array([letter.src]), np.array([letter.dst])
        elapsed = np.array([self.sim.kernel.now - letter.sent])
        if not elapsed[0]:  # without a network too, a message takes a nanosecond
            return 0
        if letter.src == SERVER:
            return int(network.moved_down(dst, letter.nbytes, elapsed)[0])
        if letter.dst == SERVER:
            return int(network.moved_up(src, letter.nbytes, elapsed)[0])
        return int(network.moved_link(src, dst, letter.nbytes, elapsed)[0])

    def deliver(self, letter: Letter) -> None:
        """Hand a message over, unless its receiver is offline."""
        sim = self.sim
        there = letter.dst == SERVER or bool(sim.system.availability.online[letter.dst])
        self._end(letter, sim.now if there else None)
        if there:
            sim.strategy.on_message(sim, letter.src, letter.dst, letter.payload, letter.tag)

    def _end(self, letter: Letter, arrived: float | None) -> None:
        moved = self._moved(letter)
        self._bytes_done += moved
        self.log.append((letter.src, letter.dst, letter.sent / NS, arrived, moved, _text(letter.tag)))
        del self._letters[letter]

    # ---- gossip ----------------------------------------------------------------------------------

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
        nbytes, now = sim.layout.nbytes, sim.kernel.now
        due = now + np.maximum(1, sim.system.network.link(src, dst, nbytes))
        kept = vectors.detach().to(sim.layout.dtype, copy=True)
        gossip = Gossip(kept, weights, tag, src, dst, due, nbytes, now)
        self._gossip[gossip] = None
        sim.kernel.schedule(int(due.max(initial=now + 1)), Phase.MESSAGE, ("exchange", gossip))

    def deliver_exchange(self, gossip: Gossip) -> None:
        """Mix and hand over."""
        self._end_exchange(gossip)
        self.sim.strategy.on_exchange(self.sim, gossip.mixing_matrix @ gossip.vectors, gossip.tag)

    def _end_exchange(self, gossip: Gossip) -> None:
        now, moved, sent, tag = self.sim.kernel.now, self._moved_exchange(gossip), gossip.sent / NS, _text(gossip.tag)
        self._bytes_done += int(moved.sum())
        edges = zip(gossip.src.tolist(), gossip.dst.tolist(), gossip.due.tolist(), moved.tolist(), strict=True)
        for src, dst, due, nbytes in edges:
            self.log.append((src, dst, sent, due / NS if due <= now else None, nbytes, tag))
        del self._gossip[gossip]

    def _moved_exchange(self, gossip: Gossip) -> NDArray[np.int64]:
        elapsed = np.full(len(gossip.src), self.sim.kernel.now - gossip.sent)
        moved = self.sim.system.network.moved_link(gossip.src, gossip.dst, gossip.nbytes, elapsed)
        return np.where(elapsed > 0, moved, 0)  # without a network too, a step takes a nanosecond

    # ---- the ledger ------------------------------------------------------------------------------

    def bytes_moved(self) -> int:
        """Bytes that have travelled between nodes so far, parts of what is under way included."""
        letters = sum(self._moved(letter) for letter in self._letters)
        return self._bytes_done + letters + sum(int(self._moved_exchange(each).sum()) for each in self._gossip)

    def close(self) -> None:
        """The run is over: what is under way never arrives."""
        for letter in list(self._letters):
            self._end(letter, None)
        for gossip in list(self._gossip):
            self._end_exchange(gossip)

    # ---- stop and resume -------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs; shared with the run, not copied."""
        under_way = {"letters": list(self._letters), "gossip": list(self._gossip)}
        return {"bytes_done": self._bytes_done, "rows": len(self.log), **under_way}

    def restore(self, snapshot: dict[str, Any], rows: list[pa.Table]) -> None:
        """Become what :meth:`snapshot` saw; ``rows`` are the log's, which were on disk."""
        self._bytes_done = snapshot["bytes_done"]
        self._letters = dict.fromkeys(snapshot["letters"])
        self._gossip = dict.fromkeys(snapshot["gossip"])
        self.log.load(rows)


def _among_online(mixing_matrix: Tensor, online: NDArray[np.bool_]) -> Tensor:
    """Move the weight of edges that touch an offline node to the diagonal: rows still sum to what they did.

    So do columns if the matrix is symmetric, and then the mean is kept.
    """
    here = torch.from_numpy(online.copy())
    usable = here[:, None] & here[None, :] | torch.eye(len(here), dtype=torch.bool)
    kept = torch.where(usable, mixing_matrix, 0)
    kept.diagonal().add_((mixing_matrix - kept).sum(dim=1))
    return kept


def _text(tag: Any) -> str:
    return "" if tag is None else str(tag)

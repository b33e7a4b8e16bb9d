"""DFedSAM-MGS: DFedSAM with several gossip steps per round (Shi et al. 2023, arXiv 2302.04083).

Objective   min_x 1/N sum_i max_{||s|| <= rho} F_i(x + s), every node i with a model x_i of its own
Node i      y_0 = x_i^t;  s = rho g_i(y_k) / ||g_i(y_k)||;  y_{k+1} = y_k - eta g_i(y_k + s), K local steps, both
            gradients over one batch, the norm over all parameters;  then z_i^(0) = y_K and Q gossip steps, one after
            the other:  z_i^(q+1) = sum_{l in N(i) u {i}} w_il z_l^(q);  x_i^{t+1} = z_i^(Q)
State       d on every node (its model)
Traffic     Q d along every directed edge per round, in Q steps that each take a link's time; nothing to or from a
            server. A local step costs two gradients.
Defaults    rho = 0.01 and Q = 4, a ring with Metropolis weights. With Q = 1 it is DFedSAM.
Departures  no code of the authors is known. The Q steps of a round use one mixing matrix, so that together they are
            W^Q, also where the graph is drawn anew in every round; a node that goes offline between two of them is
            left out of the rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedsim import SAM, Federation, LocalSGD, Peers, Topology, whole


class DFedSAMMGS(Peers):
    """DFedSAM that mixes Q times per round."""

    def __init__(
        self, local: LocalSGD | None = None, topology: Topology | None = None, rho: float = 0.01, gossip: int = 4
    ) -> None:
        super().__init__(SAM.of(local, rho), topology)
        self.gossip = whole("gossip", gossip, least=1, most=10**6)
        self.done = 0

    def on_exchange(self, fed: Federation, vectors: Tensor, tag: Any) -> None:
        """z^(q+1) = W z^(q), until q + 1 = Q."""
        self.done += 1
        if self.done < self.gossip:
            again = fed.rng("topology", self.gossip_steps - 1)  # W as the round's first step drew it
            fed.exchange(vectors, self.topology.mixing_matrix(fed.clients, again))
        else:
            self.done = 0
            super().on_exchange(fed, vectors, tag)

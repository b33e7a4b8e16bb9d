"""DFedSAM: decentralised federated averaging along sharpness-aware steps (Shi et al. 2023, arXiv 2302.04083).

Objective   min_x 1/N sum_i max_{||s|| <= rho} F_i(x + s), every node i with a model x_i of its own
Node i      y_0 = x_i^t;  s = rho g_i(y_k) / ||g_i(y_k)||;  y_{k+1} = y_k - eta g_i(y_k + s), K local steps, both
            gradients over one batch, the norm over all parameters;  then one gossip step:
            x_i^{t+1} = sum_{l in N(i) u {i}} w_il y_l,K
State       d on every node (its model)
Traffic     1 d along every directed edge per round; nothing to or from a server. A local step costs two gradients.
Defaults    rho = 0.01, a ring with Metropolis weights. With rho = 0 it is DFedAvg.
Departures  no code of the authors is known. A ported implementation mixes before it trains, which gives the same
            iterates half a round apart, with weights whose columns do not sum to 1, which moves the mean.
"""

from __future__ import annotations

from fedsim import SAM, LocalSGD, Peers, Topology


class DFedSAM(Peers):
    """DFedAvg whose nodes take sharpness-aware steps."""

    def __init__(self, local: LocalSGD | None = None, topology: Topology | None = None, rho: float = 0.01) -> None:
        super().__init__(SAM.of(local, rho), topology)

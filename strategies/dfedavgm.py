"""DFedAvgM: DFedAvg with heavy-ball momentum in the local steps (Sun, Li, Wang 2021, arXiv 2104.11375).

Objective   min_x 1/N sum_i F_i(x), every node i with a model x_i of its own
Node i      y_0 = y_{-1} = x_i^t;  y_{k+1} = y_k - eta g_i(y_k) + theta (y_k - y_{k-1}), K local steps;  then
            x_i^{t+1} = sum_{l in N(i) u {i}} w_il y_l,K. The momentum begins anew in every round and does not travel.
State       d on every node (its model)
Traffic     1 d along every directed edge per round; nothing to or from a server
Defaults    theta = 0.9, a ring with Metropolis weights
Departures  the paper's quantised variant is not here.
"""

from __future__ import annotations

from fedsim import ConfigError, LocalSGD, Peers, Topology, number


class DFedAvgM(Peers):
    """DFedAvg whose nodes take momentum steps."""

    def __init__(self, local: LocalSGD | None = None, topology: Topology | None = None, momentum: float = 0.9) -> None:
        local = local if local is not None else LocalSGD()
        momentum = number("momentum", momentum, least=0, below=1)
        if local.momentum not in (0.0, momentum):
            raise ConfigError(
                f"momentum={momentum}: local.momentum={local.momentum} sets the same; give strategy.momentum alone"
            )
        super().__init__(local.replace(momentum=momentum), topology)

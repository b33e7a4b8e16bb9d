"""DFedAvg: decentralised federated averaging (Sun, Li, Wang 2021, arXiv 2104.11375).

Objective   min_x 1/N sum_i F_i(x), every node i with a model x_i of its own
Node i      y_0 = x_i^t; y_{k+1} = y_k - eta g_i(y_k), K local steps;  then one gossip step:
            x_i^{t+1} = sum_{l in N(i) u {i}} w_il y_l,K
State       d on every node (its model)
Traffic     1 d along every directed edge per round; nothing to or from a server
Defaults    a ring with Metropolis weights
Departures  none. A node that is offline keeps its model, and the weight of its edges goes to their other ends.
"""

from __future__ import annotations

from fedsim import Peers


class DFedAvg(Peers):
    """Train, then mix: what :class:`fedsim.Peers` does of itself. Takes its settings."""

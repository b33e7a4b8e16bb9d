"""D-PSGD: decentralised parallel SGD (Lian et al. 2017, arXiv 1705.09056).

Objective   min_x 1/N sum_i F_i(x), every node i with a model x_i of its own
Node i      x_i^{t+1} = sum_l w_il x_l^t - eta g_i(x_i^t): one stochastic gradient at its own model, while the models
            x^t travel to its neighbours
State       d on every node (its model)
Traffic     1 d along every directed edge per round; nothing to or from a server
Defaults    a ring, as in the paper's experiments, with Metropolis weights
Departures  none. A node that is offline or whose gradient is lost mixes without a step; a round lasts as long as the
            slowest node's gradient or the slowest link, whichever is longer. Of the local rule the rate, the batch
            size, clipping and weight decay count; epochs do not, and momentum, fresh in every task, has no effect.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedsim import ConfigError, Federation, LocalSGD, Peers, Topology


class DPSGD(Peers):
    """Gradient and gossip side by side, one of each per round."""

    def __init__(self, local: LocalSGD | None = None, topology: Topology | None = None) -> None:
        local = local if local is not None else LocalSGD()
        if local.steps not in (None, 1):
            raise ConfigError(f"local.steps={local.steps}: D-PSGD makes one local step per round; leave it out")
        super().__init__(local.replace(steps=1), topology)
        self.mixed: Tensor | None = None

    def settle(self, fed: Federation) -> None:
        """Begin a round when somebody is there; end it when all gradients and all neighbours' models have come."""
        if fed.in_flight or self.mixing:
            return
        if self.mixed is not None:
            models, self.mixed = self.mixed, None
            for reply in self.replies:  # - eta g_i(x_i^t), the step that the node took on its own model
                models[reply.client] += reply["model"] - self.models[reply.client]
            self.complete(fed, models)
        self.train(fed)
        if fed.in_flight:
            self.mix(fed, self.models)

    def on_exchange(self, fed: Federation, vectors: Tensor, tag: Any) -> None:
        """W x^t; the gradients are added when they are all there."""
        self.mixed, self.mixing = vectors, False

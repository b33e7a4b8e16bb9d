"""FedProx: a proximal term keeps clients near the server's model (Li et al. 2020, arXiv 1812.06127).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    SGD on F_i(x) + mu / 2 ||x - x^t||^2:  x_{k+1} = x_k - eta_l (g_i(x_k) + mu (x_k - x^t));
            a straggler runs a random number of steps between 1 and all of them, and its result is used
Server      x^{t+1} = x^t + eta_g sum_{i in S} w_i (x_i - x^t)
State       none on clients, d on the server
Traffic     1 d down, 1 d up per client and round
Defaults    mu = 0.01; there is no universal one (the paper tunes it in 0.001 to 1 per data set). eta_g = 1, sample
            weights, no stragglers.
Departures  in the authors' code a straggler runs whole epochs, here steps; who straggles is drawn anew every round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim import ConfigError, Federation, LocalSGD, PlainStep, Reply, Synchronous, mean_update, number, one_of


class FedProx(Synchronous):
    """FedAvg with a proximal term, and with partial work."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        mu: float = 0.01,
        partial: float = 0.0,
        weighting: str = "samples",
        server_lr: float = 1.0,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        local = local if local is not None else LocalSGD()
        if local.prox not in (0.0, mu):
            raise ConfigError(f"mu={mu}: local.prox={local.prox} sets the same penalty; give strategy.mu alone")
        local = local.replace(prox=number("mu", mu, least=0))
        super().__init__(local, over_selection, deadline, selection, stragglers, server)
        self.partial = number("partial", partial, least=0, most=1)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)

    def local_steps(self, fed: Federation, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """U{1, ..., all} for stragglers."""
        steps = self.jobs["train"].local_steps(clients, fed.samples[clients])
        late, share = fed.rng("partial work", self.round.number, clients).uniform(2).T
        return np.where(late < self.partial, np.ceil(share * steps), steps).astype(np.int64)

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """x^t + eta_g * sum_i w_i (x_i - x^t)."""
        return fed.model + self.server(self.server_lr * mean_update(replies, self.weighting))

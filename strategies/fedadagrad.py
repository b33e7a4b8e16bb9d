"""FedAdagrad: Adagrad on the server, the mean update for a gradient (Reddi et al. 2021, arXiv 2003.00295).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    local SGD from x^t; Delta_i = x_K - x^t
Server      Delta = sum_{i in S} w_i Delta_i;  m <- beta1 m + (1 - beta1) Delta;
            v <- v + Delta^2;
            x^{t+1} = x^t + eta m / (sqrt(v) + tau), item by item; m = 0 and v = tau^2 at first, no bias correction
State       none on clients, 3 d on the server (x, m, v)
Traffic     1 d down, 1 d up per client and round
Defaults    beta1 = 0, tau = 1e-3 (the paper's recommendation). The paper tunes eta together with the local rate for
            every data set; with 0.03 the embedded images are learnt steadily at the default local rate. Items whose
            updates are far below tau move like tau^-1 eta Delta.
Departures  none; tau stands outside the root, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsim import Federation, LocalSGD, Reply, Synchronous, mean_update, number, one_of


class FedAdagrad(Synchronous):
    """Adagrad on the server: the second moment only grows."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        weighting: str = "samples",
        server_lr: float = 0.03,
        beta1: float = 0.0,
        tau: float = 1e-3,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        super().__init__(local, over_selection, deadline, selection, stragglers)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)
        self.beta1 = number("beta1", beta1, least=0, below=1)
        self.tau = number("tau", tau, above=0)
        self.first: Tensor | float = 0.0
        self.second: Tensor | None = None

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """m, v and x as in the paper's algorithm 2."""
        delta = mean_update(replies, self.weighting)
        if self.second is None:
            self.second = delta.new_full(delta.shape, self.tau**2)
        self.first = self.beta1 * self.first + (1 - self.beta1) * delta
        self.second = self.second + delta**2
        return fed.model + self.server_lr * self.first / (self.second.sqrt() + self.tau)

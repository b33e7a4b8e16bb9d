"""Asynchronous FedAvg: every arrival is a server step, with unbiased weights (Fraboni et al. 2023, arXiv 2206.10189).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    local SGD from the model last sent to it, x_i; Delta_i = x_K - x_i; it gets the new model at once
Server      at every arrival:  x <- x + eta_g d_i Delta_i,  d_i = (sum_j 1 / tau_j) tau_i p_i, tau_i client i's expected
            time for a task: of all arrivals the share (1 / tau_i) / sum_j 1 / tau_j is its own, so
            E[weight of i] = p_i per step
State       none on clients, d on the server
Traffic     1 d down, 1 d up per update
Defaults    eta_g = 1 and sample weights
Departures  tau_i is what the devices are expected to need, as the paper's fixed times. No discount of stale updates: it
            would change the mean weights. The weights of slow clients are large (N tau_i / mean tau for equal p_i and
            speeds near each other): lower eta_g or the local rate when speeds differ much.
"""

from __future__ import annotations

from fedsim import (
    Federation,
    LocalSGD,
    PlainStep,
    Reply,
    Strategy,
    expected_seconds,
    idle_with_data,
    number,
    objective_weights,
    one_of,
)


class AsyncFedAvg(Strategy):
    """Every client is always at work; nobody waits for anybody."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        weighting: str = "samples",
        server_lr: float = 1.0,
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, server)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """d_i = (sum_j 1 / tau_j) tau_i p_i, over the clients that have data."""
        tau = expected_seconds(fed, self.jobs["train"])
        arrivals = (1 / tau[fed.samples > 0]).sum()
        self.d = (arrivals * tau * objective_weights(fed.samples, self.weighting)).tolist()

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """x <- x + eta_g d_i Delta_i."""
        step = self.server_lr * self.d[reply.client] * reply["delta"]
        fed.publish(fed.model + self.server(step), used=[reply])

    def settle(self, fed: Federation) -> None:
        """Whoever is idle gets the newest model."""
        fed.dispatch(idle_with_data(fed))

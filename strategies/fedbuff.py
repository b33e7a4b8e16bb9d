"""FedBuff: federated learning with buffered asynchronous aggregation (Nguyen et al. 2022, arXiv 2106.06639).

Objective   min_x sum_i p_i F_i(x), p_i the share of arrivals that client i makes
Client i    local SGD from x_tau; Delta_i = x_K - x_tau
Server      buffer the updates; at the K-th:  x <- x + eta_g / K * sum_i s(u_i) Delta_i;  version + 1; empty it
            s(u) = (1 + u)^-1/2, u = versions published since the client started
            unbiased (arXiv 2206.10189):  x <- x + eta_g sum_i d_i Delta_i,  d_i = p_i (sum_j 1 / tau_j) tau_i / K,
            with every client always at work, tau_i its expected time for a task and no s: E[weight of i] = p_i
State       none on clients, 2 d on the server (the sum; this file keeps the K replies, which is the same sum)
Traffic     1 d down, 1 d up per update
Defaults    eta_g = 1, equal weights, s polynomial with a = 1/2, K and concurrency the run's cohort
Departures  the paper's own code (FLSim) sums without 1 / K and absorbs it in the server rate, and scales s by its
            value at an average staleness; here is the rule of the paper. Updates older than ``max_staleness``
            are refused if that is set. A buffer that is not full when the run ends stays unused.
"""

from __future__ import annotations

from fedsim import (
    Asynchronous,
    ConfigError,
    Federation,
    LocalSGD,
    PlainStep,
    Reply,
    StalenessWeight,
    expected_seconds,
    idle_with_data,
    number,
    objective_weights,
    one_of,
    optional_whole,
    weighted_sum,
)


class FedBuff(Asynchronous):
    """Clients never wait for each other; the server steps once per ``buffer_size`` arrivals."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        buffer_size: int | None = None,
        weighting: str = "equal",
        server_lr: float = 1.0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
        max_staleness: int | None = None,
        concurrency: int | None = None,
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, concurrency, server)
        self.buffer_size = optional_whole("buffer_size", buffer_size, least=1)
        self.weighting = one_of("weighting", weighting, ("equal", "samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)
        self.staleness_weight = StalenessWeight(staleness, staleness_a, staleness_b)
        self.max_staleness = optional_whole("max_staleness", max_staleness)
        if weighting != "equal":
            _refuse_bias(weighting, staleness, max_staleness, concurrency)
        self.buffer: list[Reply] = []

    def start(self, fed: Federation) -> None:
        """K d_i: 1 each, or p_i (sum_j 1 / tau_j) tau_i over the clients that have data."""
        self.size = self.buffer_size or fed.cohort
        self.d = [1.0] * fed.clients
        if self.weighting != "equal":
            tau = expected_seconds(fed, self.jobs["train"])
            arrivals = (1 / tau[fed.samples > 0]).sum()
            self.d = (objective_weights(fed.samples, self.weighting) * arrivals * tau).tolist()

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """Buffer; at the K-th update x <- x + eta_g / K sum_i K d_i s(u_i) Delta_i."""
        if self.max_staleness is not None and fed.staleness(reply) > self.max_staleness:
            fed.reject(reply, "stale")
            return
        self.buffer.append(reply)
        if len(self.buffer) >= self.size:
            weights = [
                self.d[each.client] * self.staleness_weight(fed.staleness(each)) / self.size for each in self.buffer
            ]
            step = weighted_sum([each["delta"] for each in self.buffer], weights)
            fed.publish(fed.model + self.server(self.server_lr * step), used=self.buffer)
            self.buffer = []

    def settle(self, fed: Federation) -> None:
        """Keep ``concurrency`` clients at work; everybody if the weights are to be unbiased."""
        if self.weighting == "equal":
            super().settle(fed)
        else:
            fed.dispatch(idle_with_data(fed))


def _refuse_bias(weighting: str, staleness: str, max_staleness: int | None, concurrency: int | None) -> None:
    """Weights that are unbiased by d_i alone stay so only if nothing else weighs, refuses or chooses."""
    for key, value, needed in (
        ("staleness", staleness, "constant"),
        ("max_staleness", max_staleness, None),
        ("concurrency", concurrency, None),
    ):
        if value != needed:
            raise ConfigError(
                f"weighting={weighting}: unbiased weights need {key}={needed or 'null'}, got {key}={value}"
            )

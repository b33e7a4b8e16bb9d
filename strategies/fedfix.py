"""FedFix: the server steps at fixed times with whatever has come (Fraboni et al. 2023, arXiv 2206.10189).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    local SGD from the model last sent to it, x_i; Delta_i = x_K - x_i; then it waits for the next step
Server      at t = Dt, 2 Dt, ...:  x <- x + eta_g sum_{i in A} d_i Delta_i, A those that came since the last step;
            they get the new x, the others work on.  d_i = ceil(tau_i / Dt) p_i, tau_i client i's expected time for a
            task: one that needs k steps of the server comes in every k-th, so E[weight of i] = p_i per step
State       none on clients, d on the server
Traffic     1 d down, 1 d up per update
Defaults    eta_g = 1 and sample weights; Dt half the slowest client's time (the paper tries 0.2, 0.5 and 0.8 of it)
Departures  tau_i is what the devices are expected to need, as the paper's fixed times; with per-task jitter or absent
            clients the weights are unbiased only as far as that holds. The authors' ``P_surr`` for FedFix, which is for
            reports only, is the inverse of the bias; it is not used here.
"""

from __future__ import annotations

from fedsim import (
    Federation,
    LocalSGD,
    PlainStep,
    Reply,
    Strategy,
    Task,
    Timer,
    expected_seconds,
    idle_with_data,
    number,
    objective_weights,
    one_of,
    optional_seconds,
    weighted_sum,
    whole_periods,
)


class FedFix(Strategy):
    """Every client is always at work or waits for the next step; the server steps every ``period`` seconds."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        period: float | None = None,
        weighting: str = "samples",
        server_lr: float = 1.0,
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, server)
        self.period = optional_seconds("period", period, least=1e-9)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)
        self.arrived: list[Reply] = []
        self.due = False

    def start(self, fed: Federation) -> None:
        """d_i = ceil(tau_i / Dt) p_i, in whole nanoseconds."""
        tau = expected_seconds(fed, self.jobs["train"])
        slowest = float(tau[fed.samples > 0].max(initial=0.0))
        self.Dt = max(round(self.period or slowest / 2, 9), 1e-9)
        self.d = (whole_periods(tau, self.Dt) * objective_weights(fed.samples, self.weighting)).tolist()

    def on_online(self, fed: Federation, client: int) -> None:
        """It gets a model at the next step."""
        self._await_step(fed)

    def on_lost(self, fed: Federation, task: Task, why: str) -> None:
        """Its client gets a new model at the next step."""
        self._await_step(fed)

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """The client waits for the next step."""
        self.arrived.append(reply)
        self._await_step(fed)

    def on_timer(self, fed: Federation, timer: Timer) -> None:
        """x <- x + eta_g sum_{i in A} d_i Delta_i; who is idle gets the new model."""
        self.due = False
        if self.arrived:
            step = weighted_sum(
                [each["delta"] for each in self.arrived], [self.d[each.client] for each in self.arrived]
            )
            fed.publish(fed.model + self.server(self.server_lr * step), used=self.arrived)
            self.arrived = []
        fed.dispatch(idle_with_data(fed))

    def _await_step(self, fed: Federation) -> None:
        """Of the steps at 0, Dt, 2 Dt, ... only those count at which somebody waits: the next one, perhaps now."""
        if not self.due:
            self.due = True
            fed.timer(max(int(whole_periods(fed.now, self.Dt)) * self.Dt, fed.now))

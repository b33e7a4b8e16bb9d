"""FedADMM: federated ADMM with sampled clients and inexact local solves (Gong, Li, Freris 2022, arXiv 2204.03529).

Objective   min 1/m sum_i f_i(w_i)  subject to  w_i = theta, over all m clients alike
Client i    K steps on f_i(w) + y_i^T w + rho / 2 ||w - theta||^2:  w <- w - eta_l (g_i(w) + y_i + rho (w - theta)),
            from theta (``warm_start``: from its last w_i);  y_i^+ = y_i + rho (w_i^+ - theta);
            Delta_i = (w_i^+ + y_i^+ / rho) - (w_i + y_i / rho)
Server      theta <- theta + eta / |S| sum_{i in S} Delta_i;  with eta = |S| / m it is always
            theta = 1/m sum_i (w_i + y_i / rho), the z-step of ADMM (that of Wang, Marella, Anderson 2022,
            arXiv 2203.15104); w_i = theta^0 and y_i = 0 at first
Wire        with ``grid`` = D only multiples of D travel, as whole numbers of ``bits``: Q(w_i^+) takes the place of
            w_i^+ and Q(theta) of theta on the clients, so that duals follow from what both ends know and none is sent
            (the exchange of SLIM-KL, arXiv 2309.08201; Q rounds at random, without bias). The error is then O(D).
State       2 d on a client (w_i, y_i), 2 d on the server (theta, theta^0)
Traffic     1 d down, 1 d up per client and round; with ``grid`` d numbers of ``bits`` each
Defaults    rho = 0.01 as in the authors' code. eta = |S| / m (``server_lr`` null), with which it converges under
            sampling; eta = 1 is the paper's accelerated choice, which can diverge from a cold start.
Departures  who takes part for the first time need not know theta^0: it sends w_i^+ + y_i^+ / rho, and the server, which
            does, subtracts it; its warm start is theta, as is that of a client without data. The authors' code computes
            something else: see ``fedadmm_released``, and ``random_epochs`` for its clients' E_i ~ U{1, ..., 10} passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import (
    ConfigError,
    Context,
    Federation,
    Layout,
    LocalSGD,
    Quantiser,
    Reply,
    SimulationError,
    Synchronous,
    Task,
    TensorSpec,
    flag,
    mean,
    number,
    optional_number,
    optional_whole,
    whole,
)


@dataclass
class DualSGD(LocalSGD):
    """The client as released: steps along ``g + y + rho (w - theta)`` from ``theta``; ``rho`` is ``prox``."""

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        """``y = 0``, ``[d]``."""
        return {"dual": layout.zeros()}

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """``g + y``; the proximal term is added to it."""
        return super().direction(ctx, x, batch) + ctx.state["dual"]

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        """``y^+``, and ``(w^+ - theta) + (y^+ - y) / rho``, which is twice the first of them."""
        step = x - ctx.start
        ctx.state["dual"] = ctx.state["dual"] + self.prox * step
        return {"delta": 2 * step}


@dataclass
class AugmentedSGD(DualSGD):
    """The client of the paper: it remembers its model and sends how ``w + y / rho`` has changed."""

    warm_start: bool = False
    quantiser: Quantiser | None = None

    def payload_spec(self, layout: Layout) -> dict[str, TensorSpec]:
        """``Delta``, or the codes of it."""
        return super().payload_spec(layout) if self.quantiser is None else {"delta": self.quantiser.spec(layout)}

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        """``y = 0``; ``w`` is not known before the first task, and 0 stands for ``w + y / rho``."""
        return {**super().initial_state(layout), "model": layout.zeros(), "joined": torch.zeros(1, dtype=layout.dtype)}

    def origin(self, ctx: Context) -> Tensor:
        """``theta``, or if it is to be and there is one the client's last ``w``."""
        if self.quantiser is not None:
            ctx.start = self.quantiser.values(ctx.message["theta"], ctx.start.dtype)
        x = ctx.point()
        if self.warm_start:
            # Who makes no step, for want of data, must not hold on to an old w: its dual would sum up the distance.
            steps = torch.from_numpy(ctx.steps).to(x.device).unsqueeze(1) > 0
            x.copy_(torch.where(steps & (ctx.state["joined"] > 0), ctx.state["model"], x))
        return x

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        """``w^+``, ``y^+`` and ``Delta``; where only multiples travel, ``w^+`` is rounded first and y follows from it.

        ``theta``, ``w`` and with them ``y / rho`` are on the grid then, and so is ``Delta``.
        """
        if self.quantiser is not None:
            codes = self.quantiser.codes(x, ctx.rng("quantisation").uniform(x.shape[-1]))
            x = self.quantiser.values(codes, x.dtype)
        before = ctx.state["model"] + ctx.state["dual"] / self.prox
        ctx.state["dual"] = ctx.state["dual"] + self.prox * (x - ctx.start)
        ctx.state["model"] = x
        ctx.state["joined"] = torch.ones_like(ctx.state["joined"])
        delta = x + ctx.state["dual"] / self.prox - before
        return {"delta": delta if self.quantiser is None else self.quantiser.nearest(delta)}


Rule = TypeVar("Rule", bound=DualSGD)


def _client(kind: type[Rule], local: LocalSGD | None, rho: float, **settings: Any) -> Rule:
    """``local`` as a client of ADMM."""
    rho = number("rho", rho, above=0)
    if local is not None and local.prox not in (0.0, rho):
        raise ConfigError(f"rho={rho}: local.prox={local.prox} sets the same penalty; give strategy.rho alone")
    return kind.around(local, prox=rho, **settings)


class _Passes(Synchronous):
    """Rounds whose clients may make a random number of passes. Takes the settings of :class:`fedsim.Round`, too."""

    def __init__(self, local: LocalSGD, random_epochs: int | None, *rounds: Any) -> None:
        super().__init__(local, *rounds)
        self.random_epochs = optional_whole("random_epochs", random_epochs, least=1, most=10**6)

    def local_steps(self, fed: Federation, clients: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """E_i ~ U{1, ..., random_epochs} passes over the client's data."""
        if self.random_epochs is None:
            return None
        epochs = 1 + fed.rng("epochs", self.round.number, clients).integers(self.random_epochs)
        return epochs * self.jobs["train"].batches_per_epoch(fed.samples[clients])


class FedADMM(_Passes):
    """ADMM whose server keeps the mean of all clients' ``w_i + y_i / rho`` by their changes."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        rho: float = 0.01,
        server_lr: float | None = None,
        warm_start: bool = False,
        random_epochs: int | None = None,
        grid: float | None = None,
        bits: int = 16,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        grid = optional_number("grid", grid, above=0)
        self.quantiser = None if grid is None else Quantiser(grid, bits)
        warm_start = flag("warm_start", warm_start)
        client = _client(AugmentedSGD, local, rho, warm_start=warm_start, quantiser=self.quantiser)
        super().__init__(client, random_epochs, over_selection, deadline, selection, stragglers)
        self.server_lr = optional_number("server_lr", server_lr, above=0)

    def check_federation(self, fed: Federation) -> None:
        """Refuse a grid that does not reach the initial model."""
        if self.quantiser is not None:
            try:
                self.quantiser.nearest(fed.model)
            except ValueError as error:
                raise ConfigError(f"strategy.grid={self.quantiser.step:g}: too fine for the model, {error}") from None

    def start(self, fed: Federation) -> None:
        """w_i = theta^0 for everybody."""
        self.initial = self.theta = fed.model
        self.joined = np.zeros(fed.clients, dtype=np.bool_)
        self._send(fed, self.theta)

    def settle(self, fed: Federation) -> None:
        """Begin the next round when this one is over, with what of theta can travel."""
        if self.round.over:
            replies = self.round.close(fed)
            if replies:
                fed.publish(self.aggregate(fed, replies), used=replies)
            self.round.open(fed, self.local_steps, self.sent, held=self.codes is not None)

    def message(self, fed: Federation, task: Task) -> Mapping[str, Tensor]:
        """Q(theta)."""
        return {} if self.codes is None else {"theta": self.codes}

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """theta + eta / |S| sum_{i in S} Delta_i; the clients get to see Q of it."""
        eta = self.server_lr if self.server_lr is not None else len(replies) / fed.clients
        changes = [self._change(each) for each in replies]
        self.joined[[each.client for each in replies]] = True
        self.theta = self.theta + eta * mean(changes)
        return self._send(fed, self.theta)

    def _change(self, reply: Reply) -> Tensor:
        delta = reply["delta"]
        if self.quantiser is not None:
            delta = self.quantiser.values(delta, self.theta.dtype)
        return delta if self.joined[reply.client] else delta - self.initial

    def _send(self, fed: Federation, theta: Tensor) -> Tensor:
        """What of ``theta`` is to travel down, ``self.codes``, and what it stands for."""
        self.codes: Tensor | None = None
        self.sent = theta
        if self.quantiser is not None:
            uniform = fed.rng("quantisation", self.round.number).uniform(len(theta))
            try:
                self.codes = self.quantiser.codes(theta, uniform)
            except ValueError as error:
                raise SimulationError(f"FedADMM cannot send its model: {error}; a coarser grid or more bits") from None
            self.sent = self.quantiser.values(self.codes, theta.dtype)
        return self.sent


class FedADMMReleased(_Passes):
    """FedADMM as its authors' code computes it (github.com/YonghaiGong/FedADMM).

    Client i    starts from theta and takes theta for its previous model, so that Delta_i = 2 (w_i^+ - theta)
    Server      theta <- theta + eta / |S| sum_{i in S} Delta_i;  eta = 1, and 0.5 from round 60 on
    State       1 d on a client (y_i), 1 d on the server
    Traffic     1 d down, 1 d up per client and round
    Departures  the authors' momentum of 0.5 is ``local.momentum=0.5``, their passes ``random_epochs=10``. Under
                sampling it does not converge to the optimum: it is here for comparison.
    """

    def __init__(
        self,
        local: LocalSGD | None = None,
        rho: float = 0.01,
        server_lr: float = 1.0,
        later_server_lr: float = 0.5,
        later: int = 60,
        random_epochs: int | None = None,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        client = _client(DualSGD, local, rho)
        super().__init__(client, random_epochs, over_selection, deadline, selection, stragglers)
        self.server_lr = number("server_lr", server_lr, above=0)
        self.later_server_lr = number("later_server_lr", later_server_lr, above=0)
        self.later = whole("later", later)

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """theta + eta / |S| sum_{i in S} Delta_i."""
        eta = self.server_lr if fed.version < self.later else self.later_server_lr
        return fed.model + eta * mean([each["delta"] for each in replies])

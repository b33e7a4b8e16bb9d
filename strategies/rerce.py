"""RERCE-Fed: consensus ADMM without duals for noisy links and sampled clients (Lari et al. 2024, arXiv 2409.13451).

Objective   min_x sum_k f_k(x), all clients alike. The paper's f_k are least squares with the gradient A_k x - b_k
Client k    x_k^1 = argmin f_k(x) + rho / 2 ||x - z^0||^2, without a message;  when it is asked, with s received:
            x_k^+ = argmin f_k(x) - <grad f_k(x_k), x> + rho / 2 ||x - s||^2
                  = (I - rho B_k) x_k + rho B_k s  for least squares, B_k = (A_k + rho I)^-1
Server      s^n = 2 z^n - z^{n-1} goes to the cohort S_n, whose members send their new x_k;  z^{n+1} = mean of these
Links       what arrives is v + sigma N(0, I) both ways (``uplink_noise``, ``downlink_noise``); the client keeps its own
            x_k without it
State       2 d on a client (x_k, v_k; with ``solver=exact`` x_k, and B_k, d x d), 2 d on the server (z^n, z^{n-1})
Traffic     1 d down, 1 d up per member of the cohort and step; at the first step nothing goes down, z^0 is common
Defaults    rho = 1, no noise (the authors simulate sigma^2 = 0.01 or 6.25e-4). ``solver=exact`` is the paper's, for
            problems whose gradient is linear; it counts as one local step. ``solver=steps``, the default, suits any
            problem: K steps of the local rule along g(x) + v_k + rho (x - s) from x_k, v_k <- v_k + rho (x_k^+ - s)
Departures  the authors' code forgets to keep z^1, so that its third s is 2 z^2 - z^0, which breaks exactness. For f_k
            that are not quadratic the paper has no rule. v_k, 0 at first, is -grad f_k(x_k) where the steps reach the
            minimiser; kept instead of it, what inexact steps leave over is made good later (sum_k v_k = rho K
            (z^n - z^{n-1}) with everybody in S_n). Noise adds a random walk along the consensus: fix the horizon; where
            few are asked z, the mean of few x_k, has a floor. A client that comes later computes its x_k^1 first; one
            without data takes no part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim import (
    ConfigError,
    Context,
    Federation,
    Layout,
    LocalSGD,
    Reply,
    Strategy,
    Task,
    idle_with_data,
    mean,
    number,
    one_of,
    whole,
)

LARGEST = 4096
"""Most parameters for which a client can hold a matrix."""


@dataclass
class ProximalStep(LocalSGD):
    """The client: from ``x`` to the minimiser of ``f(x') + <v, x'> + rho / 2 ||x' - s||^2``.

    ``s`` is ``ctx.start``, and ``rho`` is ``prox``. Who has not ``joined`` has no ``x`` yet, and ``v = 0``.
    """

    solver: str = "steps"
    uplink_noise: float = 0.0
    downlink_noise: float = 0.0

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        """``x [d]``, whether there is one, and ``v [d]`` or, for the exact solver, ``B [d, d]``."""
        state = {"x": layout.zeros(), "joined": torch.zeros(1, dtype=layout.dtype)}
        if self.solver == "exact":
            return {**state, "inverse": torch.zeros(layout.size, layout.size, dtype=layout.dtype)}
        return {**state, "v": layout.zeros()}

    def run(self, ctx: Context) -> dict[str, Tensor]:
        """The step, by either solver."""
        if self.solver == "steps":
            return super().run(ctx)
        self.origin(ctx)
        return self.finish(ctx, self._minimiser(ctx))

    def origin(self, ctx: Context) -> Tensor:
        """``x``; for a newcomer ``s``, which it has without noise."""
        joined = ctx.state["joined"]
        if self.downlink_noise:
            ctx.start = ctx.start + joined * self.downlink_noise * _normal(ctx, "downlink noise")
        x = ctx.point()
        return x.copy_(torch.where(joined > 0, ctx.state["x"], x))

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """``g + v``; the proximal term is added to it."""
        return super().direction(ctx, x, batch) + ctx.state["v"]

    def _minimiser(self, ctx: Context) -> Tensor:
        """``(I - rho B) x + rho B s``; a newcomer's ``B (b + rho s)``, with ``A`` and ``b`` from gradients."""
        x, s, joined, rho = ctx.state["x"], ctx.start, ctx.state["joined"], self.prox
        pull = rho * (s - x)
        if not bool(joined.all()):
            minus_b = ctx.grad(torch.zeros_like(s))
            units = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
            columns = [ctx.grad(unit.expand_as(s)) - minus_b for unit in units]
            inverse = torch.linalg.inv(torch.stack(columns, dim=-1) + rho * units)
            ctx.state["inverse"] = torch.where(joined.unsqueeze(2) > 0, ctx.state["inverse"], inverse)
            pull = torch.where(joined > 0, pull, rho * s - minus_b)
        found = joined * x + (ctx.state["inverse"] * pull.unsqueeze(1)).sum(dim=-1)
        if not bool(joined.all()):
            left = ctx.grad(found) + rho * (found - s)
            if bool(((joined == 0) & (left.abs() > 1e-3 * (1 + pull.norm(dim=-1, keepdim=True)))).any()):
                raise ValueError("solver=exact needs a problem whose gradient is linear; take solver=steps")
        return found

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        """``x^+`` and ``v^+ = v + rho (x^+ - s)``, and what the server receives of it."""
        if self.solver == "steps":
            ctx.state["v"] = ctx.state["v"] + self.prox * (x - ctx.start)
        sent = self.upload(ctx, x)
        if self.uplink_noise:
            sent = sent + self.uplink_noise * _normal(ctx, "uplink noise")
        ctx.state["x"], ctx.state["joined"] = x, torch.ones_like(ctx.state["joined"])
        return {"model": sent}

    def upload(self, ctx: Context, x: Tensor) -> Tensor:
        """What a client sends of its new ``x``."""
        return x


@dataclass
class ContinualStep(ProximalStep):
    """The client that goes on by itself: it keeps what it received last, and sends ``2 x^+ - x``."""

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        """As before, and ``r [d]``, what it received last."""
        return {**super().initial_state(layout), "received": layout.zeros()}

    def origin(self, ctx: Context) -> Tensor:
        """``r <- s``, and ``x``."""
        x = super().origin(ctx)
        ctx.state["received"] = ctx.start
        return x

    def upload(self, ctx: Context, x: Tensor) -> Tensor:
        """``2 x^+ - x``; a newcomer's ``x`` is ``z^0``, which it has as ``s``."""
        return 2 * x - torch.where(ctx.state["joined"] > 0, ctx.state["x"], ctx.start)


@dataclass
class UnselectedStep(ContinualStep):
    """A step towards what was received last, of which nobody hears."""

    def origin(self, ctx: Context) -> Tensor:
        """``s = r``."""
        ctx.start = ctx.state["received"]
        return ctx.point().copy_(ctx.state["x"])


Rule = TypeVar("Rule", bound=ProximalStep)


def _normal(ctx: Context, purpose: str) -> Tensor:
    """Standard normal numbers ``[n, d]``, keyed by the task."""
    return torch.from_numpy(ctx.rng(purpose).normal(ctx.start.shape[-1])).to(ctx.start)


class _Iterations(Strategy):
    """Steps that wait for all who take part in them.

    Attributes:
        begun: ``[clients]``, who has its first ``x``.
        waiting: the tasks of the step that are not over.
        replies: what has come of it.
    """

    def __init__(
        self, kind: type[Rule], local: LocalSGD | None, rho: float, solver: str, uplink: float, downlink: float
    ) -> None:
        rho, solver = number("rho", rho, above=0), one_of("solver", solver, ("steps", "exact"))
        if local is not None and local.prox not in (0.0, rho):
            raise ConfigError(f"rho={rho}: local.prox={local.prox} sets the same penalty; give strategy.rho alone")
        noise = {
            "uplink_noise": number("uplink_noise", uplink, least=0),
            "downlink_noise": number("downlink_noise", downlink, least=0),
        }
        client = kind.around(local, prox=rho, solver=solver, **noise).replace(sends="model")
        if solver == "exact":
            if client.gradient is not None:
                raise ConfigError("solver=exact: makes no local steps of its own kind; take local=sgd")
            client = client.replace(steps=1)
        super().__init__(client)
        self.solver = solver
        self.waiting: set[int] = set()
        self.replies: list[Reply] = []

    @abstractmethod
    def open(self, fed: Federation) -> list[int]:
        """Ask for the next step; the tasks to wait for."""

    @abstractmethod
    def step(self, fed: Federation, heard: Sequence[Reply]) -> Tensor:
        """The server's step, with what it was sent, if anything; the next model."""

    def check_federation(self, fed: Federation) -> None:
        """Refuse matrices that are too large, and problems without parameters."""
        if self.solver == "exact" and not 0 < fed.layout.size <= LARGEST:
            raise ConfigError(f"strategy.solver=exact: needs a matrix of {fed.layout.size}^2 numbers; take steps")

    def start(self, fed: Federation) -> None:
        """z^0 is the initial model."""
        self.initial = fed.model
        self.begun = np.zeros(fed.clients, dtype=np.bool_)

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """Keep it until the step is over."""
        self.waiting.discard(reply.task.id)
        self.replies.append(reply)

    def on_lost(self, fed: Federation, task: Task, why: str) -> None:
        """Go on without it."""
        self.waiting.discard(task.id)

    def settle(self, fed: Federation) -> None:
        """When all are done or lost, make the server's step and begin the next one."""
        if self.waiting:
            return
        if self.replies:
            replies, self.replies = self.replies, []
            self.begun[[each.client for each in replies]] = True
            model = self.step(fed, [each for each in replies if each.task.tag == "upload"])
            fed.publish(model, used=replies)
        self.waiting = set(self.open(fed))

    def own_models(self, fed: Federation) -> Mapping[int, Tensor]:
        """Each client's x_k."""
        return {client: x for client, x in fed.kept("x").items() if self.begun[client]}


class RERCE(_Iterations):
    """The cohort steps towards s and sends its models, of which the server takes the mean."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        rho: float = 1.0,
        solver: str = "steps",
        uplink_noise: float = 0.0,
        downlink_noise: float = 0.0,
    ) -> None:
        super().__init__(ProximalStep, local, rho, solver, uplink_noise, downlink_noise)

    def start(self, fed: Federation) -> None:
        """z^0, and s^0 with it."""
        super().start(fed)
        self.z = self.previous = self.initial

    def step(self, fed: Federation, heard: Sequence[Reply]) -> Tensor:
        """z^{n+1} = 1/C sum_{k in S_n} x_k^{n+1}."""
        if heard:
            self.z, self.previous = mean([each["model"] for each in heard]), self.z
        return self.z

    def open(self, fed: Federation) -> list[int]:
        """s^n to the cohort; who is new computes x_k^1, and at the first step the cohort sends it."""
        there = idle_with_data(fed)
        silent = there[~self.begun[there]]
        if self.begun.any():
            chosen = fed.pick(fed.cohort, among=there[self.begun[there]])
            asked = fed.dispatch(chosen, start=2 * self.z - self.previous, tag="upload")
        else:
            chosen = fed.pick(fed.cohort, among=silent)
            asked = fed.dispatch(chosen, start=self.initial, held=True, tag="upload")
            silent = np.setdiff1d(silent, chosen)
        return asked + fed.dispatch(silent, start=self.initial, local=True, tag="silent")


class RERCECLU(_Iterations):
    """RERCE-Fed with continual local updates (the authors' second script).

    Client k    every step, asked or not:  x_k^+ = (I - rho B_k) x_k + rho B_k r_k;  q_k = 2 x_k^+ - x_k
                who is asked first sets r_k to what it received, z^n, and sends q_k
    Server      keeps the q_k it heard last;  z^{n+1} = mean of them over all clients. At the first step all send
                2 x_k^1 - z^0
    State       d more on a client (r_k), N d on the server
    Traffic     1 d down, 1 d up per client that is asked; at the first step 1 d up from everybody
    Defaults    4 clients are asked per step, as in the authors' script; ``cohort`` plays no part
    Departures  a client that is offline does not step. The model, z, is extrapolated as s is above.
    """

    everybody = True

    def __init__(
        self,
        local: LocalSGD | None = None,
        rho: float = 1.0,
        selected: int = 4,
        solver: str = "steps",
        uplink_noise: float = 0.0,
        downlink_noise: float = 0.0,
    ) -> None:
        super().__init__(ContinualStep, local, rho, solver, uplink_noise, downlink_noise)
        train = self.jobs["train"]
        silent = UnselectedStep.around(local, prox=train.prox, solver=self.solver, steps=train.steps)
        self.jobs["continue"] = silent.replace(sends="model")
        self.selected = whole("selected", selected, least=1)

    def start(self, fed: Federation) -> None:
        """Nothing is heard yet."""
        super().start(fed)
        self.heard = fed.model.new_zeros(fed.clients, fed.layout.size)
        self.z = self.initial

    def step(self, fed: Federation, heard: Sequence[Reply]) -> Tensor:
        """z^{n+1} = 1/K sum_k q_k, as heard last."""
        for reply in heard:
            self.heard[reply.client] = reply["model"]
        self.z = self.heard[torch.from_numpy(self.begun)].mean(dim=0)
        return self.z

    def open(self, fed: Federation) -> list[int]:
        """z^n to some; all step; who is new sends what it begins with."""
        there = idle_with_data(fed)
        known = there[self.begun[there]]
        chosen = fed.pick(self.selected, among=known)
        rest = np.setdiff1d(known, chosen)
        return [
            *fed.dispatch(there[~self.begun[there]], start=self.initial, held=True, tag="upload"),
            *fed.dispatch(chosen, start=self.z, tag="upload"),
            *fed.dispatch(rest, start=self.z, job="continue", local=True, tag="silent"),
        ]

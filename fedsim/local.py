"""The client's half: what one task does on a client, written once for a stack of clients.

Every vector a rule sees is a stack ``[n, d]``, one row per client, and reductions run over ``dim=-1``
only, so the same lines serve one client in a deployment (``n = 1``) and a whole group in the simulator.
Rows whose client has done all its steps are frozen: ``ctx.active [n, 1]`` is their mask.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, flag, number, one_of, optional_number, optional_whole, whole
from fedsim.rng import Draw
from fedsim.vectors import Layout


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that will travel, known before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Extras(NamedTuple):
    """What goes into a step of :class:`LocalSGD` beside the gradient."""

    clip: float | None = None
    weight_decay: float = 0.0
    prox: float = 0.0
    momentum: float = 0.0

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return self != Extras()


class Context(ABC):
    """What a local rule can see and use.

    Attributes:
        start: ``[n, d]`` what each client downloaded.
        message: extra tensors sent down, each ``[n, ...]``.
        state: the clients' own tensors, each ``[n, ...]``; assign to an entry to change it. It is kept only
            if the server accepts the result.
        lr: ``[n, 1]`` learning rates of this task.
        steps: ``[n]`` local steps of each client.
        step: the local step it is at, from 0; -1 before the first.
        running: how many clients have not finished in the current step: the first rows, for the stack is in order of
            steps, the most first. Before the first step and after the last one it is all of them.
        active: ``[n, 1]`` the same as a mask.
        clients: ``[n]`` client ids.
    """

    start: Tensor
    message: dict[str, Tensor]
    state: dict[str, Tensor]
    lr: Tensor
    steps: NDArray[np.int64]
    step: int = -1
    running: int
    clients: NDArray[np.int64]

    @property
    def active(self) -> Tensor:
        """``[n, 1]``: who has not finished."""
        return (torch.arange(len(self.clients), device=self.lr.device) < self.running).unsqueeze(1)

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """The mini-batches of each local step in turn; sets ``running``. Opaque, to be given to :meth:`grad`."""

    @abstractmethod
    def grad(self, x: Tensor, batch: Any = None) -> Tensor:
        """A new ``[n, d]``: gradients of the clients' mean losses at ``x [n, d]`` over a batch (None: all their data).

        Over a batch, the rows of clients that have finished are zero.
        """

    @abstractmethod
    def rng(self, purpose: str) -> Draw:
        """Keyed randomness of these tasks, one key per row."""

    def point(self) -> Tensor:
        """A copy of ``start`` to train on."""
        return self.start.clone()

    def change(self, x: Tensor) -> Tensor:
        """A new ``[n, d]``: ``x - start``."""
        return x - self.start

    def freeze(self, new: Tensor, old: Tensor) -> Tensor:
        """``new`` for the clients still running, ``old`` for those that have finished."""
        return new if self.running == len(new) else torch.where(self.active, new, old)

    def follow(self, x: Tensor, direction: Tensor) -> Tensor:
        """A new ``[n, d]``: ``x - lr * direction``, frozen for those that have finished."""
        return self.freeze(torch.addcmul(x, self.lr, direction, value=-1.0), x)

    def descend(self, x: Tensor, batch: Any) -> None:
        """``x <- x - lr * grad(x, batch)`` in place: a plain step, which need not make the gradient to take it."""
        k = self.running
        x[:k].addcmul_(self.lr[:k], self.grad(x, batch)[:k], value=-1.0)

    def descend_all(self, x: Tensor, extras: Extras) -> Tensor | None:
        """The end ``[n, d]`` of all steps of :class:`LocalSGD` from ``x`` on, which may be written to.

        None, and ``x`` as it was, if they have to be made one by one.
        """
        if extras:
            return None
        for batch in self.batches():
            self.descend(x, batch)
        return x

    def update(self, extras: Extras) -> Tensor | None:
        """A new ``[n, d]``: how far all steps of :class:`LocalSGD` lead away from ``start``.

        None if there is no faster way to it than :meth:`point`, the steps, and :meth:`change`.
        """
        return None


MOST = 10**9
"""Most steps of a task, and examples of a batch."""

Rule = TypeVar("Rule", bound="LocalSGD")


@dataclass
class LocalSGD:
    """Mini-batch SGD on a client's own data, and the hooks around one local step.

    One step, with ``g`` what :meth:`direction` returns for the batch::

        g <- g * min(1, clip / ||g||)                  (one norm over all parameters)
        g <- g + weight_decay * x + prox * (x - start)
        v <- momentum * v + g                          (v = g in the first step; fresh in every task)
        x <- x - lr * lr_decay^round * v

    Args:
        lr: learning rate.
        batch_size: examples in a mini-batch; None takes all of a client's data. The last batch of an epoch may
            be smaller.
        epochs: passes over the client's data, one number or one per client; a fraction is rounded up to whole steps.
        steps: local steps instead of epochs, one number or one per client.
        momentum: heavy-ball coefficient.
        weight_decay: L2 coefficient.
        clip: largest norm of a step's gradient; None does not clip.
        prox: FedProx's mu, the penalty ``mu / 2 * ||x - start||^2``.
        lr_decay: factor on the rate per round.
        keep: whether each client keeps the model it ended its task with, as its state ``"own"``, once the server has
            accepted the result (:meth:`Strategy.own_models`). It costs ``d`` numbers of memory per client.
    """

    lr: float = 0.1
    batch_size: int | None = 10
    epochs: float | list[float] = 1.0
    steps: int | list[int] | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    prox: float = 0.0
    lr_decay: float = 1.0
    keep: bool = False
    sends: str = field(default="delta", init=False)
    """What travels up: ``"delta"`` is ``x - start``, ``"model"`` is ``x``, ``"gradient"`` is the mean of what the steps
    followed, ``(start - x) / (lr * steps)``. For strategies to set, by :meth:`replace`: they know which they use."""

    gradient: LocalSGD | None = field(default=None, init=False)
    """The rule whose direction stands for the plain gradient, if not None. Set by :meth:`around`."""

    measured: ClassVar[bool] = False
    """True for rules whose amount of work depends on its outcome: they are trained alone, at take-effect."""
    unread: ClassVar[tuple[str, ...]] = ("own",)
    """State that the rule writes and never reads: it is not handed to its tasks, for it would travel for nothing."""

    def __post_init__(self) -> None:
        self.lr = number("lr", self.lr, least=0)
        self.batch_size = optional_whole("batch_size", self.batch_size, least=1, most=MOST)
        if _is_list(self.epochs):
            self.epochs = [number("epochs", each, above=0, most=1e6) for each in self.epochs]
        else:
            self.epochs = number("epochs", self.epochs, above=0, most=1e6)
        if _is_list(self.steps):
            self.steps = [whole("steps", each, most=MOST) for each in self.steps]
        else:
            self.steps = optional_whole("steps", self.steps, most=MOST)
        self.momentum = number("momentum", self.momentum, least=0, below=1)
        self.weight_decay = number("weight_decay", self.weight_decay, least=0)
        self.clip = optional_number("clip", self.clip, above=0)
        self.prox = number("prox", self.prox, least=0)
        self.lr_decay = number("lr_decay", self.lr_decay, above=0, most=1)
        self.keep = flag("keep", self.keep)
        self.sends = one_of("sends", self.sends, ("delta", "model", "gradient"))
        if self.sends == "gradient":
            if not self.lr:
                raise ConfigError("local.lr=0.0: clients that send their mean gradient need a rate > 0")
            if self.momentum:
                raise ConfigError(
                    f"local.momentum={self.momentum}: a step along a velocity is no gradient, and mean gradients are "
                    "what travels up here; leave it 0"
                )

    # ---- known before training -------------------------------------------------------------------

    def check(self, clients: int) -> None:
        """Refuse settings that do not fit a population of ``clients``.

        Raises:
            ConfigError: if ``epochs`` or ``steps`` is a list of another length.
        """
        for key, value in (("epochs", self.epochs), ("steps", self.steps)):
            if isinstance(value, list) and len(value) != clients:
                raise ConfigError(f"local.{key}: {len(value)} numbers for {clients} clients; give one per client")

    def batches_per_epoch(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Mini-batches in one pass over ``samples [k]`` examples."""
        if self.batch_size is None:
            return np.minimum(samples, 1)
        return -(-samples // self.batch_size)

    def local_steps(self, clients: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Local steps of each task, ``[k]``, from the clients' ids and sample counts; 0 without data."""
        if self.steps is not None:
            wanted = _per_client(self.steps, clients).astype(np.int64)
        else:
            # 0.1 epochs of 30 batches are 3 steps: take off what the product is above a whole number by rounding.
            passes = _per_client(self.epochs, clients)
            wanted = np.maximum(np.ceil(passes * self.batches_per_epoch(samples) - 1e-9), 1).astype(np.int64)
        return np.where(samples > 0, wanted, 0)

    def examples(self, steps: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Training examples that ``steps [k]`` local steps work through, ``[k]``."""
        per_epoch = np.maximum(self.batches_per_epoch(samples), 1)
        full, rest = np.divmod(steps, per_epoch)
        size = samples if self.batch_size is None else np.minimum(rest * self.batch_size, samples)
        return full * samples + np.where(rest > 0, size, 0)

    def rate(self, round: int) -> float:
        """The learning rate of a task that takes effect in ``round``."""
        return self.lr * self.lr_decay**round

    def payload_spec(self, layout: Layout) -> dict[str, TensorSpec]:
        """What :meth:`finish` will upload for one client: its bytes are counted before it is computed."""
        return {self.sends: TensorSpec((layout.size,), layout.dtype)}

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        """A client's state before its first accepted result; made only when it is needed."""
        return {}

    @property
    def gradients_per_step(self) -> int:
        """Gradients that one local step takes: so many times a step's time is what it costs."""
        return 1 if self.gradient is None else self.gradient.gradients_per_step

    # ---- the work itself -------------------------------------------------------------------------

    def run(self, ctx: Context) -> dict[str, Tensor]:
        """Train the stack and return what travels up, each tensor ``[n, ...]``."""
        extras = Extras(self.clip, self.weight_decay, self.prox, self.momentum)
        own = self.gradient is not None or self._has_own("direction")
        if not (own or self.keep or self._has_own("origin", "begin", "finish")) and self.sends == "delta":
            update = ctx.update(extras)
            if update is not None:
                return {"delta": update}
        x = self.origin(ctx)
        if self._has_own("origin") and x.data_ptr() == ctx.start.data_ptr():
            x = ctx.point()  # what the steps lead away from must stay where it is
        self.begin(ctx)
        end = None if own else ctx.descend_all(x, extras)
        x = self._along_direction(ctx, x) if end is None else end
        if self.keep:
            ctx.state["own"] = x
        return self.finish(ctx, x)

    def _has_own(self, *hooks: str) -> bool:
        """Whether a subclass does one of these its own way."""
        return any(getattr(type(self), name) is not getattr(LocalSGD, name) for name in hooks)

    def _along_direction(self, ctx: Context, x: Tensor) -> Tensor:
        """The end of the way from ``x [n, d]`` along :meth:`direction`, with all that goes into a step."""
        velocity: Tensor | None = None
        for batch in ctx.batches():
            finished = x[ctx.running :].clone()
            step = self.direction(ctx, x, batch)
            x[ctx.running :] = finished  # in case the rule has written to x, too
            if self.clip is not None:
                norm = step.norm(dim=-1, keepdim=True)
                step = step * (self.clip / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
            if self.weight_decay:
                step = step + self.weight_decay * x
            if self.prox:
                step = step + self.prox * (x - ctx.start)
            if self.momentum:
                velocity = step if velocity is None else self.momentum * velocity + step
                step = velocity
            x = ctx.follow(x, step)
        return x

    def origin(self, ctx: Context) -> Tensor:
        """The point ``[n, d]`` that the first step is taken from: what ``ctx.point()`` gives, which may be written to.

        It need not be ``ctx.start``: a rule may go on from a model that the client has kept.
        """
        return ctx.point()

    def begin(self, ctx: Context) -> None:
        """Before the first step."""

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """The gradient ``[n, d]`` that one step follows downhill."""
        return ctx.grad(x, batch) if self.gradient is None else self.gradient.direction(ctx, x, batch)

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        """After the last step: what travels up."""
        if self.sends == "model":
            return {"model": x}
        if self.sends == "delta":
            return {"delta": ctx.change(x)}
        steps = torch.from_numpy(ctx.steps).to(ctx.lr).clamp_min(1).unsqueeze(1)  # none where there are no examples
        return {"gradient": ctx.change(x) / (-ctx.lr * steps)}

    @classmethod
    def around(cls: type[Rule], local: LocalSGD | None, **settings: Any) -> Rule:
        """A rule of this class for strategies that bring their own: with the settings of ``local``, and its direction
        where this class asks for the gradient.

        Args:
            local: what the user chose; None is plain SGD.
            settings: of this class, and such of ``local`` as are to differ.

        Raises:
            ConfigError: if ``local`` does more its own way than the direction of a step.
        """
        rule = local if local is not None else LocalSGD()
        for name in ("run", "origin", "begin", "finish", "initial_state", "payload_spec", "local_steps", "rate"):
            if getattr(type(rule), name) is not getattr(LocalSGD, name):
                target = f"{type(rule).__module__}.{type(rule).__qualname__}"
                raise ConfigError(f"local._target_={target}: it has its own {name}, as this strategy; take local=sgd")
        shared = {each.name: getattr(rule, each.name) for each in fields(LocalSGD) if each.init}
        made = cls(**{**shared, **settings})
        plain = type(rule).direction is LocalSGD.direction
        made.sends, made.gradient = rule.sends, rule.gradient if plain else rule
        return made

    def replace(self: Rule, **changes: Any) -> Rule:
        """A copy with other settings, checked anew.

        Raises:
            ConfigError: for a setting that there is not, or a wrong value.
        """
        other = copy.copy(self)
        for name, value in changes.items():
            if name not in vars(self):
                raise ConfigError(f"{name}={value}: {type(self).__name__} has no such setting")
            setattr(other, name, value)
        other.__post_init__()
        return other

    def refuse_own(self, *settings: str) -> None:
        """Refuse settings of the local steps that a method has no place for: they must be 0.

        Raises:
            ConfigError: naming the first that is not.
        """
        for name in settings:
            if getattr(self, name):
                raise ConfigError(f"local.{name}={getattr(self, name)}: must be 0, this method has no place for it")


@dataclass
class ControlVariateSGD(LocalSGD):
    """Local steps of clients that keep a control variate ``c_i``, their mean gradient in the last task accepted.

    Subclasses take their gradients by :meth:`counted_gradient`, so that ``c_i^+ = (1 / K) sum_k g_i(x_k)`` over the K
    steps of the task. Plain steps along ``g_i - c_i + c`` make that ``c_i - c + (x_0 - x_K) / (K lr)``, SCAFFOLD's
    option II (arXiv 1910.06378); with momentum, weight decay or clipping in the steps only the mean gradient is right.

    State ``control`` ``[d]`` is ``c_i``, 0 at first. ``control_change`` ``[d]``, which is ``c_i^+ - c_i``, travels up
    beside the update. A task without a step gives ``c_i^+ = 0``, for its client has no data.
    """

    def payload_spec(self, layout: Layout) -> dict[str, TensorSpec]:
        """The update, and the change of the control variate."""
        return {**super().payload_spec(layout), "control_change": TensorSpec((layout.size,), layout.dtype)}

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        """``c_i = 0``."""
        return {"control": layout.zeros()}

    def begin(self, ctx: Context) -> None:
        """The sum of gradients is empty."""
        self.gradients = torch.zeros_like(ctx.start)

    def counted_gradient(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """The gradient ``[n, d]`` at ``x [n, d]`` over the batch of a step, counted towards ``c_i^+``."""
        gradient = LocalSGD.direction(self, ctx, x, batch)
        self.gradients += gradient  # those who have finished add 0
        return gradient

    def new_control(self, ctx: Context) -> Tensor:
        """``c_i^+ [n, d]``, after the last step."""
        return self.gradients / torch.from_numpy(ctx.steps).to(self.gradients).clamp_min(1).unsqueeze(1)

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        """Send ``c_i^+ - c_i``, too; ``c_i <- c_i^+`` once the result is accepted."""
        new = self.new_control(ctx)
        change = new - ctx.state["control"]
        ctx.state["control"] = new
        return {**super().finish(ctx, x), "control_change": change}


@dataclass
class SAM(LocalSGD):
    """Sharpness-aware minimisation: the gradient is taken where the loss is about highest nearby.

    The ``g`` of one step of :class:`LocalSGD` is the gradient at the end of an ascent step, over the same batch::

        s = rho * grad(x) / ||grad(x)||                (one norm over all parameters)
        g = grad(x + s)

    and the step is taken from ``x``. A step costs two gradients, in virtual time too; with ``rho = 0`` it is the plain
    step and costs one.

    Source: Foret et al. 2021 (arXiv 2010.01412), whose ``rho`` is the default; FedSAM (arXiv 2206.02618) is FedAvg
    with it.

    Args:
        rho: length of the ascent step.
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rho = number("rho", self.rho, least=0)

    @classmethod
    def of(cls, local: LocalSGD | None, rho: float) -> SAM:
        """``local`` with ascent steps of length ``rho``, for strategies whose clients take them.

        Raises:
            ConfigError: if ``local`` is a rule of another kind, or makes ascent steps of another length.
        """
        rho = number("rho", rho, least=0)
        if not isinstance(local, cls):
            rule = cls.around(local, rho=rho)
            if rule.gradient is not None:
                target = f"{type(local).__module__}.{type(local).__qualname__}"
                raise ConfigError(f"local._target_={target}: this strategy takes ascent steps; take local=sgd")
            return rule
        if local.rho != rho:
            raise ConfigError(f"rho={rho}: local.rho={local.rho} sets the same; take local=sgd and strategy.rho alone")
        return local

    @property
    def gradients_per_step(self) -> int:
        """Two: one to find the way up, one at the end of it."""
        return 2 if self.rho else 1

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """The gradient ``[n, d]`` at the end of the ascent step."""
        slope = ctx.grad(x, batch)
        if not self.rho:
            return slope
        norm = slope.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        return ctx.grad(x + self.rho * (slope / norm), batch)


def _is_list(setting: Any) -> TypeGuard[Sequence[Any]]:
    return hasattr(setting, "__len__") and not isinstance(setting, str)


def _per_client(setting: float | list[float] | list[int], clients: NDArray[np.int64]) -> NDArray[np.float64]:
    """A setting of these clients, ``[k]``: the same for all, or looked up by id."""
    values = np.asarray(setting, dtype=np.float64)
    return values[clients] if values.ndim else np.full(len(clients), values)

"""The fast path: groups of clients trained as stacks, for problems that are chains of linear layers.

A client's result must not show who was trained with it. So a stack holds only tasks whose batches are padded to the
same size, which depends on the task alone; and whether products of this size give a client the same bits in any stack
is tried on the machine at hand before the first of them is made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.local import Context, Extras, LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Draw, Randomness
from fedsim.training.base import (
    Result,
    Trainer,
    Work,
    divided,
    failure,
    finite_rows,
    moved,
    no_memory,
    stacked_tensors,
    unstacked,
)
from fedsim.training.batches import Batch, Rows, StackBatches, padded_size
from fedsim.training.closed_form import ClosedForm
from fedsim.training.devices import reproducible
from fedsim.training.native import NativeForm
from fedsim.vectors import aligned_stack, is_aligned

HOOKS = ("run", "origin", "begin", "direction", "finish")
"""What a local rule can do its own way."""

PLAIN = {name: getattr(LocalSGD, name) for name in HOOKS}
"""How they are done otherwise."""

NOTHING_LANES = 10_000
"""Most clients in a stack that trains nothing."""


class StackForm(Protocol):
    """A problem's gradients and plain steps for stacks ``[n, d]`` of parameter vectors, all on one device."""

    l2: float
    """Factor of the penalty ``l2 / 2 ||x||^2`` within the gradient; ``descend`` is for problems without one."""

    def lanes(self, size: int) -> int:
        """Most clients in a stack with batches of ``size`` examples."""
        ...

    def least_lanes(self, size: int) -> int:
        """The smallest stack whose clients get the same bits as in larger ones; 0 if any two sizes may differ."""
        ...

    def gradient(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        """Write the gradients at ``x[:k]`` of the mean losses over a batch of ``k`` clients into ``out[:k]``."""
        ...

    def descend(self, x: Tensor, batch: Batch, lr: Tensor) -> None:
        """``x[:k] <- x[:k] - lr[:k] * gradient`` in place; ``lr [n, 1]``."""
        ...


class Paired:
    """A form where products of one client alone would give other bits than in company: it is never alone.

    Args:
        form: what makes the gradients.
    """

    def __init__(self, form: StackForm) -> None:
        self.form, self.l2 = form, form.l2

    def gradient(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        """Write the gradients at ``x[:k]`` into ``out[:k]``."""
        if len(batch.rows) > 1:
            self.form.gradient(x, batch, out)
            return
        twice = _twice(x)
        slopes = aligned_stack(2, x)
        self.form.gradient(twice, _both(batch), slopes)
        out[:1].copy_(slopes[:1])

    def descend(self, x: Tensor, batch: Batch, lr: Tensor) -> None:
        """``x[:k] <- x[:k] - lr[:k] * gradient`` in place; ``lr [n, 1]``."""
        if len(batch.rows) > 1:
            self.form.descend(x, batch, lr)
            return
        twice = _twice(x)
        self.form.descend(twice, _both(batch), lr[:1].expand(2, 1))
        x[:1].copy_(twice[:1])


def _twice(x: Tensor) -> Tensor:
    return aligned_stack(2, x).copy_(x[:1])


def _both(batch: Batch) -> Batch:
    return Batch(batch.rows.expand(2, -1), batch.scale.expand(2, -1, -1))


class StackedContext(Context):
    """The context of a stack of tasks with batches of one padded size, in order of steps, the most first."""

    def __init__(
        self, works: Sequence[Work], batches: StackBatches, form: StackForm | Paired | None, randomness: Randomness,
        device: torch.device,
    ) -> None:  # fmt: skip
        first, starts = works[0].start, [work.start for work in works]
        alike = all(each is first for each in starts)
        self._start = (first if alike else torch.stack(starts)).to(device)
        """``[d]`` if all start from one vector, as in synchronous rounds; else ``[n, d]``."""
        self._own_start: Tensor | None = None
        self.message = moved(stacked_tensors([work.message for work in works]), device)
        self.state = moved(stacked_tensors([work.state for work in works]), device)
        self.lr = torch.tensor([[work.lr] for work in works], dtype=first.dtype, device=device)
        self.steps = batches.steps.copy()
        self.running = len(works)
        self.clients = batches.clients
        self._made: tuple[Tensor, list[bool]] | None = None
        """What :meth:`update` made last, and who in it is finite."""
        self._batches, self._form, self._randomness = batches, form, randomness

    @property
    def start(self) -> Tensor:
        """``[n, d]``: what each client downloaded, a copy for the rule."""
        if self._own_start is None:
            self._own_start = self.point()
        return self._own_start

    @start.setter
    def start(self, start: Tensor) -> None:
        self._own_start = start

    def batches(self) -> Iterator[Batch]:
        """Epoch after epoch in a new keyed order; the last batch of an epoch may be smaller."""
        for step, batch in enumerate(self._batches.each(self._start)):
            self.step, self.running = step, len(batch.rows)
            yield batch
        self.running = len(self.clients)

    # ---- steps -----------------------------------------------------------------------------------

    def point(self) -> Tensor:
        """A copy of ``start`` to train on."""
        return aligned_stack(len(self.clients), self._start).copy_(self._from())

    def change(self, x: Tensor) -> Tensor:
        """A new ``[n, d]``: ``x - start``."""
        return torch.sub(x, self._from(), out=aligned_stack(len(x), x))

    def _from(self) -> Tensor:
        """``start`` as the rule has it, or if it has not looked at it as it came."""
        return self._start if self._own_start is None else self._own_start

    def _from_for(self, x: Tensor) -> Tensor:
        """The same, dense, for steps of ``x [n, d]``: ``[n, d]``, or ``[d]`` for all."""
        start = self._from().to(x.dtype)
        return (start if start.shape == x.shape[1:] else start.expand_as(x)).contiguous()

    def follow(self, x: Tensor, direction: Tensor) -> Tensor:
        """A new ``[n, d]``: ``x - lr * direction``, frozen for those that have finished."""
        k, new = self.running, aligned_stack(len(x), x)
        torch.addcmul(x[:k], self.lr[:k], direction[:k], value=-1.0, out=new[:k])
        new[k:].copy_(x[k:])
        return new

    def grad(self, x: Tensor, batch: Any = None) -> Tensor:
        """A new ``[n, d]``: the gradients at ``x [n, d]`` over a batch, or over all of the clients' data."""
        new = aligned_stack(len(x), x)
        if self._form is None:
            return new.zero_()
        if not is_aligned(x):
            x = aligned_stack(len(x), x).copy_(x)
        if batch is None:
            self._full_gradient(self._form, x, new)
        else:
            new[len(batch.rows) :].zero_()
            self._form.gradient(x, batch, new)
        return new

    def _full_gradient(self, form: StackForm | Paired, x: Tensor, new: Tensor) -> None:
        locate = self._batches.rows
        assert locate is not None
        for lane, client in enumerate(self.clients):
            rows = locate(np.array([client])).to(x.device)
            if len(rows):
                scale = x.new_full((1, len(rows), 1), 1.0 / len(rows))
                form.gradient(x[lane : lane + 1], Batch(rows.unsqueeze(0), scale), new[lane : lane + 1])
            else:
                new[lane].zero_()

    def descend(self, x: Tensor, batch: Batch) -> None:
        """``x <- x - lr * grad(x, batch)`` in place."""
        assert self._form is not None
        if self._form.l2:
            super().descend(x, batch)
        else:
            self._form.descend(x, batch, self.lr)

    def descend_all(self, x: Tensor, extras: Extras) -> Tensor | None:
        """The end ``[n, d]`` of all steps from ``x`` on, which may be written to; None if there is no way at once."""
        if not isinstance(self._form, NativeForm) or self._form.l2:
            return super().descend_all(x, extras)
        if not is_aligned(x) or (extras and self._is_kept(x)):
            x = aligned_stack(len(x), x).copy_(x)
        self._form.descend_all(x, self._batches.blocks(x), self.lr, self._from_for(x), extras)
        if self._batches.rows is not None:
            self.step = int(self._batches.steps[0]) - 1
        return x

    def _is_kept(self, x: Tensor) -> bool:
        """Whether a stack lies where the rule can see it: steps with extras are not made in place."""
        seen = [self._own_start, *self.message.values(), *self.state.values()]
        places = {each.untyped_storage().data_ptr() for each in seen if isinstance(each, Tensor)}
        return x.untyped_storage().data_ptr() in places

    def update(self, extras: Extras) -> Tensor | None:
        """A new ``[n, d]``: how far all steps lead away from ``start``; None if there is no way at once."""
        if not isinstance(self._form, NativeForm) or self._form.l2:
            return None
        new = aligned_stack(len(self.clients), self._start)
        finite = self._form.update(new, self._batches.blocks(new), self.lr, self._from_for(new), extras)
        self._made = new, finite
        return new

    def finite(self, payload: Mapping[str, Tensor], plain: bool) -> Sequence[bool | None]:
        """For each client True if all it sends is finite, None or False if that is not certain.

        Args:
            payload: what the rule has made.
            plain: whether no code of a user's can have written to it: then what was seen while the update was made
                still holds.
        """
        if plain and self._made is not None and len(payload) == 1 and next(iter(payload.values())) is self._made[0]:
            return self._made[1]
        return finite_rows(payload, len(self.clients))

    def rng(self, purpose: str) -> Draw:
        """The keys of these tasks, one for each row."""
        return self._randomness(purpose, self.clients, self._batches.nth)


class StackedTrainer(Trainer):
    """Runs the rules of whole groups on stacks.

    Args:
        problem: one that is a chain of linear layers, or trains nothing.
        jobs: the local rules by name.
        randomness: the run's.
        device: where stacks are trained; works come from main memory, and results go back to it.
        kernel: ``native`` or ``torch``, what makes the steps where there is a choice.
    """

    def __init__(
        self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness,
        device: torch.device | str = "cpu", kernel: str = "torch",
    ) -> None:  # fmt: skip
        self.samples, self.jobs, self.randomness = problem.samples, dict(jobs), randomness
        self.device, self.kernel = torch.device(device), kernel
        self.rows, self.form = self._form_of(problem)
        self.native = self._native_form_of(problem)
        self._least: dict[int, int] = {}

    def _form_of(self, problem: Problem) -> tuple[Rows | None, StackForm | None]:
        """Where clients' examples lie, and how they are trained on; nothing if nothing is trained."""
        chain = problem.chain() if problem.trains else None
        return (None, None) if chain is None else (chain.rows, ClosedForm(chain, self.device))

    def _native_form_of(self, problem: Problem) -> NativeForm | None:
        """What is faster where it can be had."""
        chain = problem.chain() if problem.trains and self.kernel == "native" and self.device.type == "cpu" else None
        return None if chain is None or not NativeForm.takes(chain) else NativeForm(chain)

    def train(self, group: Sequence[Work]) -> list[Result]:
        """The results of a group in its order, whatever stacks it is cut into."""
        alike: dict[Any, list[Work]] = {}
        for work in group:
            alike.setdefault(self._kind(work), []).append(work)
        results: dict[int, Result] = {}
        with reproducible(self.device):
            for works in alike.values():
                works.sort(key=lambda work: -work.steps)
                for work, result in zip(works, self._train_alike(works), strict=True):
                    results[work.task] = result
        return [results[work.task] for work in group]

    def _train_alike(self, works: list[Work]) -> list[Result]:
        """The results of tasks that may share a stack, the longest first, in as few stacks as may be."""
        rule, batches = self.jobs[works[0].job], self._batches(works)
        try:
            most = self._lanes(rule, batches.padded)
        except Exception as error:
            if not no_memory(error):
                raise
            return [failure(rule, work, 1, 1, error) for work in works]
        lanes = -(-len(works) // -(-len(works) // most))  # about equally large
        results: list[Result] = []
        for part in batches.parts(lanes):
            results += self._train_stack(works[len(results) : len(results) + lanes], part)
        return results

    def _batches(self, works: Sequence[Work]) -> StackBatches:
        numbers = np.array([(work.client, work.nth, work.steps) for work in works])
        clients, nth, steps = np.ascontiguousarray(numbers.T)
        samples, batch_size = self.samples[clients], self.jobs[works[0].job].batch_size
        return StackBatches(clients, nth, samples, steps, batch_size, self.rows, self.randomness)

    def _kind(self, work: Work) -> tuple[Any, ...]:
        """What tasks must have in common to share a stack."""
        size = padded_size(self.jobs[work.job].batch_size, int(self.samples[work.client]))
        kind = (work.job, size if self.form is not None else 0)
        if not work.message and not work.state:
            return kind
        tensors = ((name, each.shape, each.dtype) for part in (work.message, work.state) for name, each in part.items())
        return *kind, *tensors

    def _lanes(self, rule: LocalSGD, size: int) -> int:
        """Most tasks in one stack of batches of this size."""
        if self.form is None:
            return NOTHING_LANES
        if type(rule).measured or self._least_lanes(size) == 0:
            return 1
        return self._faster(self.form, size).lanes(size)

    def _faster(self, form: StackForm, size: int) -> StackForm:
        """What makes the gradients of batches of this size: the native form unless ``form`` is better at large ones."""
        return form if self.native is None or not self.native.suits(size) else self.native

    def _train_stack(self, works: list[Work], batches: StackBatches) -> list[Result]:
        # A copy, so that what a rule writes to itself cannot reach another task: state belongs into the context.
        rule, lanes = copy.copy(self.jobs[works[0].job]), works
        if len(works) == 1 and self._must_double(rule):
            lanes = works * 2
            batches = self._batches(lanes)
        context = StackedContext(lanes, batches, self._form_for(batches.padded), self.randomness, self.device)
        try:
            made = moved(rule.run(context), "cpu")
            payload = divided(made, "the payload", len(lanes))
            state = unstacked(moved(context.state, "cpu"), "ctx.state", len(lanes))
            finite = context.finite(made, plain=not _has_own_hooks(rule))
        except (Exception, SystemExit) as error:
            if len(works) == 1:
                return [failure(rule, works[0], context.step + 1, 1, error)]
        else:
            steps, count = context.steps.tolist(), len(works)
            return [Result(payload[lane], state[lane], steps[lane], count, finite[lane]) for lane in range(count)]
        # Whose fault it was shows when each is trained by itself.
        return [result for work in works for result in self._train_alike([work])]

    def _form_for(self, size: int) -> StackForm | Paired | None:
        """What makes gradients of batches of this size."""
        if self.form is None:
            return None
        form = self._faster(self.form, size)
        return Paired(form) if self._least_lanes(size) == 2 else form

    def _must_double(self, rule: LocalSGD) -> bool:
        """Whether a task that is alone has to be trained beside a copy of itself.

        What a rule of the user's own computes of a stack of one (a standard deviation, say) may go another way than
        with several.
        """
        alone = self.form is None or not self._is_invariant() or type(rule).measured
        return not alone and _has_own_hooks(rule)

    def _is_invariant(self) -> bool:
        """Whether bits must not show how tasks were grouped; on a GPU the group is part of a run's identity."""
        return self.device.type == "cpu"

    def _least_lanes(self, size: int) -> int:
        assert self.form is not None
        if not self._is_invariant():
            return 1
        if size not in self._least:
            self._least[size] = self._faster(self.form, size).least_lanes(size)
        return self._least[size]


def _has_own_hooks(rule: LocalSGD) -> bool:
    """Whether code of a user's has a part in what a rule makes: of a subclass, of the object, or put into the class."""
    own = any(getattr(type(rule), name) is not PLAIN[name] or name in vars(rule) for name in HOOKS)
    return own or rule.gradient is not None

"""The fast path: groups of clients trained as stacks, for problems that are chains of linear layers.

A client's result must not show who was trained with it. So a stack holds only tasks whose batches are padded to the
same size, which depends on the task alone; and whether products of this size give a client the same bits in any stack
is tried on the machine at hand before the first of them is made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.local import Context, LocalSGD
from fedsim.problems.base import Problem
from fedsim.rng import Draw, Randomness
from fedsim.training.base import Result, Trainer, Work, failure, moved, stacked_tensors, unstacked
from fedsim.training.closed_form import Batch, ClosedForm, aligned_stack, is_aligned
from fedsim.training.devices import reproducible

HOOKS = ("run", "begin", "direction", "finish")
"""What a local rule can do its own way."""

NOTHING_LANES = 10_000
"""Most clients in a stack that trains nothing."""

Rows: TypeAlias = Callable[[NDArray[np.int64]], Tensor]
"""``[examples]``: where the examples that clients ``[k]`` train on lie, client by client."""


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


def padded_size(batch_size: int | None, samples: int) -> int:
    """What the batches of a task are filled up to: its batch size, or all the client has if that is less, rounded up.

    Rounded to even numbers, from 16 on to multiples of 4, from 32 on of 8 and so on: few sizes, so that clients of
    unlike sizes still share a stack, and never a quarter more than asked for.
    """
    if batch_size is not None and samples >= batch_size:
        return max(batch_size, 2)
    unit = 1 << max(samples.bit_length() - 3, 1)
    size = -(-max(samples, 1) // unit) * unit
    return size if batch_size is None else max(min(size, batch_size), 2)


class StackedContext(Context):
    """The context of a stack of tasks with batches of one padded size, in order of steps, the most first."""

    def __init__(
        self, works: Sequence[Work], rule: LocalSGD, samples: NDArray[np.int64], rows: Rows | None,
        form: StackForm | None, randomness: Randomness, device: torch.device,
    ) -> None:  # fmt: skip
        first = works[0]
        self.start = aligned_stack(len(works), first.start)
        for row, work in zip(self.start, works, strict=True):
            row.copy_(work.start)
        self.start = self.start.to(device)
        self.message = moved(stacked_tensors([work.message for work in works]), device)
        self.state = moved(stacked_tensors([work.state for work in works]), device)
        self.lr = torch.tensor([[work.lr] for work in works], dtype=self.start.dtype, device=device)
        self.steps = np.array([work.steps for work in works])
        self.running = len(works)
        self.clients = np.array([work.client for work in works])
        self._nth = np.array([work.nth for work in works])
        self._samples = samples
        self._sizes = samples if rule.batch_size is None else np.full(len(works), rule.batch_size)
        self._padded = padded_size(rule.batch_size, int(samples[0]))
        self._rows, self._form, self._randomness = rows, form, randomness

    # ---- batches ---------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Epoch after epoch in a new keyed order; the last batch of an epoch may be smaller."""
        if self._rows is None:
            return
        x, per_epoch = self.start, -(-self._samples // np.maximum(self._sizes, 1))
        held = self._rows(self.clients).numpy()
        order = np.zeros((len(self.clients), int(self._samples.max())), dtype=np.int64)
        lanes, places = np.arange(len(self.clients))[:, None], np.arange(self._padded)
        for step in range(int(self.steps[0])):
            k = int(np.searchsorted(-self.steps, -step))
            epoch, position = np.divmod(step, per_epoch[:k])
            fresh = np.flatnonzero(position == 0)
            if len(fresh):
                self._shuffle(order, held, fresh, epoch[fresh])
            first = position * self._sizes[:k]
            counts = np.minimum(self._samples[:k] - first, self._sizes[:k])[:, None]
            # What only fills a batch repeats its last example, so that nothing foreign (a NaN, say) can come in.
            rows = order[lanes[:k], first[:, None] + np.minimum(places, counts - 1)]
            scale = np.where(places < counts, 1.0 / counts, 0.0)[:, :, None]
            self.step, self.running = step, k
            yield Batch(torch.from_numpy(rows).to(x.device), torch.from_numpy(scale).to(x))

    def _shuffle(
        self, order: NDArray[np.int64], held: NDArray[np.int64], lanes: NDArray[np.int64], epoch: NDArray[np.int64]
    ) -> None:
        """A new order of their examples for these lanes."""
        sizes = self._samples[lanes]
        keys = self._randomness("batches", self.clients[lanes], self._nth[lanes], epoch)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        starts = (np.cumsum(self._samples) - self._samples)[lanes]
        order[np.repeat(lanes, sizes), within] = held[np.repeat(starts, sizes) + keys.permutations(sizes)]

    # ---- steps -----------------------------------------------------------------------------------

    def point(self) -> Tensor:
        """A copy of ``start`` to train on."""
        return aligned_stack(len(self.start), self.start).copy_(self.start)

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
            new[self.running :].zero_()
            self._form.gradient(x, batch, new)
        return new

    def _full_gradient(self, form: StackForm, x: Tensor, new: Tensor) -> None:
        assert self._rows is not None
        for lane, client in enumerate(self.clients):
            rows = self._rows(np.array([client])).to(x.device)
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

    def rng(self, purpose: str) -> Draw:
        """The keys of these tasks, one for each row."""
        return self._randomness(purpose, self.clients, self._nth)


class StackedTrainer(Trainer):
    """Runs the rules of whole groups on stacks.

    Args:
        problem: one that is a chain of linear layers, or trains nothing.
        jobs: the local rules by name.
        randomness: the run's.
        device: where stacks are trained; works come from main memory, and results go back to it.
    """

    def __init__(
        self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness, device: torch.device | str = "cpu"
    ) -> None:
        self.samples, self.jobs, self.randomness = problem.samples, dict(jobs), randomness
        self.device = torch.device(device)
        self.rows, self.form = self._form_of(problem)
        self._least: dict[int, int] = {}

    def _form_of(self, problem: Problem) -> tuple[Rows | None, StackForm | None]:
        """Where clients' examples lie, and how they are trained on; nothing if nothing is trained."""
        chain = problem.chain() if problem.trains else None
        return (None, None) if chain is None else (chain.rows, ClosedForm(chain, self.device))

    def train(self, group: Sequence[Work]) -> list[Result]:
        """The results of a group in its order, whatever stacks it is cut into."""
        results: dict[int, Result] = {}
        with reproducible(self.device):
            for works in self._stacks(group):
                for work, result in zip(works, self._train_stack(works), strict=True):
                    results[work.task] = result
        return [results[work.task] for work in group]

    def _stacks(self, group: Sequence[Work]) -> Iterator[list[Work]]:
        """Tasks that may share a stack, the longest first, cut into stacks."""
        alike: dict[Any, list[Work]] = {}
        for work in group:
            alike.setdefault(self._kind(work), []).append(work)
        for (job, size, *_), works in alike.items():
            works.sort(key=lambda work: -work.steps)
            lanes = self._lanes(self.jobs[job], size)
            for first in range(0, len(works), lanes):
                yield works[first : first + lanes]

    def _kind(self, work: Work) -> tuple[Any, ...]:
        """What tasks must have in common to share a stack."""
        size = padded_size(self.jobs[work.job].batch_size, int(self.samples[work.client]))
        tensors = ((name, each.shape, each.dtype) for part in (work.message, work.state) for name, each in part.items())
        return work.job, size if self.form is not None else 0, *tensors

    def _lanes(self, rule: LocalSGD, size: int) -> int:
        """Most tasks in one stack of batches of this size."""
        if self.form is None:
            return NOTHING_LANES
        if type(rule).measured or self._least_lanes(size) == 0:
            return 1
        return self.form.lanes(size)

    def _train_stack(self, works: list[Work]) -> list[Result]:
        # A copy, so that what a rule writes to itself cannot reach another task: state belongs into the context.
        rule = copy.copy(self.jobs[works[0].job])
        lanes = works * 2 if len(works) == 1 and self._must_double(rule, works[0]) else works
        samples = self.samples[[work.client for work in lanes]]
        context = StackedContext(lanes, rule, samples, self.rows, self.form, self.randomness, self.device)
        try:
            payload = unstacked(moved(rule.run(context), "cpu"), "the payload", len(lanes))
            state = unstacked(moved(context.state, "cpu"), "ctx.state", len(lanes))
        except (Exception, SystemExit) as error:
            if len(works) > 1:  # whose fault it was shows when each is trained by itself
                return [result for work in works for result in self._train_stack([work])]
            return [failure(rule, works[0], context.step + 1, 1, error)]
        steps = context.steps.tolist()
        return [Result(payload[lane], state[lane], steps[lane], len(works)) for lane in range(len(works))]

    def _must_double(self, rule: LocalSGD, work: Work) -> bool:
        """Whether a task that is alone has to be trained beside a copy of itself.

        Products of one stack, or what a rule of the user's own computes of it (a standard deviation, say), may go
        another way than products of several.
        """
        if self.form is None or type(rule).measured or not self._is_invariant():
            return False
        least = self._least_lanes(padded_size(rule.batch_size, int(self.samples[work.client])))
        return least == 2 or (least == 1 and _has_own_hooks(rule))

    def _is_invariant(self) -> bool:
        """Whether bits must not show how tasks were grouped; on a GPU the group is part of a run's identity."""
        return self.device.type == "cpu"

    def _least_lanes(self, size: int) -> int:
        assert self.form is not None
        if not self._is_invariant():
            return 1
        if size not in self._least:
            self._least[size] = self.form.least_lanes(size)
        return self._least[size]


def _has_own_hooks(rule: LocalSGD) -> bool:
    return any(getattr(type(rule), name) is not getattr(LocalSGD, name) for name in HOOKS)

"""The mini-batches of a stack of tasks: which examples every client looks at in each step, padded to one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.rng import Randomness

Ids: TypeAlias = NDArray[np.int64]

Rows: TypeAlias = Callable[[Ids], Tensor]
"""``[examples]``: where the examples that clients ``[k]`` train on lie, client by client."""

AT_ONCE = 2**16
"""Places of examples looked up at once, about: few enough to stay in the cache, many enough to make it cheap."""


class Batch(NamedTuple):
    """One step's examples of the first ``k`` clients of a stack, padded to one size."""

    rows: Tensor
    """``[k, size]``: where the examples lie; a row that only fills the batch repeats one of its examples."""
    scale: Tensor
    """``[k, size, 1]``: 1 / (the client's examples in this batch), 0 for rows that only fill it."""


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


class Steps(NamedTuple):
    """Some steps on end of the ``n`` clients of a stack: what each :class:`Batch` holds of one."""

    rows: Tensor
    """``[t, n, size]``."""
    scale: Tensor
    """``[t, n, size, 1]``."""
    running: Tensor
    """``[t]``: how many clients are at work in each, the first ones."""

    @classmethod
    def of(cls, batch: Batch) -> Steps:
        """One step."""
        return cls(batch.rows.unsqueeze(0), batch.scale.unsqueeze(0), torch.tensor([len(batch.rows)]))


class StackBatches:
    """Epoch after epoch in a new keyed order; the last batch of an epoch may be smaller. One batch that holds all of a
    client's examples holds them as they lie: its order would mean nothing, and drawing it takes time.

    The clients must be such that :func:`padded_size` is the same for all, and in order of steps, the most first.

    Args:
        clients: ids, ``[n]``.
        nth: which of the client's own tasks each is, ``[n]``.
        samples: examples each holds, ``[n]``.
        steps: local steps of each, ``[n]``.
        batch_size: the rule's; None takes all examples.
        rows: tells where clients' examples lie; None if there are none to train on.
        randomness: the run's.
    """

    def __init__(
        self, clients: Ids, nth: Ids, samples: Ids, steps: Ids, batch_size: int | None, rows: Rows | None,
        randomness: Randomness,
    ) -> None:  # fmt: skip
        self.clients, self.nth, self.samples, self.steps = clients, nth, samples, steps
        self.batch_size, self.rows, self.randomness = batch_size, rows, randomness
        self.size = samples if batch_size is None else np.full(len(clients), batch_size)
        self.per_epoch = np.maximum(-(-samples // np.maximum(self.size, 1)), 1)
        self.padded = padded_size(batch_size, int(samples[0]))
        self._made: tuple[Ids, Ids] | None = None

    def parts(self, lanes: int) -> Iterator[StackBatches]:
        """The same for so many clients after another. What is short is looked up once for all of them."""
        if self.rows is not None and 0 < self.steps[0] * self.padded * len(self.clients) <= AT_ONCE:
            self._made = self._block(np.arange(self.steps[0])[:, None], self._held())
        for first in range(0, len(self.clients), lanes):
            some = slice(first, first + lanes)
            part = StackBatches(
                self.clients[some], self.nth[some], self.samples[some], self.steps[some], self.batch_size, self.rows,
                self.randomness,
            )  # fmt: skip
            if self._made is not None:
                part._made = (self._made[0][:, some], self._made[1][:, some])
            yield part

    def each(self, like: Tensor) -> Iterator[Batch]:
        """The batch of each step, of as many clients as have not finished, for parameters ``like``."""
        for rows, scale, running in self.blocks(like):
            for step, k in enumerate(running.tolist()):
                yield Batch(rows[step, :k], scale[step, :k])

    def blocks(self, like: Tensor) -> Iterator[Steps]:
        """All steps, some at a time, for parameters ``like``."""
        for rows, counts, running in self._blocks():
            yield Steps(torch.from_numpy(rows).to(like.device), self._scales(counts, like), torch.from_numpy(running))

    def _blocks(self) -> Iterator[tuple[Ids, Ids, Ids]]:
        """Of some steps at a time where the examples lie, how many count, and how many clients are at work."""
        most = int(self.steps[0])
        if self.rows is None or not most:
            return
        if self._made is not None:
            rows, counts = self._made
            yield rows[:most], counts[:most], (self.steps > np.arange(most)[:, None]).sum(axis=1)
            return
        longest, held = int(self.per_epoch.max()), self._held()
        block = longest * max(1, AT_ONCE // (len(self.clients) * self.padded * longest))
        for first in range(0, most, block):
            steps = np.arange(first, min(first + block, most))[:, None]
            yield *self._block(steps, held), (self.steps > steps).sum(axis=1)

    def _held(self) -> Ids:
        assert self.rows is not None
        return self.rows(self.clients).numpy()

    def _block(self, steps: Ids, held: Ids) -> tuple[Ids, Ids]:
        """Where the examples ``[t, n, padded]`` of some steps ``[t, 1]`` lie, and how many count ``[t, n]``."""
        begun = steps[0] // self.per_epoch
        epochs = (np.minimum(steps[-1] + 1, self.steps) - 1) // self.per_epoch - begun + 1
        epochs = np.where(self.steps > steps[0], epochs, 0)
        order, starts = self._orders(begun, epochs, held)
        at_work = self.steps > steps
        epoch, position = np.divmod(steps, self.per_epoch)
        entry = np.where(at_work, np.cumsum(epochs) - epochs + epoch - begun, 0)
        first = np.where(at_work, starts[entry] + position * self.size, 0)
        counts = np.where(at_work, np.minimum(self.samples - position * self.size, self.size), 1)
        # What only fills a batch repeats its last example, so that nothing foreign (a NaN, say) can come in.
        inside = np.minimum(np.arange(self.padded), counts[:, :, None] - 1)
        return order[first[:, :, None] + inside], counts

    def _orders(self, begun: Ids, epochs: Ids, held: Ids) -> tuple[Ids, Ids]:
        """The clients' examples in the orders of so many epochs from ``begun`` on, and where each order starts."""
        lane = np.repeat(np.arange(len(epochs)), epochs)
        number = np.arange(len(lane)) - np.repeat(np.cumsum(epochs) - epochs, epochs)
        sizes = self.samples[lane]
        starts = np.cumsum(sizes) - sizes
        inside = np.arange(sizes.sum()) - np.repeat(starts, sizes)
        shuffled = self.per_epoch[lane] > 1
        if shuffled.any():
            some = lane[shuffled]
            keys = self.randomness("batches", self.clients[some], self.nth[some], (begun[lane] + number)[shuffled])
            inside[np.repeat(shuffled, sizes)] = keys.permutations(sizes[shuffled])
        mine = np.repeat((np.cumsum(self.samples) - self.samples)[lane], sizes)
        return held[mine + inside], starts

    def _scales(self, counts: Ids, like: Tensor) -> Tensor:
        """``[t, n, padded, 1]``."""
        shape = (*counts.shape, self.padded, 1)
        if counts.min() == counts.max() == self.padded:
            return like.new_full((1, 1, 1, 1), 1.0 / self.padded).expand(shape)
        counted = np.where(np.arange(self.padded) < counts[:, :, None], 1.0 / counts[:, :, None], 0.0)
        return torch.from_numpy(counted).to(like).unsqueeze(3)

"""Classification by any torch module, the training examples spread over the clients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.checks import ConfigError, flag, number, one_of
from fedsim.data.partitions import Divided, Iid, Partition, Table
from fedsim.data.sources import Dataset, Embedded, Source
from fedsim.problems.base import CLIENTS, Problem, count_classes
from fedsim.problems.chain import Chain, layers_of
from fedsim.problems.client_split import PARTS, ClientSplit
from fedsim.problems.models import CheckedModel, Mlp, Model
from fedsim.problems.modules import PRECISIONS, FlatModule, as_new, check_compiler, torch_seeded
from fedsim.problems.network import Network
from fedsim.problems.sequential import Sequential, Stage, sequential_of
from fedsim.rng import Randomness

CHUNK = 500
"""Examples evaluated at once: enough to keep a core busy, few enough for a convolution's memory."""


@dataclass(slots=True)
class _Held:
    """What one client holds, kept while that client is at work."""

    client: int
    rows: Tensor
    """``[samples]``, where the examples it trains on lie."""
    examples: tuple[Tensor, Tensor] | None = None
    """All of them, gathered, once asked for."""


class Classification(Problem):
    """Mean cross-entropy of a torch module on labelled examples.

    The examples are kept once, as the source has them; a client's lie at ``rows(client)``, gathered when needed.
    One object must not be used by two threads at a time, for they would share the module; give each a copy.

    Clients may keep some of their own examples apart (:class:`~fedsim.problems.client_split.ClientSplit`), to see how
    a model does on each client's own data. Training sees only the others: these are ``samples``, and all that counts
    samples goes by them. Where clients share examples (:class:`~fedsim.data.partitions.Sampled`), what one keeps apart
    another may train on.

    Attributes:
        train_x, train_y: the source's training set, ``[n, ...]`` and ``[n]``, with the validation share.
        train_rows, val_rows: where in it what clients may hold and the validation share lie, both ascending.
        spread: which positions in ``train_rows`` each client holds, those it keeps apart included.
        val_x, val_y: the validation share, empty if ``validation`` is 0.
        test_x, test_y: the official test set.
        classes: how many classes there are.
        draws: whether a forward pass in training draws random numbers (dropout).

    Args:
        data: a source, or a data set already loaded; the embedded images unless given.
        model: a builder (``build(shape, classes)``, and ``check(data)`` if it cannot take all data), a
            ``torch.nn.Module``, which is copied and whose weights are the initial model, or a function without
            arguments that makes one; :class:`Mlp` unless given.
        partition: how training examples are spread; :class:`Iid` unless given.
        validation: share of the training examples kept for validation, 0 to 0.5.
        client_validation: share of its own examples that each client keeps for validation, 0 to 0.5.
        client_test: share of its own examples that each client keeps for test, 0 to 0.5.
        precision: of forward passes in training: ``float32`` leaves them in the parameters' own, ``bfloat16`` is
            torch's autocast. Parameters, gradients and evaluation stay as they are.
        compile: whether ``torch.compile`` makes forward passes and gradients in training; takes a C++ compiler.

    Raises:
        ConfigError: from the constructor for wrong arguments, from :meth:`prepare` for data and models that
            do not fit.
    """

    def __init__(
        self,
        data: Source | Dataset | None = None,
        model: Model | nn.Module | Callable[[], nn.Module] | None = None,
        partition: Partition | None = None,
        validation: float = 0.1,
        client_validation: float = 0.0,
        client_test: float = 0.0,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        self.data = Embedded() if data is None else data
        self.model = Mlp() if model is None else model
        self.partition = Iid() if partition is None else partition
        self.validation = number("validation", validation, least=0, most=0.5)
        self.client_validation = number("client_validation", client_validation, least=0, most=0.5)
        self.client_test = number("client_test", client_test, least=0, most=0.5)
        self.precision = one_of("precision", precision, PRECISIONS)
        self.compile = flag("compile", compile)
        if self.compile:
            check_compiler()
        if not isinstance(self.data, (Dataset, Source)):
            raise ConfigError(f"data={data!r}: must be a Dataset or have load()")
        if not (isinstance(self.model, (nn.Module, Model)) or callable(self.model)):
            raise ConfigError(f"model={model!r}: must be a torch module, a function that makes one, or have build()")
        if not isinstance(self.partition, Partition):
            raise ConfigError(f"partition={partition!r}: must be a Partition")
        self.target_metric = ("val_accuracy", "above") if self.validation else None
        self.client_parts = tuple(part for part, share in self._client_shares().items() if share)
        self._held: _Held | None = None

    def _client_shares(self) -> dict[str, float]:
        return dict(zip(PARTS, (self.client_test, self.client_validation), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: not the examples gathered last."""
        return vars(self) | {"_held": None}

    # ---- preparation -----------------------------------------------------------------------------

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Load the data, keep the validation share, spread the rest over ``clients`` clients, make the model."""
        data = self.data if isinstance(self.data, Dataset) else self.data.load()
        self.classes = data.classes
        with torch_seeded(randomness("model").torch_seed()):
            module = self._build(data)
            dtype = next((each.dtype for each in module.parameters()), torch.float32)
            self.draws = _probe(module, data.train_x[:2].to(dtype, copy=True), data.classes)
        if self.precision == "bfloat16" and dtype is not torch.float32:
            name = str(dtype).removeprefix("torch.")
            raise ConfigError(f"precision=bfloat16: needs a model of float32 parameters, this one's are {name}")
        self._flat = FlatModule(module, self.precision, self.compile)
        self.layout = self._flat.layout
        self._initial = self._flat.values.clone()

        self.val_rows, self.train_rows = self._validation_split(len(data.train_y), randomness)
        self.spread = self.partition.split(_table(data, self.train_rows), clients, randomness)
        self._split = ClientSplit(self.spread.sizes, self._client_shares(), randomness)
        self.clients, self.samples = clients, self._split.training
        self._held = None
        self.train_x, self.train_y = data.train_x.to(dtype), data.train_y
        self.val_x, self.val_y = self._gathered(torch.from_numpy(self.val_rows))
        self.test_x, self.test_y = data.test_x.to(dtype), data.test_y
        self._form = self._written_down() or self._flat

    def _build(self, data: Dataset) -> nn.Module:
        """The user's module."""
        if isinstance(self.model, nn.Module):
            module = copy.deepcopy(self.model)
        elif isinstance(self.model, Model):
            if isinstance(self.model, CheckedModel):
                self.model.check(data)
            module = self.model.build(data.shape, self.classes)
        else:
            module = self.model()
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model: made a {type(module).__name__}, not a torch module")
        return module

    def _written_down(self) -> Sequential | None:
        """The module with its derivatives written down, where that is known; chains have a faster form still."""
        if not self._is_plain() or self.chain() is not None:
            return None
        return sequential_of(self._flat.module, self.layout, tuple(self.train_x.shape[1:]))

    def _is_plain(self) -> bool:
        """Whether training computes in the parameters' own precision, by the operations of torch's own library."""
        return self.precision == "float32" and not self.compile

    def _validation_split(self, n: int, randomness: Randomness) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of ``n`` training examples are kept for validation and which are not, both ascending."""
        count = max(1, int(self.validation * n)) if self.validation else 0
        if count >= n:
            raise ConfigError(f"problem.validation={self.validation}: leaves none of {n} training examples to train on")
        order = randomness("validation").permutation(n)
        return np.sort(order[:count]), np.sort(order[count:])

    # ---- what training and records need ----------------------------------------------------------

    def initial(self) -> Tensor:
        """A new copy of the initial model ``[d]``."""
        return self._initial.clone()

    def chain(self) -> Chain | None:
        """The module as a chain of linear layers, if it is nothing else and ``precision`` and ``compile`` are plain."""
        if not self._is_plain():
            return None
        layers = layers_of(self._flat.module, self.layout, tuple(self.train_x.shape[1:]))
        if layers is None:
            return None
        inputs = self.train_x.flatten(1)
        return Chain(layers, "cross_entropy", inputs, self.train_y, lambda clients: self.part_rows(clients, "training"))

    def network(self) -> Network | None:
        """The module, unless it draws or is compiled: clients then go one after another."""
        if self.draws or self.compile:
            return None
        module, rows = self._flat.module, lambda clients: self.part_rows(clients, "training")
        return Network(module, self.layout, self.train_x, self.train_y, rows, self.precision)

    def on(self, device: torch.device) -> Classification:
        """A copy to train from, whose training examples and module are on another device; vectors must be there."""
        other = copy.copy(self)
        other._held = None
        other.train_x, other.train_y = self.train_x.to(device), self.train_y.to(device)
        other._flat = FlatModule(copy.deepcopy(self._flat.module).to(device), self.precision, self.compile)
        other._form = other._written_down() or other._flat
        return other

    def with_linear(self, made: Callable[[str, str | None], Stage]) -> Classification:
        """This problem to train from, with linear layers that ``made`` makes from the names of weight and bias."""
        form = self._form
        if not isinstance(form, Sequential) or not form.has_linear() or self.layout.dtype is not torch.float32:
            return self
        other = copy.copy(self)
        other._held, other._form = None, form.with_linear(made)
        return other

    def rows(self, client: int) -> Tensor:
        """``[samples]``: where in ``train_x`` the examples that one client trains on lie."""
        return self._of(client).rows

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """The examples ``[samples, ...]`` and labels ``[samples]`` one client trains on; not to be written to."""
        held = self._of(client)
        if held.examples is None:
            held.examples = self._gathered(held.rows)
        return held.examples

    def _of(self, client: int) -> _Held:
        """What the client holds. A task's steps ask for the same client again and again, so the last one is kept."""
        if self._held is None or self._held.client != client:
            rows = self.part_rows(np.array([client]), "training")
            self._held = _Held(client, rows.to(self.train_x.device))
        return self._held

    def part_rows(self, clients: NDArray[np.int64], part: str) -> Tensor:
        """``[n]``: where in ``train_x`` the clients' own examples of a part lie, client by client.

        Args:
            clients: whose, ``[k]``.
            part: ``"training"``, ``"validation"`` or ``"test"``.
        """
        held = self.spread.each(clients)
        if self.client_parts:
            positions = (self._split.positions(client, part) for client in clients.tolist())
            held = [each[mine] for each, mine in zip(held, positions, strict=True)]
        return torch.from_numpy(self.train_rows[np.concatenate(held)])

    def _gathered(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # Half the time of train_x[rows].
        return self.train_x.index_select(0, rows), self.train_y.index_select(0, rows)

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """The gradient ``[d]`` of the mean cross-entropy over a client's batch; zero if there are no examples."""
        images, labels = self._batch(client, batch)
        if not len(labels):
            return torch.zeros_like(x)
        return self._form.gradient(as_new(x), images, labels, noise if self.draws else None)

    def descend(self, x: Tensor, client: int, batch: Tensor | None, noise: int, lr: Tensor) -> None:
        """``x <- x - lr * gradient`` in place, ``lr [1]``; for some models without making the gradient."""
        images, labels = self._batch(client, batch)
        if not len(labels):
            return
        own = as_new(x)
        self._form.descend(own, images, labels, lr.item(), noise if self.draws else None)
        if own is not x:
            x.copy_(own)

    def _batch(self, client: int, batch: Tensor | None) -> tuple[Tensor, Tensor]:
        return (
            self.examples(client) if batch is None else self._gathered(self.rows(client)[batch.to(self.train_x.device)])
        )

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Mean cross-entropy and accuracy: ``loss, accuracy`` (test) and, if kept, ``val_loss, val_accuracy``."""
        with self._evaluating(x) as module:
            loss, accuracy = _score(module, self.test_x, self.test_y)
            metrics = {"loss": loss, "accuracy": accuracy}
            if len(self.val_y):
                metrics["val_loss"], metrics["val_accuracy"] = _score(module, self.val_x, self.val_y)
        return metrics

    def evaluate_clients(self, x: Tensor, clients: NDArray[np.int64], part: str) -> dict[str, NDArray[np.float64]]:
        """``loss`` and ``accuracy``: ``[k]`` means over what each client keeps for ``part``, NaN if nothing."""
        columns = {name: np.full(len(clients), np.nan) for name in ("loss", "accuracy")}
        keeping = np.flatnonzero(self._split.kept[part][clients])
        with self._evaluating(x) as module:
            for start in range(0, len(keeping), CLIENTS):
                some = keeping[start : start + CLIENTS]
                losses, right = self._scores(module, self.part_rows(clients[some], part))
                sizes = self._split.kept[part][clients[some]]
                owner = np.repeat(np.arange(len(some)), sizes)
                columns["loss"][some] = np.bincount(owner, losses) / sizes
                columns["accuracy"][some] = np.bincount(owner, right) / sizes
        return columns

    def _scores(self, module: nn.Module, rows: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The cross-entropy of each example in ``rows [n]``, and 1 where the answer is right."""
        losses, right = np.empty(len(rows)), np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            images, labels = self._gathered(rows[start : start + CHUNK])
            logits = module(images)
            losses[start : start + CHUNK] = cross_entropy(logits, labels, reduction="none").numpy()
            right[start : start + CHUNK] = (logits.argmax(dim=1) == labels).numpy()
        return losses, right

    @contextmanager
    def _evaluating(self, x: Tensor) -> Iterator[nn.Module]:
        """The module with parameters ``x [d]``, for evaluation within the block."""
        self._flat.values.copy_(x)
        self._flat.bind(self._flat.values)
        module = self._flat.module.eval()
        try:
            # Seeded for modules that draw even now: evaluation too must not depend on what ran before.
            with torch.no_grad(), torch_seeded(0):
                yield module
        finally:
            module.train()

    def class_counts(self) -> NDArray[np.int64]:
        """``[clients, classes]``: training examples of each class each client holds."""
        labels = self.train_y.numpy()

        def held(clients: NDArray[np.int64]) -> NDArray[np.int64]:
            mine: NDArray[np.int64] = labels[self.part_rows(clients, "training").numpy()]
            return mine

        return count_classes(held, self.samples, self.classes)

    def client_table(self) -> dict[str, NDArray[Any]]:
        """``samples``, what is kept apart (``test_samples, validation_samples``, if asked for), and ``class_0 ..
        class_{classes - 1}``: how many training examples of each class a client holds.

        No classes where clients draw their examples when they are needed: to draw those of a million clients
        that were never asked for would cost more than the run.
        """
        columns = {"samples": self.samples} | {f"{part}_samples": self._split.kept[part] for part in self.client_parts}
        if isinstance(self.spread, Divided):
            counts = self.class_counts()
            columns |= {f"class_{label}": counts[:, label] for label in range(self.classes)}
        return columns


def _table(data: Dataset, rows: NDArray[np.int64]) -> Table:
    """What a partition may know of the training examples in ``rows``."""
    ids = None if data.train_ids is None else data.train_ids.numpy()[rows]

    def feature(position: int) -> NDArray[np.float64]:
        return data.train_x.flatten(1)[:, position].numpy()[rows].astype(np.float64)

    return Table(data.train_y.numpy()[rows], data.classes, ids, feature)


def _probe(module: nn.Module, x: Tensor, classes: int) -> bool:
    """Whether a forward pass in training draws random numbers.

    Raises:
        ConfigError: if the module cannot take ``x [n, ...]``, does not make logits ``[n, classes]`` of it, or changes
            buffers in training (running statistics), which no vector of parameters would carry.
    """
    name = type(module).__name__
    try:
        with torch.no_grad():
            logits = module.train()(x)  # lazy layers take their shape, and draw their weights, here
            buffers = {key: each.clone() for key, each in module.named_buffers()}
            before, seen = torch.get_rng_state(), x.clone()
            module(x)
    except Exception as error:  # user code may raise anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model: {name} cannot take examples of shape {list(x.shape[1:])} ({reason})") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(x), classes):
        made = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"model: {name} must make logits {[len(x), classes]} of {len(x)} examples, got {made}")
    for key, each in module.named_buffers():
        if key not in buffers or not torch.equal(buffers[key], each):
            raise ConfigError(
                f"model: buffer {key} changes in training outside the exchanged parameters (BatchNorm's running "
                "statistics are such); use GroupNorm"
            )
    if not torch.equal(seen.nan_to_num(), x.nan_to_num()):
        raise ConfigError(f"model: {name} writes into the examples it gets, which others train on; let it copy them")
    return not torch.equal(before, torch.get_rng_state())


def _score(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers, summed over chunks in order."""
    loss, right = 0.0, 0
    for start in range(0, len(y), CHUNK):
        logits, labels = module(x[start : start + CHUNK]), y[start : start + CHUNK]
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
    return loss / len(y), right / len(y)

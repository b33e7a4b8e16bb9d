"""What users' rules hand to the steps in C: it is seen as on any other path, or refused before memory is touched."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedsim
from fedsim.data import Dataset
from fedsim.local import Context, Extras, LocalSGD
from fedsim.problems.chain import Chain, Layer
from fedsim.problems.models import Logistic
from fedsim.rng import Randomness
from fedsim.training import StackedTrainer, Work
from fedsim.training.base import Result
from fedsim.training.batches import Steps
from fedsim.training.native import NativeForm, instruction_sets
from fedsim.vectors import aligned_stack

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="was not built, or this processor has no AVX2")

EXTRAS = {"momentum": 0.5, "prox": 0.3}


def trained(kernel: str, rule: LocalSGD, state: bool = False) -> list[Result]:
    """The results of three clients with ten examples each."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 15, generator=generator), torch.arange(30) % 3
    problem = fedsim.Classification(Dataset(x, y, x[:2], y[:2], 3), Logistic(), fedsim.data.Iid(), validation=0)
    problem.prepare(3, Randomness(0))
    trainer = StackedTrainer(problem, {"train": rule}, Randomness(0), kernel=kernel)
    start = problem.initial()
    works = [
        Work(i, i, 0, "train", start, {}, {"own": start + i + 1} if state else {}, 0.1, 4 - (i > 1)) for i in range(3)
    ]
    return trainer.train(works)


def compare(rule: Callable[..., LocalSGD], state: bool = False, **settings: Any) -> None:
    """Both kernels give the same results of a rule, but for their last digits."""
    pairs = [trained(kernel, rule(batch_size=3, **settings), state) for kernel in ("native", "torch")]
    for mine, other in zip(*pairs, strict=True):
        assert mine.error is None, mine.error
        assert other.error is None, other.error
        for one, two in ((mine.payload, other.payload), (mine.state, other.state)):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


class Spoilt(LocalSGD):
    """Makes something else of the update that C has found to be finite."""

    def run(self, ctx: Context) -> dict[str, Tensor]:
        made = super().run(ctx)
        made["delta"].numpy()[1, 2] = float("nan")
        return made


class Instead(LocalSGD):
    """Has C make an update, and sends something else."""

    def begin(self, ctx: Context) -> None:
        ctx.update(Extras())  # type: ignore[attr-defined]

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        delta = x - ctx.start
        delta[1, 2] = float("nan")
        return {"delta": delta}


def wrapped() -> LocalSGD:
    """A rule whose own ``run`` was exchanged for one that spoils what it has made."""
    rule = LocalSGD(batch_size=3)
    rule.run = Spoilt(batch_size=3).run  # type: ignore[method-assign]
    return rule


def test_what_a_rule_makes_of_a_finite_update_is_looked_at() -> None:
    assert [each.finite for each in trained("native", LocalSGD(batch_size=3))] == [True, True, True]
    for rule in (Spoilt(batch_size=3), Instead(batch_size=3), wrapped()):
        assert [each.finite for each in trained("native", rule)] == [True, None, True]


def test_nothing_is_asked_of_tensors_that_inference_mode_lacks() -> None:
    with torch.inference_mode():
        results = trained("native", LocalSGD(batch_size=3))
    assert [(each.finite, each.error) for each in results] == [(True, None)] * 3


# ---- what hooks may do ---------------------------------------------------------------------------


class Scaled(LocalSGD):
    """Looks at the step in its last hook."""

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        return {"delta": (x - ctx.start) / (ctx.step + 1)}


class FromStart(LocalSGD):
    """Hands over what it was given to look at."""

    def origin(self, ctx: Context) -> Tensor:
        return ctx.start


class FromOwn(LocalSGD):
    """Goes on from what its client has kept, and tells how far it went."""

    def origin(self, ctx: Context) -> Tensor:
        return ctx.state["own"]

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        return {"delta": x - ctx.state["own"]}


class Rates(LocalSGD):
    """Rates of its own: one for all, or in double precision."""

    def __init__(self, double: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.double = double

    def begin(self, ctx: Context) -> None:
        ctx.lr = ctx.lr.double() * torch.arange(1, len(ctx.lr) + 1).unsqueeze(1) if self.double else ctx.lr[:1] * 2


class Anchored(LocalSGD):
    """Pulled towards one point of its own: one row for all clients, and in double precision."""

    def begin(self, ctx: Context) -> None:
        ctx.start = ctx.start[:1].double() + 1.0


@pytest.mark.parametrize("settings", [{}, EXTRAS])
def test_the_last_hook_sees_the_last_step(settings: dict[str, float]) -> None:
    compare(Scaled, **settings)


@pytest.mark.parametrize("settings", [{}, EXTRAS])
def test_a_rule_may_begin_at_the_very_start_it_was_given(settings: dict[str, float]) -> None:
    compare(FromStart, **settings)
    assert all(each.payload["delta"].abs().max() > 0.01 for each in trained("native", FromStart(**settings)))


def test_what_a_client_keeps_is_not_trained_in_place() -> None:
    compare(FromOwn, state=True, **EXTRAS)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("settings", [{}, EXTRAS])
def test_rates_of_a_rules_own(double: bool, settings: dict[str, float]) -> None:
    compare(lambda **given: Rates(double, **given), **settings)


def test_a_start_of_a_rules_own() -> None:
    compare(Anchored, momentum=0.5, prox=0.3)


# ---- what they may not ---------------------------------------------------------------------------


class Asking(LocalSGD):
    """Asks for gradients at what is no stack of the clients' parameters."""

    def __init__(self, change: Callable[[Tensor], Tensor], whole: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.change, self.whole = change, whole

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        return ctx.grad(self.change(x), None if self.whole else batch)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Tensor.double, r"must be float32 \[\d, 48\], are float64 \[\d, 48\]"),
        (lambda x: x[:, :-1], r"are float32 \[\d, 47\]"),
        (lambda x: x[:, :-1].clone(), r"are float32 \[\d, 47\]"),
        (lambda x: x[:0], r"are float32 \[0, 48\]"),
    ],
)
def test_gradients_elsewhere_are_the_error_of_the_task(
    change: Callable[[Tensor], Tensor], said: str, whole: bool
) -> None:
    results = trained("native", Asking(change, whole))
    assert all(each.error is not None for each in results)
    with pytest.raises(fedsim.checks.TaskError, match=said):
        raise results[0].error  # type: ignore[misc]


class Short(LocalSGD):
    """Trains fewer rows than there are clients, or such as share their memory."""

    def __init__(self, change: Callable[[Tensor], Tensor], **settings: Any) -> None:
        super().__init__(**settings)
        self.change = change

    def run(self, ctx: Context) -> dict[str, Tensor]:
        x = self.change(ctx.point())
        for batch in ctx.batches():
            ctx.descend(x, batch)
        return {"delta": x - ctx.start}


@pytest.mark.parametrize(
    "change", [lambda x: x[:-1].clone(), lambda x: x[:1].expand(len(x), -1), lambda x: x.T.contiguous().T]
)
def test_steps_of_fewer_rows_or_of_rows_that_are_not_apart_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    results = trained("native", Short(change))
    assert all("ValueError: parameters must be float32" in str(each.error) for each in results)


def one_layer(inputs: int, outputs: int, examples: int = 20) -> Chain:
    layers = (Layer(inputs, outputs, 0, inputs * outputs),)
    x, y = torch.randn(examples, inputs), torch.arange(examples) % outputs
    return Chain(layers, "cross_entropy", x, y, lambda clients: torch.arange(examples))


def steps_of(rows: Tensor) -> Steps:
    return Steps(rows, torch.full((*rows.shape, 1), 1 / rows.shape[2]), torch.full((len(rows),), rows.shape[1]))


def test_velocities_have_room_whatever_a_single_row_says_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, rooms = one_layer(5, 3), []
    at_rest = NativeForm._at_rest
    monkeypatch.setattr(NativeForm, "_at_rest", lambda *given: (rooms.append(at_rest(*given)), rooms[-1])[1])
    x = torch.zeros(18, 1).T
    assert x.stride(0) < 18
    NativeForm(chain).descend_all(x, [], torch.ones(1, 1), x, Extras(momentum=0.5))
    assert rooms[0].numel() >= 18


def test_what_does_not_hang_together_is_left_to_torch_which_says_so() -> None:
    chain = one_layer(5, 3)
    (layer,) = chain.layers
    assert NativeForm.takes(chain)
    wrong = {
        "examples of another width": replace(chain, inputs=torch.randn(20, 4)),
        "images": replace(chain, inputs=torch.randn(20, 5, 1)),
        "fewer targets": replace(chain, targets=chain.targets[:7]),
        "two outputs for one target": replace(chain, loss="squared", targets=chain.targets.float()),
        "layers that do not fit": replace(chain, layers=(layer, Layer(4, 3, 18, None))),
        "no inputs": replace(chain, layers=(Layer(0, 3, 0, 0),), inputs=torch.randn(20, 0)),
        "parameters beyond the end": replace(chain, layers=(Layer(5, 3, 1, 16),)),
    }
    assert {what: NativeForm.takes(each) for what, each in wrong.items()} == dict.fromkeys(wrong, False)


# ---- signals ---------------------------------------------------------------------------------------


def test_a_long_call_can_be_interrupted() -> None:
    chain = one_layer(1000, 100)
    x, rows = aligned_stack(1, torch.empty(100_100)).zero_(), torch.zeros(20_000, 1, 32, dtype=torch.int64)
    native, lr = NativeForm(chain), torch.ones(1, 1)
    began = time.perf_counter()
    native.descend_all(x, [steps_of(rows[:200])], lr, x, Extras())
    whole = 100 * (time.perf_counter() - began)
    threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):  # at the end of the call at the latest
        native.descend_all(x, [steps_of(rows)], lr, x, Extras())
    assert time.perf_counter() - began < whole / 2

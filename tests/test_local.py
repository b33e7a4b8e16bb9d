"""The client's half: LocalSGD against torch's own optimiser, closed forms and hand-written loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import checked
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.checks import ConfigError, SimulationError
from fedsim.data.partitions import Indices, Partition, Table
from fedsim.data.sources import Dataset
from fedsim.local import Context, LocalSGD
from fedsim.problems.base import Problem
from fedsim.problems.classification import Classification
from fedsim.problems.quadratic import Quadratic
from fedsim.rng import Draw, Randomness
from fedsim.training import GeneralTrainer, Result, Work
from fedsim.training.general import SingleContext
from fedsim.vectors import Layout

SEED = 5


class Sizes(Partition):
    """The first client holds the first so many examples, and so on."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        return np.repeat(np.arange(clients), self.sizes)


def classification(*sizes: int) -> Classification:
    """Three classes in six dimensions, a two-layer module in float64, clients with so many examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes) + 4, 6, generator=generator)
    y = torch.arange(len(x)) % 3
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    problem = Classification(Dataset(x[:-4], y[:-4], x[-4:], y[-4:], 3), module, Sizes(*sizes), validation=0)
    problem.prepare(len(sizes), Randomness(SEED))
    return problem


def quadratic(clients: int = 3, dimension: int = 4) -> Quadratic:
    problem = Quadratic(dimension)
    problem.prepare(clients, Randomness(SEED))
    return problem


def train(
    rule: LocalSGD, problem: Problem, client: int = 0, steps: int | None = None, nth: int = 0, **more: Any
) -> Result:
    """One client's task through the general path."""
    ids = np.array([client])
    count = int(rule.local_steps(ids, problem.samples[ids])[0]) if steps is None else steps
    settings = {"start": problem.initial(), "message": {}, "state": {}, "lr": rule.lr, **more}
    work = Work(task=9, client=client, nth=nth, job="train", steps=count, **settings)
    return checked(GeneralTrainer(problem, {"train": rule}, Randomness(SEED)).train([work])[0])


def curve(problem: Quadratic, client: int = 0) -> tuple[Tensor, Tensor]:
    """Curvature and centre of one bowl."""
    return torch.from_numpy(problem.curvature[client]), torch.from_numpy(problem.centres[client])


def batches_of(client: int, nth: int, samples: int, size: int, steps: int) -> list[Tensor]:
    """The mini-batches of a task, from the keys alone."""
    found: list[Tensor] = []
    epoch = 0
    while len(found) < steps:
        order = Randomness(SEED)("batches", client, nth, epoch).permutation(samples)
        found += [torch.from_numpy(order[i : i + size]) for i in range(0, samples, size)]
        epoch += 1
    return found[:steps]


# ---- against torch.optim -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)], ids=lambda value: str(value)
)
def test_every_step_is_that_of_torch_sgd(momentum: float, weight_decay: float) -> None:
    problem = classification(4, 11)
    rule = LocalSGD(lr=0.3, batch_size=4, momentum=momentum, weight_decay=weight_decay)
    assert isinstance(problem.model, nn.Module)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    module.load_state_dict(problem.model.state_dict())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3, momentum=momentum, weight_decay=weight_decay)
    x, y = problem.examples(1)
    assert len(x) == 11
    for step, batch in enumerate(batches_of(1, 2, 11, 4, 7)):  # over two epochs of 4 + 4 + 3 examples
        optimiser.zero_grad()
        cross_entropy(module(x[batch]), y[batch]).backward()
        optimiser.step()
        expected = torch.cat([each.detach().reshape(-1) for each in module.parameters()])
        got = problem.initial() + train(rule, problem, 1, step + 1, nth=2).payload["delta"]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_with_settings_that_round_nowhere_the_bits_are_those_of_torch_sgd() -> None:
    # Powers of two: every product is exact, so that only the order of additions could tell the two apart.
    problem = quadratic()
    rule = LocalSGD(lr=0.25, momentum=0.5, weight_decay=0.125, steps=9).replace(sends="model")
    x = problem.initial().add_(1 / 3).requires_grad_()
    start = x.detach().clone()
    optimiser = torch.optim.SGD([x], lr=0.25, momentum=0.5, weight_decay=0.125)
    for steps in range(1, 10):
        x.grad = problem.gradient(x.detach(), 1, None, 0)
        optimiser.step()
        assert torch.equal(train(rule, problem, 1, steps, start=start).payload["model"], x.detach())


def test_momentum_begins_afresh_in_every_task() -> None:
    problem, rule = quadratic(), LocalSGD(lr=0.25, momentum=0.5, steps=1).replace(sends="model")
    a, b = curve(problem)
    x = problem.initial()
    for _ in range(3):
        expected = x - 0.25 * (a * (x - b))
        x = train(rule, problem, 0, start=x).payload["model"]
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=0)


# ---- closed forms --------------------------------------------------------------------------------


def test_plain_steps_on_a_bowl_follow_the_closed_form() -> None:
    problem, start = quadratic(), torch.full((4,), 2.0, dtype=torch.float64)
    for client in range(3):
        a, b = curve(problem, client)
        for steps in (0, 1, 2, 40):
            delta = train(LocalSGD(lr=0.3), problem, client, steps, start=start).payload["delta"]
            torch.testing.assert_close(start + delta, b + (1 - 0.3 * a) ** steps * (start - b), rtol=1e-11, atol=1e-11)


def test_the_proximal_gradient_is_mu_times_the_way_from_the_start() -> None:
    problem, mu = quadratic(), 0.7
    a, b = curve(problem)
    start = torch.full((4,), 1.5, dtype=torch.float64)
    rule = LocalSGD(lr=0.2, prox=mu)
    one = start - 0.2 * a * (start - b)  # the first step feels nothing of it
    two = one - 0.2 * (a * (one - b) + mu * (one - start))
    for steps, expected in ((1, one), (2, two), (500, (a * b + mu * start) / (a + mu))):
        delta = train(rule, problem, 0, steps, start=start).payload["delta"]
        torch.testing.assert_close(start + delta, expected, rtol=1e-12, atol=1e-12)


def test_weight_decay_is_an_l2_penalty() -> None:
    problem = quadratic()
    a, b = curve(problem)
    delta = train(LocalSGD(lr=0.2, weight_decay=0.5), problem, 0, 500).payload["delta"]
    torch.testing.assert_close(delta, a * b / (a + 0.5), rtol=1e-12, atol=1e-12)  # the start is 0


def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one() -> None:
    problem = quadratic()
    a, b = curve(problem)
    gradient = a * (0 - b)
    norm = float(gradient.norm())
    for clip in (norm / 7, norm * 0.999, norm * 1.001, norm * 50):
        delta = train(LocalSGD(lr=0.1, clip=clip), problem, 0, 1).payload["delta"]
        torch.testing.assert_close(delta, -0.1 * gradient * min(1.0, clip / norm), rtol=1e-12, atol=0)
        assert float(delta.norm()) <= 0.1 * clip * (1 + 1e-12)
    loose = train(LocalSGD(lr=0.1, clip=norm * 50), problem, 0, 5).payload["delta"]
    assert torch.equal(loose, train(LocalSGD(lr=0.1), problem, 0, 5).payload["delta"])


def test_clipping_comes_before_weight_decay_and_prox() -> None:
    problem = quadratic()
    a, b = curve(problem)
    start = torch.full((4,), 4.0, dtype=torch.float64)
    x = start
    for _ in range(3):
        gradient = a * (x - b)
        gradient = gradient * min(1.0, 0.5 / float(gradient.norm()))
        x = x - 0.1 * (gradient + 0.3 * x + 0.2 * (x - start))
    rule = LocalSGD(lr=0.1, clip=0.5, weight_decay=0.3, prox=0.2).replace(sends="model")
    torch.testing.assert_close(train(rule, problem, 0, 3, start=start).payload["model"], x, rtol=1e-12, atol=0)


def test_a_zero_gradient_survives_clipping() -> None:
    problem = quadratic()
    _, b = curve(problem)
    assert torch.equal(train(LocalSGD(clip=1e-3), problem, 0, 3, start=b).payload["delta"], torch.zeros_like(b))


def test_the_rate_decays_per_round_from_the_first_on() -> None:
    rule = LocalSGD(lr=0.4, lr_decay=0.5)
    assert [rule.rate(round) for round in range(4)] == [0.4, 0.2, 0.1, 0.05]
    assert LocalSGD(lr=0.4).rate(1000) == 0.4
    problem = quadratic()
    a, b = curve(problem)
    torch.testing.assert_close(train(rule, problem, 0, 1, lr=rule.rate(2)).payload["delta"], 0.1 * a * b)


def test_sending_the_model_sends_where_sending_the_delta_leads() -> None:
    problem, start = quadratic(), torch.full((4,), 3.0, dtype=torch.float64)
    model = train(LocalSGD().replace(sends="model"), problem, 0, 6, start=start).payload
    delta = train(LocalSGD(), problem, 0, 6, start=start).payload
    assert list(model) == ["model"]
    assert list(delta) == ["delta"]
    assert torch.equal(delta["delta"], model["model"] - start)


# ---- how much work -------------------------------------------------------------------------------


def steps_of(rule: LocalSGD, *samples: int, clients: list[int] | None = None) -> list[int]:
    ids = np.arange(len(samples)) if clients is None else np.array(clients)
    return rule.local_steps(ids, np.array(samples)).tolist()


def test_epochs_become_steps() -> None:
    assert steps_of(LocalSGD(batch_size=10, epochs=1), 1, 9, 10, 11, 30) == [1, 1, 1, 2, 3]
    assert steps_of(LocalSGD(batch_size=10, epochs=5), 1, 11) == [5, 10]
    assert steps_of(LocalSGD(batch_size=None, epochs=3), 1, 500) == [3, 3]


def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_steps() -> None:
    assert steps_of(LocalSGD(batch_size=1, epochs=0.1), 30, 31, 1) == [3, 4, 1]
    assert steps_of(LocalSGD(batch_size=10, epochs=1.5), 30, 20, 10) == [5, 3, 2]
    assert steps_of(LocalSGD(batch_size=None, epochs=0.01), 30) == [1]
    assert steps_of(LocalSGD(epochs=1e-12), 30) == [1]


@given(st.integers(1, 999), st.integers(1, 300), st.integers(1, 20))
@settings(deadline=None)
def test_steps_of_any_decimal_epochs_are_rounded_up_exactly(hundredths: int, samples: int, size: int) -> None:
    exact = math.ceil(Fraction(hundredths, 100) * math.ceil(Fraction(samples, size)))
    assert steps_of(LocalSGD(epochs=hundredths / 100, batch_size=size), samples) == [exact]


def test_steps_take_the_place_of_epochs() -> None:
    assert steps_of(LocalSGD(steps=7, epochs=3, batch_size=10), 1, 100) == [7, 7]
    assert steps_of(LocalSGD(steps=0), 5) == [0]


def test_steps_may_be_given_per_client() -> None:
    for given_steps in ([4, 0, 9], (4, 0, 9), np.array([4, 0, 9])):
        rule = LocalSGD(steps=given_steps)  # type: ignore[arg-type]
        rule.check(3)
        assert steps_of(rule, 5, 5, 5, clients=[2, 0, 1]) == [9, 4, 0]
        assert steps_of(rule, 5, clients=[2]) == [9]
    for count in (2, 4):
        with pytest.raises(ConfigError, match=r"local\.steps: 3 numbers for"):
            rule.check(count)


@pytest.mark.parametrize(
    "rule", [LocalSGD(epochs=2), LocalSGD(steps=4), LocalSGD(steps=[4, 4]), LocalSGD(batch_size=None)]
)
def test_without_data_there_are_no_steps_and_nothing_changes(rule: LocalSGD) -> None:
    assert steps_of(rule, 0, 3)[0] == 0
    problem = classification(0, 3)
    result = train(rule, problem, 0)
    assert result.steps == 0
    assert torch.equal(result.payload["delta"], torch.zeros_like(problem.initial()))


def test_no_batch_size_means_all_data_at_once() -> None:
    problem = classification(3, 8)
    all_of_it = problem.gradient(problem.initial(), 1, None, 0)
    delta = train(LocalSGD(lr=1.0, batch_size=None), problem, 1).payload["delta"]
    torch.testing.assert_close(delta, -all_of_it, rtol=1e-12, atol=1e-14)  # one step, in another order of examples
    large = train(LocalSGD(lr=1.0, batch_size=999), problem, 1).payload["delta"]
    assert torch.equal(delta, large)


class Held(Problem):
    """Only says how many examples its clients hold."""

    def __init__(self, *samples: int) -> None:
        self.samples = np.array(samples)
        self.layout = Layout.flat(2)

    def prepare(self, clients: int, randomness: Randomness) -> None: ...

    def initial(self) -> Tensor:
        return self.layout.zeros()

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        return self.layout.zeros()

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {}


def batches(rule: LocalSGD, samples: int, steps: int, client: int = 0, nth: int = 0) -> list[list[int]]:
    """What a context hands out, as lists of positions."""
    problem = Held(*[samples] * (client + 1))
    work = Work(0, client, nth, "train", problem.initial(), {}, {}, 0.1, steps)
    return [batch.tolist() for batch in SingleContext(work, rule, problem, Randomness(SEED)).batches()]


sizes = st.one_of(st.none(), st.integers(1, 25))


@given(st.integers(0, 60), sizes, st.integers(0, 40))
@settings(deadline=None)
def test_examples_counts_exactly_what_the_batches_hold(samples: int, size: int | None, steps: int) -> None:
    rule = LocalSGD(batch_size=size)
    handed_out = batches(rule, samples, steps)
    assert len(handed_out) == (steps if samples else 0)
    assert rule.examples(np.array([steps]), np.array([samples])).tolist() == [sum(map(len, handed_out))]


@given(st.integers(1, 60), sizes, st.integers(1, 4))
@settings(deadline=None)
def test_every_epoch_sees_each_example_once(samples: int, size: int | None, epochs: int) -> None:
    rule = LocalSGD(batch_size=size, epochs=epochs)
    steps = steps_of(rule, samples)[0]
    handed_out = batches(rule, samples, steps)
    per_epoch = steps // epochs
    for epoch in range(epochs):
        one = handed_out[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(example for batch in one for example in batch) == list(range(samples))
        assert {len(batch) for batch in one[:-1]} <= {size}
        assert 1 <= len(one[-1]) <= (size or samples)
    assert rule.examples(np.array([steps]), np.array([samples])).tolist() == [epochs * samples]


def test_batches_are_keyed_by_client_task_and_epoch() -> None:
    rule = LocalSGD(batch_size=25)
    orders = [batches(rule, 50, 2, client, nth) for client, nth in ((0, 0), (0, 1), (1, 0), (1, 1))]
    drawn = {tuple(order) for task in orders for order in task}
    assert len(drawn) == 8
    assert batches(rule, 50, 2, 1, 0) == orders[2]
    assert batches(rule, 50, 1, 1, 0) == orders[2][:1]  # more steps begin with the same ones
    assert [torch.tensor(order).tolist() for order in orders[1]] == [
        each.tolist() for each in batches_of(0, 1, 50, 25, 2)
    ]


# ---- settings ------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG = [
    *[("lr", value) for value in (-0.1, NAN, INF, "fast", None, True)],
    *[("batch_size", value) for value in (0, -1, 2.5, "all", INF)],
    *[("epochs", value) for value in (0, -1, NAN, INF, None)],
    *[("steps", value) for value in (-1, 2.5, NAN, True, "many", [1, -1], [1, "x"], object(), {1: 2, -3: 4})],
    *[("momentum", value) for value in (-0.1, 1, 1.5, NAN, None)],
    *[("weight_decay", value) for value in (-1, NAN, INF)],
    *[("clip", value) for value in (0, -1, NAN, "no")],
    *[("prox", value) for value in (-1, NAN, INF, None)],
    *[("lr_decay", value) for value in (0, -1, 1.1, NAN)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value)[:12])
def test_a_wrong_setting_is_refused_in_one_line_with_its_name(name: str, value: object) -> None:
    for make in (lambda: LocalSGD(**{name: value}), lambda: LocalSGD().replace(**{name: value})):
        with pytest.raises(ConfigError, match=rf"^{name}\b") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_numpy_and_torch_numbers_are_numbers() -> None:
    rule = LocalSGD(lr=np.float32(0.5), batch_size=np.int64(3), steps=np.int64(4), clip=torch.tensor(2.0))  # type: ignore[arg-type]
    assert (rule.lr, rule.batch_size, rule.steps, rule.clip) == (0.5, 3, 4, 2.0)
    assert type(rule.lr) is float


def test_replacing_leaves_the_original_alone_and_keeps_the_rest() -> None:
    first = LocalSGD(lr=0.2, momentum=0.5, steps=[1, 2])
    second = first.replace(prox=0.3, sends="model")
    assert (first.prox, first.sends) == (0.0, "delta")
    assert (second.lr, second.momentum, second.prox, second.sends) == (0.2, 0.5, 0.3, "model")
    assert second.steps == [1, 2]
    assert second.steps is not first.steps


def test_replacing_keeps_the_rules_own_class() -> None:
    other = Sharp(radius=0.25, lr=0.3).replace(lr=0.1)
    assert isinstance(other, Sharp)
    assert (other.radius, other.lr) == (0.25, 0.1)


def test_replacing_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises((ConfigError, TypeError, AttributeError), match="learning_rate"):
        LocalSGD().replace(learning_rate=0.3)


# ---- rules of one's own, and stacks --------------------------------------------------------------


class Sharp(LocalSGD):
    """Sharpness-aware steps: the gradient is taken a little uphill, with the same batch."""

    def __init__(self, radius: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.radius = radius

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        gradient = ctx.grad(x, batch)
        return ctx.grad(x + self.radius * gradient / gradient.norm(dim=-1, keepdim=True), batch)


class Memory(LocalSGD):
    """Follows what the server sent and what it kept, and keeps where it came to."""

    def initial_state(self, layout: Layout) -> dict[str, Tensor]:
        return {"kept": layout.zeros(), "count": torch.zeros((), dtype=torch.int64)}

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        return ctx.grad(x, batch) + ctx.message["c"] - ctx.state["kept"]

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        ctx.state["kept"] = x
        ctx.state["count"] = ctx.state["count"] + 1
        return {"delta": x}


def test_a_rule_with_two_gradients_a_step_equals_the_loop_by_hand() -> None:
    problem = classification(9, 7)
    rule = Sharp(radius=0.1, lr=0.5, batch_size=4, epochs=2, momentum=0.5)
    x, velocity = problem.initial(), None
    for batch in batches_of(1, 0, 7, 4, 4):
        gradient = problem.gradient(x, 1, batch, 0)
        gradient = problem.gradient(x + 0.1 * gradient / gradient.norm(dim=-1, keepdim=True), 1, batch, 0)
        velocity = gradient if velocity is None else 0.5 * velocity + gradient
        x = x - 0.5 * velocity
    assert torch.equal(train(rule, problem, 1).payload["delta"], x - problem.initial())


def test_message_and_state_reach_a_rule_and_its_state_comes_back() -> None:
    problem = quadratic()
    a, b = curve(problem)
    c = torch.full((4,), 0.3, dtype=torch.float64)
    kept = torch.arange(4, dtype=torch.float64)
    state = {"kept": kept, "count": torch.tensor(4)}
    result = train(Memory(lr=0.1), problem, 0, 3, message={"c": c}, state=state)
    x = problem.initial()
    for _ in range(3):
        x = x - 0.1 * (a * (x - b) + c - kept)
    torch.testing.assert_close(result.payload["delta"], x, rtol=1e-12, atol=0)
    assert torch.equal(result.state["kept"], result.payload["delta"])
    assert (result.state["count"].shape, int(result.state["count"])) == ((), 5)
    assert torch.equal(kept, torch.arange(4, dtype=torch.float64))  # what the driver holds is as it was
    assert int(state["count"]) == 4


def test_a_result_and_the_state_it_came_with_share_no_memory() -> None:
    problem = quadratic()
    state = {"kept": problem.initial(), "count": torch.tensor(0)}
    result = train(Memory(lr=0.1), problem, 0, 3, message={"c": problem.initial()}, state=state)
    before = result.state["kept"].clone()
    result.payload["delta"].zero_()  # a reply is the strategy's own
    assert torch.equal(result.state["kept"], before)


class Vandal(LocalSGD):
    """Writes to everything it was handed."""

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        for tensor in (ctx.start, *ctx.message.values(), *ctx.state.values()):
            tensor.fill_(9.0)
        return {"delta": x}


def test_a_rule_cannot_write_to_what_the_driver_holds() -> None:
    problem, held = quadratic(), [torch.zeros(4, dtype=torch.float64) for _ in range(3)]
    train(Vandal(), problem, 0, 2, start=held[0], message={"m": held[1]}, state={"s": held[2]})
    assert all(not bool(tensor.any()) for tensor in held)


def test_a_rule_that_raises_names_client_task_and_step() -> None:
    class Broken(LocalSGD):
        def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(SimulationError, match=r"Broken raised ZeroDivisionError: mine \(client 2, task 9, .* step 1\)"):
        train(Broken(), quadratic(), 2, 3)


def test_a_group_gives_what_each_task_gives_alone_in_its_order() -> None:
    problem, rule = classification(9, 7, 1, 0), LocalSGD(lr=0.5, batch_size=4, epochs=2, momentum=0.5)
    works = [
        Work(i, client, nth, "train", problem.initial() + 0.1 * i, {}, {}, 0.5, 4)
        for i, (client, nth) in enumerate([(1, 0), (0, 0), (2, 0), (1, 1), (3, 0)])
    ]
    trainer = GeneralTrainer(problem, {"train": rule}, Randomness(SEED))
    together = trainer.train(works)
    assert [result.group for result in together] == [5] * 5
    for work, result in zip(works, together, strict=True):
        alone = checked(GeneralTrainer(problem, {"train": rule}, Randomness(SEED)).train([work])[0])
        assert torch.equal(alone.payload["delta"], result.payload["delta"])
        assert alone.group == 1


class Stack(Context):
    """All clients of a quadratic as one stack, with a step count each."""

    def __init__(self, problem: Quadratic, start: Tensor, steps: list[int], lr: float) -> None:
        self.start, self.message, self.state = start, {}, {}
        self.lr = torch.full((len(steps), 1), lr, dtype=torch.float64)
        self.steps: NDArray[np.int64] = np.array(steps)
        self.clients = np.arange(len(steps))
        self.running = len(steps)
        self._problem = problem

    def batches(self) -> Iterator[None]:
        for step in range(int(self.steps.max())):
            self.running = int((step < self.steps).sum())
            yield None

    def grad(self, x: Tensor, batch: Any = None) -> Tensor:
        return torch.from_numpy(self._problem.curvature * (x.numpy() - self._problem.centres))

    def rng(self, purpose: str) -> Draw:
        return Randomness(SEED)(purpose, self.clients)


@pytest.mark.parametrize(
    "rule",
    [
        LocalSGD(lr=0.2),
        LocalSGD(lr=0.2, momentum=0.9, weight_decay=0.1, prox=0.3),
        LocalSGD(lr=0.2, clip=0.7).replace(sends="model"),
        Sharp(lr=0.2, momentum=0.5, clip=2.0),
    ],
)
def test_a_stack_of_clients_gives_what_each_client_gives_alone(rule: LocalSGD) -> None:
    problem = quadratic(4, 6)
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps = [8, 3, 1, 0]
    together = rule.run(Stack(problem, start.clone(), steps, rule.lr))[rule.sends]
    for client, count in enumerate(steps):
        alone = train(rule, problem, client, count, start=start[client]).payload[rule.sends]
        assert torch.equal(together[client], alone)

"""What is learnt: gradients against autograd and closed forms, metrics, and what is refused."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.checks import ConfigError
from fedsim.data.partitions import Dirichlet, Iid, Partition, Sampled, Shard, Table
from fedsim.data.sources import Dataset, Embedded, NpzFile
from fedsim.problems.base import Problem
from fedsim.problems.classification import Classification
from fedsim.problems.models import Cnn, Logistic, Mlp
from fedsim.problems.quadratic import Quadratic
from fedsim.problems.schedule_only import ScheduleOnly
from fedsim.rng import Randomness

CONF = Path(__file__).parents[1] / "conf"


def small(n: int = 60, shape: tuple[int, ...] = (1, 4, 4)) -> Dataset:
    """``n`` training and 30 test examples of three classes; value 0 of training example i is i."""
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(count, *shape, generator=generator) for count in (n, 30))
    train.view(n, -1)[:, 0] = torch.arange(n)
    return Dataset(train, torch.arange(n) % 3, test, torch.arange(30) % 3, 3)


def prepared(clients: int = 4, seed: int = 0, **arguments: object) -> Classification:
    problem = Classification(**{"data": small(), "model": Mlp(5), **arguments})  # type: ignore[arg-type]
    problem.prepare(clients, Randomness(seed))
    return problem


def parameters(problem: Classification, x: Tensor) -> dict[str, Tensor]:
    return {name: part.clone().requires_grad_() for name, part in problem.layout.split(x).items()}


# ---- models --------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def test_models_have_the_known_sizes() -> None:
    assert count(Cnn().build((1, 28, 28), 10)) == 1_663_370
    assert count(Logistic().build((1, 28, 28), 10)) == 7_850
    assert count(Mlp().build((1, 28, 28), 10)) == 784 * 200 + 200 + 200 * 10 + 10
    assert count(Mlp([200, 200]).build((1, 28, 28), 10)) == 199_210  # McMahan et al. 2017's 2NN


@pytest.mark.parametrize("model", [Logistic(), Mlp([6, 5]), Cnn()])
def test_models_make_logits(model: Logistic) -> None:
    assert model.build((3, 8, 5), 7)(torch.ones(2, 3, 8, 5)).shape == (2, 7)


def test_models_refuse_what_does_not_fit() -> None:
    for shape in ((784,), (28, 28), (1, 3, 28)):
        with pytest.raises(ConfigError, match="needs images"):
            Cnn().build(shape, 10)
    for hidden in (0, [], [5, -1], 2.5, "many"):
        with pytest.raises(ConfigError, match="hidden="):
            Mlp(hidden)  # type: ignore[arg-type]


# ---- classification ------------------------------------------------------------------------------


def test_train_validation_and_test_are_disjoint_and_complete() -> None:
    data = small()
    problem = prepared(data=data, validation=0.2)
    assert len(problem.val_rows) == 12
    assert sorted([*problem.val_rows, *problem.train_rows]) == list(range(60))
    # Value 0 of an example is its position in the source.
    held = torch.cat([problem.examples(client)[0] for client in range(4)])
    assert sorted(held.view(48, -1)[:, 0].tolist()) == problem.train_rows.tolist()
    assert problem.val_x.view(12, -1)[:, 0].tolist() == problem.val_rows.tolist()
    assert problem.val_y.tolist() == (problem.val_rows % 3).tolist()
    assert torch.equal(problem.test_x, data.test_x)
    assert torch.equal(problem.test_y, data.test_y)


PARTITIONS = [Iid(), Dirichlet(0.3), Shard(2), Sampled(15)]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_clients_hold_what_the_partition_gave_them(partition: Partition) -> None:
    data = small()
    problem = prepared(data=data, partition=partition)
    rows = np.setdiff1d(np.arange(60), problem.val_rows)
    spread = partition.split(Table(rows % 3, 3), 4, Randomness(0))
    for client in (0, 3, 0, 1, 2):
        expected = rows[spread.of(client)]
        assert problem.rows(client).tolist() == expected.tolist()
        images, labels = problem.examples(client)
        assert torch.equal(images, data.train_x[expected])
        assert labels.tolist() == (expected % 3).tolist()
        assert problem.samples[client] == len(expected)


@pytest.mark.parametrize("partition", PARTITIONS[:3])
def test_client_table_counts_classes(partition: Partition) -> None:
    problem = prepared(partition=partition)
    table = problem.client_table()
    assert list(table) == ["samples", "class_0", "class_1", "class_2"]
    for client in range(4):
        held = problem.examples(client)[1].numpy()
        counts = [int(table[f"class_{label}"][client]) for label in range(3)]
        assert counts == np.bincount(held, minlength=3).tolist()
        assert sum(counts) == table["samples"][client] == len(held)


def test_client_table_draws_nobody() -> None:
    problem = prepared(1_000_000, partition=Sampled(7))
    table = problem.client_table()
    assert list(table) == ["samples"]
    assert (table["samples"] == 7).all()
    assert len(table["samples"]) == 1_000_000


def test_examples_are_kept_once() -> None:
    data = small()
    assert prepared(data=data).train_x.data_ptr() == data.train_x.data_ptr()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_whose_turn_it_was_does_not_show(partition: Partition) -> None:
    problem = prepared(partition=partition)
    x = problem.initial()
    some = torch.tensor([2, 0, 2])
    for client, batch in ((0, None), (1, some), (1, None), (0, some), (0, None), (3, None), (3, some)):
        alone = prepared(partition=partition)
        expected = alone.gradient(x, client, batch, 0)
        assert torch.equal(problem.gradient(x, client, batch, 0), expected)
        images, labels = (each if batch is None else each[batch] for each in alone.examples(client))
        assert torch.equal(alone._flat.slope(images, labels), expected)


def test_preparing_anew_forgets_whose_turn_it_was() -> None:
    problem = prepared(4)
    problem.gradient(problem.initial(), 0, None, 0)
    problem.prepare(9, Randomness(3))
    assert torch.equal(problem.examples(0)[0], prepared(9, 3).examples(0)[0])


@pytest.mark.parametrize("model", [Logistic(), Mlp([7, 5]), Cnn()])
def test_gradient_is_autograds(model: Logistic) -> None:
    problem = prepared(model=model)
    torch.manual_seed(1)
    x = problem.initial() + 0.1 * torch.randn(problem.layout.size)
    before = x.clone()
    reference = model.build((1, 4, 4), 3)
    for client, batch in ((0, torch.tensor([3, 1])), (2, None), (2, torch.tensor([4])), (1, torch.tensor([0, 0, 2]))):
        values = parameters(problem, x)
        images, labels = problem.examples(client)
        if batch is not None:
            images, labels = images[batch], labels[batch]
        logits = functional_call(reference, values, (images,))
        loss = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
        expected = torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, list(values.values()))])
        with torch.no_grad():  # as a driver may call it
            found = problem.gradient(x, client, batch, 7)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(found, problem.gradient(x, client, batch, 8))
    assert torch.equal(x, before)


def test_gradient_is_the_callers_own() -> None:
    problem = prepared()
    first = problem.gradient(problem.initial(), 0, None, 0)
    kept = first.clone()
    problem.gradient(problem.initial(), 1, None, 0)
    assert torch.equal(first, kept)
    problem.initial().zero_()
    assert problem.initial().abs().sum() > 0


def test_clients_without_examples_have_a_zero_gradient() -> None:
    problem = prepared(clients=100)
    empty = int(np.flatnonzero(problem.samples == 0)[0])
    full = int(np.flatnonzero(problem.samples)[0])
    assert problem.samples.sum() == 54
    assert torch.equal(problem.gradient(problem.initial(), empty, None, 0), problem.layout.zeros())
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(problem.gradient(problem.initial(), full, none, 0), problem.layout.zeros())


def test_evaluate_is_exact() -> None:
    problem = prepared(data=small(shape=(5,)), model=Logistic())
    x = problem.initial()
    part = problem.layout.split(x)
    metrics = problem.evaluate(x)
    assert list(metrics) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    for prefix, images, labels in (("", problem.test_x, problem.test_y), ("val_", problem.val_x, problem.val_y)):
        logits = images.double() @ part["1.weight"].double().T + part["1.bias"].double()
        loss = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
        assert metrics[f"{prefix}loss"] == pytest.approx(float(loss), rel=1e-6)
        assert metrics[f"{prefix}accuracy"] == float((logits.argmax(1) == labels).double().mean())


def test_evaluate_joins_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = prepared()
    whole = problem.evaluate(problem.initial())
    monkeypatch.setattr("fedsim.problems.classification.CHUNK", 7)
    assert problem.evaluate(problem.initial()) == pytest.approx(whole, rel=1e-6)


def test_without_validation_there_is_no_target() -> None:
    problem = prepared(validation=0)
    assert list(problem.evaluate(problem.initial())) == ["loss", "accuracy"]
    assert problem.target_metric is None
    assert problem.samples.sum() == 60
    assert prepared().target_metric == ("val_accuracy", "above")


def test_bits_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    first = prepared()
    torch.manual_seed(6)  # what the global generator holds must not matter
    again, other = prepared(), prepared(seed=1)
    assert torch.equal(first.initial(), again.initial())
    assert np.array_equal(first.train_rows, again.train_rows)
    assert not torch.equal(first.initial(), other.initial())
    assert not np.array_equal(first.train_rows, other.train_rows)
    assert not np.array_equal(first.val_rows, other.val_rows)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_global_generator_is_left_alone(dropout: bool) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    problem = prepared(model=with_dropout if dropout else Mlp(5))
    problem.gradient(problem.initial(), 0, None, 1)
    problem.evaluate(problem.initial())
    assert torch.equal(before, torch.get_rng_state())


def test_a_pickled_copy_gives_the_same_bits() -> None:
    problem = prepared(model=Mlp(5))
    x = problem.initial()
    expected = problem.gradient(x, 1, None, 0), problem.evaluate(x)
    other = pickle.loads(pickle.dumps(problem))
    for _ in range(2):  # twice: the copy's module must write to the copy's own flat vectors
        assert torch.equal(other.gradient(x, 1, None, 0), expected[0])
        assert other.evaluate(x) == expected[1]
    assert not torch.equal(other.gradient(x + 1, 1, None, 0), expected[0])


def test_what_was_gathered_is_not_pickled() -> None:
    problem = prepared(data=small(3000, (1, 8, 8)), clients=2, validation=0)
    before = len(pickle.dumps(problem))
    problem.examples(1)
    assert len(pickle.dumps(problem)) == before
    assert before < 1.2 * problem.train_x.nbytes  # the data set and its examples are one
    assert problem._held is not None  # and the problem itself has lost nothing


def test_a_pickled_module_carries_its_parameters_once() -> None:
    # Views of one flat vector would each be written with all of it.
    problem = prepared(model=Mlp([500, 100]))
    assert len(pickle.dumps(problem._flat)) < 1.1 * problem.layout.nbytes


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Dropout(0.5), nn.Linear(20, 3))


class Hidden(nn.Module):
    """Draws without a dropout layer that one could see."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(nn.functional.dropout(x.flatten(1), 0.5, self.training))
        return last


@pytest.mark.parametrize("model", [with_dropout, Hidden])
def test_dropout_is_keyed_by_the_noise_seed(model: Callable[[], nn.Module]) -> None:
    problem = prepared(model=model)
    assert problem.draws
    assert not prepared().draws
    x = problem.initial()
    first = problem.gradient(x, 0, None, 1)
    problem.evaluate(x)
    assert not torch.equal(first, problem.gradient(x, 0, None, 2))
    assert torch.equal(first, problem.gradient(x, 0, None, 1))
    assert problem.evaluate(x) == problem.evaluate(x)


def test_a_users_own_module() -> None:
    mine = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)).double()
    mine[1].weight.requires_grad_(False)
    weights = [each.detach().clone() for each in mine.parameters()]
    problem = prepared(model=mine)
    assert problem.layout.dtype == torch.float64
    assert problem.layout.size == 8 + 16 + 27  # the frozen weight is not learnt, so it does not travel
    assert torch.equal(problem.initial(), torch.cat([each.reshape(-1) for each in weights[1:]]))
    problem.evaluate(problem.initial() + 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, mine.parameters(), strict=True))


def test_tied_weights_travel_once() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    module[2].weight = module[1].weight
    problem = prepared(model=module)
    assert problem.layout.size == count(module) == 256 + 32 + 51
    copy = pickle.loads(pickle.dumps(problem))
    x = problem.initial() + 0.01
    assert torch.equal(copy.gradient(x, 0, None, 0), problem.gradient(x, 0, None, 0))


def test_lazy_layers_take_their_shape_under_the_seed() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

    first, again = prepared(model=build), prepared(model=build)
    assert first.layout.size == 51
    assert torch.equal(first.initial(), again.initial())
    assert not first.draws


class Shifting(nn.Flatten):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.sub_(0.5))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)), "GroupNorm"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), "cannot take examples of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), "must make logits"),
        (nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(3)), "no trainable parameters"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3)).requires_grad_(False), "no trainable"),
        (lambda: 3, "not a torch module"),
        (nn.Sequential(Shifting(), nn.Linear(16, 3)), "writes into the examples"),
    ],
)
def test_modules_that_do_not_fit_are_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        prepared(model=model)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused() -> None:
    for arguments, words in (
        ({"validation": 0.6}, "validation=0.6"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"data": 3}, "data=3"),
        ({"model": 3}, "model=3"),
        ({"partition": "iid"}, "partition='iid'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Classification(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leaves none of 1"):
        prepared(data=small(1), clients=1)


def test_plain_gradient_descent_learns_real_images() -> None:
    # A sign or scale error in the gradient, or labels that do not belong to their images, would show here.
    problem = Classification(model=Logistic())
    problem.prepare(10, Randomness(0))
    x = problem.initial()
    for _ in range(4):
        for client in range(10):
            x -= 0.05 * problem.gradient(x, client, None, 0)
    metrics = problem.evaluate(x)
    assert problem.samples.sum() == 5400
    assert metrics["accuracy"] > 0.65
    assert metrics["val_accuracy"] > 0.65


# ---- quadratic -----------------------------------------------------------------------------------


def quadratic(clients: int = 7, seed: int = 0, **arguments: float) -> Quadratic:
    problem = Quadratic(**arguments)  # type: ignore[arg-type]
    problem.prepare(clients, Randomness(seed))
    return problem


def test_quadratic_gradient_is_autograds() -> None:
    problem = quadratic()
    x = torch.linspace(-1, 1, 10, dtype=torch.float64, requires_grad=True)
    for client in range(7):
        curvature, centre = (torch.from_numpy(each[client]) for each in (problem.curvature, problem.centres))
        (expected,) = torch.autograd.grad(0.5 * (curvature * (x - centre) ** 2).sum(), x)
        found = problem.gradient(x.detach(), client, None, 1)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_quadratic_optimum() -> None:
    problem = quadratic()
    best = torch.from_numpy(problem.optimum)
    total = sum(problem.gradient(best, client, None, 0) for client in range(7))
    assert isinstance(total, Tensor)
    assert total.abs().max() < 1e-13
    at_best = problem.evaluate(best)
    assert at_best["distance"] == 0
    step = torch.full((10,), 0.5, dtype=torch.float64)
    away = problem.evaluate(best + step)
    assert away["distance"] == pytest.approx(2.5)
    assert away["loss"] - at_best["loss"] == pytest.approx(0.125 * problem.curvature.sum() / 7)


def test_quadratic_laws_and_keys() -> None:
    problem = quadratic(4000)
    assert problem.curvature.min() >= 0.2
    assert problem.curvature.max() <= 2
    assert problem.curvature.mean() == pytest.approx(1.1, abs=0.01)
    assert problem.centres.mean() == pytest.approx(0, abs=0.06)
    assert problem.centres.std() == pytest.approx(3, abs=0.05)
    assert np.corrcoef(problem.curvature[:, 0], np.abs(problem.centres[:, 0]))[0, 1] == pytest.approx(0, abs=0.07)
    assert problem.samples.tolist() == [1] * 4000
    few = quadratic(3)
    np.testing.assert_array_equal(few.curvature, problem.curvature[:3])
    np.testing.assert_array_equal(few.centres, problem.centres[:3])
    assert not np.array_equal(quadratic(3, seed=1).centres, few.centres)
    assert few.target_metric == ("distance", "below")
    assert few.initial().tolist() == [0] * 10


def test_quadratic_noise_is_keyed_and_scaled() -> None:
    exact, noisy = quadratic(dimension=4000), quadratic(dimension=4000, noise=0.5)
    x = exact.initial()
    error = noisy.gradient(x, 2, None, 9) - exact.gradient(x, 2, None, 9)
    assert float(error.std()) == pytest.approx(0.5, rel=0.05)
    assert float(error.mean()) == pytest.approx(0, abs=0.04)
    assert torch.equal(noisy.gradient(x, 2, None, 9), noisy.gradient(x, 2, None, 9))
    assert not torch.equal(noisy.gradient(x, 2, None, 9), noisy.gradient(x, 2, None, 10))


@pytest.mark.parametrize(
    "arguments",
    [{"dimension": 0}, {"low": 0}, {"high": 0.1}, {"spread": -1}, {"noise": -1}, {"noise": float("nan")}],
)
def test_quadratic_refuses(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))}="):
        Quadratic(**arguments)  # type: ignore[arg-type]


# ---- nothing, and the configuration --------------------------------------------------------------


def test_schedule_only_charges_bytes_and_trains_nothing() -> None:
    problem = ScheduleOnly(parameters=123, samples=5)
    problem.prepare(3, Randomness(0))
    assert problem.layout.nbytes == 492
    assert problem.layout.size == 0
    assert problem.initial().shape == problem.gradient(problem.initial(), 0, None, 0).shape == (0,)
    assert problem.evaluate(problem.initial()) == {}
    assert problem.samples.tolist() == [5, 5, 5]
    assert problem.target_metric is None
    with pytest.raises(ConfigError, match="parameters="):
        ScheduleOnly(parameters=0)
    with pytest.raises(ConfigError, match="samples="):
        ScheduleOnly(samples=0)


@pytest.mark.parametrize("problem", [Quadratic(noise=0.1), ScheduleOnly()])
def test_prepared_problems_can_be_sent_to_workers(problem: Problem) -> None:
    problem.prepare(3, Randomness(0))
    x = problem.initial() + 1
    other = pickle.loads(pickle.dumps(problem))
    assert torch.equal(other.gradient(x, 1, None, 4), problem.gradient(x, 1, None, 4))


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ("data/embedded", Embedded),
        ("data/npz", NpzFile),
        ("partition/iid", Iid),
        ("partition/dirichlet", Dirichlet),
        ("partition/shard", Shard),
        ("partition/sampled", Sampled),
        ("model/logistic", Logistic),
        ("model/mlp", Mlp),
        ("model/cnn", Cnn),
        ("problem/classification", Classification),
        ("problem/quadratic", Quadratic),
        ("problem/none", ScheduleOnly),
    ],
)
def test_yaml_and_constructor_agree(choice: str, made: type) -> None:
    text = (CONF / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    keys = yaml.safe_load(text)
    assert keys.pop("_target_") == f"{made.__module__}.{made.__qualname__}"
    defaults = {name: each.default for name, each in inspect.signature(made).parameters.items()}
    groups = {"data", "model", "partition"}
    assert keys == {name: value for name, value in defaults.items() if name not in groups}

"""The steps in C: the same bits on every instruction set, in one go or step by step, and no number out of place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedsim
from fedsim.checks import ConfigError
from fedsim.data.sources import Dataset
from fedsim.identity import differences
from fedsim.local import Extras
from fedsim.pool import InlinePool
from fedsim.problems.chain import Chain, Layer
from fedsim.problems.models import Logistic, Mlp
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.training import StackedTrainer, Work, batches, kernel_for, trainer_for
from fedsim.training.batches import Batch, StackBatches, Steps
from fedsim.training.closed_form import ClosedForm
from fedsim.training.native import NativeForm, built, instruction_sets
from fedsim.vectors import aligned_stack

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="was not built, or this processor has no AVX2")

EXAMPLES = 60
EVERYTHING = Extras(clip=0.4, weight_decay=0.05, prox=0.3, momentum=0.8)


def chain_of(
    widths: Sequence[int], activations: Sequence[str | None], bias: bool, loss: str, seed: int = 0, size: float = 1.0
) -> Chain:
    layers, place = [], 0
    for before, after, activation in zip(widths, widths[1:], (*activations, None), strict=False):
        layers.append(Layer(before, after, place, place + before * after if bias else None, activation))
        place += before * after + bias * after
    generator = torch.Generator().manual_seed(seed)
    inputs = size * torch.randn(EXAMPLES, widths[0], generator=generator)
    targets = {
        "cross_entropy": torch.randint(0, widths[-1], (EXAMPLES,), generator=generator),
        "binary": torch.randint(0, 2, (EXAMPLES,), generator=generator).float(),
        "squared": torch.randn(EXAMPLES, generator=generator),
    }
    return Chain(tuple(layers), loss, inputs, targets[loss], lambda clients: torch.arange(EXAMPLES))


def parameters(chain: Chain, clients: int, seed: int = 1) -> Tensor:
    size = sum(each.outputs * (each.inputs + (each.bias is not None)) for each in chain.layers)
    return aligned_stack(clients, torch.empty(size)).normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))


def some_steps(running: Sequence[int], size: int, full: Sequence[int], seed: int = 2) -> Steps:
    """Random batches; of each client's ``size`` places only so many count."""
    generator, clients = torch.Generator().manual_seed(seed), len(full)
    rows = torch.randint(0, EXAMPLES, (len(running), clients, size), generator=generator)
    counts = torch.tensor(full)[None, :, None]
    scale = torch.where(torch.arange(size) < counts, 1.0 / counts, torch.zeros(()))
    return Steps(rows, scale.expand(len(running), -1, -1).unsqueeze(3), torch.tensor(running))


shapes = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(1, 40), min_size=2, max_size=4),
        "activations": st.lists(st.sampled_from(["relu", "tanh", None]), min_size=3, max_size=3),
        "bias": st.booleans(),
        "loss": st.sampled_from(["cross_entropy", "binary", "squared"]),
    }
)


def chain_from(shape: dict) -> Chain:
    widths = shape["widths"] if shape["loss"] == "cross_entropy" else [*shape["widths"][:-1], 1]
    return chain_of(widths, shape["activations"][: len(widths) - 2], shape["bias"], shape["loss"])


# ---- the bits ------------------------------------------------------------------------------------


@pytest.mark.skipif(len(instruction_sets()) < 2, reason="this processor has one instruction set only")
@settings(max_examples=60, deadline=None)
@given(shape=shapes, size=st.integers(1, 13), extras=st.sampled_from([Extras(), EVERYTHING, Extras(momentum=0.5)]))
def test_every_instruction_set_gives_the_same_bits(shape: dict, size: int, extras: Extras) -> None:
    chain = chain_from(shape)
    steps, lr = some_steps([3, 3, 2, 1], size, [size, max(size - 1, 1), 1]), torch.tensor([[0.1], [0.2], [0.3]])
    made = []
    for name in instruction_sets():
        x = parameters(chain, 3)
        NativeForm(chain, name).descend_all(x, [steps], lr, parameters(chain, 3, 5), extras)
        made.append(x)
    assert made[0].isfinite().all()
    assert torch.equal(made[0], made[1])


@pytest.mark.skipif(len(instruction_sets()) < 2, reason="this processor has one instruction set only")
def test_every_instruction_set_gives_the_same_bits_on_layers_of_the_usual_size() -> None:
    chain = chain_of([784, 200, 62, 10], ["relu", "tanh"], True, "cross_entropy")
    steps, lr = some_steps([2] * 5, 23, [23, 11]), torch.full((2, 1), 0.1)
    made = [parameters(chain, 2) for _ in instruction_sets()]
    for x, name in zip(made, instruction_sets(), strict=True):
        NativeForm(chain, name).descend_all(x, [steps], lr, x, EVERYTHING._replace(prox=0.0))
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("at_once", [1, 40, 2**16])
@pytest.mark.parametrize("extras", [Extras(), EVERYTHING, Extras(prox=0.5), Extras(momentum=0.9)])
def test_the_way_at_once_is_the_way_in_blocks_and_ends_where_start_and_update_lead(
    extras: Extras, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chain_of([9, 17, 4], ["relu"], True, "cross_entropy")
    steps = np.array([9, 7, 2])
    ids, samples = np.arange(3), np.array([20, 20, 20])

    def made() -> Iterator[Steps]:
        own = StackBatches(ids, ids, samples, steps, 6, lambda some: torch.arange(60), Randomness(1))
        return own.blocks(start)

    native, start, lr = NativeForm(chain), parameters(chain, 3), torch.full((3, 1), 0.1)
    whole, update = parameters(chain, 3), torch.empty_like(start)
    native.descend_all(whole, made(), lr, start, extras)
    monkeypatch.setattr(batches, "AT_ONCE", at_once)
    update = aligned_stack(3, start)
    native.update(update, made(), lr, start, extras)
    assert torch.equal(update, whole - start)
    alone = aligned_stack(3, start)
    native.update(alone, made(), lr, start[1].contiguous(), extras)  # one start for all
    assert torch.equal(alone[1], update[1])
    assert not torch.equal(alone[0], update[0])


def test_plain_steps_at_once_are_those_one_after_another() -> None:
    chain = chain_of([9, 17, 4], ["tanh"], True, "cross_entropy")
    native, x, lr = NativeForm(chain), parameters(chain, 3), torch.tensor([[0.1], [0.2], [0.3]])
    steps, whole = some_steps([3, 2, 2, 1], 5, [5, 4, 1]), parameters(chain, 3)
    for t, k in enumerate(steps.running.tolist()):
        native.descend(x, Batch(steps.rows[t, :k], steps.scale[t, :k]), lr)
    native.descend_all(whole, [steps], lr, whole, Extras())
    assert torch.equal(x, whole)


# ---- the numbers ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shape=shapes, size=st.integers(1, 13))
def test_gradients_are_those_of_the_closed_form_in_double_precision(shape: dict, size: int) -> None:
    chain = chain_from(shape)
    steps = some_steps([2], size, [size, max(size - 2, 1)])
    batch, x = Batch(steps.rows[0], steps.scale[0]), parameters(chain, 2)
    mine = aligned_stack(2, x)
    NativeForm(chain).gradient(x, batch, mine)
    targets = chain.targets if chain.loss == "cross_entropy" else chain.targets.double()
    double = Chain(chain.layers, chain.loss, chain.inputs.double(), targets, chain.rows)
    exact = aligned_stack(2, x.double())
    ClosedForm(double).gradient(aligned_stack(2, x.double()).copy_(x), Batch(batch.rows, batch.scale.double()), exact)
    torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=2e-6 * float(exact.abs().max().clamp_min(1)))


@pytest.mark.parametrize("activation", ["tanh", None])
@pytest.mark.parametrize("loss", ["squared", "binary"])
def test_tanh_and_sigmoid_are_right_to_the_last_digits_from_tiny_to_huge(activation: str | None, loss: str) -> None:
    values = torch.cat([torch.linspace(-95, 95, 401), torch.logspace(-30, 0, 61), -torch.logspace(-30, 0, 61)])
    chain = Chain(
        (Layer(1, 1, 0, None, activation),), loss, values[:, None], torch.zeros(len(values)), lambda clients: values
    )
    slope = aligned_stack(len(values), torch.empty(1))
    batch = Batch(torch.arange(len(values))[:, None], torch.ones(len(values), 1, 1))
    NativeForm(chain).gradient(aligned_stack(len(values), slope).fill_(1.0), batch, slope)
    z = values.double()
    a, inner = (z.tanh(), 1 - z.tanh() ** 2) if activation else (z, 1.0)
    outer = a if loss == "squared" else a.sigmoid()
    exact = outer * inner * z
    # Slopes of tanh end in 1 - a^2, which cancels; what is smaller than any normal number may be 0.
    allowed = 1e-6 * exact.abs() + (1e-6 * z.abs() if activation else 0) + 1e-35
    assert ((slope[:, 0].double() - exact).abs() <= allowed).all()


@settings(max_examples=30, deadline=None)
@given(
    extras=st.builds(
        Extras,
        clip=st.sampled_from([None, 0.05, 0.5, 1e6]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        prox=st.sampled_from([0.0, 0.7]),
        momentum=st.sampled_from([0.0, 0.9]),
    )
)
def test_what_goes_into_a_step_beside_the_gradient_is_what_the_formula_says(extras: Extras) -> None:
    chain = chain_of([9, 17, 4], ["tanh"], True, "cross_entropy")
    native, start, lr = NativeForm(chain), parameters(chain, 2), 0.3
    steps, x = some_steps([2] * 4, 5, [5, 5]), parameters(chain, 2, 7)
    y, v = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    native.descend_all(x, [steps], torch.full((2, 1), lr), start, extras)
    for t in range(4):
        slope = aligned_stack(2, x)
        native.gradient(aligned_stack(2, x).copy_(y), Batch(steps.rows[t], steps.scale[t]), slope)
        g = slope.double()
        if extras.clip is not None:
            g *= (extras.clip / g.norm(dim=1, keepdim=True)).clamp_max(1)
        g += extras.weight_decay * y + extras.prox * (y - start.double())
        v = extras.momentum * v + g
        y = y - lr * v
    torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)


def test_a_long_gradient_is_clipped_to_its_norm_to_six_digits() -> None:
    chain = chain_of([4000, 300], [], False, "cross_entropy")
    native, x, lr = NativeForm(chain), parameters(chain, 1), torch.ones(1, 1)
    steps, start = some_steps([1], 8, [8]), parameters(chain, 1)
    native.descend_all(x, [steps], lr, start, Extras(clip=1e-2))
    assert float((x - start).double().norm()) == pytest.approx(1e-2, rel=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(activation: str | None, value: float) -> None:
    chain = chain_of([5, 6, 3], [activation], True, "cross_entropy")
    chain.inputs[7] = value
    steps, x = some_steps([1, 1], 4, [4]), parameters(chain, 1)
    steps.rows[1, 0, 2] = 7
    NativeForm(chain).descend_all(x, [steps], torch.ones(1, 1), x, Extras())
    # Slopes of 0 times an infinite example are not numbers, so even a dead or saturated unit cannot hide it.
    assert not x.isfinite().all()


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_told_wherever_it_stands(name: str, value: float) -> None:
    chain = chain_of([5, 6, 3], ["relu"], True, "cross_entropy")
    native, lr, steps = NativeForm(chain, name), torch.ones(3, 1), some_steps([1], 4, [4, 4, 4])
    for place in range(parameters(chain, 1).shape[1]):
        start = parameters(chain, 3)
        start[1, place] = value
        # The second client makes no step, so its difference is 0 but for this place.
        told = native.update(aligned_stack(3, start), [steps], lr, start, Extras())
        assert told == [True, False, True], place


@pytest.mark.parametrize("name", instruction_sets())
def test_large_numbers_are_finite_though_their_sum_is_not(name: str) -> None:
    chain = chain_of([5, 6, 3], ["relu"], True, "cross_entropy")
    start, update = parameters(chain, 1), aligned_stack(1, parameters(chain, 1))
    told = NativeForm(chain, name).update(update, [some_steps([1], 4, [4])], torch.full((1, 1), 1e38), start, Extras())
    assert update.isfinite().all()
    assert not update.abs().sum().isfinite()
    assert told == [True]


# ---- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, EXAMPLES, 2**40])
def test_an_example_that_is_not_there_is_an_error_and_nothing_is_changed(wrong: int) -> None:
    chain = chain_of([5, 3], [], True, "cross_entropy")
    steps, x = some_steps([2, 2], 4, [4, 4]), parameters(chain, 2)
    steps.rows[1, 1, 3] = wrong
    with pytest.raises(IndexError, match=f"example {wrong}"):
        NativeForm(chain).descend_all(x, [steps], torch.ones(2, 1), x, Extras())
    assert torch.equal(x, parameters(chain, 2))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_that_is_not_there_is_the_error_of_its_task(wrong: int) -> None:
    data = Dataset(torch.randn(12, 5), torch.arange(12) % 3, torch.randn(2, 5), torch.zeros(2), 3)
    made = fedsim.Classification(data, Logistic(), validation=0)
    made.prepare(3, Randomness(0))
    chain = made.chain()
    assert chain is not None
    chain.targets[made.rows(1)[0]] = wrong
    trainer = StackedTrainer(made, {"train": fedsim.LocalSGD(batch_size=2)}, Randomness(0), kernel="native")
    works = [Work(i, i, 0, "train", made.initial(), {}, {}, 0.1, 2) for i in range(3)]
    results = trainer.train(works)
    assert [one.error is not None for one in results] == [False, True, False]
    assert "IndexError" in str(results[1].error)
    assert "client 1" in str(results[1].error)


# ---- which kernel --------------------------------------------------------------------------------


def run(kernel: str, out: object = None) -> fedsim.Run:
    return fedsim.simulate(FedAvg(), pool=InlinePool(kernel=kernel), stop=fedsim.Stop(rounds=3), out=out)  # type: ignore[arg-type]


def test_both_kernels_lead_to_one_model_and_the_manifest_says_which_it_was(tmp_path) -> None:
    runs = {kernel: run(kernel, tmp_path / kernel) for kernel in ("auto", "native", "torch")}
    torch.testing.assert_close(runs["native"].model, runs["torch"].model, rtol=0, atol=1e-5)
    assert runs["auto"].manifest["model_sha256"] == runs["native"].manifest["model_sha256"]
    assert runs["torch"].manifest["model_sha256"] != runs["native"].manifest["model_sha256"]
    assert runs["torch"].manifest["events_sha256"] == runs["native"].manifest["events_sha256"]
    kept = {kernel: json.loads((tmp_path / kernel / "manifest.json").read_text()) for kernel in runs}
    assert kept["auto"]["execution"] == {"kernel": "native"}
    assert differences(kept["auto"], kept["native"]) == []
    assert differences(kept["auto"], kept["torch"]) == ["kernel native -> torch"]


def test_without_it_torch_makes_the_steps_and_who_insists_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsim.training, "instruction_sets", lambda: ())
    assert kernel_for("auto") == kernel_for("torch") == "torch"
    assert InlinePool().identity() == {"kernel": "torch"}
    with pytest.raises(ConfigError, match=r"^kernel=native: is not there"):
        InlinePool(kernel="native")
    with pytest.raises(ConfigError, match=r"kernel=nativ: .*native"):
        InlinePool(kernel="nativ")


def test_what_was_built_from_another_text_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, found in ((built.REVISION, True), (built.REVISION + 1, False)):
        built.compiled.cache_clear()
        monkeypatch.setattr(built, "REVISION", revision)
        assert (built.compiled() is not None) is found
        assert built.why_not() == (
            "the processor has no AVX2" if found else "what was built does not fit this fedsim, install it again"
        )
    monkeypatch.setattr(built.importlib.util, "find_spec", lambda name: None)
    assert built.why_not() == "there was no C compiler when fedsim was installed"
    built.compiled.cache_clear()


def test_double_precision_is_not_native_whatever_is_asked_for() -> None:
    made = fedsim.LeastSquares()
    made.prepare(3, Randomness(0))
    trainer = trainer_for(made, {}, Randomness(0), kernel="native")
    assert isinstance(trainer, StackedTrainer)
    assert isinstance(trainer.form, ClosedForm)


def test_large_batches_on_large_layers_are_left_to_torch() -> None:
    data = Dataset(torch.randn(160, 784), torch.arange(160) % 3, torch.randn(2, 784), torch.zeros(2), 3)
    for width, batch, native in ((512, 64, True), (512, 80, False), (100, 80, True)):
        made = fedsim.Classification(data, Mlp(width), validation=0)
        made.prepare(2, Randomness(0))
        trainer = StackedTrainer(made, {"train": fedsim.LocalSGD(batch_size=batch)}, Randomness(0), kernel="native")
        works = [Work(i, i, 0, "train", made.initial(), {}, {}, 0.1, 1) for i in range(2)]
        assert isinstance(trainer._form_for(batch), NativeForm) is native
        assert not isinstance(StackedTrainer(made, {}, Randomness(0))._form_for(batch), NativeForm)
        torch_kernel = StackedTrainer(made, trainer.jobs, Randomness(0)).train(works)
        for mine, other in zip(trainer.train(works), torch_kernel, strict=True):
            assert torch.equal(mine.payload["delta"], other.payload["delta"]) is not native
            torch.testing.assert_close(mine.payload["delta"], other.payload["delta"], rtol=0, atol=1e-5)


def test_wide_layers_and_large_batches_are_cut_into_pieces_whose_sums_are_right() -> None:
    chain = chain_of([2500, 130, 90, 11], ["relu", "tanh"], True, "cross_entropy", size=0.1)
    steps = some_steps([2], 999, [999, 700])
    batch, x = Batch(steps.rows[0], steps.scale[0]), parameters(chain, 2)
    exact = aligned_stack(2, x.double())
    double = Chain(chain.layers, chain.loss, chain.inputs.double(), chain.targets, chain.rows)
    ClosedForm(double).gradient(aligned_stack(2, x.double()).copy_(x), Batch(batch.rows, batch.scale.double()), exact)
    made = [aligned_stack(2, x) for _ in instruction_sets()]
    for mine, name in zip(made, instruction_sets(), strict=True):
        NativeForm(chain, name).gradient(x, batch, mine)
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        assert torch.equal(mine, made[0])


WITH_AVX2 = """
import fedsim
from fedsim.strategies.fedbuff import FedBuff
from fedsim.training.native import form, linear

form.instruction_sets = linear.instruction_sets = lambda: ("avx2",)
run = fedsim.simulate(FedBuff(fedsim.LocalSGD(momentum=0.5)), stop=fedsim.Stop(rounds=4))
print(run.manifest["instruction_set"], run.manifest["model_sha256"], run.manifest["events_sha256"])
"""


@pytest.mark.slow
def test_a_whole_run_has_the_same_bits_on_an_older_instruction_set() -> None:
    known = fedsim.simulate(FedBuff(fedsim.LocalSGD(momentum=0.5)), stop=fedsim.Stop(rounds=4)).manifest
    older = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", WITH_AVX2], capture_output=True, text=True, env=older, check=True
    ).stdout.split()
    assert done == ["AVX2", known["model_sha256"], known["events_sha256"]]

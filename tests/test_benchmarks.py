"""The benchmarks: everybody does the same work on the same tensors, and the gate closes."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from fedsim.strategies.fedavg import FedAvg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # experiments/ is not installed

from experiments.benchmarks import kernel, ours, plain, processes, tables, targets, tensors, training  # noqa: E402
from experiments.benchmarks.__main__ import main, parsed  # noqa: E402
from experiments.benchmarks.contest import Block, Contestant, Measured, contest, interleaved, rounds_in  # noqa: E402
from experiments.benchmarks.workloads import GPU_WORKLOADS, WORKLOADS, Workload, from_json  # noqa: E402

TINY = Workload("tiny", "mlp", clients=6, cohort=3, samples=8, batch=4, holdings=6)


def naive_model(workload: Workload, path: Path, rounds: int = 1) -> np.ndarray:
    loop = plain.NaiveLoop(workload, plain.Tensors(path), plain.build(workload))
    for _ in range(rounds):
        loop.round()
    return loop.model()


def our_model(workload: Workload, path: Path, rounds: int = 1) -> np.ndarray:
    run = fedsim.simulate(
        FedAvg(fedsim.LocalSGD(lr=workload.lr, batch_size=workload.batch)),
        ours.problem_of(workload, plain.Tensors(path)),
        stop=fedsim.Stop(rounds=rounds),
        clients=workload.clients,
        cohort=workload.cohort,
        eval_every=0,
    )
    return torch.cat([part.reshape(-1) for part in run.model.values()]).numpy()


# ---- the same work -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
def test_the_naive_loop_equals_fedavg_after_rounds_on_whole_batches(model: str, tmp_path: Path) -> None:
    workload = replace(TINY, model=model).whole_batch()
    path = tensors.write(workload, tmp_path)
    theirs, own = naive_model(workload, path, rounds=2), our_model(workload, path, rounds=2)
    start = torch.cat([part.reshape(-1) for part in plain.Tensors(path).initial.values()]).numpy()
    assert np.abs(theirs - start).max() > 100 * training.AGREEMENT  # something was learnt
    assert np.abs(theirs - own).max() <= training.AGREEMENT


def test_one_step_of_the_naive_loop_is_what_calculus_says(tmp_path: Path) -> None:
    workload = replace(TINY, model="logistic", clients=1, cohort=1, holdings=1).whole_batch()
    path = tensors.write(workload, tmp_path)
    given = plain.Tensors(path)
    x = given.x[0].reshape(workload.samples, -1).double()
    weight, bias = (part.double() for part in given.initial.values())
    residual = torch.softmax(x @ weight.T + bias, dim=1) - torch.eye(10, dtype=torch.float64)[given.y[0]]
    residual *= workload.lr / workload.samples
    expected = torch.cat([(weight - residual.T @ x).reshape(-1), bias - residual.sum(dim=0)])
    assert np.abs(naive_model(workload, path) - expected.numpy()).max() < 1e-6


def test_both_do_as_many_local_steps_on_as_many_examples(tmp_path: Path) -> None:
    workload = replace(TINY, samples=9)  # the last batch is smaller
    seen: list[int] = []

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain.build(workload)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return self.inner(x)

    given = plain.Tensors(tensors.write(workload, tmp_path))
    plain.train(Counting(), *given.of(0), workload)
    rule = fedsim.LocalSGD(lr=workload.lr, batch_size=workload.batch)
    assert seen == [4, 4, 1]
    assert len(seen) == workload.local_steps == rule.local_steps(np.array([0]), np.array([9]))[0]


def test_the_workload_tensors_are_the_same_for_all(tmp_path: Path) -> None:
    workload = replace(TINY, clients=12)  # two clients to each holding
    path = tensors.write(workload, tmp_path)
    assert tensors.write(workload, tmp_path).read_bytes() == path.read_bytes()
    given = plain.Tensors(path)
    problem = ours.problem_of(workload, given)
    problem.prepare(workload.clients, fedsim.rng.Randomness(3))
    for client in range(workload.clients):
        theirs, own = given.of(client), problem.examples(client)
        assert torch.equal(theirs[0], own[0])
        assert torch.equal(theirs[1], own[1])
    assert torch.equal(problem.initial(), torch.cat([part.reshape(-1) for part in given.initial.values()]))


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_plain_module_is_fedsims(name: str) -> None:
    workload = WORKLOADS[name]
    theirs, own = plain.build(workload), tensors.module_of(workload)
    shapes = [{key: part.shape for key, part in module.state_dict().items()} for module in (theirs, own)]
    assert shapes[0] == shapes[1]
    theirs.load_state_dict(own.state_dict())
    x = torch.from_numpy(tensors.make(replace(workload, holdings=1, samples=3))["x"][0])
    assert torch.equal(theirs(x), own(x))


def test_a_workload_survives_its_way_to_another_process() -> None:
    for workload in (*WORKLOADS.values(), *GPU_WORKLOADS.values()):
        assert from_json(workload.to_json()) == workload


def test_images_are_framed_with_zeros_for_larger_models() -> None:
    small = tensors.make(TINY)["x"]
    large = tensors.make(replace(TINY, shape=(3, 32, 32)))["x"]
    assert large.shape == (6, 8, 3, 32, 32)
    for channel in range(3):
        assert np.array_equal(large[:, :, channel, 2:30, 2:30], small[:, :, 0])
    assert not large[:, :, :, :2].any()


def test_adapters_import_no_fedsim() -> None:
    folder = ROOT / "experiments" / "benchmarks"
    reached, waiting = set(), ["flwr_adapter", "pfl_adapter"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.partition(".")[0] == "fedsim" for module in modules), name
            waiting += [each.rpartition(".")[2] for each in modules if each.startswith("experiments.benchmarks.")]
        waiting = [each for each in waiting if each not in reached]
    assert reached == {"flwr_adapter", "pfl_adapter", "orders", "plain", "workloads"}


# ---- measuring -----------------------------------------------------------------------------------


PUPIL = """
import numpy as np
from experiments.benchmarks.orders import Orders

orders, done, held = Orders(), 0, bytearray(10**8)
print("not an answer")
while count := orders.rounds(lambda: np.array([done])):
    done += count
    orders.answer(clients=2 * count)
orders.answer(done=done)
"""


def test_a_contestant_does_what_it_is_told_and_leaves() -> None:
    with contest([Contestant("pupil", [sys.executable, "-c", PUPIL])]) as (pupil,):
        assert pupil.rounds(5).clients == 10
        assert pupil.model().tolist() == [6]  # the first one was to warm up
        pupil.watch(4)
        assert 1e8 < pupil.peak < 2e8
        assert pupil.finish() == {"done": 10}
        process = pupil._process.pid
    assert processes.tree(process) == []


class Steady(Contestant):
    """Needs a hundredth of a second for each round, and ``warm_up`` more for the first."""

    def rounds(self, count: int) -> Block:
        first, self.warm_up = self.warm_up, 0.0
        return Block(0.01 * count + first, 0.0, count)


def test_blocks_last_about_as_long_as_wanted_and_one_round_at_least() -> None:
    assert rounds_in(2.0, Steady("steady", [])) == 200
    assert rounds_in(2.0, Steady("steady", [], warm_up=0.1)) == 200
    assert rounds_in(0.001, Steady("steady", [])) == 1


def test_contestants_take_turns_and_are_compared_within_a_repeat() -> None:
    contestants = [Contestant(name, [sys.executable, "-c", PUPIL]) for name in ("first", "second")]
    with contest(contestants):
        measured = interleaved(contestants, repeats=3, seconds=0.0, least=2)
    assert list(measured) == ["first", "second"]
    assert measured["first"].speed("wall") == 1.0
    for each in measured.values():
        assert [block.clients for block in each.blocks] == [4, 4, 4]
        assert each.reference == measured["first"].blocks
        assert each.peak > 1e8


@pytest.mark.slow
def test_contestants_in_processes_of_their_own_agree_and_leave_nobody_behind(tmp_path: Path) -> None:
    workload = TINY.whole_batch()
    path = tensors.write(workload, tmp_path)
    contestants = [training.naive(path, workload), training.ours(path, workload)]
    for each in contestants:
        each.warm_up = 0.0  # so that all make equally many rounds
    with contest(contestants):
        blocks = [each.rounds(3) for each in contestants]
        models = [each.model() for each in contestants]
        ids = [each._process.pid for each in contestants]
        assert all(processes.tree(each) for each in ids)
    assert [block.clients for block in blocks] == [9, 9]
    assert all(block.wall > 0 and block.cpu > 0 for block in blocks)
    assert np.abs(models[0] - models[1]).max() <= training.AGREEMENT
    assert np.abs(models[0] - naive_model(workload, path, rounds=4)).max() <= training.AGREEMENT  # one was to warm up
    assert not any(processes.tree(each) for each in ids)


def test_a_contestant_that_fails_says_why() -> None:
    broken = Contestant("broken", [sys.executable, "-c", "raise ValueError('no such thing')"])
    with pytest.raises(RuntimeError, match=r"(?s)broken has ended.*no such thing"), contest([broken]):
        pass


def test_processor_time_and_memory_of_a_process_and_its_child() -> None:
    work = "sum(range(3 * 10**6)); held = bytearray(10**8)"
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work + '; print(1, flush=True); input()'!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        both = processes.tree(process.pid)
        assert len(both) == 2
        assert processes.cpu_seconds(both) > processes.cpu_seconds(both[:1]) > 0
        assert 1e8 < processes.memory_bytes(both) < 2e8
        assert processes.memory_bytes(both[:1]) < 1e8
        process.communicate(b"\n")
    assert processes.tree(process.pid) == []


def test_speeds_are_medians_of_ratios_within_repeats() -> None:
    # The machine was slow in the second repeat: ratios of medians would be off.
    own = [Block(1.0, 2.0, 10), Block(10.0, 20.0, 10), Block(1.0, 4.0, 20)]
    other = [Block(3.0, 2.0, 10), Block(20.0, 60.0, 10), Block(4.0, 8.0, 10)]
    measured = Measured("ours", 0.0, own, other)
    assert measured.speed("wall") == pytest.approx(3.0)  # of 3, 2, 8
    assert measured.speed("cpu") == pytest.approx(3.0)  # of 1, 3, 4
    assert measured.each("wall") == 0.1


def test_schedules_are_timed_from_a_warm_start_to_the_last_table(tmp_path: Path) -> None:
    rates = kernel.schedule("fedbuff", 10, 0.2, str(tmp_path / "out"))
    assert 100 < rates["wall"] < 10**6
    assert 100 < rates["cpu"] < 10**6
    assert rates["cpu"] < rates["bare"] < 10**8
    assert (tmp_path / "out" / "manifest.json").exists()


# ---- targets and report --------------------------------------------------------------------------


def test_the_gate_fails_below_sixty_per_cent_and_passes_above() -> None:
    assert targets.missed({"W1a": 0.61 * 2.8, "million": 2.0 / 0.61}) == []
    (line,) = targets.missed({"W1a": 0.59 * 2.8, "W3": 4.0})
    assert line == "W1a inline, speed per core: 1.652 x naive is 59% of the target 2.8"
    (line,) = targets.missed({"million": 2.0 / 0.59})  # a limit: more is worse
    assert line.startswith("a million clients")
    assert len(targets.missed({"W1a": float("nan")})) == 1
    with pytest.raises(KeyError):
        targets.missed({"no such result": 1.0})


@pytest.mark.parametrize(("result", "status"), [(1.6, 1), (1.8, 0)])
def test_only_a_short_run_fails_for_a_missed_target(
    result: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(report: tables.Report, *_: object) -> None:
        report.results["W1a"] = result

    monkeypatch.setattr("experiments.benchmarks.__main__.measure", measure)
    assert main(["--short"]) == status
    assert ("below 60%" in capsys.readouterr().err) == bool(status)
    assert main(["--table", str(tmp_path / "report.md")]) == 0
    assert f"{result:.2f}" in (tmp_path / "report.md").read_text()


def test_every_part_can_be_asked_for_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(["--only", "W3,start"]).only == ("W3", "start")
    for wrong in (["--only", "W9"], ["--repeats", "0"], ["--flwr-python", "/no/python"], ["--table", "/no/folder/x"]):
        with pytest.raises(SystemExit) as left:
            parsed(wrong)
        assert left.value.code == 2
    assert "W9: must be some of W1a" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 0
    assert capsys.readouterr().out == "--device cuda: torch sees no GPU here, nothing is measured\n"


def test_tables_line_up() -> None:
    text = tables.markdown(["", "n"], [["one", "1"], ["eleven", "11"]])
    assert text.splitlines() == ["|        |  n |", "| :----- | -: |", "| one    |  1 |", "| eleven | 11 |"]

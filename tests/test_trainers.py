"""Which trainer a problem gets, and what becomes of memory that runs out before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim.checks import TaskError
from fedsim.data import Dataset, Iid
from fedsim.pool import InlinePool
from fedsim.problems.models import LeNet
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg
from fedsim.training import GeneralTrainer, Trainer, VmapTrainer, trainer_for
from fedsim.training.closed_form import ClosedForm
from fedsim.training.vmapped import Vmapped

JOBS = {"train": fedsim.LocalSGD(lr=0.1)}


class Peeking(nn.Module):
    """Looks at a value, which no stack of clients has one of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits if logits.sum().item() > 0 else 2 * logits


@pytest.mark.parametrize(("model", "kind"), [(LeNet(), VmapTrainer), (Peeking(), GeneralTrainer)])
def test_a_module_is_put_on_a_device_once_to_see_whether_it_can_be_stacked(
    model: nn.Module, kind: type[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.zeros(6, 1, 16, 16), torch.arange(6) % 3
    problem = fedsim.Classification(Dataset(x, y, x, y, 3), model, Iid(), validation=0.0)
    problem.prepare(2, Randomness(0))
    made: list[Vmapped] = []
    begin = Vmapped.__init__
    monkeypatch.setattr(Vmapped, "__init__", lambda self, *given: (made.append(self), begin(self, *given))[1])
    trainer = trainer_for(problem, JOBS, Randomness(0), "meta")
    assert type(trainer) is kind
    assert len(made) == 1
    assert kind is not VmapTrainer or trainer.form is made[0]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("can't allocate memory: you tried to allocate")]
)
def test_memory_that_runs_out_while_a_size_of_stacks_is_tried_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(form: ClosedForm, size: int) -> int:
        raise error

    monkeypatch.setattr(ClosedForm, "least_lanes", full)
    with pytest.raises(TaskError, match=r"out of memory: one task alone does not fit \(") as caught:
        fedsim.simulate(FedAvg(JOBS["train"]), pool=InlinePool(kernel="torch"), stop=fedsim.Stop(rounds=1))
    cause = caught.value.__cause__
    assert isinstance(cause, TaskError)
    assert cause.fatal  # whatever the faults model says


def test_anything_else_that_goes_wrong_in_the_trial_is_no_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(form: ClosedForm, size: int) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(ClosedForm, "least_lanes", broken)
    with pytest.raises(ValueError, match="a bug"):
        fedsim.simulate(FedAvg(JOBS["train"]), pool=InlinePool(kernel="torch"), stop=fedsim.Stop(rounds=1))

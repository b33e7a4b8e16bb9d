"""A worker's answers, near and far, without a Ray around it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import fedsim
from fedsim.pool import InlinePool
from fedsim.pool.crew import Member
from fedsim.pool.lines import Line, Ticket
from fedsim.pool.parcels import Packed, Parcel, Results, shared_tensors
from fedsim.pool.ray import Group, RayPool
from fedsim.pool.regions import Letter, Region
from fedsim.pool.usercode import pickled_with_user_code
from fedsim.pool.worker import Answer, Worker
from fedsim.rng import Randomness
from fedsim.training import Result, Work

WORKS = [Work(task, task, 0, "main", torch.full((5000,), 1.0 + task % 2), {}, {}, 0.1, 3) for task in range(4)]


def parts() -> tuple[Any, ...]:
    problem = fedsim.Quadratic(dimension=5000)
    problem.prepare(10, Randomness(0))
    return problem, {"main": fedsim.LocalSGD(momentum=0.5)}, Randomness(0)


def worker() -> Worker:
    return Worker(pickled_with_user_code((*parts(), "cpu")), probe=None)


def group(region: Region | None = None) -> Group:
    return Group(WORKS, shared_tensors(WORKS), region=region)


def parcels() -> list[Parcel]:
    places = {id(tensor): place for place, tensor in enumerate(group().shared)}
    return [Parcel.of(work, places) for work in WORKS]


def deltas(results: list[Result]) -> torch.Tensor:
    return torch.stack([result.payload["delta"] for result in results])


def expected() -> torch.Tensor:
    pool = InlinePool()
    pool.open(*parts())
    pool.submit(WORKS)
    return deltas([pool.result(work.task) for work in WORKS])


def test_near_and_far_give_what_the_driver_would_and_near_is_copied_before_the_region_is_used_again() -> None:
    one, near = worker(), group(Region.create())
    far = one.train(parcels(), *map(Packed.of, near.shared))
    assert torch.equal(deltas(group().results(far)), expected())
    for _ in range(2):
        letter = near.sealed(parcels())
        assert letter is not None
        answer = one.train_near(pickle.loads(pickle.dumps(letter)))
        assert isinstance(answer.results, Letter)
        results = near.results(answer)
        assert near.region is not None
        near.region.seal(torch.zeros(10**5).numpy())
        assert torch.equal(deltas(results), expected())
    assert len(one._regions) == 1


def test_results_for_which_there_is_no_room_go_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    one, near = worker(), group(Region.create())
    letter = near.sealed(parcels())

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Region, "seal", refuse)
    assert letter is not None
    answer = one.train_near(letter)
    assert isinstance(answer, Answer)
    assert isinstance(answer.results, Results)
    assert torch.equal(deltas(near.results(answer)), expected())
    assert near.sealed(parcels()) is None
    assert near.region is None  # neither sent nor given back


class Recorder:
    """Stands for an actor: notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote = staticmethod(lambda *given: self.calls.append((name, given)))

        return Method


class Heard(Line):
    """A line whose other end is looked at here."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[Any] = []

    def ask(self, word: Any) -> Ticket:
        self.words.append(word)
        return super().ask(word)


def sent_by(pool: RayPool, member: Member) -> tuple[Any, Group]:
    pool._ray = type("Ray", (), {"put": staticmethod(lambda packed: ("reference", packed.array[0]))})
    sent = group()
    pool._store.keep(sent.shared)
    sent.join(member)
    return pool._send(sent), sent


def test_who_has_a_line_gets_letters_through_it_and_all_others_references() -> None:
    pool, actor, line = RayPool(), Recorder(), Heard()
    member = Member(0, actor, greeting=None, near=True, line=line)
    ticket, sent = sent_by(pool, member)
    assert ticket in line.tickets
    assert [type(word) for word in line.words] == [Letter]
    assert actor.calls == []
    assert len(pool._store) == 0
    sent.leave()
    member.line = None
    sent_by(pool, member)
    ((called, given),) = actor.calls
    assert called == "train"
    assert given[1:] == tuple(("reference", work.start[0]) for work in WORKS)
    assert len(pool._store) == len(WORKS)


def test_without_room_in_a_region_the_line_is_left_and_ray_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left")

    pool, actor, line = RayPool(), Recorder(), Heard()
    member = Member(0, actor, greeting=None, near=True, line=line)
    monkeypatch.setattr(Region, "seal", refuse)
    sent_by(pool, member)
    assert not line.takes  # a worker that waits at its line hears no call
    assert line.words == []
    assert [called for called, _ in actor.calls] == ["train"]
    assert member.lent() is None


def test_a_region_goes_back_to_its_worker_and_is_lost_with_it() -> None:
    member, one, two = Member(0, "actor", greeting=None, near=True, line=Line()), group(), group()
    one.join(member)
    two.join(member)
    regions = {id(one.region), id(two.region)}
    assert len(regions) == 2
    one.leave()
    two.leave()
    assert {id(region) for region in member.regions} == regions
    one.join(member)
    assert len(member.regions) == 1
    member.actor = "another"
    one.leave()
    assert len(member.regions) == 1

from __future__ import annotations

import pytest
from grids import deployed, grid_of

from fedsim.checks import ConfigError, SimulationError
from fedsim.flower.configuration import run_config
from fedsim.flower.messages import WORK


def outcomes(run, client):
    return run.events.loc[run.events["client"] == client, "outcome"].tolist()


def test_a_killed_node_loses_its_task_and_the_run_ends_with_what_is_left(tmp_path):
    grid = grid_of(tmp_path, "rounds=4", "local.steps=10", speeds=(0.1, 0.1, 0.3))
    grid.clock.later(2.05, lambda: grid.remove(1002))
    run = deployed(grid)
    assert outcomes(run, 2) == ["interrupted"]
    assert run.summary["outcomes"] == {"applied": 12, "interrupted": 1, "pending": 2}
    assert set(run.events.loc[run.events["outcome"] == "applied", "client"]) == {0, 1}
    lost = run.events[run.events["client"] == 2].iloc[0]
    assert lost["up_bytes"] == 0
    assert lost["down_bytes"] == run.events["down_bytes"].iloc[0]
    assert "client 2 is gone (node 1002)" in (tmp_path / "out" / "run.log").read_text()


def test_a_node_that_comes_while_the_run_goes_on_takes_part(tmp_path):
    grid = grid_of(tmp_path, "rounds=6", "local.steps=10", speeds=(0.1, 0.1), wait_seconds=0.5)
    grid.nodes[1000].config["num-partitions"] = grid.nodes[1001].config["num-partitions"] = 3
    grid.clock.later(2.75, lambda: grid.add(7, 0.1, partition_id=2, num_partitions=3))
    run = deployed(grid)
    first = run.events[run.events["client"] == 2].iloc[0]
    # It came 2.25 s after time 0, which is 0.5 s after the first look; the third round begins at 3 s.
    assert first["dispatched"] == pytest.approx(3.0)
    assert set(outcomes(run, 2)[:-1]) == {"applied"}
    assert "begins with 2 of 3 clients" in (tmp_path / "out" / "run.log").read_text()


def test_a_client_comes_back_as_another_node(tmp_path):
    grid = grid_of(tmp_path, "strategy=fedbuff", "cohort=3", "rounds=8", "local.steps=10", speeds=(0.1, 0.1, 0.1))
    grid.clock.later(1.55, lambda: grid.remove(1001))
    grid.clock.later(3.05, lambda: grid.add(2000, 0.1, partition_id=1, num_partitions=3))
    run = deployed(grid)
    mine = run.events[run.events["client"] == 1]
    assert mine["outcome"].tolist()[:3] == ["applied", "interrupted", "applied"]
    assert mine["dispatched"].iloc[2] == pytest.approx(3.05, abs=0.2)
    assert "client 1 is another node than before" in (tmp_path / "out" / "run.log").read_text()


def test_a_client_whose_node_is_replaced_within_one_look_loses_its_task(tmp_path):
    grid = grid_of(tmp_path, "strategy=fedbuff", "cohort=3", "rounds=8", "local.steps=10", speeds=(0.1, 0.1, 0.1))
    grid.clock.later(1.55, lambda: grid.add(2000, 0.1, partition_id=1, num_partitions=3))  # asked who it is
    grid.clock.later(1.60, lambda: grid.remove(1001))  # and heard when the other one has just gone
    run = deployed(grid)
    mine = run.events[run.events["client"] == 1]
    assert mine["outcome"].tolist()[:3] == ["applied", "interrupted", "applied"]
    assert mine["dispatched"].iloc[2] == pytest.approx(1.6)
    assert "not taken" not in (tmp_path / "out" / "run.log").read_text()


def test_nodes_without_a_number_get_the_lowest_free_ones(tmp_path):
    grid = grid_of(tmp_path, speeds=())
    grid.add(30)
    grid.add(10, partition_id=1)
    grid.add(20)
    deployed(grid)
    to = {(m.metadata.dst_node_id, m.content["order"]["client"]) for m in grid.pushed
          if m.metadata.message_type == WORK}  # fmt: skip
    assert (10, 1) in to
    assert {client for _, client in to} == {0, 1, 2}
    assert len(to) == 3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"partition_id": 3, "num_partitions": 3}, "partition-id=3: must be from 0 to 2"),
        ({"partition_id": 0, "num_partitions": 3}, "partition-id=0: node 1000 is this client already"),
        ({"partition_id": 2, "num_partitions": 9}, "num-partitions=9: the run has clients=3"),
        ({"partition_id": "two"}, "partition-id=two: must be a whole number >= 0"),
        ({"partition_id": 2, "pause": -1.0}, "pause=-1.0: must be a number >= 0"),
    ],
)
def test_a_node_that_does_not_fit_is_not_taken(tmp_path, config, said):
    grid = grid_of(tmp_path, speeds=(0.0, 0.0), wait_seconds=1.0)
    for node in grid.nodes.values():
        node.config["num-partitions"] = 3
    grid.add(3000, **config)
    run = deployed(grid)
    assert f"node 3000 is not taken: {said}" in (tmp_path / "out" / "run.log").read_text()
    assert set(run.events["client"]) == {0, 1}


def test_a_run_without_nodes_says_so(tmp_path):
    grid = grid_of(tmp_path, speeds=(), wait_seconds=2.0)
    with pytest.raises(SimulationError, match=r"^no node has come within 2 s$"):
        deployed(grid)
    assert grid.clock() == pytest.approx(102.0, abs=0.2)


def test_a_run_whose_nodes_are_all_gone_says_so(tmp_path):
    grid = grid_of(tmp_path, "rounds=100", "local.steps=10", speeds=(0.1, 0.1, 0.1), wait_seconds=5.0)
    for node in (1000, 1001, 1002):
        grid.clock.later(2.5, lambda node=node: grid.remove(node))
    with pytest.raises(SimulationError, match=r"nothing has happened for 5 s at .* 0 of 3 clients online, 0 at work"):
        deployed(grid)


def test_a_client_whose_code_raises_fails_its_task_only(tmp_path):
    grid = grid_of(tmp_path, "strategy=fedbuff", "rounds=3")

    def broken(asked, reply):
        if asked.metadata.message_type == WORK and asked.content["order"]["task"] == 1:
            from flwr.app import Error, Message

            return Message(Error(2, "Traceback\nValueError: no such file"), reply_to=asked)
        return reply

    grid.tamper = broken
    run = deployed(grid)
    assert run.events["outcome"].tolist().count("failed") == 1
    assert run.summary["stopped"] == "rounds"
    assert "has lost task 1: ValueError: no such file" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy=dfedavg", "strategy: DFedAvg has peers that talk to each other"),
        ("strategy=known_probability", "strategy.probability=null: must be given"),
        ("problem=none", "problem=ScheduleOnly: trains nothing"),
    ],
)
def test_what_needs_a_simulator_is_refused_in_one_line(tmp_path, override, said):
    grid = grid_of(tmp_path, override)
    with pytest.raises(ConfigError, match=said) as caught:
        deployed(grid)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_setting_of_a_deployment_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^wait_second=3: unknown setting of a deployment, did you mean 'wait_sec"):
        run_config({}, {}, wait_second=3)


def test_a_node_says_when_it_is_ready_and_how_many_steps_it_will_make(tmp_path):
    grid = grid_of(tmp_path, "strategy=afa_cs", "cohort=2", "rounds=20", speeds=(0.1, 0.1, 0.1))
    grid.nodes[1001].config |= {"pause": 5.0, "steps": 7}
    run = deployed(grid)
    mine = run.events[run.events["client"] == 1]
    done = mine[mine["outcome"] == "applied"]
    assert len(done) >= 2
    assert set(mine["steps"]) == {7}
    assert mine["dispatched"].iloc[0] == pytest.approx(5.0)
    gaps = mine["dispatched"].to_numpy()[1:] - mine["arrived"].to_numpy()[:-1]
    assert gaps == pytest.approx([5.0] * len(gaps))
    assert set(run.events.loc[run.events["client"] == 0, "steps"]) != {7}


def test_only_where_clients_choose_their_steps_does_what_a_node_says_count(tmp_path):
    grid = grid_of(tmp_path, "local.steps=3")
    grid.nodes[1001].config["steps"] = 7
    assert set(deployed(grid).events["steps"]) == {3}


def test_a_late_timer_keeps_its_place_among_others():
    from fedsim.flower.clock import WallKernel
    from fedsim.kernel import Phase

    kernel, seen = WallKernel(), []
    kernel.schedule(30, Phase.TIMER, "c")
    kernel.schedule(10, Phase.TIMER, "a")
    kernel.schedule(20, Phase.TIMER, "b")
    dropped = kernel.schedule(15, Phase.TIMER, "dropped")
    kernel.schedule(60, Phase.TIMER, "later")
    kernel.cancel(dropped)
    kernel.pass_to(40)
    kernel.schedule(40, Phase.ARRIVAL, "arrival", 3, 9)
    kernel.schedule(40, Phase.LOSS, "loss", 2, 8)
    kernel.catch_up(40)
    kernel.run_instant(lambda event: seen.append((kernel.now, event)))
    assert seen == [(40, each) for each in ("arrival", "loss", "a", "b", "c")]
    assert kernel.next_time() == 60


def test_a_node_that_rests_is_asked_by_nobody_in_the_instant_of_its_answer(tmp_path):
    grid = grid_of(
        tmp_path, "strategy=fedcompass", "cohort=2", "rounds=8", "strategy.least_steps=4", "strategy.most_steps=20",
        speeds=(0.1, 0.1, 0.2),
    )  # fmt: skip
    grid.nodes[1000].config["pause"] = 3.0
    run = deployed(grid)
    assert set(run.events["outcome"]) <= {"applied", "pending"}
    mine = run.events[run.events["client"] == 0]
    assert (mine["dispatched"].to_numpy()[1:] - mine["arrived"].to_numpy()[:-1] >= 3.0 - 1e-6).all()
    assert len(mine) > 2

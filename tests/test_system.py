"""The system models against their stated laws: exact where a hand can compute, else within standard errors."""

from __future__ import annotations

import inspect
import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from fedsim.checks import ConfigError
from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.system import Faults, Stage, System, availability, compute, network

CONF = Path(__file__).parent.parent / "conf"
CHOICES = sorted(
    path for group in ("compute", "network", "availability", "faults") for path in (CONF / group).glob("*.yaml")
)
MANY = 200_000


def prepared(model, clients=MANY, seed=1):
    model.prepare(clients, Randomness(seed))
    return model


def within(values, mean, deviation, sigmas=5.0):
    """Whether the sample mean lies within ``sigmas`` standard errors of ``mean``."""
    return abs(np.mean(values) - mean) <= sigmas * deviation / math.sqrt(len(values))


# Compute


@pytest.mark.parametrize(
    ("law", "mean", "deviation"),
    [
        (compute.Constant(mean=0.3), 0.3, 1e-12),
        (compute.Uniform(low=0.1, high=0.5), 0.3, 0.4 / math.sqrt(12)),
        (compute.Lognormal(mean=0.3, sigma=0.7), 0.3, 0.3 * math.sqrt(math.exp(0.49) - 1)),
        (compute.Exponential(mean=0.3), 0.3, 0.3),
    ],
    ids=lambda each: type(each).__name__,
)
def test_speeds_follow_their_law(law, mean, deviation):
    speeds = prepared(law).seconds_per_step
    assert speeds.shape == (MANY,)
    assert speeds.dtype == np.float64
    assert within(speeds, mean, deviation)
    assert np.std(speeds) == pytest.approx(deviation, rel=0.05, abs=1e-9)


def test_uniform_and_lognormal_shapes():
    speeds = prepared(compute.Uniform(low=0.1, high=0.5)).seconds_per_step
    assert 0.1 < speeds.min() < 0.101
    assert 0.499 < speeds.max() < 0.5
    speeds = prepared(compute.Lognormal(mean=0.3, sigma=0.7)).seconds_per_step
    assert np.median(speeds) == pytest.approx(0.3 * math.exp(-0.245), rel=0.01)
    assert np.std(np.log(speeds)) == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize(("law", "jitter"), [("lognormal", 0.5), ("exponential", 0.5), ("exponential", 1.0)])
def test_jitter_has_mean_one_and_its_coefficient_of_variation(law, jitter):
    model = prepared(compute.Constant(mean=1.0, jitter=jitter, jitter_law=law), clients=10)
    clients, nth = np.zeros(MANY, dtype=np.int64), np.arange(MANY)
    factors = model.durations(clients, 1, nth) / NS
    assert within(factors, 1.0, jitter)
    assert np.std(factors) == pytest.approx(jitter, rel=0.03)
    if law == "exponential":
        assert factors.min() >= 1.0 - jitter
        assert np.mean(factors > 1.0) == pytest.approx(math.exp(-1), abs=0.01)
    else:
        assert np.median(factors) == pytest.approx((1 + jitter**2) ** -0.5, rel=0.01)


def test_durations_are_speed_times_steps_in_whole_nanoseconds():
    model = prepared(compute.Constant(mean=0.1), clients=3)
    spans = model.durations(np.array([2, 0, 1]), np.array([3, 0, 1]), np.zeros(3, dtype=np.int64))
    assert spans.dtype == np.int64
    assert spans.tolist() == [300_000_000, 0, 100_000_000]
    assert model.expected(np.array([2, 0]), 7).tolist() == [700_000_000] * 2


def test_expected_ignores_jitter_and_no_jitter_draws_nothing():
    plain, jittered = (prepared(compute.Lognormal(jitter=each), clients=50) for each in (0.0, 0.4))
    clients, nth = np.arange(50), np.full(50, 3)
    assert np.array_equal(plain.expected(clients, 9), jittered.expected(clients, 9))
    assert np.array_equal(plain.durations(clients, 9, nth), plain.expected(clients, 9))
    assert not np.array_equal(jittered.durations(clients, 9, nth), jittered.expected(clients, 9))
    plain._randomness = None  # would raise if anything were drawn
    plain.durations(clients, 9, nth)


def test_nanoseconds_are_rounded_to_the_nearest():
    model = prepared(compute.Constant(mean=1.6e-9), clients=1)
    assert model.expected(np.zeros(3, dtype=np.int64), np.array([1, 2, 4])).tolist() == [2, 3, 6]


def test_a_tail_beyond_the_clock_is_capped():
    model = prepared(compute.Constant(mean=1e9), clients=1)
    assert model.expected(np.array([0]), 10).tolist() == [2**60]


# Draws belong to the client


def draws_of(clients, order):
    """Everything the models say about ``order`` in a population of ``clients``, as rows per client."""
    system = System(
        compute.Lognormal(jitter=0.5), network.Lognormal(), availability.Markov(), Faults(dropout=0.5, when="any")
    )
    system.prepare(clients, Randomness(7))
    ids = np.array(order)
    stage, fraction = system.faults.draw(ids, ids + 5)
    columns = [
        system.compute.durations(ids, 4, ids + 5),
        system.network.up(ids, 1000),
        system.network.down(ids, 1000),
        system.availability.online[ids],
        stage,
        fraction,
    ]
    return [tuple(column[row].item() for column in columns) for row in range(len(ids))]


def test_draws_depend_on_nobody_else_asked_nor_on_order():
    order = list(range(40))
    rows = draws_of(100, order)
    assert len(set(rows)) == 40
    assert draws_of(100, order[::-1]) == rows[::-1]
    assert draws_of(5000, order[3:30:4]) == rows[3:30:4]
    assert [draws_of(100, [client])[0] for client in order] == rows


def test_tasks_of_one_client_differ():
    model = prepared(compute.Constant(jitter=0.5), clients=1)
    assert len(np.unique(model.durations(np.zeros(100, dtype=np.int64), 1, np.arange(100)))) == 100


# Network


def test_transfer_times_by_hand():
    net = prepared(network.Constant(down=20.0, up=5.0, latency=0.05), clients=4)
    ids = np.array([0, 3])
    assert net.down(ids, 2_500_000).tolist() == [1_050_000_000] * 2  # 2.5 MB = 20 Mbit: a second, and the latency
    assert net.up(ids, 2_500_000).tolist() == [4_050_000_000] * 2
    assert net.up(ids, np.array([0, 1250])).tolist() == [50_000_000, 52_000_000]
    assert net.link(ids, ids[::-1], 2_500_000).tolist() == [4_050_000_000] * 2
    assert net.up_bytes_per_second.tolist() == [625_000.0] * 4
    assert net.down(ids, 8).dtype == np.int64


def test_a_link_runs_at_the_slower_end():
    net = prepared(network.Constant(), clients=3)
    net.up_bytes_per_second = np.array([100.0, 1000.0, 1.0])
    net.down_bytes_per_second = np.array([500.0, 1.0, 500.0])
    assert net.link(np.array([0, 1]), np.array([2, 0]), 1000).tolist() == [10_050_000_000, 2_050_000_000]


def test_twice_the_bytes_take_twice_the_time_net_of_latency():
    net = prepared(network.Lognormal(latency=0.2), clients=1000)
    ids = np.arange(1000)
    for travel in (net.down, net.up):
        once, twice = travel(ids, 10**6) - NS // 5, travel(ids, 2 * 10**6) - NS // 5
        assert np.all(once > 0)
        assert np.max(np.abs(twice - 2 * once)) <= 1  # each is rounded to the nanosecond


def test_lognormal_bandwidths_have_their_medians_and_are_drawn_apart():
    net = prepared(network.Lognormal(down=16.0, up=8.0, sigma=0.5))
    down, up = net.down_bytes_per_second, net.up_bytes_per_second
    assert within(np.log(down), math.log(2e6), 0.5)
    assert within(np.log(up), math.log(1e6), 0.5)
    assert np.std(np.log(up)) == pytest.approx(0.5, rel=0.01)
    assert abs(np.corrcoef(np.log(down), np.log(up))[0, 1]) < 5 / math.sqrt(MANY)


def test_bytes_moved_by_a_cut_transfer():
    net = prepared(network.Constant(down=20.0, up=5.0, latency=0.05), clients=1)
    elapsed = np.array([0, 49_999_999, 50_000_000, 550_000_000, 1_049_999_999, 1_050_000_000, 9 * NS])
    moved = net.moved_down(np.zeros(7, dtype=np.int64), 2_500_000, elapsed)
    assert moved.dtype == np.int64
    assert moved.tolist() == [0, 0, 0, 1_250_000, 2_499_999, 2_500_000, 2_500_000]
    up = net.moved_up(np.zeros(3, dtype=np.int64), np.array([10, 10, 0]), np.array([50_008_000, 50_016_000, NS]))
    assert up.tolist() == [5, 10, 0]


def test_no_network_costs_no_time():
    net = prepared(network.NoNetwork(), clients=2)
    ids = np.arange(2)
    assert net.down(ids, 10**9).tolist() == net.up(ids, 0).tolist() == net.link(ids, ids[::-1], 5).tolist() == [0, 0]
    assert net.moved_up(ids, 77, np.zeros(2, dtype=np.int64)).tolist() == [77, 77]
    assert np.all(np.isinf(net.up_bytes_per_second))


# Availability

MODELS = [
    availability.Bernoulli(p=0.3, slot=60.0),
    availability.Markov(up=300.0, down=100.0),
    availability.Markov(up=300.0, down=100.0, slot=50.0),
    availability.Cyclic(up=30.0, down=10.0),
]
NAMES = ["bernoulli", "markov", "markov-slotted", "cyclic"]


def history(model, until):
    """Every change up to ``until`` ns as (time, came, went)."""
    changes = []
    while model.next_change() <= until:
        now = model.next_change()
        came, went = model.advance(now)
        changes.append((now, came.tolist(), went.tolist()))
    return changes


def test_always():
    model = prepared(availability.Always(), clients=5)
    assert model.next_change() is None
    assert [each.tolist() for each in model.advance(10**15)] == [[], []]
    assert model.online.all()


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_came_and_went_account_for_online(model):
    prepared(model, clients=40)
    last = -1
    for _ in range(300):
        before, now = model.online.copy(), model.next_change()
        assert now > last
        came, went = model.advance(now)
        assert came.dtype == went.dtype == np.int64
        assert np.array_equal(came, np.flatnonzero(~before & model.online))
        assert np.array_equal(went, np.flatnonzero(before & ~model.online))
        last = now


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_one_long_step_is_the_net_of_all_short_ones(model):
    until = 5000 * NS + 123
    prepared(model, clients=30)
    start = model.online.copy()
    changes = history(model, until)
    end, following = model.online.copy(), model.next_change()
    prepared(model, clients=30)
    assert np.array_equal(model.online, start)
    came, went = model.advance(until)
    assert len(changes) > 50
    assert np.array_equal(model.online, end)
    assert model.next_change() == following > until
    assert np.array_equal(came, np.flatnonzero(~start & end))
    assert np.array_equal(went, np.flatnonzero(start & ~end))


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_nothing_changes_before_next_change(model):
    prepared(model, clients=30)
    model.advance(model.next_change())
    before, due = model.online.copy(), model.next_change()
    assert [each.tolist() for each in model.advance(due - 1)] == [[], []]
    assert np.array_equal(model.online, before)
    assert model.next_change() == due


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_a_pickle_in_mid_run_has_the_same_future(model):
    prepared(model, clients=30)
    history(model, 1000 * NS)
    other = pickle.loads(pickle.dumps(model))
    assert history(model, 3000 * NS) == history(other, 3000 * NS)
    assert np.array_equal(model.online, other.online)


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_a_client_lives_the_same_life_in_any_population(model):
    def life(clients):
        prepared(model, clients=clients)
        states = []
        for now in range(0, 3000 * NS, 30 * NS):
            model.advance(now)
            states.append(model.online[:3].tolist())
        return states

    assert life(3) == life(9000)  # 9000 clients are planned in other windows than 3


@pytest.mark.parametrize("model", [MODELS[0], MODELS[2]], ids=["bernoulli", "markov-slotted"])
def test_slotted_states_change_at_slot_boundaries_only(model):
    slot = int(model.slot * NS)
    prepared(model, clients=50)
    assert model.slotted
    assert [model.advance(now)[0].size for now in (0, 1, slot - 1)] == [0, 0, 0]
    assert [now for now, _, _ in history(model, 10 * slot)] == [slot * n for n in range(1, 11)]
    assert not MODELS[1].slotted
    assert not MODELS[3].slotted


def test_bernoulli_share_and_independence():
    model = prepared(availability.Bernoulli(p=0.3, slot=60.0))
    first = model.online.copy()
    assert within(first, 0.3, math.sqrt(0.21))
    model.advance(60 * NS)
    assert within(model.online, 0.3, math.sqrt(0.21))
    assert within(first & model.online, 0.09, math.sqrt(0.09 * 0.91))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_bernoulli_at_its_ends(p):
    model = prepared(availability.Bernoulli(p=p, slot=1.0), clients=1000)
    assert history(model, 20 * NS) == [(n * NS, [], []) for n in range(1, 21)]
    assert model.online.mean() == p


@pytest.mark.parametrize("slot", [None, 50.0])
def test_markov_share_of_time_and_memory(slot):
    clients, up, down, step, count = 4000, 300.0, 100.0, 50.0, 100
    model = prepared(availability.Markov(up, down, slot), clients=clients)
    states = [model.online.copy()]
    for n in range(1, count):
        model.advance(int(n * step * NS))
        states.append(model.online.copy())
    seen = np.array(states, dtype=np.float64)
    share = up / (up + down)
    # What is left of a state after one step: exponential in time, or one step of the chain.
    memory = math.exp(-step * (1 / up + 1 / down)) if slot is None else 1 - slot / up - slot / down
    variance = share * (1 - share) * (1 + memory) / (1 - memory) / count  # of one client's average over time
    assert within(seen.mean(axis=0), share, math.sqrt(variance))
    assert within(seen[0], share, math.sqrt(share * (1 - share)))  # begun in stationarity
    centred = seen - share
    kept = (centred[1:] * centred[:-1]).mean() / (share * (1 - share))
    assert kept == pytest.approx(memory, abs=0.01)


def test_markov_durations_are_exponential():
    clients, kept, up, down = 200, 20, 300.0, 100.0
    model = prepared(availability.Markov(up=up, down=down), clients=clients)
    switched: list[list[int]] = [[] for _ in range(clients)]
    starts_on = model.online.copy()
    for now, came, went in history(model, 30_000 * NS):
        for client in came + went:
            switched[client].append(now)
    for state, mean in ((True, up), (False, down)):
        spans = []
        for client in range(clients):
            # Between switches 0 and 1 the client is in the state that it did not begin in.
            first = 1 if starts_on[client] == state else 0
            times = np.array(switched[client])
            own = np.diff(times)[first::2][:kept]
            assert len(own) == kept  # a fixed number each: long spans are not cut off by the end
            spans.extend(own / NS)
        assert within(spans, mean, mean)
        assert np.std(spans) == pytest.approx(mean, rel=0.1)


def test_markov_slotted_probabilities():
    model = prepared(availability.Markov(up=300.0, down=100.0, slot=60.0))
    before = model.online.copy()
    model.advance(60 * NS)
    assert within(~model.online[before], 0.2, 0.4)
    assert within(model.online[~before], 0.6, math.sqrt(0.24))


def test_cyclic_is_exactly_periodic_with_spread_phases():
    model = prepared(availability.Cyclic(up=30.0, down=10.0), clients=100)
    start, last, online_for = model.online.copy(), 0, np.zeros(100, dtype=np.int64)
    while (now := model.next_change()) <= 40 * NS:
        online_for += (now - last) * model.online
        model.advance(now)
        last = now
    online_for += (40 * NS - last) * model.online
    assert np.all(online_for == 30 * NS)
    assert np.array_equal(model.online, start)
    assert within(prepared(availability.Cyclic(up=30.0, down=10.0)).online, 0.75, math.sqrt(0.1875))


def test_cyclic_to_the_nanosecond():
    model = prepared(availability.Cyclic(up=3e-9, down=1e-9), clients=100)
    offline = np.flatnonzero(~model.online)
    assert 0 < len(offline) < 100
    assert model.next_change() == 1
    came, went = model.advance(1)
    assert np.array_equal(came, offline)  # whoever is off is off for this one nanosecond
    assert len(went) > 0


# Faults


def test_no_dropout_draws_nothing():
    stage, fraction = Faults().draw(np.arange(5), np.zeros(5, dtype=np.int64))  # not even prepared
    assert stage.tolist() == [Stage.NONE] * 5
    assert stage.dtype == np.int8
    assert fraction.tolist() == [1.0] * 5


def test_dropout_share_and_fraction():
    faults = prepared(Faults(dropout=0.1), clients=10)
    stage, fraction = faults.draw(np.arange(MANY) % 10, np.arange(MANY) // 10)
    during = stage == Stage.DURING
    assert set(np.unique(stage)) == {Stage.NONE, Stage.DURING}
    assert within(during, 0.1, 0.3)
    assert within(fraction[during], 0.5, 1 / math.sqrt(12))
    assert 0 < fraction[during].min() < fraction[during].max() < 1
    assert np.all(fraction[~during] == 1)


@pytest.mark.parametrize(("when", "code"), [("before", 1), ("during", 2), ("after", 3)])
def test_certain_dropout_at_its_stage(when, code):
    stage, _ = prepared(Faults(dropout=1.0, when=when)).draw(np.arange(1000), np.zeros(1000, dtype=np.int64))
    assert np.all(stage == code)


def test_any_stage_is_uniform_and_loses_the_same_tasks():
    clients, nth = np.arange(MANY), np.zeros(MANY, dtype=np.int64)
    stage, fraction = prepared(Faults(dropout=0.6, when="any")).draw(clients, nth)
    for code in (Stage.BEFORE, Stage.DURING, Stage.AFTER):
        assert within(stage == code, 0.2, 0.4)
    during, _ = prepared(Faults(dropout=0.6)).draw(clients, nth)
    assert np.array_equal(stage != Stage.NONE, during != Stage.NONE)
    assert np.all(fraction[stage == Stage.BEFORE] == 0)


def test_offline_policy():
    assert Faults().offline_policy(slotted=True) == "finish"
    assert Faults().offline_policy(slotted=False) == "lose"
    assert Faults(on_offline="pause").offline_policy(slotted=True) == "pause"
    assert Faults(detect=1.5).detect_ns == 1_500_000_000


# Arguments and configuration


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (compute.Constant, "mean", 0),
        (compute.Uniform, "low", -1),
        (compute.Uniform, "high", 0.01),
        (compute.Lognormal, "sigma", -0.1),
        (compute.Exponential, "mean", math.nan),
        (compute.Exponential, "jitter", -0.5),
        (compute.Constant, "jitter_law", "gauss"),
        (network.Constant, "down", 0.0),
        (network.Constant, "up", -5.0),
        (network.Lognormal, "latency", -1),
        (network.Lognormal, "sigma", "wide"),
        (availability.Bernoulli, "p", 1.1),
        (availability.Bernoulli, "slot", 0),
        (availability.Markov, "up", 0),
        (availability.Markov, "down", -1),
        (availability.Markov, "slot", 101.0),
        (availability.Cyclic, "up", 0.0),
        (availability.Cyclic, "down", math.inf),
        (Faults, "dropout", 1.5),
        (Faults, "when", "later"),
        (Faults, "on_offline", "ignore"),
        (Faults, "detect", -1),
    ],
)
def test_a_bad_argument_is_named(make, key, value):
    with pytest.raises(ConfigError, match=rf"^{key}="):
        make(**{key: value})


def test_exponential_jitter_above_one_is_refused():
    compute.Constant(jitter=1.5)
    with pytest.raises(ConfigError, match=r"^jitter=1\.5:"):
        compute.Constant(jitter=1.5, jitter_law="exponential")


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_choice_states_every_argument_with_its_default(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines[2:])
    node = OmegaConf.load(path)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    defaults = {name: each.default for name, each in inspect.signature(get_class(node["_target_"])).parameters.items()}
    if path.stem == "dropout":
        defaults["dropout"] = 0.1
    assert arguments == defaults
    if path.stem != "trace":  # a trace needs its folder
        instantiate(node)


# Size


def test_a_million_clients():
    system = System(compute.Lognormal(jitter=0.1), network.Lognormal(), availability.Markov(), Faults(dropout=0.1))
    began = time.process_time()
    system.prepare(1_000_000, Randomness(0))
    assert time.process_time() - began < 2
    began = time.process_time()
    for _ in range(1000):
        system.availability.advance(system.availability.next_change())
    assert time.process_time() - began < 1


def test_default_system():
    system = System()
    system.prepare(3, Randomness(0))
    ids = np.arange(3)
    assert system.compute.expected(ids, 2).tolist() == [200_000_000] * 3
    assert system.network.up(ids, 100).tolist() == [0] * 3
    assert system.availability.online.tolist() == [True] * 3
    assert system.faults.draw(ids, ids)[0].tolist() == [0] * 3

"""Every generator of devices against its stated law: moments within standard errors, the rest exactly."""

from __future__ import annotations

import math
import pickle
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from devices import COUNTS, MANY, has_moments, prepared, watch, within

from fedsim.checkpoint import CheckpointFolder
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.system import System, availability, compute, network
from fedsim.system.base import LONGEST
from fedsim.system.charging import Charging
from fedsim.system.participation import Diurnal, LabelCorrelated

MBIT = 125_000
STANDARD = NormalDist()


# ---- compute -------------------------------------------------------------------------------------


def cut_normal(mean, spread):
    """Mean and variance of a normal law cut off at 0."""
    hazard = STANDARD.pdf(1 / spread) / STANDARD.cdf(1 / spread)
    return mean * (1 + spread * hazard), (mean * spread) ** 2 * (1 - hazard / spread - hazard**2)


SPEEDS = {
    "constant": (compute.Constant(mean=0.3), 0.3, 0.0),
    "uniform": (compute.Uniform(low=0.1, high=0.5), 0.3, 0.16 / 12),
    "lognormal": (compute.Lognormal(mean=0.3, sigma=0.5), 0.3, 0.09 * math.expm1(0.25)),
    "exponential": (compute.Exponential(mean=0.3), 0.3, 0.09),
    "normal": (compute.Normal(mean=0.3), *cut_normal(0.3, 0.3)),
    "normal, wide": (compute.Normal(mean=0.3, spread=1.0), *cut_normal(0.3, 1.0)),
}


@pytest.mark.parametrize("name", SPEEDS)
def test_speeds_have_their_mean_and_variance(name):
    law, mean, variance = SPEEDS[name]
    speeds = prepared(law).seconds_per_step
    assert has_moments(speeds, mean, variance)
    assert speeds.min() > 0


@pytest.mark.parametrize(
    ("law", "jitter"), [("lognormal", 0.4), ("exponential", 0.4), ("exponential", 1.0), ("normal", 0.05)]
)
def test_jitter_has_mean_one_and_its_deviation(law, jitter):
    model = prepared(compute.Constant(mean=1.0, jitter=jitter, jitter_law=law), clients=10)
    factors = model.durations(np.zeros(MANY, dtype=np.int64), 1, np.arange(MANY)) / NS
    assert has_moments(factors, 1.0, jitter**2)


def test_the_widest_normal_jitter_keeps_its_mean_as_it_says():
    model = prepared(compute.Constant(mean=1.0, jitter=0.3, jitter_law="normal"), clients=1)
    factors = model.durations(np.zeros(MANY, dtype=np.int64), 1, np.arange(MANY)) / NS
    assert has_moments(factors, *cut_normal(1.0, 0.3))
    assert cut_normal(1.0, 0.3)[0] < 1.0005
    assert factors.min() > 0
    with pytest.raises(ConfigError, match=r"^jitter=0\.31: must be a number >= 0 and <= 0\.3$"):
        compute.Normal(jitter=0.31)


def test_only_who_is_not_above_zero_draws_again():
    speeds = prepared(compute.Normal(mean=1.0, spread=1.0), clients=2000).seconds_per_step
    attempts = []
    for client in range(2000):
        tries = 1 + Randomness(1)("compute.speed", client).normal(40)
        attempts.append(int(np.argmax(tries > 0)))
        assert speeds[client] == tries[attempts[-1]]
    assert within(np.array(attempts) > 0, STANDARD.cdf(-1))
    assert max(attempts) > 1


def test_normal_is_the_released_setting_of_fedcompass():
    model = prepared(compute.Normal(mean=0.15), clients=1000)
    assert (model.spread, model.jitter, model.jitter_law) == (0.3, 0.05, "normal")
    other = prepared(compute.Exponential(0.15, jitter=0.05, jitter_law="normal"), clients=1000)
    ids = np.arange(1000)
    for each in (model, other):
        ratio = each.durations(ids, 20, ids) / each.expected(ids, 20)
        assert has_moments(ratio, 1.0, 0.0025)


@pytest.mark.parametrize("clients", [2, 5, 21])
def test_linear_is_scenario_f_x_to_the_nanosecond(clients):
    model = prepared(compute.Linear(slowest=1.0, spread=80), clients=clients)
    wanted = [round(NS * (10 * (clients - 1) - 8 * each) / (10 * (clients - 1))) for each in range(clients)]
    assert model.expected(np.arange(clients), 1).tolist() == wanted
    assert (wanted[0], wanted[-1]) == (NS, NS // 5)
    same = prepared(compute.Linear(slowest=1.0, spread=0), clients=clients)
    assert same.seconds_per_step.tolist() == [1.0] * clients


def test_a_client_alone_is_the_slowest():
    assert prepared(compute.Linear(slowest=0.7), clients=1).seconds_per_step.tolist() == [0.7]


# ---- network -------------------------------------------------------------------------------------


def test_lognormal_and_constant_bandwidths():
    net = prepared(network.Lognormal(down=16.0, up=8.0, sigma=0.5))
    assert has_moments(np.log(net.down_bytes_per_second), math.log(16 * MBIT), 0.25)
    assert has_moments(np.log(net.up_bytes_per_second), math.log(8 * MBIT), 0.25)
    net = prepared(network.Constant(down=16.0, up=8.0), clients=3)
    assert (*net.down_bytes_per_second, *net.up_bytes_per_second) == (*[16.0 * MBIT] * 3, *[8.0 * MBIT] * 3)


@pytest.mark.filterwarnings("error")
def test_hardly_any_bandwidth_is_the_longest_span_without_a_warning():
    nets = [network.Constant(down=1e-300, up=1e-323), network.Mobile(scale=1e-308), network.Lognormal(1e-300, 1e-320)]
    for net in nets:
        prepared(net, clients=4)
        who, latency = np.arange(4), round(0.05 * NS)
        for time in (net.down(who, 1), net.up(who, 10**12), net.link(who, who[::-1], 8)):
            assert time.tolist() == [LONGEST + latency] * 4
        assert net.down(who, 0).tolist() == [latency] * 4
        assert net.moved_up(who, 100, np.full(4, latency + LONGEST // 2)).tolist() == [50] * 4


def lognormal_between(median, low, high, sigma=0.6):
    """Mean and variance of a lognormal law cut to a range."""
    a, b = math.log(low / median) / sigma, math.log(high / median) / sigma
    inside = STANDARD.cdf(b) - STANDARD.cdf(a)
    first, second = (
        math.exp((power * sigma) ** 2 / 2)
        * median**power
        * (STANDARD.cdf(b - power * sigma) - STANDARD.cdf(a - power * sigma))
        / inside
        for power in (1, 2)
    )
    return first, second - first**2


@pytest.mark.parametrize(
    ("way", "least", "median", "most", "mean"), [("down", 2.4, 4.3, 17.3, 5.25), ("up", 0.43, 3.3, 6.6, 3.38)]
)
def test_mobile_bandwidths_follow_the_fitted_law(way, least, median, most, mean):
    speeds = getattr(prepared(network.Mobile()), f"{way}_bytes_per_second") / MBIT
    assert least <= speeds.min() < 1.1 * least
    assert 0.9 * most < speeds.max() <= most
    assert within(speeds < median, 0.5)
    slow, fast = lognormal_between(median, least, median), lognormal_between(median, median, most)
    assert has_moments(speeds[speeds < median], *slow)
    assert has_moments(speeds[speeds > median], *fast)
    assert (slow[0] + fast[0]) / 2 == pytest.approx(mean, abs=0.005)  # as the documentation says


def test_mobile_ways_are_drawn_apart_and_scaled_together():
    net, fast = prepared(network.Mobile()), prepared(network.Mobile(scale=8.0))
    both = np.log([net.down_bytes_per_second, net.up_bytes_per_second])
    assert abs(np.corrcoef(both)[0, 1]) < 5 / math.sqrt(MANY)
    assert np.array_equal(fast.down_bytes_per_second, 8 * net.down_bytes_per_second)
    assert np.array_equal(fast.up_bytes_per_second, 8 * net.up_bytes_per_second)


# ---- availability: what holds for every model ----------------------------------------------------

SLOT = 600.0
MODELS = {
    "bernoulli": lambda: availability.Bernoulli(p=0.3, slot=SLOT),
    "markov": lambda: availability.Markov(up=1800.0, down=600.0),
    "markov-slotted": lambda: availability.Markov(up=1800.0, down=900.0, slot=SLOT),
    "cyclic": lambda: availability.Cyclic(up=1500.0, down=500.0),
    "diurnal": lambda: Diurnal(mean=0.4, amplitude=1.0, timezones=1.0),
    "label-bernoulli": lambda: LabelCorrelated(slot=SLOT),
    "label-markov": lambda: LabelCorrelated("markov", slot=SLOT),
    "label-cyclic": lambda: LabelCorrelated("cyclic", slot=SLOT),
    "charging": lambda: Charging(),
}
SHARES = {"bernoulli": 0.3, "markov": 0.75, "markov-slotted": 2 / 3, "cyclic": 0.75, "diurnal": 0.4}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("name", SHARES)
def test_the_share_online_is_as_stated_from_the_beginning_and_in_the_long_run(name):
    seen = watch(prepared(MODELS[name](), clients=5000), slots=144)
    for slot in (0, 1, 70, 143):
        assert within(seen[slot], SHARES[name])
    assert within(seen.mean(axis=0), SHARES[name])  # a day's average of each client, independent of the others'


@every_model
def test_a_client_lives_the_same_life_in_any_population(name):
    few, many = (watch(prepared(MODELS[name](), clients), slots=200) for clients in (7, 3000))
    assert np.array_equal(few, many[:, :7])
    assert 0 < few.mean() < 1
    assert not np.array_equal(few, watch(prepared(MODELS[name](), 7, seed=2), slots=200))


@every_model
def test_changes_account_for_states_and_long_steps_are_the_net_of_short_ones(name):
    short, long = prepared(MODELS[name](), 60), prepared(MODELS[name](), 60)
    start, until = short.online.copy(), 50_300 * NS
    while (now := short.next_change()) <= until:
        before = short.online.copy()
        assert [each.size for each in short.advance(now - 1)] == [0, 0]
        came, went = short.advance(now)
        assert np.array_equal(came, np.flatnonzero(~before & short.online))
        assert np.array_equal(went, np.flatnonzero(before & ~short.online))
    came, went = long.advance(until)
    assert np.array_equal(long.online, short.online)
    assert np.array_equal(came, np.flatnonzero(~start & long.online))
    assert np.array_equal(went, np.flatnonzero(start & ~long.online))
    assert len(came) + len(went) > 0


@every_model
def test_a_checkpoint_or_a_pickle_in_mid_run_has_the_same_future(name, tmp_path):
    model, other = prepared(MODELS[name](), 40), prepared(MODELS[name](), 40)
    model.advance(100_000 * NS)
    folder = CheckpointFolder(tmp_path / "checkpoint", {}, [model])
    folder.write(dict(vars(model)), {})
    vars(other).clear()
    vars(other).update(folder.newest()[1])
    third, future = pickle.loads(pickle.dumps(model)), []
    for each in (model, other, third):
        lived = []
        for _ in range(200):
            came, went = each.advance(each.next_change())
            lived.append((each.next_change(), came.tolist(), went.tolist()))
        future.append(lived)
    assert future[0] == future[1] == future[2]


# ---- availability: spans of Markov and cyclic ----------------------------------------------------


@pytest.mark.parametrize("slot", [None, 60.0])
def test_markov_spans_have_their_means(slot):
    up, down, clients, until = 300.0, 100.0, 100, 20_000
    model = prepared(availability.Markov(up, down, slot), clients)
    last, time_on, ends_on, ends_off = 0, 0.0, 0, 0
    while (now := model.next_change()) <= until * NS:
        time_on += (now - last) / NS * np.count_nonzero(model.online)
        came, went = model.advance(now)
        ends_on, ends_off, last = ends_on + len(went), ends_off + len(came), now
    time_off = last / NS * clients - time_on
    for time, ends, mean in ((time_on, ends_on, up), (time_off, ends_off, down)):
        # Time over ends estimates a mean span; exponential spans deviate by their mean, geometric ones by less.
        assert time / ends == pytest.approx(mean, rel=5 / math.sqrt(ends))


def test_cyclic_spans_are_exact_and_phases_uniform():
    model = prepared(availability.Cyclic(up=1500.0, down=500.0), 1000)
    start, switches = model.online.copy(), [[] for _ in range(1000)]
    while (now := model.next_change()) <= 6000 * NS:
        for client in np.concatenate(model.advance(now)):
            switches[client].append(now / NS)
    for client, times in enumerate(switches):
        spans = [500.0, 1500.0] if start[client] else [1500.0, 500.0]
        assert np.diff(times).tolist() == pytest.approx((spans * 3)[: len(times) - 1])
    wait = np.array([times[0] for times in switches])
    assert has_moments(wait[start], 750.0, 1500**2 / 12)
    assert has_moments(wait[~start], 250.0, 500**2 / 12)


# ---- availability=diurnal ------------------------------------------------------------------------


def test_diurnal_probability_is_the_mean_of_the_cosine_over_each_slot():
    model = prepared(Diurnal(mean=0.4, amplitude=0.9, period=7000.0, timezones=0.0, slot=1000.0), 3)
    for slot in range(9):
        times = 1000.0 * (slot + (np.arange(10_000) + 0.5) / 10_000)
        wanted = np.mean(0.4 * (1 + 0.9 * np.cos(2 * np.pi * times / 7000.0)))
        assert model.probability(slot) == pytest.approx([wanted] * 3, abs=1e-8)
    assert np.mean([model.probability(slot) for slot in range(7)]) == pytest.approx(0.4, abs=1e-12)


def test_diurnal_presence_follows_the_probability():
    model = prepared(Diurnal(mean=0.5, amplitude=1.0, period=24_000.0, timezones=0.0, slot=2000.0), 20_000)
    seen = watch(model, slots=24, length=2000.0)
    for slot in range(24):
        assert within(seen[slot], model.probability(slot)[0])
    assert model.probability(0)[0] > 0.95
    assert model.probability(6)[0] < 0.05
    assert within(seen[3] & seen[4], model.probability(3)[0] * model.probability(4)[0])  # slots are independent


@pytest.mark.parametrize("timezones", [0.25, 1.0])
def test_diurnal_phases_are_uniform_over_the_time_zones(timezones):
    model = prepared(Diurnal(mean=0.5, amplitude=1.0, period=86400.0, timezones=timezones, slot=1e-3))
    swing = (model.probability(0) / 0.5) - 1
    angle = 2 * np.pi * timezones
    mean = math.sin(angle) / angle
    assert has_moments(swing, mean, (1 + math.sin(2 * angle) / (2 * angle)) / 2 - mean**2)


# ---- availability=label_correlated ---------------------------------------------------------------


def labelled(counts, seed=1, **settings):
    model = LabelCorrelated(**settings)
    model.meet(lambda: np.asarray(counts))
    model.prepare(len(counts), Randomness(seed))
    return model


def test_rates_are_scalar_products_with_weights_that_sum_to_one():
    counts = np.concatenate([np.eye(10, dtype=np.int64), COUNTS[:300], np.zeros((1, 10), dtype=np.int64)])
    bare = labelled(counts, p_min=1e-9, alpha=1.0, mean=0.1).rates
    assert np.sum(bare[:10]) == pytest.approx(10 * 0.1, abs=1e-6)  # clients with one label each show q
    assert bare[10:-1] == pytest.approx(COUNTS[:300] / 50 @ bare[:10], abs=1e-7)
    bounded = labelled(counts, p_min=0.15, alpha=1.0, mean=0.6).rates
    assert bounded[:-1] == pytest.approx(np.clip(6 * bare[:-1], 0.15, 1.0), abs=1e-6)
    assert bounded.max() == 1.0
    assert (bounded.min(), bounded[-1]) == (0.15, 0.15)


def test_the_weights_of_labels_are_dirichlet():
    alpha = 0.5
    weights = np.array(
        [labelled(np.eye(10, dtype=np.int64), seed, p_min=1e-12, alpha=alpha).rates for seed in range(1000)]
    )
    for label in (0, 9):  # the ten weights of one draw are not independent
        assert within(weights[:, label], 0.1)
    assert within(np.sum(weights**2, axis=1), (alpha + 1) / (10 * alpha + 1))


def standardised(seen, rates, memory):
    """How far each client's share of slots is from its rate, in standard deviations of such a share."""
    variance = rates * (1 - rates) * (1 + memory) / (1 - memory) / len(seen)
    return (seen.mean(axis=0) - rates) / np.sqrt(variance)


@pytest.mark.parametrize("pattern", ["bernoulli", "markov"])
def test_everybody_takes_part_at_its_rate_from_slot_0_on(pattern):
    model = labelled(COUNTS[:3000], pattern=pattern, slot=SLOT)
    seen, rates = watch(model, slots=600), model.rates
    leave = 0.05 * (1 / rates - 1)
    memory = np.where(leave > 1, 1 - 1 - rates / (1 - rates), 1 - 0.05 - leave) if pattern == "markov" else 0.0
    z = standardised(seen, rates, memory)
    assert within(z, 0.0)
    assert np.std(z) == pytest.approx(1.0, abs=0.1)
    assert np.abs(z).max() < 8  # a rate of 0.02 has tails that are not normal
    for slot in (0, 1, 300, 599):
        total = np.sum(seen[slot] - rates)
        assert abs(total) < 5 * math.sqrt(np.sum(rates * (1 - rates)))
    assert (rates == 0.02).sum() > 100


def test_markov_clients_come_and_leave_as_the_paper_says():
    model = labelled(COUNTS[:3000], pattern="markov", come=0.05, slot=SLOT)
    seen, rates = watch(model, slots=600), model.rates
    before, after = seen[:-1], seen[1:]
    leave = 0.05 * (1 / rates - 1)
    rare, often = leave > 1, leave <= 1
    assert rare.sum() > 100
    assert not np.any(before[:, rare] & after[:, rare])  # leaves for certain
    assert within(after[:, often][~before[:, often]], 0.05)
    came = after[:, rare & (rates == 0.02)][~before[:, rare & (rates == 0.02)]]
    assert within(came, 0.02 / 0.98)
    left = (~after & before)[:, often].sum() - (before * leave)[:, often].sum()
    assert abs(left) < 5 * math.sqrt((before * leave * (1 - leave))[:, often].sum())


def test_cyclic_clients_have_their_exact_share_and_begin_while_off():
    model = labelled(COUNTS[:3000], pattern="cyclic", cycle=100, slot=SLOT)
    seen, rates = watch(model, slots=250), model.rates
    wanted = np.maximum(1, np.rint(100 * rates))
    for begin in (0, 37, 150):
        assert np.array_equal(seen[begin : begin + 100].sum(axis=0), wanted)
    assert np.array_equal(seen[100:], seen[:150])
    began = seen & ~np.roll(seen, 1, axis=0)
    assert np.array_equal(began[1:101].sum(axis=0), np.ones(3000))  # one span in every cycle
    wait = np.argmax(seen, axis=0)
    off = 100 - wanted
    assert np.all(wait < off)
    # Uniform over 0 .. off - 1: mean and variance of where in its range each begins.
    assert within(wait - (off - 1) / 2, 0.0)
    assert within(((wait - (off - 1) / 2) ** 2) / ((off**2 - 1) / 12), 1.0)


def test_a_rate_of_one_is_always_there():
    for pattern in ("bernoulli", "markov", "cyclic"):
        model = labelled([[5]] * 20, pattern=pattern, mean=1.0)
        assert model.rates.tolist() == [1.0] * 20
        assert watch(model, slots=150, length=60.0).all()


# ---- settings and runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (compute.Normal, "mean", 0),
        (compute.Normal, "spread", 1.1),
        (compute.Normal, "jitter_law", "gauss"),
        (compute.Linear, "slowest", 0),
        (compute.Linear, "spread", 100),
        (compute.Linear, "spread", -1),
        (network.Mobile, "scale", 0),
        (network.Mobile, "latency", -0.1),
        (Diurnal, "mean", 0),
        (Diurnal, "amplitude", 1.01),
        (Diurnal, "period", 0),
        (Diurnal, "timezones", 1.5),
        (Diurnal, "slot", 0),
        (LabelCorrelated, "pattern", "weekly"),
        (LabelCorrelated, "mean", 0),
        (LabelCorrelated, "p_min", 0),
        (LabelCorrelated, "alpha", 0),
        (LabelCorrelated, "come", 1.1),
        (LabelCorrelated, "cycle", 0),
        (LabelCorrelated, "slot", -1),
        (Charging, "threshold", 1.1),
        (Charging, "needs_charger", "yes"),
        (Charging, "needs_wifi", 1),
        (Charging, "charge_time", 0),
        (Charging, "battery_life", 0),
        (Charging, "slot", 59),
        (Charging, "slot", 3601),
    ],
)
def test_a_bad_setting_is_named(make, key, value):
    with pytest.raises(ConfigError, match=rf"^{key}={value}: "):
        make(**{key: value})


def test_a_diurnal_probability_may_not_exceed_one():
    Diurnal(mean=0.8, amplitude=0.25)
    with pytest.raises(ConfigError, match=r"^amplitude=0\.26: must be a number >= 0 and <= 0\.25$"):
        Diurnal(mean=0.8, amplitude=0.26)


def test_a_problem_without_classes_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for problem in ("quadratic", "none"):
        assert main(["run", "availability=label_correlated", f"problem={problem}", "out=x"]) == 2
        wanted = "availability=label_correlated: needs a problem whose examples have classes, such as"
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


CHOSEN = {
    "diurnal": lambda: Diurnal(slot=5.0, timezones=1.0),
    "charging": lambda: Charging(),
    "label_correlated": lambda: LabelCorrelated(slot=5.0, mean=0.3, alpha=1.0),
    "label_correlated-markov": lambda: LabelCorrelated("markov", slot=5.0, mean=0.3, alpha=1.0),
    "label_correlated-cyclic": lambda: LabelCorrelated("cyclic", slot=5.0, mean=0.3, alpha=1.0, cycle=10),
}
SETTINGS = {"diurnal": ["slot=5", "timezones=1"], "label_correlated": ["slot=5", "mean=0.3", "alpha=1.0"]}


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
@pytest.mark.parametrize("choice", CHOSEN)
def test_a_run_dispatches_only_to_who_is_there(choice, strategy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, _, pattern = choice.partition("-")
    settings = [*SETTINGS.get(name, []), *([f"pattern={pattern}"] if pattern else [])]
    settings += ["cycle=10"] if pattern == "cyclic" else []
    options = ["compute=normal", "network=mobile", "model=logistic", "local.epochs=0.1"]
    run = ["rounds=3", "clients=20", "cohort=4", f"strategy={strategy}", f"availability={name}", "out=x", "seed=3"]
    assert main(["run", *run, *options, *(f"availability.{each}" for each in settings)]) == 0
    model, table = CHOSEN[choice](), pd.read_parquet("x/clients.parquet")
    counts = table[[f"class_{label}" for label in range(10)]].to_numpy()
    System(availability=model).prepare(20, Randomness(3), lambda: counts)
    events = pd.read_parquet("x/events.parquet").sort_values("dispatched")
    assert len(events) >= 12
    for dispatched, client in zip(events.dispatched, events.client, strict=True):
        model.advance(round(dispatched * NS))
        assert model.online[client]

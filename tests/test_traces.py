"""Traces: the devices' own switching times, exactly; one device per client; files that are no trace."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Hooks, apply, simulate

import fedsim
from fedsim.cli import main
from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.system.traces import TraceAvailability, TraceCompute, TraceNetwork, load_trace, write_trace


def made(folder, spans, period, **columns):
    """A trace of ``len(spans)`` devices; ``spans[d]`` are the device's (online, offline)."""
    rows = [(device, *span) for device, each in enumerate(spans) for span in each]
    device, online, offline = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    periods = np.broadcast_to(np.float64(period), len(spans))
    presence = {"device": device.astype(np.int64), "online": online, "offline": offline}
    write_trace(Path(folder), {"period": periods, **{k: np.array(v) for k, v in columns.items()}}, presence, True)
    return str(folder)


def changes(model, until, clients=1, seed=0):
    """The initial states and every (seconds, client, online) up to ``until`` seconds."""
    model.prepare(clients, Randomness(seed))
    before, seen = model.online.copy(), []
    while (due := model.next_change()) is not None and due <= until * NS:
        came, went = model.advance(due)
        seen += sorted([(due / NS, int(c), True) for c in came] + [(due / NS, int(c), False) for c in went])
    return before.tolist(), seen


# ---- presence ------------------------------------------------------------------------------------


def test_presence_switches_at_the_spans_ends_and_begins_anew_after_the_period(tmp_path):
    path = made(tmp_path / "t", [[(2, 3.5), (7, 9)]], 10)
    first, seen = changes(TraceAvailability(path), 27)
    assert first == [False]
    times = [2, 3.5, 7, 9, 12, 13.5, 17, 19, 22, 23.5, 27]
    assert seen == [(at, 0, number % 2 == 0) for number, at in enumerate(times)]


@pytest.mark.parametrize(
    ("spans", "online", "times"),
    [
        ([(0, 4)], True, [4, 10, 14, 20]),
        ([(4, 10)], False, [4, 10, 14, 20]),
        ([(0, 4), (6, 10)], True, [4, 6, 14, 16]),
        ([(1, 4), (4, 6)], False, [1, 6, 11, 16]),
        ([(0, 2), (2, 4), (5, 8), (8, 10)], True, [4, 5, 14, 15]),
        ([(0, 10)], True, []),
        ([(0, 3), (3, 10)], True, []),
    ],
)
def test_spans_that_touch_each_other_or_the_end_are_one(tmp_path, spans, online, times):
    first, seen = changes(TraceAvailability(made(tmp_path / "t", [spans], 10)), 20)
    assert first == [online]
    assert [at for at, _, _ in seen] == times
    assert [state for _, _, state in seen] == [online ^ (number % 2 == 0) for number in range(len(times))]


def test_a_device_that_never_switches_does_not_hold_up_the_others(tmp_path):
    path = made(tmp_path / "t", [[], [(0, 5)], [(1, 2)]], [5, 5, 3])
    model = TraceAvailability(path)
    model.prepare(30, Randomness(0))
    devices = load_trace(path).of_clients(30, Randomness(0))
    assert set(devices) == {0, 1, 2}
    assert model.online.tolist() == (devices == 1).tolist()
    assert model.next_change() == NS
    assert model.advance(NS)[0].tolist() == np.flatnonzero(devices == 2).tolist()
    assert model.online.tolist() == (devices >= 1).tolist()
    assert model.advance(2 * NS)[1].tolist() == np.flatnonzero(devices == 2).tolist()
    came, went = model.advance(5 * NS)  # there at 4 s, gone at 5 s: no net change
    assert (len(came), len(went), model.next_change()) == (0, 0, 7 * NS)


@st.composite
def traces(draw):
    """Devices with periods of 1 to 20 ns and spans cut at random."""
    devices = []
    for _ in range(draw(st.integers(1, 4))):
        period = draw(st.integers(1, 20))
        cuts = sorted(draw(st.sets(st.integers(0, period), max_size=8)))
        pairs = list(itertools.pairwise(cuts))
        devices.append((period, [pair for pair in pairs if draw(st.booleans())]))
    return devices


@settings(max_examples=50, deadline=None)
@given(traces().filter(lambda devices: any(spans for _, spans in devices)), st.booleans(), st.integers(0, 5))
def test_at_every_instant_a_client_is_online_exactly_in_its_devices_spans(tmp_path_factory, devices, shift, seed):
    folder = tmp_path_factory.mktemp("trace")
    periods = np.array([period for period, _ in devices])
    path = made(folder, [[(a / NS, b / NS) for a, b in spans] for _, spans in devices], periods / NS)
    model, clients = TraceAvailability(path, shift=shift), 7
    model.prepare(clients, Randomness(seed))
    rows = Randomness(seed)("trace.device", np.arange(clients)).integers(len(devices))
    uniform = Randomness(seed)("trace.shift", np.arange(clients)).uniform()
    start = np.floor(uniform * periods[rows]).astype(int) if shift else np.zeros(clients, dtype=int)
    at = [[(now + begin) % devices[row][0] for row, begin in zip(rows, start, strict=True)] for now in range(61)]
    expected = [
        [any(a <= p < b for a, b in devices[row][1]) for row, p in zip(rows, where, strict=True)] for where in at
    ]
    assert model.online.tolist() == expected[0]
    for now in range(1, 61):
        before = model.online.copy()
        due = model.next_change()
        assert (due == now) == (expected[now] != expected[now - 1])
        came, went = model.advance(now)
        assert model.online.tolist() == expected[now]
        assert came.tolist() == np.flatnonzero(model.online & ~before).tolist()
        assert went.tolist() == np.flatnonzero(before & ~model.online).tolist()


def test_shift_begins_every_client_at_a_uniform_point_of_its_own(tmp_path):
    clients = 20_000
    path = made(tmp_path / "t", [[(0, 30)]], 100)
    model = TraceAvailability(path, shift=True)
    model.prepare(clients, Randomness(1))
    for quarter in range(9):  # the share online is the trace's at any time
        model.advance(quarter * 25 * NS)
        assert abs(model.online.mean() - 0.3) < 5 * (0.3 * 0.7 / clients) ** 0.5
    few, many = (changes(model, 150, count, seed=1)[1] for count in (40, 400))
    assert few == [each for each in many if each[1] < 40]


def test_without_shift_a_time_of_day_is_one_for_all(tmp_path):
    first, seen = changes(TraceAvailability(made(tmp_path / "t", [[(6, 18)]] * 5, 24)), 40, clients=50)
    assert first == [False] * 50
    assert {at for at, _, _ in seen} == {6, 18, 30}
    assert len(seen) == 150


def test_the_presence_of_a_trace_decides_who_works_when(tmp_path):
    # Two steps of 1.5 s, 1000 float64 down at 2 Mbit/s (4 ms) and up at 0.5 Mbit/s (16 ms). The one device is there
    # from 10 s to 20 s, and again from 50 s on (period 40): a task begun at 10 s arrives, the next is begun at once.
    path = made(tmp_path / "t", [[(10, 20)]], 40, seconds_per_step=[1.5], down=[2.0], up=[0.5])
    strategy = Hooks(
        fedsim.LocalSGD(steps=2),
        on_online=lambda self, fed, client: fed.dispatch(client),
        on_reply=lambda self, fed, reply: (apply(self, fed, reply), fed.dispatch(reply.task.client)),
    )
    run = simulate(
        strategy,
        fedsim.Stop(updates=5),
        clients=1,
        compute=TraceCompute(path),
        network=TraceNetwork(path, latency=0.5),
        availability=TraceAvailability(path),
    )
    size = run.events.down_bytes.iloc[0]
    cycle = 0.5 + size / 250_000 + 3.0 + size / 62_500 + 0.5
    assert size % 1000 == 0
    done = run.events[run.events.outcome == "applied"]
    assert done.arrived.to_numpy() == pytest.approx(
        [10 + cycle, 10 + 2 * cycle, 50 + cycle, 50 + 2 * cycle, 90 + cycle]
    )
    lost = run.events[run.events.outcome == "interrupted"]
    assert lost.dispatched.to_numpy() == pytest.approx([10 + 2 * cycle, 50 + 2 * cycle])


# ---- one device per client -----------------------------------------------------------------------


def test_speed_link_and_presence_of_a_client_are_the_same_devices(tmp_path):
    count = 500
    path = made(
        tmp_path / "t",
        [[(1 + device, 2 + device)] for device in range(count)],
        1000,
        seconds_per_step=1.0 + np.arange(count),
        down=2.0 + np.arange(count),
        up=3.0 + np.arange(count),
    )
    compute, network, availability = TraceCompute(path), TraceNetwork(path), TraceAvailability(path)
    _, seen = changes(availability, 1000, 3000, seed=5)
    compute.prepare(3000, Randomness(5))
    network.prepare(3000, Randomness(5))
    device = compute.seconds_per_step - 1
    assert np.array_equal(network.down_bytes_per_second, (device + 2) * 125_000)
    assert np.array_equal(network.up_bytes_per_second, (device + 3) * 125_000)
    assert [client for _, client, came in seen if came] == np.lexsort((np.arange(3000), device)).tolist()
    assert all(at == device[client] + 1 for at, client, came in seen if came)
    counts = np.bincount(device.astype(int), minlength=count)
    chi = ((counts - 6) ** 2 / 6).sum()  # 499 degrees of freedom
    assert abs(chi - 499) < 5 * (2 * 499) ** 0.5
    compute.prepare(10, Randomness(5))
    assert np.array_equal(compute.seconds_per_step - 1, device[:10])


def test_jitter_and_latency_are_those_of_every_compute_and_network(tmp_path):
    write_trace(tmp_path / "t", {"seconds_per_step": np.array([2.0]), "down": np.ones(1), "up": np.ones(1)}, None)
    compute, network = TraceCompute(str(tmp_path / "t"), jitter=0.5), TraceNetwork(str(tmp_path / "t"), latency=3.0)
    compute.prepare(4, Randomness(0))
    network.prepare(4, Randomness(0))
    many = np.zeros(50_000, dtype=np.int64)
    factors = compute.durations(many, 1, np.arange(50_000)) / (2 * NS)
    assert abs(factors.mean() - 1) < 5 * 0.5 / 50_000**0.5
    assert network.down(np.array([0]), 125_000).tolist() == [4 * NS]


# ---- mistakes in a trace -------------------------------------------------------------------------

GOOD = {"device": [3, 8], "period": [10.0, 20.0], "seconds_per_step": [1.0, 2.0]}
SPANS = {"device": [3, 3, 8], "online": [0.0, 4.0, 1.0], "offline": [2.0, 10.0, 20.0]}
BAD = {
    "no device": ({"device": None}, {}, "devices.parquet: has no column device"),
    "device twice": ({"device": [3, 3]}, {}, "device is 3 in row 1; allowed: ascending"),
    "device is text": ({"device": ["a", "b"]}, {}, "device must be whole numbers"),
    "broken device": ({"device": [3.5, 4.0]}, {}, "device must be whole numbers"),
    "negative speed": ({"seconds_per_step": [1.0, -1.0]}, {}, "seconds_per_step is -1.0 in row 1; allowed: >= 1e-09"),
    "missing speed": ({"seconds_per_step": [1.0, None]}, {}, "none missing"),
    "not a number": ({"seconds_per_step": [1.0, float("nan")]}, {}, "seconds_per_step is nan in row 1"),
    "true is no speed": ({"seconds_per_step": [True, True]}, {}, "seconds_per_step must be numbers"),
    "no speeds": ({"seconds_per_step": None}, {}, r"has no seconds_per_step \(it has period\)"),
    "no period": ({"period": None}, {}, "go together"),
    "endless period": ({"period": [10.0, float("inf")]}, {}, "period is inf in row 1"),
    "stranger": ({}, {"device": [3, 3, 9]}, "device is 9 in row 2; allowed: those of devices"),
    "order": ({}, {"device": [8, 3, 3]}, "device is 3 in row 1; allowed: ascending"),
    "early": ({}, {"online": [-1.0, 4.0, 1.0]}, "online is -1.0 in row 0; allowed: >= 0"),
    "backwards": ({}, {"offline": [2.0, 4.0, 20.0]}, "offline is 4.0 in row 1; allowed: later than online"),
    "after the end": ({}, {"offline": [2.0, 10.5, 20.0]}, "offline is 10.5 in row 1; allowed: at most"),
    "no span": (
        {},
        {"device": np.array([], np.int64), "online": np.array([]), "offline": np.array([])},
        "presence.parquet: holds no span",
    ),
    "too large a device": (
        {"device": np.array([3, 2**63], np.uint64)},
        {},
        "device is 9223372036854775808 in row 1; allowed: whole numbers below",
    ),
    "overlap": ({}, {"online": [0.0, 1.5, 1.0]}, "online is 1.5 in row 1; allowed: not before"),
}


def tables(folder, devices, presence):
    folder.mkdir()
    for name, columns in (("devices", devices), ("presence", presence)):
        kept = {key: each for key, each in columns.items() if each is not None}
        pq.write_table(pa.table(kept), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("mistake", BAD)
def test_a_trace_that_is_none_is_refused_in_one_line(tmp_path, mistake):
    devices, presence, expected = BAD[mistake]
    path = tables(tmp_path / "t", GOOD | devices, SPANS | presence)
    with pytest.raises(fedsim.ConfigError, match=f"^path={path}: .*{expected}") as caught:
        TraceCompute(path)
    assert "\n" not in str(caught.value)


def test_whole_numbers_other_columns_and_any_ids_are_fine(tmp_path):
    path = tables(tmp_path / "t", GOOD | {"period": [10, 20], "model": ["a", None]}, SPANS | {"online": [0, 4, 1]})
    trace = load_trace(path)
    assert (trace.devices, sorted(trace.columns)) == (2, ["period", "seconds_per_step"])
    assert trace.presence.times.tolist() == [2 * NS, 4 * NS, 0, NS]


def test_files_that_are_no_parquet_or_not_there_are_refused(tmp_path):
    for content, expected in ((None, "there is no devices.parquet"), (b"junk", "cannot be read as parquet")):
        if content:
            (tmp_path / "devices.parquet").write_bytes(content)
        with pytest.raises(fedsim.ConfigError, match=expected):
            TraceCompute(str(tmp_path))


@pytest.mark.parametrize("group", ["compute", "network", "availability"])
def test_mistakes_on_the_command_line_name_the_key_and_end_with_status_2(tmp_path, monkeypatch, capsys, group):
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "bare", {"other": np.ones(2)}, None)
    run = ["run", "problem=none", "rounds=2", "out=o", f"{group}=trace"]
    for override, expected in (
        ([], f"fedsim: {group}.path=null: give the folder"),
        ([f"{group}.path=nowhere"], f"fedsim: {group}.path=nowhere: must be the folder of a trace"),
        ([f"{group}.path=bare"], f"fedsim: {group}.path=bare: this trace has no "),
    ):
        assert main([*run, *override]) == 2
        error = capsys.readouterr().err
        assert error.startswith(expected)
        assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_trace_that_changes_while_a_run_waits_is_noticed(tmp_path):
    model = TraceAvailability(made(tmp_path / "t", [[(1, 2)]], 5))
    made(tmp_path / "t", [[(1, 3)]], 5)
    with pytest.raises(fedsim.ConfigError, match=rf"^availability\.path={tmp_path}/t: the trace is another one than"):
        # what a fresh process does with the saved attributes
        fedsim.system.traces._trace.cache_clear() or model.prepare(1, Randomness(0))


def test_a_killed_presence_goes_on_from_its_saved_attributes(tmp_path):
    path = made(tmp_path / "t", [[(1, 2), (3, 9)], [(0, 5)], []], [10, 7, 4])
    whole, cut = TraceAvailability(path, shift=True), TraceAvailability(path, shift=True)
    _, all_changes = changes(whole, 100, 50)
    changes(cut, 40, 50)
    saved = pickle.loads(pickle.dumps(vars(cut)))
    resumed = TraceAvailability(path, shift=True)
    resumed.prepare(50, Randomness(0))
    vars(resumed).clear()
    vars(resumed).update(saved)
    seen = []
    while (due := resumed.next_change()) <= 100 * NS:
        came, went = resumed.advance(due)
        seen += sorted([(due / NS, int(c), True) for c in came] + [(due / NS, int(c), False) for c in went])
    assert seen == [each for each in all_changes if each[0] > 40]


def test_a_checkpoint_does_not_hold_the_trace(tmp_path):
    spans = [[(2 * k, 2 * k + 1) for k in range(1000)]] * 50  # 100,000 switches, 800 kB
    model = TraceAvailability(made(tmp_path / "t", spans, 2000))
    model.prepare(10, Randomness(0))
    assert len(pickle.dumps(vars(model))) < 20_000

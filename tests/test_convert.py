"""``fedsim traces``: other simulators' files, in their true formats, made by hand."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsim.cli import main
from fedsim.kernel import NS
from fedsim.rng import Randomness
from fedsim.system.traces import TraceAvailability, TraceCompute, TraceNetwork, load_trace
from fedsim.unpickling import load_plain


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- FedScale ------------------------------------------------------------------------------------

CAPACITY = {
    1: {"computation": 162.0, "communication": 5648.0},
    2: {"computation": 20.0, "communication": 1000.0},
    3: {"computation": 5.0, "communication": 1.0},
}
BEHAVIOUR = {
    0: {"duration": 3, "inactive": [30, 60, 100], "finish_time": 100, "active": [10, 60, 90], "model": "CPH1801"},
    7: {"duration": 1, "inactive": [88494], "finish_time": 172800, "active": [88494], "model": "SM-G611MT"},
}


def pickled(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def read(folder):
    return [pd.read_parquet(folder / f"{name}.parquet") for name in ("devices", "presence")]


def test_fedscale_files_become_a_trace(tmp_path, capsys):
    capacity, behaviour = pickled(tmp_path / "c", CAPACITY), pickled(tmp_path / "b", BEHAVIOUR)
    out = tmp_path / "deep/phones"
    given = ["--capacity", capacity, "--behaviour", behaviour, "--batch-size", "20", "--out", str(out), "--unpickle"]
    assert main(["traces", "fedscale", *given]) == 0
    devices, presence = read(out)
    assert devices.to_dict("list") == {
        "device": [0, 1],
        "seconds_per_step": [pytest.approx(3 * 20 * 0.162), pytest.approx(3 * 20 * 0.020)],
        "down": [5.648, 1.0],
        "up": [5.648, 1.0],
        "period": [100.0, 172800.0],
    }
    assert presence.values.tolist() == [[0, 10, 30], [0, 90, 100]]
    text = capsys.readouterr().out
    assert "2 devices with seconds_per_step, down, up, period" in text
    assert "a device is online 15.0% of the time" in text
    assert f"compute=trace compute.path={out} network=trace" in text
    assert sorted(each.name for each in out.parent.iterdir()) == ["phones"]
    words = text.splitlines()[-1].removeprefix("use it: fedsim ").split()
    assert main([*words, *QUICK]) == 0


QUICK = ["problem=none", "rounds=1", "clients=40", "cohort=1", "time_limit=400", "out=quick"]


def test_fedscale_seconds_equal_fedscales_own_formula(tmp_path):
    capacity = pickled(tmp_path / "c", CAPACITY)
    assert main(["traces", "fedscale", "--capacity", capacity, "--out", "o", "--unpickle"]) == 0
    compute, network = TraceCompute("o"), TraceNetwork("o", latency=0.0)
    for model in (compute, network):
        model.prepare(50, Randomness(0))
    for client, row in enumerate(load_trace("o").of_clients(50, Randomness(0))):
        device = CAPACITY[row + 1]
        theirs = 3.0 * 10 * 7 * device["computation"] / 1000  # augmentation * batch * steps * ms / 1000
        assert compute.expected(np.array([client]), 7)[0] / NS == pytest.approx(theirs)
        kilobits = 2 * 8 * 12_500 / 1000
        both = network.down(np.array([client]), 12_500) + network.up(np.array([client]), 12_500)
        assert both[0] / NS == pytest.approx(kilobits / device["communication"])


def flat(value):
    """Arrays as lists within a list, so that they can be compared and not be taken for lists."""
    if isinstance(value, np.ndarray):
        return [value.tolist()]
    if isinstance(value, dict):
        return {key: flat(each) for key, each in value.items()}
    return [flat(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_numbers_and_arrays_in_a_pickle_are_read_as_plain_ones(tmp_path, protocol):
    content = {
        np.int64(4): {"f": np.float32(0.5), "g": np.float64(1 / 3), "b": np.bool_(True), "i": np.array([3, -1], ">i4")},
        "list": [1, 2.5, None, "x", b"\xff\x00", (1, 2), {3}, np.arange(6.0).reshape(2, 3), np.array([], np.uint8)],
    }
    expected = {
        4: {"f": 0.5, "g": 1 / 3, "b": True, "i": [[3, -1]]},
        "list": [1, 2.5, None, "x", b"\xff\x00", (1, 2), {3}, [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]], [[]]],
    }
    if protocol < 4:  # older pickles name builtins for sets, and for bytes if there are none
        content["list"] = content["list"][:6] + content["list"][7:8]
        expected["list"] = expected["list"][:6] + expected["list"][7:8]
    found = flat(load_plain("--capacity", pickled(tmp_path / "p", content, protocol)))
    assert found == expected
    assert type(next(iter(found))) is int


def test_older_names_of_numpys_functions_are_known(tmp_path):
    text = pickle.dumps({"a": np.float64(2.5), "b": np.array([1.0])}, protocol=2)
    assert b"numpy._core" in text
    (tmp_path / "p").write_bytes(text.replace(b"numpy._core", b"numpy.core"))
    assert flat(load_plain("k", str(tmp_path / "p"))) == {"a": 2.5, "b": [[1.0]]}


class Runs:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.what = (function, arguments)

    def __reduce__(self):
        return self.what


MALICIOUS = {
    "os.system": lambda: Runs(os.system, "touch PWNED"),
    "eval": lambda: Runs(eval, "open('PWNED', 'w')"),
    "in a value": lambda: {1: {"computation": Runs(os.system, "touch PWNED"), "communication": 1.0}},
    "import": lambda: Runs(__import__, "antigravity"),
    "getattr": lambda: Runs(getattr, "x", "upper"),
    "object": lambda: {"a": Path("x")},
    "another container": lambda: OrderedDict(a=1),
    "array of objects": lambda: np.array([Runs(os.system, "touch PWNED"), 1], dtype=object),
    "array of times": lambda: np.array(["2020-01-01"], "M8[s]"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_pickle_that_names_anything_else_is_refused_even_when_allowed(tmp_path, capsys, kind, protocol):
    path = pickled(tmp_path / "evil", MALICIOUS[kind](), protocol)
    assert main(["traces", "fedscale", "--capacity", path, "--out", "o", "--unpickle"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedsim: --capacity={path}: refused as a pickle of plain data: it ")
    assert error.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["evil"]


def test_hand_made_opcodes_and_junk_are_refused(tmp_path, capsys):
    by_stack = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch PWNED\x85R."
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x13dtype.__init__.__globals__\x93."
    size = b"\x80\x04\x8c\x19numpy._core.multiarray\x8c\x06scalar\x93"
    persistent = b"\x80\x04\x8c\x01xQ."
    extension = b"\x80\x02\x82\x01."
    memo = b"\x80\x04K\x01r" + struct.pack("<I", 2**31 - 1) + b"."
    deep = b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b"."
    for content in (by_stack, dotted, size, persistent, extension, memo, b"", b"junk", b"\x80\x04]", deep):
        (tmp_path / "p").write_bytes(content)
        assert main(["traces", "fedscale", "--capacity", str(tmp_path / "p"), "--out", "o", "--unpickle"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "PWNED").exists()


def test_without_the_flag_a_pickle_is_not_even_opened(tmp_path, capsys):
    assert main(["traces", "fedscale", "--capacity", "nowhere", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedsim: nowhere: FedScale's files are pickles, and a pickle can run any code")
    assert "add --unpickle" in error
    assert error.count("\n") == 1


BAD_FEDSCALE = {
    "not a dict": ("--capacity", [1, 2], "must hold a dict with an entry per device"),
    "empty": ("--capacity", {}, "must hold a dict"),
    "entry": ("--capacity", {5: 1.0}, "entry 5 must be a dict"),
    "no speed": ("--capacity", {5: {"communication": 1.0}}, "entry 5: computation=None: must be a number > 0"),
    "zero": ("--capacity", {5: {"computation": 1.0, "communication": 0}}, "communication=0: must be a number > 0"),
    "lengths": ("--behaviour", {5: {"active": [1, 4], "inactive": [2], "finish_time": 9}}, "active has 2 times"),
    "times": ("--behaviour", {5: {"active": ["x"], "inactive": [2], "finish_time": 9}}, "active: must be a list of"),
    "nothing": ("--behaviour", {5: {"finish_time": 9}}, "entry 5: active: must be a list of seconds"),
    "no end": ("--behaviour", {5: {"active": [], "inactive": []}}, "finish_time=None: must be a number > 0"),
}


@pytest.mark.parametrize("mistake", BAD_FEDSCALE)
def test_a_fedscale_file_that_is_none_is_refused(tmp_path, capsys, mistake):
    key, content, expected = BAD_FEDSCALE[mistake]
    assert main(["traces", "fedscale", key, pickled(tmp_path / "f", content), "--out", "o", "--unpickle"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedsim: {key}={tmp_path / 'f'}: ")
    assert expected in error
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f"]


def test_spans_out_of_order_overlapping_or_outside_are_united_and_cut(tmp_path):
    entry = {"active": [50, 5, 8, -3, 95, 70, 52], "inactive": [60, 10, 12, 2, 120, 65, 55], "finish_time": 100}
    path = pickled(tmp_path / "b", {0: entry})
    assert main(["traces", "fedscale", "--behaviour", path, "--out", "o", "--unpickle"]) == 0
    assert read(tmp_path / "o")[1].values.tolist() == [[0, 0, 2], [0, 5, 12], [0, 50, 60], [0, 95, 100]]


# ---- FLASH ---------------------------------------------------------------------------------------


def messages(*lines):
    return "\n".join(f"2020-01-{day:02d} {clock}\t{what}" for day, clock, what in lines)


READY = [(29, "10:00:00", "screen_lock"), (29, "10:00:10", "Wifi"), (29, "10:00:20", "battery_charged_on")]


def test_flash_files_become_a_trace(tmp_path, capsys):
    day = 86_400
    states = {
        # from 10:00:20 until it is unlocked at 11:00; again from 12:00 to 13:00, when Wi-Fi goes; the end at 14:00
        "0": messages(
            *READY,
            (29, "10:30:00", "57.0%"),
            (29, "10:40:00", "screen_on"),
            (29, "11:00:00", "screen_unlock"),
            (29, "12:00:00", "screen_lock"),
            (29, "13:00:00", "4G"),
            (29, "14:00:00", "screen_off"),
        ),
        "1": messages(*READY, (29, "11:00:00", "screen_off")),  # still open at the end: no span, left out
        "2": messages(*READY, (29, "11:00:00", "moon_full")),
        "3": "no time\tscreen_lock",
        "4": "",
        "5": messages((2, "00:00:00", "wifi"), *READY, (30, "00:00:00", "battery_charged_off")),
    }
    (tmp_path / "states").write_text(
        json.dumps({k: {"guid": k, "model": "m", "messages": v} for k, v in states.items()})
    )
    speeds = {f"{k}": {"down_u": 4000.0 * k, "down_sigma": 9.0, "up_u": 250.0, "up_sigma": 1.0} for k in (1, 2, 3)}
    (tmp_path / "speeds").write_text(json.dumps(speeds))
    assert main(["traces", "flash", "--speeds", "speeds", "--states", "states", "--out", "o"]) == 0
    devices, presence = read(tmp_path / "o")
    period = 4 * 3600.0
    assert devices.to_dict("list") == {
        "device": [0, 1],
        "down": [32.0, 64.0],
        "up": [2.0, 2.0],
        "period": [period, 28.0 * day],
    }
    begin = 27 * day + 36_000  # from 2020-01-02 on; the period of the first device is 4 hours
    spans = [(begin + 20, begin + 3600), (begin + 7200, begin + 10_800)]
    assert begin % period == 7200
    assert presence.values.tolist() == [
        [0, (spans[1][0]) % period, (spans[1][1]) % period],
        [0, (spans[0][0]) % period, (spans[0][1]) % period],
        [1, begin + 20, 28 * day],
    ]
    assert "4 devices left out" in capsys.readouterr().out


def test_a_flash_span_over_the_end_of_the_period_is_two(tmp_path):
    # period 1000 s from 2020-01-02 00:10:00 = 600 s on; ready from 900 s to 1100 s of FLASH's clock
    text = messages(
        (2, "00:10:00", "wifi"),
        (2, "00:10:00", "screen_lock"),
        (2, "00:15:00", "battery_charged_on"),
        (2, "00:18:20", "screen_unlock"),
        (2, "00:26:40", "unknown"),
    )
    (tmp_path / "s").write_text(json.dumps({"u": {"messages": text}}))
    assert main(["traces", "flash", "--states", "s", "--out", "o"]) == 0
    devices, presence = read(tmp_path / "o")
    assert devices.period.tolist() == [1000.0]
    assert presence.values.tolist() == [[0, 0, 100], [0, 900, 1000]]
    model = TraceAvailability("o")
    model.prepare(1, Randomness(0))
    assert model.online.tolist() == [True]
    for at, online in ((100, False), (900, True), (1100, False), (1900, True), (2100, False)):
        assert model.next_change() == at * NS
        model.advance(at * NS)
        assert model.online.tolist() == [online]


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("--speeds", "{", "cannot be read as JSON"),
        ("--speeds", "[]", "must hold a dict"),
        ("--speeds", '{"a": {"down_u": 1}}', "entry a: up_u=None: must be a number > 0"),
        ("--states", '{"a": {"messages": ""}}', "none of its 1 devices has messages"),
        ("--states", None, "cannot be read: No such file"),
    ],
)
def test_a_flash_file_that_is_none_is_refused(tmp_path, capsys, key, text, expected):
    if text is not None:
        (tmp_path / "f").write_text(text)
    assert main(["traces", "flash", key, "f", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedsim: {key}=f: ")
    assert expected in error
    assert not (tmp_path / "o").exists()


# ---- where it goes -------------------------------------------------------------------------------


def test_an_out_that_is_there_is_only_replaced_if_it_is_a_trace_and_allowed(tmp_path, capsys):
    capacity = pickled(tmp_path / "c", CAPACITY)
    command = ["traces", "fedscale", "--capacity", capacity, "--unpickle", "--out", "o"]
    assert main(command) == 0
    before = (tmp_path / "o/devices.parquet").read_bytes()
    assert main([*command, "--batch-size", "5"]) == 2
    assert "--out=o: exists; give a new folder, or add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "o/devices.parquet").read_bytes() == before
    assert main([*command, "--batch-size", "5", "--overwrite"]) == 0
    assert load_trace("o").columns["seconds_per_step"][0] == pytest.approx(3 * 5 * 0.162)
    (tmp_path / "o/notes.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2
    assert "exists and is no trace" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", "o"]


def test_what_would_be_no_trace_is_not_written(tmp_path, capsys):
    path = pickled(tmp_path / "c", {1: {"computation": 1e12, "communication": 1.0}})
    assert main(["traces", "fedscale", "--capacity", path, "--unpickle", "--out", "o"]) == 2
    assert "--out=o: devices.parquet: seconds_per_step is 3" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fedscale", "--out", "o"], "--capacity, --behaviour: give at least one"),
        (["flash", "--out", "o"], "--speeds, --states: give at least one"),
        (["flash", "--speeds", "x"], "required: --out"),
        (["fedscale", "--capacity", "x", "--out", "o", "--batch-size", "0"], "--batch-size=0: must be a whole number"),
        ([], "required: SOURCE"),
    ],
)
def test_wrong_words_end_with_status_2(capsys, words, expected):
    assert main(["traces", *words]) == 2
    assert expected in capsys.readouterr().err


def test_help_teaches_the_format_and_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["traces", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for piece in ("--unpickle", "presence.parquet", "Mbit/s", "seconds_per_step", "compute=trace compute.path="):
        assert piece in text

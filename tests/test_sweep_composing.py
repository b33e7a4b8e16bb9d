"""The members of a sweep are composed once, whatever they differ in; what a glob stands for; what the terminal says."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from fedsim import config
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.config import GROUPS, choices, compose_run, compose_runs, compose_single, expand, spelt_out
from fedsim.progress import LiveProgress
from fedsim.sweeps import grid

MINE = "# Mine\n_target_: fedsim.strategies.fedavg.FedAvg\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and nothing that other tests have composed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "_composed", inspect.unwrap(config._composed))
    return tmp_path


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The overrides of everything that is composed meanwhile."""
    made: list[Sequence[str]] = []
    compose = config._composed
    monkeypatch.setattr(config, "_composed", lambda given, shown: (made.append(given), compose(given, shown))[1])
    return made


def by_hydra(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What Hydra makes of all overrides at once."""
    with initialize_config_module("fedsim.conf", version_base="1.3"):
        whole = compose("config", list(overrides), return_hydra_config=True)
    choices = {group: name for group, name in whole.hydra.runtime.choices.items() if group in GROUPS and name}
    del whole.hydra
    return OmegaConf.to_container(whole, resolve=True), choices


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=0,1", "strategy=fedavg,fedbuff", "clients=8"],
        ["experiment=first", "strategy=fedbuff,fedavg", "local.lr=0.1,0.2"],
        ["local.lr=0.1,0.2", "local=prox,sgd", "rounds=3"],  # a value before the choice that it belongs to
        ["model.hidden=[8],[8,4]", "++strategy.run_config.depth=1,2", "+compute.other={a: 1}"],
        ["~local.prox", "local.batch_size=null,4", "pool=ray", "pool.workers=1,2"],
        ["compute.mean=${network.down}", "network=constant", "network.down=3,4", "hydra.verbose=true"],
        ["partition.alpha=range(0.1,0.4,0.1)", "out='a b'", "overwrite=true"],
    ],
)
def test_members_composed_together_are_what_each_is_alone(overrides: list[str], folder: Path) -> None:
    members = expand(overrides)
    assert len(members) > 1
    expected = [by_hydra(member) for member in members]
    assert list(compose_runs(members, folder)) == expected
    assert [compose_run(member, folder) for member in members] == expected


def test_members_of_the_users_own_choices_too(folder: Path) -> None:
    (folder / "mine.yaml").write_text(MINE + "rate: 1.0\n")
    (folder / "conf/model").mkdir(parents=True)
    (folder / "conf/model/tiny.yaml").write_text("_target_: tiny.Tiny\nwidth: 3\n")
    members = expand(["strategy=mine,fedavg", "model=tiny", "model.width=1,2"])
    together = list(compose_runs(members, folder))
    assert together == [compose_run(member, folder) for member in members]
    assert [each[0]["model"]["width"] for each in together] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        ["seed=0,1", "local.lrr=1"],
        ["seed=0,1", "strategy=fedbuf"],
        ["seed=0,1", "rounds.x=1"],
        ["seeed=0,1"],
        ["seed=0,1", "strategy={a: 1}"],
        ["seed=0,1", "hydra=1"],
        ["seed=0,1", "=3"],
        ["seed=0,1", "+local.lr=1"],
        ["seed=0,1", "~local.lrr"],
        ["seed=0,1", "local.lr=${nothing}"],
        ["seed=0,1", "local.lr=???"],
    ],
)
def test_what_is_wrong_with_a_member_is_said_as_for_a_single_run(wrong: list[str], folder: Path) -> None:
    members = expand(wrong)
    with pytest.raises(ConfigError) as alone:
        compose_run(members[0], folder)
    with pytest.raises(ConfigError) as together:
        list(compose_runs(members, folder))
    assert str(together.value) == str(alone.value)


def test_no_member_changes_another(folder: Path) -> None:
    members = expand(["model.hidden=[1],[2]"])
    first, second = compose_runs(members, folder)
    first[0]["model"]["hidden"].append(9)
    assert second[0]["model"]["hidden"] == [2]
    ragged = [["seed=7", "+local.own=1"], ["rounds=3"], []]
    assert list(compose_runs(ragged, folder)) == [
        compose_run(["seed=7", "+local.own=1"], folder), compose_run(["rounds=3"], folder), compose_run([], folder)
    ]  # fmt: skip


def test_a_sweep_composes_no_more_often_than_it_has_choices(
    compositions: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(grid.Sweep, "start", lambda sweep, member: begun.append(member.name))
    few = ["problem=none", "clients=8", "cohort=2", "rounds=2"]
    assert main(["run", "-m", *few, "strategy=fedavg,fedbuff", "seed=range(5)", "out=sweep"]) == 0
    assert len(begun) == 10
    assert [[one for one in made if "strategy" in one] for made in compositions] == [
        ["strategy=fedavg"], ["strategy=fedbuff"]
    ]  # fmt: skip


def test_a_sweep_leaves_what_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid.Sweep, "start", lambda sweep, member: None)
    assert main(["run", "-m", "problem=none", "seed=0,1", "rounds=2", "hydra.verbose=false", "out=sweep"]) == 0
    left = OmegaConf.load(folder / "sweep/multirun.yaml")
    assert left.hydra.overrides.task == ["problem=none", "seed=0,1", "rounds=2"]
    assert (left.hydra.mode, left.hydra.sweep.dir, left.rounds) == ("MULTIRUN", "sweep", 2)


# ---- what is shown ---------------------------------------------------------------------------------


def test_the_terminal_says_which_member_is_composed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(LiveProgress, "show", lambda progress, share, state: said.append(f"{share:.2f} {state}"))
    monkeypatch.setattr(grid.Sweep, "start", lambda sweep, member: None)
    assert main(["run", "-m", "problem=none", "seed=0,1,2,3", "out=sweep"]) == 0
    counts = list(zip(("0.00", "0.25", "0.50", "0.75"), range(1, 5), strict=True))
    assert said == [f"{share} {what} {n} of 4" for what in ("composing", "checking") for share, n in counts]


def test_what_is_shown_goes_to_a_terminal_only_and_is_gone_afterwards() -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        progress = LiveProgress("sweep of 2")
        progress.console = Console(file=screen, force_terminal=terminal, width=100)
        with progress:
            for _ in progress.through(["a", "b"], "composing"):
                if progress._progress is not None:
                    progress._progress.refresh()
        text = screen.getvalue()
        assert ("sweep of 2" in text and "composing 2 of 2" in text) is terminal
        assert terminal is text.endswith("\x1b[2K")  # the line is wiped out


# ---- globs -----------------------------------------------------------------------------------------


def test_a_glob_is_every_choice_that_it_matches(folder: Path) -> None:
    (folder / "fedmine.yaml").write_text(MINE)
    known = sorted(choices("strategy", folder))
    feds = [name for name in known if name.startswith("fed")]
    assert "fedmine" in feds
    overrides = ["rounds=2", "strategy=glob(fed*)", "seed=0,1"]
    assert spelt_out(overrides, folder) == ["rounds=2", f"strategy={','.join(feds)}", "seed=0,1"]
    assert spelt_out(["strategy=glob([fed*,sc*],exclude=*_m*)"], folder) == [
        f"strategy={','.join(name for name in known if name.startswith(('fed', 'sc')) and '_m' not in name)}"
    ]
    assert spelt_out(["local.lr=0.1,0.2", "out=glob", "seed=range(3)"], folder) == [
        "local.lr=0.1,0.2", "out=glob", "seed=range(3)"
    ]  # fmt: skip


def test_a_sweep_over_a_glob_has_a_member_for_each_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, str]] = []
    monkeypatch.setattr(
        grid.Sweep, "start", lambda sweep, member: begun.append((member.name, member.choices["strategy"]))
    )
    assert main(["run", "-m", "problem=none", "strategy=glob([fedp*,fedy*])", "seed=0,1", "out=sweep"]) == 0
    names = [name for name in sorted(choices("strategy", Path.cwd())) if name.startswith(("fedp", "fedy"))]
    assert begun == [(f"{name}_seed{seed}", name) for name in names for seed in (0, 1)]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy=glob(zzz*)", r"^strategy=glob\(zzz\*\): matches no choice, allowed: afa_cd, .*scaffold_m_vr$"),
        ("seed=glob(*)", r"^seed=glob\(\*\): glob is for groups of choices, did you mean 'server'\?"),
        ("stratgy=glob(*)", r"^stratgy=glob\(\*\): glob is for groups of choices, did you mean 'strategy'\?"),
        ("strategy=glob(", r"^strategy=glob\(: cannot be read as key=value$"),
    ],
)
def test_a_glob_that_stands_for_nothing_is_one_line(override: str, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        spelt_out([override], folder)


def test_a_single_run_takes_no_glob(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^strategy=glob\(fed\*\): several values are a sweep, add -m$"):
        compose_single(["strategy=glob(fed*)"], folder, "add -m")


def test_members_are_launched_by_nobody_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "seed=0,1", "hydra/launcher=joblib", "out=sweep"]) == 2
    assert capsys.readouterr().err == "fedsim: hydra/launcher=joblib: unknown name, allowed: basic\n"
    assert not (folder / "sweep").exists()

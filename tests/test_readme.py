"""What the README shows works when copied."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from fedsim.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FEDSIM = Path(sys.executable).with_name("fedsim")
CLUSTER = "10.0.0.1:6379"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    return tmp_path


def test_python_quick_start_runs_and_shows_staleness(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "README", "exec"), {})
    staleness = float(capsys.readouterr().out.split()[-1])
    # 10 in flight and a buffer of 5: (10 - 1) / 5, less what the start lacks.
    assert 1.2 < staleness < 1.8


def test_own_strategy_is_twenty_lines_and_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, settings = blocks("python")[1], blocks("yaml")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (folder / "delaydrop.py").write_text(code)
    (folder / "delaydrop.yaml").write_text(settings)
    options = ["rounds=40", "strategy.patience=10", "strategy.rate=0.2", "eval_every=40", "out=mine"]
    assert main(["run", "strategy=delaydrop", *options]) == 0
    found = re.search(r"accuracy ([0-9.]+)", capsys.readouterr().out)
    assert found
    assert float(found[1]) > 0.5  # it learns: chance is 0.1


@pytest.fixture
def own_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the README has its reader write for a device model and a problem."""
    monkeypatch.syspath_prepend(folder)
    python, settings = blocks("python"), blocks("yaml")
    files = {"phones.py": python[2], "medians.py": python[3]}
    files |= {"conf/compute/two_kinds.yaml": settings[1], "conf/problem/median.yaml": settings[2]}
    for name, text in files.items():
        assert name.rpartition("conf/")[2] in README
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_own_device_model_and_problem_run(own_parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = "fedsim run problem=median compute=two_kinds compute.share=0.5 local.lr=1 rounds=20"
    assert f"    {shown}\n" in README
    assert main([*shown.split()[1:], "out=mine"]) == 0
    clients = pd.read_parquet("mine/clients.parquet")
    assert set(clients["seconds_per_step"]) == {0.1, 1.0}
    assert 35 < (clients["seconds_per_step"] == 1.0).sum() < 65
    # The numbers lie in 10 .. 16 with a deviation of 1: their median is near 13, its mean distance near 1.9.
    assert pd.read_parquet("mine/metrics.parquet")["loss"].iloc[-1] < 2.1
    assert main(["run", "compute=two_kinds", "compute.share=many"]) == 2
    assert "compute.share=many: must be a number" in capsys.readouterr().err


def test_flower_in_python_averages_what_clients_draw_in_virtual_time(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[4], "README", "exec"), {"__name__": "readme"})
    times = [float(each) for each in capsys.readouterr().out.rpartition("[")[2].strip("]\n").split(",")]
    assert len(times) == 4
    assert times == sorted(set(times))


def stopped_run(path: str) -> None:
    """A run that was stopped in its first instants."""
    from fedsim.assemble import Assembly
    from fedsim.config import compose_run

    def stop(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Assembly(*compose_run(["problem=quadratic", "rounds=3", f"out={path}"], Path.cwd())).run(stop)


@pytest.mark.usefixtures("own_parts")
def test_every_command_shown_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `fedsim run ...` line composes and builds; the cheap ones run whole elsewhere."""
    from fedsim import cli
    from fedsim.assemble import Assembly
    from fedsim.config import compose_run, expand
    from fedsim.plots.command import KINDS
    from fedsim.running import in_full
    from fedsim.sweeps.search import probes

    shown = [line.strip().partition(" #")[0] for line in README.splitlines() if line.startswith("    fedsim ")]
    assert len(shown) >= 6
    for _, command, *arguments in map(shlex.split, dict.fromkeys(shown)):
        if "hydra/sweeper=optuna" in arguments:
            for probe in probes([each for each in arguments if not each.startswith(("-m", "hydra"))]):
                Assembly(*compose_run(probe, Path.cwd()))
        elif command == "run" and "--help" not in arguments:
            for member in expand([in_full(each) for each in arguments if each != "-m"]):
                Assembly(*compose_run(member, Path.cwd()))
        elif command == "resume":
            stopped_run(arguments[0])
            assert main([command, *arguments]) == 0
        elif command == "deploy":  # those with --local run in the slow tests; here they only print their commands
            words = " ".join(arguments).replace("--local ", "clients=").split()
            assert main([command, *words, "--folder", str(Path.cwd() / f"deployment-{hash(tuple(words))}")]) == 0
            assert "flower-superlink" in capsys.readouterr().out
        elif "--help" in arguments:
            with contextlib.suppress(SystemExit):  # argparse's way to end
                main([command, *arguments])
            assert capsys.readouterr().out
        elif command in ("report", "plot"):
            options = cli._parser().parse_args([command, *arguments])
            assert command == "report" or options.name in KINDS
        else:
            assert main([command, *arguments]) == 0
            assert capsys.readouterr().out


def test_table_of_strategies_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "strategy", "--format", "markdown"]) == 0
    table = capsys.readouterr().out
    assert table in README
    for path in (ROOT / "conf/strategy").glob("*.yaml"):
        assert f"| `{path.stem}` |" in table


def test_table_reads_a_strategy_of_ones_own_without_running_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "strange.py").write_text(
        '"""Strange (A, B 2031, arXiv\n3101.00001).\n\nTraffic   7 d (x, (y, z)) down, 1 d\n   up; etc."""\n\n1 / 0'
    )
    (folder / "strange.yaml").write_text("# Strange: it is (A, B 2031)\n_target_: strange.Strange\n")
    (folder / "lost.yaml").write_text("# Nowhere f(x)\n_target_: nowhere.Lost\n")
    assert main(["list", "strategy", "--format", "markdown"]) == 0
    table = capsys.readouterr().out
    assert "| `strange` | Strange: it is | [A, B 2031](https://arxiv.org/abs/3101.00001) | 7 d down, 1 d up |" in table
    assert "| `lost` | Nowhere f(x) |  |  |" in table


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster that is there already."""
    from ray.cluster_utils import Cluster

    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield str(running.address)
    running.shutdown()


def commands_shown(text: str) -> list[str]:
    """What the indented lines of a text call, without comments, each once."""
    return list(dict.fromkeys(re.findall(r"^    fedsim (.*?)\s*(?:#.*)?$", text, re.M)))


def run_all(commands: list[str], folder: Path) -> None:
    """Run the commands in turn, as a user would."""
    for command in commands:
        done = subprocess.run([FEDSIM, *shlex.split(command)], cwd=folder, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), command


def is_deployment(command: str) -> bool:
    return command.startswith("deploy") or command in commands_shown(README.partition("## Deploying with Flower")[2])


@pytest.mark.slow
def test_every_command_shown_runs_as_it_stands_one_after_the_other(own_parts: Path, cluster: str) -> None:
    commands = [command for command in commands_shown(README) if not is_deployment(command)]
    assert len(commands) > 25
    resume = next(command for command in commands if command.startswith("resume"))
    before, after = commands[: commands.index(resume)], commands[commands.index(resume) :]
    run_all([command.replace(CLUSTER, cluster) for command in before], own_parts)
    shutil.rmtree(resume.split()[1])
    stopped_run(resume.split()[1])
    run_all([command.replace(CLUSTER, cluster) for command in after], own_parts)
    runs = [command for command in commands if re.match(r"run(?!.* --help)(?! -m)", command)]
    made = [path.parent for path in own_parts.glob("runs/*/manifest.json")]
    assert len(made) == len(runs)
    assert all(len(pd.read_parquet(path / "events.parquet")) for path in made)


@pytest.mark.slow
def test_every_deployment_shown_runs_as_it_stands(folder: Path) -> None:
    commands = [command for command in commands_shown(README) if is_deployment(command)]
    assert sum("--local" in command for command in commands) == 2
    run_all(commands, folder)
    assert "wall" in (folder / "runs/both/report.md").read_text()

"""``fedsim deploy`` without Flower's processes: the commands and files it prints, as Flower reads them; bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedsim.cli import main
from fedsim.config import compose_run
from fedsim.flower import instructions
from fedsim.flower.application import write_app
from fedsim.flower.certificates import NodeKey, issue_node_key
from fedsim.flower.commands import settings
from fedsim.flower.configuration import read_run_config

ROOT = Path(__file__).parent.parent
QUICK = ["data=digits", "model=logistic", "rounds=2"]
FILES = tuple(f"deployment/{name}" for name in ("authority.pem", "superlink.pem", "superlink.key"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The commands that are printed, word by word."""
    assert main(["deploy", *QUICK, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def of(program: str, commands: list[list[str]]) -> list[list[str]]:
    return [command[1:] for command in commands if command[0] == program]


# ---- what is printed, as Flower understands it ---------------------------------------------------


def test_superlink_serves_everyone_encrypted_and_asks_nodes_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    (given,) = of("flower-superlink", printed(capsys, "clients=2", "--tls", "--host", "server.example.org"))
    options = _parse_args_run_superlink().parse_args(given)
    assert (options.host, options.port, options.isolation) == ("0.0.0.0", 8000, "subprocess")
    assert (options.insecure, options.enable_supernode_auth) == (False, True)
    assert not options.runtime_dependency_install
    assert (options.ssl_ca_certfile, options.ssl_certfile, options.ssl_keyfile) == FILES
    assert all(Path(name).is_file() for name in FILES)


def test_superlink_for_this_machine_listens_on_loopback_only(capsys: pytest.CaptureFixture[str]) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    (given,) = of("flower-superlink", printed(capsys, "clients=2", "--port", "7777"))
    options = _parse_args_run_superlink().parse_args(given)
    assert (options.host, options.port, options.insecure, options.ssl_keyfile) == ("127.0.0.1", 7777, True, None)
    assert not options.enable_supernode_auth
    assert list(Path("deployment").rglob("*.key")) == []


def test_supernode_joins_with_its_part_of_the_data_and_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    from flwr.common.config import parse_config_args
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    (given,) = of("flower-supernode", printed(capsys, "clients=12", "--tls", "--host", "10.0.0.1", "--port", "99"))
    options = _parse_args_run_supernode().parse_args(given)
    assert (options.superlink, options.insecure, options.root_certificates) == ("10.0.0.1:99", False, "authority.pem")
    assert options.auth_supernode_private_key == "node-0.key"
    assert parse_config_args([options.node_config]) == {"partition-id": 0, "num-partitions": 12}
    assert not options.runtime_dependency_install
    assert len(list(Path("deployment/nodes").glob("node-*.key"))) == 12


def test_every_node_is_registered_by_its_own_public_key(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    commands = printed(capsys, "clients=3", "--tls")
    registered = [command[2:] for command in of("flwr", commands) if command[:2] == ["supernode", "register"]]
    assert registered == [[f"deployment/nodes/node-{node}.pub", "fedsim"] for node in range(3)]
    assert main(["deploy", *QUICK, "clients=9", "--tls", "--folder", "many"]) == 0
    (loop,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("for ")]
    (folder / "flwr").write_text('#!/bin/sh\necho "$@"\n')
    (folder / "flwr").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", loop], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"supernode register many/nodes/node-{node}.pub fedsim" for node in range(9)]


def test_run_command_finds_app_configuration_and_superlink(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    from flwr.cli.app import typer_click_object
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    overrides = ["clients=2", "strategy=fedbuff", "strategy.buffer_size=2"]
    command = next(each for each in of("flwr", printed(capsys, *overrides, "--tls", "--host", "h")) if each[0] == "run")
    given = typer_click_object.commands["run"].make_context("run", command[1:]).params
    assert (given["superlink"], given["stream"]) == ("fedsim", True)
    load_and_validate(Path(given["app"], "pyproject.toml"))  # raises for what is no app
    assert build_fab_from_disk(Path(given["app"]))
    # What the app's own process will make of it.
    fused = get_fused_config_from_dir(Path(given["app"]), parse_config_args(given["run_config_overrides"]))
    read = read_run_config(fused)
    config, choices = compose_run([*QUICK, *overrides], folder)
    out = Path(read.config["out"])
    assert (out.is_absolute(), out.parent.parent) == (True, folder)
    assert (read.config | {"out": None}, read.choices, read.loader) == (config, choices, "")
    monkeypatch.setenv("FLWR_HOME", str(folder / "deployment/home"))
    link = read_superlink_connection("fedsim")
    assert (link.address, link.insecure) == ("h:8000", False)
    assert Path(str(link.root_certificates)).samefile("deployment/authority.pem")


def test_every_terminal_gets_the_whole_environment(capsys: pytest.CaptureFixture[str]) -> None:
    exports = [command[1:] for command in printed(capsys, "clients=2") if command[0] == "export"]
    assert len(exports) == 3
    for given in exports:
        variables = dict(each.split("=") for each in given)
        assert variables.pop("FLWR_HOME") in ("$PWD/deployment/home", "$PWD/fedsim-node-0")
        assert variables == {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }


def test_the_folder_is_its_owners_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "clients=2", "--tls")
    assert stat.S_IMODE(Path("deployment").stat().st_mode) == 0o700


def test_run_configuration_survives_any_text() -> None:
    text = json.dumps({"config": {"path": 'a "b" \\ \n \x7f \u2028 ü 😀'}})
    given = {"fedsim": text, "loader": "\x7f \t ü 😀 \\"}
    assert tomllib.loads(settings(given)) == given


def shell(text: str) -> list[list[str]]:
    """The indented commands of a README, word by word."""
    lines = re.sub(r" \\\n\s+", " ", text).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ")]


def test_what_the_apps_readme_shows_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "experiments").symlink_to(ROOT / "experiments")
    shown = shell((ROOT / "experiments/flower_app/README.md").read_text())
    made, here, *_ = shown
    assert made[:2] == ["python", "experiments/flower_app/make_data.py"]
    subprocess.run([sys.executable, *made[1:]], check=True)
    assert sorted(path.name for path in Path(made[2]).iterdir()) == ["0.npz", "1.npz"]
    assert (here[:2], here[-3:]) == (["fedsim", "deploy"], ["--local", "2", "--tls"])
    (command,) = [words for words in shown if words[:2] == ["fedsim", "deploy"] and "--local" not in words]
    assert main(command[1:]) == 0
    printed = shell("".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines() if line[:1] != "#"))
    commands = [words for words in printed if words and words[0] != "cd"]
    for words in commands:
        if words[:2] == ["flwr", "run"]:  # a link of this test's
            words[2] = words[2].removeprefix(f"{ROOT}/")
    assert all(words in shown for words in commands)
    assert all(words in commands for words in shown[4:])


# ---- apps -----------------------------------------------------------------------------------------


def test_the_app_to_copy_is_an_app_and_is_taken_as_it_is(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    app = ROOT / "experiments/flower_app"
    assert load_and_validate(app / "pyproject.toml")[1] == []
    assert build_fab_from_disk(app)
    commands = printed(capsys, "clients=2", "--app", str(app))
    assert next(each for each in of("flwr", commands) if each[0] == "run")[1] == str(app)
    overrides = parse_config_args([str(folder / "deployment/run.toml")])
    assert read_run_config(get_fused_config_from_dir(app, overrides)).loader == "own_data:load"
    printed(capsys, "clients=2", "--app", str(app), "--loader", "mine:load", "--folder", "other")
    overrides = parse_config_args([str(folder / "other/run.toml")])
    assert read_run_config(get_fused_config_from_dir(app, overrides)).loader == "mine:load"


def test_an_app_needs_both_halves_and_our_keys(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    project = (write_app(folder / "app") / "pyproject.toml").read_text()
    for wrong, line in {
        project.replace("serverapp", "elsewhere"): "must name both serverapp and clientapp",
        project.replace('fedsim = ""', ""): 'must have fedsim = ""',
        project.replace('loader = ""', "loader = 3"): 'must have loader = ""',
        "[": "cannot be read",
        "[tool]\nflwr = 3": "must name both serverapp and clientapp",
    }.items():
        (folder / "app/pyproject.toml").write_text(wrong)
        assert main(["deploy", *QUICK, "clients=2", "--app", "app"]) == 2
        assert line in capsys.readouterr().err


# ---- what is refused ------------------------------------------------------------------------------

WRONG = {
    "--local 0": "--local=0: must be a whole number from 1 to 64",
    "--local two": "--local: invalid int value: 'two'",
    "--local 2 clients=3": "clients=3: each supernode is a client, so leave it out with --local",
    "--local 2 --host h": "--host=h: is for deployments on several machines, not --local",
    "--local 2 --folder f": "--folder=f: is for deployments on several machines, not --local",
    "--host a_b": "--host=a_b: must be a host name or an IP address",
    "--port 0": "--port=0: must be a whole number from 1 to 65535",
    "--folder there": "there: exists already, give another",
    "--app nowhere": "--app=nowhere: cannot be read: pyproject.toml: No such file",
    "--loader mine": "--loader=mine: must be package.module:function",
    "deployment.wait_second=3": "deployment.wait_second=3: unknown setting of a deployment, did you mean",
    "deployment.poll_seconds=0": "deployment.poll_seconds=0: must be a number > 0",
    "deployment.ttl_seconds=[": "deployment.ttl_seconds=[: cannot be read as key=value",
    "--local 2 deployment.most_samples=0": "deployment.most_samples=0: must be a whole number >= 1",
    "--tsl": "unrecognized arguments: --tsl",
    "seed=0,1": "seed=0,1: several values are a sweep, and a deployment is one run",
    "strategy=fedavgg": "did you mean 'fedavg'?",
    "out=there": "exists already, give another directory or overwrite=true",
    "strategy=dfedavg": "peers that talk to each other",
    "strategy=flower app=there": "strategy=flower: a Flower app needs no fedsim to be deployed: flwr run DIR",
    "problem=none": "trains nothing; deploy one that does",
    "--local 2 strategy=dfedavg": "peers that talk to each other",
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(
    words: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "there").mkdir()
    (folder / "there/file").touch()
    assert main(["deploy", *QUICK, *(["clients=2"] if "--local" not in words else []), *words.split()]) == 2
    shown = capsys.readouterr()
    assert WRONG[words] in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")
    assert [path.name for path in folder.iterdir()] == ["there"]


def test_settings_of_the_deployment_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "clients=2", "deployment.wait_seconds=7", "deployment.most_samples=5")
    read = read_run_config(tomllib.loads(Path("deployment/run.toml").read_text()))
    assert (read.settings.wait_seconds, read.settings.most_samples, read.settings.poll_seconds) == (7.0, 5, 0.2)


def test_numbers_of_the_deployment_are_read_as_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "clients=2", "deployment.ttl_seconds=1e3", "deployment.wait_seconds=2e-1")
    read = read_run_config(tomllib.loads(Path("deployment/run.toml").read_text()))
    assert (read.settings.ttl_seconds, read.settings.wait_seconds) == (1000.0, 0.2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half_of_the_files(
    number: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
) -> None:
    def interrupted(keys: Path, name: str) -> NodeKey:
        if name == "node-1":
            os.kill(os.getpid(), number)
        return issue_node_key(keys, name)

    monkeypatch.setattr(instructions, "issue_node_key", interrupted)
    before = signal.signal(number, signal.default_int_handler)  # not the end of the tests, should nobody listen
    try:
        assert main(["deploy", *QUICK, "clients=2", "--tls"]) == status
    finally:
        signal.signal(number, before)
    shown = capsys.readouterr()
    assert shown.err.endswith(": nothing is written\n")
    assert (shown.out, list(folder.iterdir())) == ("", [])


def test_it_is_told_where_the_records_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", *QUICK, "clients=2", "out=there"]) == 0
    assert "# its records go to there\n" in capsys.readouterr().out
    assert main(["deploy", *QUICK, "clients=2", "--folder", "other"]) == 0
    told = re.search("# its records go to (runs/.+)\n", capsys.readouterr().out)
    assert told is not None
    assert told[1] in Path("other/run.toml").read_text()


def test_flags_may_stand_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "data=digits", "--folder", "here", "model=logistic", "--tls", "clients=1"]) == 0
    assert Path("here/nodes/node-0.key").is_file()
    assert "fedsim deploy" not in capsys.readouterr().err

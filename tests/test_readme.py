"""What the README shows works when copied."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from fedsim.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
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


def stopped_run(path: str) -> None:
    """A run that was stopped in its first instants."""
    from fedsim.assemble import Assembly
    from fedsim.config import compose_run

    def stop(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Assembly(*compose_run(["problem=quadratic", "rounds=3", f"out={path}"], Path.cwd())).run(stop)


def test_every_command_shown_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `fedsim run ...` line composes and builds; the cheap ones run whole elsewhere."""
    from fedsim.assemble import Assembly
    from fedsim.config import compose_run, expand

    shown = [line.strip().partition(" #")[0] for line in README.splitlines() if line.startswith("    fedsim ")]
    assert len(shown) >= 6
    for _, command, *arguments in map(str.split, dict.fromkeys(shown)):
        if command == "run" and "--help" not in arguments:
            for member in expand([each for each in arguments if each != "-m"]):
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
        elif command != "report":
            assert main([command, *arguments]) == 0
            assert capsys.readouterr().out


def test_every_strategy_is_in_the_table() -> None:
    for path in (ROOT / "conf/strategy").glob("*.yaml"):
        assert f"| `{path.stem}` |" in README

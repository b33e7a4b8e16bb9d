"""The code base keeps its own rules: style, types, layering, sizes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedsim

ROOT = Path(__file__).parent.parent
PYTHON = sorted([*ROOT.glob("fedsim/**/*.py"), *ROOT.glob("strategies/*.py")])


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed"
    return found


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports", "--no-cache")],
    ids=["ruff", "format", "mypy", "layers"],
)
def test_tool_finds_nothing(command: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [tool(command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def test_fedsim_never_imports_strategies() -> None:
    guilty = [path for path in ROOT.glob("fedsim/**/*.py") if any("strategies" in name for name in imports(path))]
    assert guilty == []


def test_strategies_import_only_public_names() -> None:
    for path in ROOT.glob("strategies/*.py"):
        ours = [name for name in imports(path) if name.split(".")[0] == "fedsim"]
        assert set(ours) <= {"fedsim"}, path


def test_public_names_are_what_they_say() -> None:
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None
    assert set(fedsim.__all__) == {*fedsim._WHERE, "__version__"}


def test_no_module_is_too_long() -> None:
    assert {path.name: count for path in PYTHON if (count := len(path.read_text().splitlines())) > 500} == {}


def test_no_function_is_too_long() -> None:
    long = {}
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long[f"{path.name}:{node.name}"] = lines
    assert long == {}


def test_every_yaml_key_says_what_it_means() -> None:
    from fedsim.config import described

    for path in sorted(ROOT.glob("conf/**/*.yaml")):
        summary, keys = described(path)
        assert summary, path
        if path.parent.name != "experiment":
            silent = [key for key, _, comment in keys if not comment and key not in ("_target_", "defaults", "hydra")]
            assert silent == [], path


def test_every_yaml_states_exactly_what_its_class_takes() -> None:
    import inspect

    import yaml

    from fedsim.config import PARTS, locate

    for group in (*PARTS, "pool"):
        for path in sorted(ROOT.glob(f"conf/{group}/*.yaml")):
            node = yaml.safe_load(path.read_text())
            parameters = inspect.signature(locate(node.pop("_target_"), str(path))).parameters
            objects = {"local", "data", "model", "partition", "server", "topology"}
            assert set(node) == set(parameters) - objects, path

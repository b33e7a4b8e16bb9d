"""The notebooks run from beginning to end, as notebooks; what they claim in prose they assert in code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_something(path: Path, tmp_path: Path) -> None:
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) or output.output_type == "stream" for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_in_percent_format_and_holds_itself_to_its_claims(path: Path) -> None:
    text = path.read_text()
    assert "formats: py:percent" in text.partition("# %%")[0]
    assert text.count("\n# %% [markdown]\n") >= 4
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))


def test_there_are_five_notebooks_and_the_readme_names_them() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        assert f"({path.name})" in readme

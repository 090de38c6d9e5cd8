"""The rules of the house that a machine can check: size, docstrings, imports, no print."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = sorted((ROOT / "vqrae_ds").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 80


def imports_of(tree: ast.Module) -> set[str]:
    """The top-level names of all modules that are imported at run time, anywhere in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_rules_of_the_package(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    place = path.relative_to(ROOT / "vqrae_ds").as_posix()
    assert ast.get_docstring(tree), "each file says what it does"
    assert text.count("\n") <= MAX_FILE_LINES
    imported = imports_of(tree)
    if place != "engines.py":
        assert not any(name.split(".")[0] == "deepspeed" for name in imported)
    if place.startswith(("config/", "manifest", "command_line")):
        assert not {name.split(".")[0] for name in imported} & {"torch", "transformers"}
    if place.startswith(("models/", "ops/")):
        assert "torch.distributed" not in imported, "models know no rank"
    if place != "train.py":
        assert "vqrae_ds.train" not in imported
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", f"print in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"


def test_top_level_holds_what_was_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    allowed = {"vqrae_ds", "ds_configs", "launchers", "tools", "tests", ".ci"}
    allowed |= {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore"}
    assert {Path(name).parts[0] for name in listed.stdout.splitlines()} <= allowed

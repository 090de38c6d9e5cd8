"""Indexing runs in many processes, each of which would pay for what it imports."""

from __future__ import annotations

from tests.conftest import run_python


def test_indexing_imports_no_torch() -> None:
    code = "import sys, vqrae_ds.data.indexing, vqrae_ds.data.shard_writing; print(*sys.modules)"
    assert "torch" not in run_python("-c", code).stdout.split()

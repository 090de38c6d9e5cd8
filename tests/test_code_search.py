"""The choice of the search for the nearest codes."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from tests.conftest import run_python
from vqrae_ds.code_search import choose_search
from vqrae_ds.ops.nearest_code import nearest_code


def test_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_search(on_gpu=False) is nearest_code
    assert caplog.messages == [
        "nearest codes: tiles in PyTorch (the Triton kernels need CUDA)",
    ]


def test_a_gpu_that_is_too_old(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with caplog.at_level(logging.INFO):
        assert choose_search(on_gpu=True) is nearest_code
    assert "need compute capability 8.0, this GPU has 7.5" in caplog.messages[-1]


def test_without_triton(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with caplog.at_level(logging.INFO):
        assert choose_search(on_gpu=True) is nearest_code
    assert caplog.messages[-1] == "nearest codes: tiles in PyTorch (triton is not installed)"


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, vqrae_ds.code_search, vqrae_ds.ops.nearest_code; "
    done = run_python("-c", code + "assert 'vqrae_ds.ops.nearest_code_kernels' not in sys.modules")
    assert done.returncode == 0, done.stderr

"""The choice of the search for the nearest codes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_python
from tests.tiny import build_model, random_images
from vqrae_ds import VQRAE
from vqrae_ds.ops import code_search
from vqrae_ds.ops.code_search import choose_search
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


def test_a_model_chooses_when_it_searches(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Once it is on a GPU as well, for all that it is asked is where the tokens are."""
    build_model().save_pretrained(tmp_path)
    model = VQRAE.from_pretrained(tmp_path)
    assert model.quantizer.search is code_search.search_where_they_are
    code_search._search_on.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model.encode_to_indices(random_images())
    assert caplog.messages == [
        "nearest codes: tiles in PyTorch (the Triton kernels need CUDA)",
    ]


TRIAL = """
import torch
from vqrae_ds.ops import code_search
from vqrae_ds.ops import nearest_code_triton

if {broken!r}:
    exec({broken!r})
print(code_search._trial(torch.device("cpu")))
"""
BROKEN = {
    "": "None",
    "nearest_code_triton._settle = lambda *_: None": "other codes in torch.float32",
    "nearest_code_triton.norms_kernel = None": "cannot be built here: TypeError",
    "torch.equal = lambda *_: 1 / 0": "cannot be built here: ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_trial_finds_kernels_that_are_wrong(broken: str) -> None:
    """In the interpreter, without one of the kernels or with what a GPU says late."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRIAL.format(broken=broken)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert BROKEN[broken] in done.stdout, done.stderr


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, vqrae_ds.ops.code_search, vqrae_ds.ops.nearest_code; "
    done = run_python("-c", code + "assert 'vqrae_ds.ops.nearest_code_kernels' not in sys.modules")
    assert done.returncode == 0, done.stderr

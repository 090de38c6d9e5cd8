"""Conversion of the moving averages instead of the weights: what is taken, what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.zero_files import (
    BUFFERS,
    FROZEN,
    TRAINED,
    assert_identical,
    expected,
    seal,
    write_averages,
    write_step,
)
from vqrae_ds.conversion.consolidate import consolidate, verify


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_step(tmp_path / "step_00001000", TRAINED, FROZEN, BUFFERS)


@pytest.mark.parametrize("to", ["stage2", "inference"])
def test_moving_averages_are_taken_on_request(checkpoint, tmp_path, to):
    with pytest.raises(ValueError, match="holds no moving average.*ema was off") as caught:
        consolidate(checkpoint, tmp_path / "out", to=to, ema=True)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00001000"]
    averages = {name: torch.randn_like(tensor) for name, tensor in TRAINED.items()}
    write_averages(checkpoint, averages)
    with pytest.raises(ValueError, match="ema_rank_00000.pt is not in the manifest"):
        consolidate(checkpoint, tmp_path / "out", to=to, ema=True)
    seal(checkpoint)
    consolidate(checkpoint, tmp_path / "averaged", to=to, ema=True)
    consolidate(checkpoint, tmp_path / "plain", to=to)
    cast = torch.float32 if to == "inference" else None
    wanted = {n.removeprefix("vqrae."): tensor for n, tensor in averages.items()}
    for name, replaced in {"averaged": wanted, "plain": {}}.items():
        verify(checkpoint, tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        assert_identical(found, expected(cast) | replaced)
        record = json.loads((tmp_path / name / "conversion.json").read_text())
        assert record["ema"] == (name == "averaged")
    shutil.copy(tmp_path / "plain" / "model.safetensors", tmp_path / "averaged")
    with pytest.raises(ValueError, match="decoder.bias in model.safetensors differs"):
        verify(checkpoint, tmp_path / "averaged")

"""Conversion of checkpoints whose frozen weights lie once in the run."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.zero_files import FROZEN, assert_identical, expected, write_split_step
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.safetensors_stream import StreamedTensor, record_of, write_file
from vqrae_ds.manifest import hash_file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_split_step(tmp_path / "run")


@pytest.mark.parametrize("to", ["stage2", "inference"])
def test_converts_like_one_that_holds_them(checkpoint, tmp_path, to):
    consolidate(checkpoint, tmp_path / "out", to=to)
    cast = torch.float32 if to == "inference" else None
    assert_identical(load_file(tmp_path / "out" / "model.safetensors"), expected(cast))
    verify(checkpoint, tmp_path / "out")


def test_damage_of_the_run_s_file_is_refused_and_named(checkpoint, tmp_path):
    (path,) = (tmp_path / "run" / "frozen").iterdir()
    intact = path.read_bytes()
    middle = intact.index(FROZEN["vqrae.encoder.weight"][5].view(torch.uint8).numpy().tobytes())
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    with pytest.raises(ValueError, match=f"{path} does not match its checksum"):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} is missing: the folder frozen/ of a run") as no:
        consolidate(checkpoint, tmp_path / "out", to="inference")
    assert "\n" not in str(no.value)
    path.write_bytes(intact)
    consolidate(checkpoint, tmp_path / "out", to="inference")


def test_a_step_folder_that_was_copied_alone_is_refused(checkpoint, tmp_path):
    alone = tmp_path / "copies" / "runs" / checkpoint.name
    alone.parent.mkdir(parents=True)
    checkpoint.rename(alone)
    with pytest.raises(ValueError, match="copies/frozen/.* is missing: .*keep and copy it with"):
        consolidate(alone, tmp_path / "out", to="inference")


def test_the_digest_is_known_before_the_file_is_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(3 << 20),  # more than one chunk
        "c": torch.randn(()),
        "d": torch.empty(0, 4),
    }

    def pieces(name: str) -> list[torch.Tensor]:
        return list(tensors[name].reshape(-1).split(100_000))

    streamed = [
        StreamedTensor(n, tuple(t.shape), t.dtype, functools.partial(pieces, n))
        for n, t in tensors.items()
    ]
    record = record_of(streamed)
    path = tmp_path / "x.safetensors"
    write_file(path, streamed, lambda written: None)
    assert hash_file(path) == record
    assert_identical(load_file(path), tensors)
    tensors["a"][2, 2] += 1
    assert record_of(streamed) != record

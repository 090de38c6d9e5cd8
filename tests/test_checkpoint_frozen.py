"""The file of the frozen encoder in one process: written once, and found when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from tests.file_engine import FileEngine, run_alone, save_at, starting_from
from tests.limits import small_files_only
from vqrae_ds import checkpoint, manifest
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run


@pytest.fixture
def run(tmp_path):
    with run_alone(tmp_path) as run:
        yield run


def frozen_encoder(value: float) -> nn.Module:
    """An encoder of 3 x 5 weights, the only frozen ones."""
    encoder = nn.Linear(5, 3, bias=False).requires_grad_(False)
    nn.init.constant_(encoder.weight, value)
    return nn.ModuleDict({"vqrae": nn.ModuleDict({"encoder": encoder})})


def save_frozen(run: Run, step: int, value: float = 0.5) -> Path:
    engine = FileEngine(module=frozen_encoder(value))
    return checkpoint.save(run, checkpoint.Content(engine, None, TrainState(step, 0)))


def test_the_frozen_encoder_is_written_once_and_outlives_the_checkpoints(run):
    folders = [save_frozen(run, step) for step in (1, 2)]
    (path,) = (Path(run.config.run.output_dir) / "frozen").iterdir()
    before = path.stat()
    folders += [save_frozen(run, step) for step in (3, 4)]
    assert [folder.exists() for folder in folders] == [False, False, True, True]
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert torch.equal(load_file(path)["vqrae.encoder.weight"], torch.full((3, 5), 0.5))
    digest = xxhash.xxh3_128(path.read_bytes()).hexdigest()
    assert path.name == f"{digest}.safetensors"
    for folder in folders[2:]:
        found = manifest.read_manifest(folder)
        assert found.frozen == manifest.FileRecord(path.stat().st_size, digest)
        assert not any("safetensors" in name for name in found.files)
    assert manifest.read_manifest(save_at(run, 5)).frozen is None, "nothing was frozen"


def test_a_frozen_file_that_is_lost_or_damaged_is_written_again(run):
    record = manifest.read_manifest(save_frozen(run, 1)).frozen
    path = manifest.frozen_file(run.config.run.output_dir, record)
    content = path.read_bytes()
    engine = FileEngine(module=frozen_encoder(0.5))
    path.unlink()
    assert checkpoint.write_pretrained(run, engine, record) == record
    assert path.read_bytes() == content
    path.write_bytes(content[:-1] + b"\xff")
    assert checkpoint.write_pretrained(run, engine) == record
    assert path.read_bytes() == content
    other = checkpoint.write_pretrained(run, FileEngine(module=frozen_encoder(0.25)))
    assert {p.name for p in path.parent.iterdir()} == {
        f"{r.xxh3_128}.safetensors" for r in (record, other)
    }


def test_what_could_not_be_written_leaves_nothing(run):
    engine = FileEngine(module=frozen_encoder(0.5))
    with small_files_only(100), pytest.raises(OSError, match="File too large"):
        checkpoint.write_pretrained(run, engine)
    folder = Path(run.config.run.output_dir) / "frozen"
    assert list(folder.iterdir()) == []
    checkpoint.write_pretrained(run, engine)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("how", ["flipped", "shorter", "missing"])
def test_a_damaged_frozen_file_is_named_and_no_run_starts_over_for_it(run, how):
    save_frozen(run, 1)
    newest = save_frozen(run, 2)
    assert checkpoint.find(run) == newest
    path = manifest.frozen_file(
        Path(run.config.run.output_dir), manifest.read_manifest(newest).frozen
    )
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[:-1])
    line = {
        "flipped": "does not match its checksum",
        "shorter": f"has {len(content) - 1} bytes",
        "missing": "is missing: the folder frozen/ of a run belongs to its checkpoints",
    }[how]
    with pytest.raises(ValueError, match=f"{path} {line}.*all checkpoints of the run need it"):
        checkpoint.find(run)
    with pytest.raises(ValueError, match=f"{path} {line}"):
        checkpoint.resolve_start(starting_from(run, newest.parent.parent))

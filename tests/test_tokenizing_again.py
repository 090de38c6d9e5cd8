"""The same command again: what is there stays, what is damaged, away or stale is mended."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.tokenizing import (
    SIZES,
    contents,
    copy_to,
    crops_of_photos,
    damage_of,
    encoder,
    make_codes,
    run,
    task_of,
)
from vqrae_ds.manifest import write_sealed
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.tokenizing import folder, progress
from vqrae_ds.tokenizing import tokenize as tokenizing
from vqrae_ds.tokenizing.dataset import CodeDataset
from vqrae_ds.tokenizing.folder import code_path, finish, publish
from vqrae_ds.tokenizing.tokenize import Encode, Made, tokenize


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, shards and the codes of one straight run."""
    root = tmp_path_factory.mktemp("tokenizing")
    make_codes(root, crops_of_photos(sum(SIZES)))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return copy_to(tmp_path, made)


def make_without_shard_3(root: Path) -> Path:
    """Make its codes while the shard is away, as `root`/away; where it belongs is returned."""
    shard = root / "shards" / "00003.tar"
    code_path(root / "codes", 3).unlink()
    shard.rename(root / "away")
    run(root, bad_samples="skip")
    return shard


def test_what_is_there_is_not_made_again(root, monkeypatch):
    before = contents(root / "codes")
    monkeypatch.setattr(VQRAE, "encode_to_indices", None)  # nobody may ask for codes
    assert run(root).made.shards == 0
    assert contents(root / "codes") == before
    (root / "codes" / "manifest.json").unlink()
    assert run(root).totals.samples == sum(SIZES)
    assert contents(root / "codes") == before


def test_what_is_damaged_or_gone_is_made_again(root):
    before = contents(root / "codes")
    altered = code_path(root / "codes", 0)
    altered.write_bytes(altered.read_bytes()[:-9] + b"?" + altered.read_bytes()[-8:])
    code_path(root / "codes", 2).write_bytes(b"")
    code_path(root / "codes", 3).unlink()
    (root / "codes" / f".{altered.name}.elsewhere").write_bytes(b"of a killed rank")
    damage = damage_of(root)
    assert f"{altered.name}: it was altered after it was written" in damage
    assert any("codes-000002.safetensors is no file of codes" in line for line in damage)
    assert any("codes-000003.safetensors" in line and "No such file" in line for line in damage)
    outcome = run(root)
    assert (outcome.made.shards, outcome.made.images) == (3, SIZES[0] + SIZES[2] + SIZES[3])
    assert contents(root / "codes") == before


def test_a_shard_that_was_away_is_tried_again(root):
    expected = contents(root / "codes")
    shutil.rmtree(root / "codes")
    away = root / "shards" / "00003.tar"
    away.rename(root / "away")
    assert run(root, bad_samples="skip").totals.skipped == {"missing_shard": SIZES[3]}
    assert damage_of(root, bad_samples="skip") == []
    (root / "away").rename(away)
    assert run(root, bad_samples="skip").totals.skipped == {}
    assert contents(root / "codes") == expected


def test_a_retry_never_takes_codes_away(root, caplog):
    """One sample cannot be read at first; then the whole shard is away; then all is back."""
    expected = contents(root / "codes")
    shutil.rmtree(root / "codes")
    shard = root / "shards" / "00000.tar"
    whole = shard.read_bytes()
    last = int(task_of(root).index.samples_of(0).offsets[-1])

    def load() -> Encode:
        encode = encoder(root)()

        def cut_and_encode(images: Tensor) -> Tensor:
            os.truncate(shard, last)  # under a rank that is reading it
            return encode(images)

        return cut_and_encode

    outcome = tokenize(task_of(root, bad_samples="skip"), load)
    assert outcome.totals.skipped == {"resized_shard": 1}
    assert outcome.made == Made(len(SIZES), sum(SIZES) - 1, 1)
    first = contents(root / "codes")
    shard.unlink()
    outcome = run(root, bad_samples="skip")
    assert outcome.totals.samples == sum(SIZES) - 1 and outcome.made == Made()
    assert "it has the codes of 8 images, of which 0 can be read now" in caplog.text
    assert contents(root / "codes") == first
    shard.write_bytes(whole)
    assert run(root).made == Made(1, SIZES[0])
    assert contents(root / "codes") == expected


def test_a_manifest_that_a_peer_wrote_too_early_is_written_anew(root, monkeypatch):
    """A peer sees a file under each name while this rank is about to make one of them anew."""
    manifest = root / "codes" / "manifest.json"
    expected = manifest.read_bytes()
    away = make_without_shard_3(root)
    early = manifest.read_bytes()
    (root / "away").rename(away)

    def load() -> Encode:
        assert manifest.read_bytes() == early, "who reads the folder can until there is more"
        return encoder(root)()

    def publish_beside_a_peer(*arguments: Any) -> None:
        assert not manifest.exists()
        manifest.write_bytes(early)
        publish(*arguments)

    monkeypatch.setattr(tokenizing, "publish", publish_beside_a_peer)
    assert tokenize(task_of(root), load).totals.skipped == {}
    assert manifest.read_bytes() == expected != early


def test_a_stale_manifest_is_written_anew_by_the_next_start(root, monkeypatch):
    """A peer ends while a rank makes a file anew; that one publishes it, and is interrupted."""
    manifest = root / "codes" / "manifest.json"
    expected = manifest.read_bytes()
    away = make_without_shard_3(root)
    (root / "away").rename(away)
    task = task_of(root)

    def publish_beside_a_peer(*arguments: Any) -> None:
        assert not manifest.exists()
        assert finish(task.output, task.job, task.index).skipped == {"missing_shard": SIZES[3]}
        publish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizing, "publish", publish_beside_a_peer)
        tokenize(task, encoder(root))
    assert len(CodeDataset(root / "codes")) == sum(SIZES) - SIZES[3]
    assert damage_of(root) != []
    outcome = run(root)
    assert outcome.made == Made() and outcome.totals.samples == sum(SIZES)
    assert manifest.read_bytes() == expected
    assert len(CodeDataset(root / "codes")) == sum(SIZES)


def test_a_manifest_that_comes_late_is_written_anew(root, monkeypatch):
    """A rank has read all files; before its manifest has its name a peer makes one and ends."""
    manifest = root / "codes" / "manifest.json"
    expected = manifest.read_bytes()
    away = make_without_shard_3(root)
    manifest.unlink()
    task = task_of(root, bad_samples="skip")

    def write_late(path: Path, payload: dict[str, Any]) -> None:
        monkeypatch.undo()
        (root / "away").rename(away)
        assert run(root).totals.samples == sum(SIZES)
        write_sealed(path, payload)

    monkeypatch.setattr(folder, "write_sealed", write_late)
    assert finish(task.output, task.job, task.index).samples == sum(SIZES)
    assert manifest.read_bytes() == expected


def test_progress_does_not_count_what_is_made_anew(root, monkeypatch, caplog):
    code_path(root / "codes", 0).write_bytes(b"damaged")
    code_path(root / "codes", 3).write_bytes(b"damaged")
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    caplog.set_level("INFO", "vqrae_ds")
    run(root)
    lines = [r.getMessage() for r in caplog.records if r.name == progress.__name__]
    done = [int(line.partition(f" of {sum(SIZES)} images")[0]) for line in lines]
    assert done == [15 + 4, 15 + 8, 15 + 9, 14 + 4, 14 + 8, 14 + 10]
    assert not any("| -" in line for line in lines), "no time is less than none"

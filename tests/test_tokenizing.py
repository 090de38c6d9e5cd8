"""A data set becomes codes, and nothing of it is lost: not by faults, damage or interruption."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bad_members import make_faults
from tests.tokenizing import (
    crops_of_photos,
    direct_codes,
    encoder,
    make_model,
    run,
    task_of,
    write_shards_of,
)
from vqrae_ds.data.faults import BadSample
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.tokenizing.code_shard import encode_shard, read_columns, read_header
from vqrae_ds.tokenizing.folder import code_path, publish, read_manifest
from vqrae_ds.tokenizing.job import begin_or_join, check_num_codes
from vqrae_ds.tokenizing.sharing import Claims, Turn, Worker, this_worker, turns
from vqrae_ds.tokenizing.tokenize import Encode, tokenize
from vqrae_ds.tokenizing.verifying import verify

SIZES = [9, 0, 4, 10, 1]  # of the shards: an empty one, and some that batches of 4 do not divide


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, shards, the codes of one straight run, and what a script finds by itself."""
    root = tmp_path_factory.mktemp("tokenizing")
    images = crops_of_photos(sum(SIZES))
    model = make_model(root / "model")
    write_shards_of(root / "shards", images, SIZES)
    run(root)
    found, first = [], 0
    for shard, size in enumerate(SIZES):
        folder = root / f"direct{shard}"
        found.append(direct_codes(model, images[first : first + size], folder) if size else None)
        first += size
    np.savez(root / "direct.npz", *(codes for codes in found if codes is not None))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    for name in ("model", "shards", "codes"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damage_of(root: Path, **data: Any) -> list[str]:
    task = task_of(root, **data)
    return verify(task.output, task.job, task.index).damage


def test_codes_are_those_of_the_model_on_the_same_batches(made):
    direct = iter(np.load(made / "direct.npz").values())
    number = 0
    for shard, size in enumerate(SIZES):
        codes = read_columns(read_header(code_path(made / "codes", shard)))
        assert codes.keys == [f"class/{number + i:05d}" for i in range(size)]
        assert codes.numbers_N.tolist() == list(range(size))
        number += size
        if size:
            np.testing.assert_array_equal(codes.codes_Nhw, next(direct))
            width, height, left, top, side = codes.crops_N5.T
            assert (side == np.minimum(width, height)).all()
            assert (left == (width - side) // 2).all() and (top == (height - side) // 2).all()
    assert len(set(np.concatenate([c.ravel() for c in np.load(made / "direct.npz").values()]))) > 9


def test_the_manifest_has_every_file_and_the_totals(made):
    manifest = read_manifest(made / "codes")
    assert manifest["totals"]["samples"] == sum(SIZES)
    assert manifest["totals"]["tokens"] == sum(SIZES) * 16
    assert [entry["num_samples"] for entry in manifest["shards"]] == SIZES
    assert manifest["job"]["grid"] == [4, 4] and manifest["job"]["num_codes"] == 64
    assert damage_of(made) == []


def test_what_is_there_is_not_made_again(root, monkeypatch):
    before = contents(root / "codes")
    monkeypatch.setattr(VQRAE, "encode_to_indices", None)  # nobody may ask for codes
    assert run(root).shards == 0
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
    assert (outcome.shards, outcome.images) == (3, SIZES[0] + SIZES[2] + SIZES[3])
    assert contents(root / "codes") == before


def test_a_file_that_another_rank_has_to_mend_is_left_to_it(root):
    """A rank that ended with an error would take its peers along."""
    before = contents(root / "codes")
    code_path(root / "codes", 1).write_bytes(b"damaged")
    code_path(root / "codes", 2).unlink()
    first = run(root, "codes", Worker(0, 2))
    assert (first.shards, first.totals) == (1, None)
    assert "manifest.json" not in contents(root / "codes")
    second = run(root, "codes", Worker(1, 2))
    assert (second.shards, second.totals.samples) == (1, sum(SIZES))
    assert contents(root / "codes") == before


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_one_after_another_make_the_same(root, world_size):
    """Each first finds its own share, and helps then: one rank alone would do all."""
    expected = contents(root / "codes")
    shutil.rmtree(root / "codes")
    outcomes = [run(root, "codes", Worker(rank, world_size)) for rank in range(world_size)]
    assert [outcome.shards for outcome in outcomes] == [len(SIZES), *[0] * (world_size - 1)]
    assert contents(root / "codes") == expected


def test_turns_cover_all_shards_own_first():
    for world_size in (1, 2, 5, 9):
        for rank in range(world_size):
            order = list(turns(7, Worker(rank, world_size)))
            assert sorted(turn.shard for turn in order) == list(range(7))
            own = [turn.shard for turn in order if turn.is_own]
            assert own == list(range(rank, 7, world_size)) == [t.shard for t in order[: len(own)]]


def _hold(path: Path, shard: int, is_held, is_over) -> None:
    assert Claims(path).take(Turn(shard, is_own=True))
    is_held.set()
    is_over.wait(60)


def test_a_claim_lasts_as_long_as_its_process(root):
    shutil.rmtree(root / "codes")
    (root / "codes").mkdir()
    context = get_context("fork")
    is_held, is_over = context.Event(), context.Event()
    # The folder of a job must be there before anything else is in it.
    begin_or_join(root / "codes", task_of(root).job)
    path = root / "codes" / "claims"
    holder = context.Process(target=_hold, args=(path, 2, is_held, is_over))
    holder.start()
    try:
        assert is_held.wait(60)
        outcome = run(root)
        assert (outcome.shards, outcome.totals) == (len(SIZES) - 1, None)
        assert not code_path(root / "codes", 2).exists()
        assert not (root / "codes" / "manifest.json").exists()
    finally:
        holder.kill()
        holder.join()
    outcome = run(root)
    assert (outcome.shards, outcome.totals.samples) == (1, sum(SIZES))
    assert damage_of(root) == []


def test_without_locks_each_does_its_own_share(root, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    expected = contents(root / "codes")
    shutil.rmtree(root / "codes")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    outcomes = [run(root, "codes", Worker(rank, 2)) for rank in range(2)]
    assert [outcome.shards for outcome in outcomes] == [3, 2]
    assert outcomes[0].totals is None and outcomes[1].totals.samples == sum(SIZES)
    assert contents(root / "codes") == expected


def test_bad_samples_are_refused_by_name_or_recorded(tmp_path):
    make_model(tmp_path / "model")
    faults = make_faults(tmp_path / "payload")
    sound = crops_of_photos(len(faults))
    mixed = [data for fault, good in zip(faults, sound, strict=True) for data in (fault.data, good)]
    index = write_shards_of(tmp_path / "shards", mixed, [20, len(mixed) - 20])
    limit = {"max_image_bytes": 2 << 20}
    with pytest.raises(BadSample, match="00000.tar, sample 'class/00000': it has no bytes"):
        run(tmp_path, **limit)
    outcome = run(tmp_path, bad_samples="skip", **limit)
    recorded = {}
    for shard in range(2):
        for number, key, kind in read_header(code_path(tmp_path / "codes", shard)).skipped:
            assert index.samples_of(shard).keys[number] == key
            recorded[key] = kind
    bad = {f"class/{2 * i:05d}": fault.kind for i, fault in enumerate(faults) if fault.kind}
    assert recorded == bad and len(bad) > 15
    assert outcome.totals.samples == len(mixed) - len(bad)
    assert sum(outcome.totals.skipped.values()) == len(bad)
    assert damage_of(tmp_path, **limit) == []
    assert not (tmp_path / "payload").exists(), "nothing was executed"


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


def test_a_manifest_that_a_peer_wrote_too_early_is_written_anew(root):
    """A peer sees a file under each name while this rank is about to make one of them anew."""
    manifest = root / "codes" / "manifest.json"
    expected = manifest.read_bytes()
    away = root / "shards" / "00003.tar"
    code_path(root / "codes", 3).unlink()
    away.rename(root / "away")
    run(root, bad_samples="skip")
    early = manifest.read_bytes()
    (root / "away").rename(away)

    def load() -> Encode:
        assert not manifest.exists()
        manifest.write_bytes(early)
        return encoder(root)()

    assert tokenize(task_of(root), load).totals.skipped == {}
    assert manifest.read_bytes() == expected != early


def test_verify_finds_codes_that_are_sound_and_wrong(root):
    """A file of its own job that says what is not so: two samples with the same place."""
    task, path = task_of(root), code_path(root / "codes", 0)
    header = read_header(path)
    codes = read_columns(header)
    parts = {
        "job": header.job,
        "source": header.source,
        "made_with": header.made_with,
    }
    for changed in (
        codes._replace(numbers_N=codes.numbers_N * 0),
        codes._replace(keys=codes.keys[::-1]),
        codes._replace(codes_Nhw=codes.codes_Nhw + np.uint16(64)),
    ):
        data = encode_shard(changed, skipped=[], **parts)
        publish(root / "codes", 0, data)
        lines = verify(task.output, task.job, task.index).damage
        assert len(lines) == 2, "the file, and the manifest that lists another one"
        assert lines[0].startswith("codes-000000.safetensors: ")


def test_another_job_is_refused(root):
    task = task_of(root)
    other = VQRAE.from_pretrained(root / "model")
    other.in_proj.weight.data[0, 0] += 1
    other.save_pretrained(root / "other" / "model")
    (root / "other" / "shards").symlink_to(root / "shards")
    (root / "other" / "codes").symlink_to(root / "codes")
    with pytest.raises(ValueError, match=r"another job \(weights_xxh3_128 \w+ there, \w+ here\)"):
        run(root / "other")
    with pytest.raises(ValueError, match="max_image_pixels 89478485 there, 99 here"):
        run(root, max_image_pixels=99)
    (task.output / "job.json").unlink()
    with pytest.raises(ValueError, match="is not empty"):
        run(root)
    assert len(str(pytest.raises(ValueError, run, root).value).splitlines()) == 1


def test_more_codes_than_uint16_tells_apart():
    check_num_codes(65536)
    with pytest.raises(ValueError, match="65537 codes.*65536 apart: train with"):
        check_num_codes(65537)


def test_who_a_process_is():
    assert this_worker({}) == Worker(0, 1, 0)
    said = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert this_worker(said | {"SLURM_PROCID": "0"}) == Worker(3, 8, 1)
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}
    assert this_worker(step) == Worker(5, 6, 2)
    assert this_worker({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) == Worker(), "a batch script"
    for wrong in (said | {"RANK": "8"}, said | {"WORLD_SIZE": "-1"}, said | {"RANK": "x"}):
        with pytest.raises(ValueError, match="RANK="):
            this_worker(wrong)

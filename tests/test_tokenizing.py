"""A data set becomes codes: those of the model, each sample once, of one job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.bad_members import make_faults
from tests.tokenizing import (
    SIZES,
    copy_to,
    crops_of_photos,
    damage_of,
    direct_codes,
    make_codes,
    make_model,
    run,
    task_of,
    write_shards_of,
)
from vqrae_ds.data.faults import BadSample
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.tokenizing.code_shard import encode_shard, read_columns, read_header
from vqrae_ds.tokenizing.folder import code_path, publish, read_manifest
from vqrae_ds.tokenizing.job import check_num_codes
from vqrae_ds.tokenizing.tokenize import Made
from vqrae_ds.tokenizing.verifying import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, shards, the codes of one straight run, and what a script finds by itself."""
    root = tmp_path_factory.mktemp("tokenizing")
    images = crops_of_photos(sum(SIZES))
    model = make_codes(root, images)
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
    return copy_to(tmp_path, made)


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
    assert outcome.made == Made(shards=2, images=len(mixed) - len(bad), skipped=len(bad))
    assert sum(outcome.totals.skipped.values()) == len(bad)
    assert damage_of(tmp_path, **limit) == []
    assert not (tmp_path / "payload").exists(), "nothing was executed"


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

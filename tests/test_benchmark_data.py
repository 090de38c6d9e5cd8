"""The benchmark of reading images, small: both sides read the same pictures; nothing is timed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from vqrae_ds.benchmarks import data
from vqrae_ds.benchmarks.photo_shards import source_jpegs
from vqrae_ds.config import DataConfig

PHOTOS = ROOT / "tests/data/photos"


def test_both_read_the_same_pictures_and_each_round_begins_at_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_training, replay = [], data.open_training, data._replay

    def noting(config: DataConfig, *arguments: object, **options: object) -> object:
        assert config.num_workers > 0
        opened.append((config.train, options["seed"], options["start"]))
        return open_training(config, *arguments, **options)

    def noting_replay(*arguments: object) -> float:
        opened.append((None, None, "peer"))
        return replay(*arguments)

    monkeypatch.setattr(data, "_replay", noting_replay)
    monkeypatch.setattr(data, "open_training", noting)
    monkeypatch.setattr(data, "SAMPLES_A_SHARD", 16)
    report = data.measure_data(PHOTOS, tmp_path, position=200, rounds=2)
    rows = {row.metric: row for row in report.rows}
    assert list(rows) == [
        "exact_images_per_cpu_second",
        "fast_images_per_cpu_second",
        "exact_random_crops_per_cpu_second",
        "fast_random_crops_per_cpu_second",
        "bare_decodes_per_cpu_second",
        "bare_half_decodes_per_cpu_second",
        "resume_time",
    ]
    assert all(row.ours > 0 and row.peer > 0 for row in report.rows)
    psnr = report.details["psnr_to_pillow_mean_and_least"]
    assert psnr["exact_images"][1] >= 50 and psnr["exact_random_crops"][1] >= 50
    assert psnr["exact_images"][0] < 100, "they are no copies of one another"
    assert 50 > psnr["fast_images"][0] >= 37 and psnr["fast_images"][1] >= 34
    assert psnr["fast_random_crops"] == psnr["exact_random_crops"], "crops too small to be halved"
    (row,) = report.rows[-1:]
    assert row.peer_name == "webdataset, reading up to it once"
    starts = [start for _, _, start in opened]
    assert starts == [0, *(0, 2, 100, 200), "peer", *(0, 2, 100, 200)]
    ours = [each for each in opened if each[2] != "peer"]
    assert len({path for path, _, _ in ours}) == len({seed for _, seed, _ in ours}) == 9
    assert report.details["index_bytes_a_sample"] < 10
    assert not list(tmp_path.iterdir()), "nothing stays"


def test_the_peer_resumes_by_turns(tmp_path: Path) -> None:
    found = data._measure_resuming(PHOTOS, tmp_path / "many", 100, rounds=3, peer_rounds=2)
    assert {at: len(seconds) for at, seconds in found.seconds.items()} == {
        0: 3,
        1: 3,
        50: 3,
        100: 3,
    }
    assert len(found.peer_seconds) == 2 and min(found.peer_seconds) > 0


def test_no_photograph_is_enlarged_to_be_read(tmp_path: Path) -> None:
    shades = np.random.default_rng(0).integers(0, 256, (6, 64, 1024, 1), np.uint8)
    stripes = np.repeat(np.repeat(shades, 12, axis=1), 3, axis=3)  # sharp from row to row
    names = ("large", "small", "other", "narrow", "low")
    sizes = ((1024, 768), (256, 200), (300, 171), (255, 400), (400, 170))
    pictures = [Image.fromarray(stripes[n][:h, :w]) for n, (w, h) in enumerate(sizes)]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(tmp_path / f"{name}.png")
    found = [Image.open(io.BytesIO(jpeg)) for jpeg in source_jpegs(tmp_path, 512)]
    assert [image.size for image in found] == [(512, 512)] * 3, "the large one, and two mosaics"
    large = pictures[0].crop((128, 0, 896, 768)).resize((512, 512), Image.Resampling.BICUBIC)
    assert data._psnr(np.asarray(found[0]), np.asarray(large)) > 25
    small, other = pictures[1].crop((0, 14, 256, 185)), pictures[2].crop((22, 0, 278, 171))
    for mosaic, order in ((found[1], (other, small)), (found[2], (small, other))):
        for place, piece in enumerate(order * 3):
            left, top = 256 * (place % 2), 171 * (place // 2)
            height = min(171, 512 - top)
            seen = np.asarray(mosaic.crop((left, top, left + 256, top + height)))
            assert data._psnr(seen, np.asarray(piece)[:height]) > 25
    for name in ("large", "small", "other"):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ValueError, match="no photograph of at least 256 x 171 pixels"):
        source_jpegs(tmp_path, 512)

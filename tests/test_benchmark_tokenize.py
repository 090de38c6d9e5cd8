"""The benchmark of tokenizing, small: both sides make codes of the same pictures."""

from __future__ import annotations

from tests.conftest import ROOT
from tests.tokenizing import make_model
from vqrae_ds.benchmarks.tokenize import SAMPLES_A_SHARD, measure_tokenize


def test_both_ways_make_the_same_codes_and_are_timed(tmp_path):
    make_model(tmp_path / "model")
    (tmp_path / "work").mkdir()
    photos, encoder = ROOT / "tests/data/photos/val", ROOT / "ds_configs/tiny/encoder"
    places = (photos, tmp_path / "model", encoder, tmp_path / "work")
    report = measure_tokenize(*places, batch_size=16, rounds=2, shards=1)
    row, cpu_row = report.rows
    assert (row.metric, cpu_row.metric) == ("images_per_second", "images_per_cpu_second")
    assert cpu_row.ratio > 0.8, "a bound for a machine with other work"
    found = report.details["seconds_of_a_job"].values()
    for rate, seconds in zip((row.ours, row.peer), found, strict=True):
        assert min(seconds) <= SAMPLES_A_SHARD / rate <= max(seconds)
    assert report.details["share_of_codes_that_are_the_same"] > 0.9
    assert not list((tmp_path / "work").iterdir()), "nothing stays"

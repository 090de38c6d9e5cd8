"""Figures of a set that are not finite, and classes that were not measured, in its report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_python
from tests.tars import write_tar
from tests.tiny import IMAGE_SIZE, build_model
from vqrae_ds.config import DataConfig
from vqrae_ds.data.index import read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader, open_evaluation
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.evaluation.labels import Labels
from vqrae_ds.evaluation.measuring import ORIGINAL, TRAINED, Instruments, measure, reconstruct
from vqrae_ds.evaluation.set_report import as_lines, as_markdown
from vqrae_ds.evaluation.set_summary import Subject, summarize_set
from vqrae_ds.evaluation.whole_set import SetFigures

PHOTOS = find_images(ROOT / "tests/data/photos/val")
NUMBER = 12


def summary_of(labels: Labels | None = None, **figures: list[float]) -> dict:
    """The report of a set of images with these figures, of which there is nothing special else."""
    rows = torch.randn(NUMBER, 6, generator=torch.Generator().manual_seed(0))
    values = {"cosine": [0.5] * NUMBER, "l2": [1.0] * NUMBER} | figures
    found = SetFigures(
        numbers_n=torch.arange(NUMBER),
        figures={name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()},
        num_same=0,
        counts_K=torch.ones(64, dtype=torch.int64),
        tokens=16,
        pooled_numbers_m=torch.arange(NUMBER),
        pooled={TRAINED: rows, ORIGINAL: rows + 0.1},
        frechet=None,
        num_left_out=0,
    )
    subject = Subject(Path("model"), build_model().config, torch.float32, "set", IMAGE_SIZE)
    return summarize_set(subject, found, labels, is_canonical=False, left_out={})


def test_an_infinite_psnr_is_no_part_of_a_mean_and_nothing_else_is_dropped() -> None:
    psnr = [math.inf, *[20.0 + i for i in range(NUMBER - 1)]]
    ssim, l2 = [[value] * NUMBER for value in (0.9, 1.0)]
    ssim[3] = ssim[5] = math.nan
    l2[4] = math.inf
    report = summary_of(psnr=psnr, baseline_psnr=[math.inf] * NUMBER, ssim=ssim, l2=l2)
    assert report["figures"] == {"psnr": 25.0, "baseline_psnr": None, "ssim": None}
    assert report["retention"]["l2"] is None and report["retention"]["cosine"] == 0.5
    assert report["left_out"]["ssim"] == "it is not a finite number for 2 of 12 images"
    assert report["left_out"]["l2"] == "it is not a finite number for 1 of 12 images"
    assert report["left_out"]["baseline_psnr"] == "it is infinite for each image"
    assert "psnr" not in report["left_out"]
    json.dumps(report, allow_nan=False)
    assert "| SSIM | - |" in as_markdown(report)
    psnr[1] = math.nan
    assert summary_of(psnr=psnr)["figures"]["psnr"] is None


def test_classes_are_those_of_the_images_that_were_measured() -> None:
    names = [f"{number:02d}" for number in range(100)]
    labels_n = torch.arange(100)
    labels_n[:NUMBER] = 7
    report = summary_of(Labels(labels_n, names))
    assert report["classes"] == {}, "one class is always right"
    assert report["left_out"]["classes"].startswith("the 12 images with a class are of 1 classes")
    labels_n[:NUMBER:2] = 90
    report = summary_of(Labels(labels_n, names))
    assert (report["classes"]["num_images"], report["classes"]["num_classes"]) == (NUMBER, 2)
    assert "12 images of 2 classes" in as_markdown(report)
    as_0_and_1 = summary_of(Labels((labels_n > 7).long(), ["07", "90"]))
    assert as_0_and_1["classes"] == report["classes"]
    assert any(line.startswith("k-NN accuracy") for line in as_lines(report))
    labels_n[:] = -1
    assert summary_of(Labels(labels_n, names))["classes"] == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_with_damaged_weights_is_refused(tmp_path: Path, value: float) -> None:
    write_tar(tmp_path / "0.tar", [("a.webp", PHOTOS[0].read_bytes())])
    index = index_shards(tmp_path)
    data, alone = DataConfig(train="any"), Reader(0, 1)
    batch = next(open_evaluation(index, data, alone, image_size=IMAGE_SIZE, batch_size=1))
    model, damaged = build_model().eval(), build_model().eval()
    measure(Instruments(model, model.encoder, None, None), batch, 1)
    with torch.no_grad():
        damaged.decoder.head.bias[0] = value
        next(damaged.encoder.parameters())[:] = value
    with pytest.raises(ValueError, match="values of the original encoder's output are not finite"):
        measure(Instruments(model, damaged.encoder, None, None), batch, 1)
    with pytest.raises(ValueError, match="4 of 4 values of Inception's output are not finite"):
        measure(Instruments(model, None, None, lambda _: torch.full((1, 4), value)), batch, 1)
    damaged.encoder = model.encoder
    with pytest.raises(ValueError, match="16 of 3072 values of the decoder's output are not"):
        reconstruct(damaged, batch.images_B3HW)


def test_labels_that_cannot_be_read_cost_the_classes_and_nothing_else(tmp_path: Path) -> None:
    members = [(f"{i}.webp", photo.read_bytes()) for i, photo in enumerate(PHOTOS[:3])]
    members.insert(2, ("1.json", b"[" * 200_000))
    write_tar(tmp_path / "0.tar", members)
    index_shards(tmp_path)
    assert read_index(tmp_path).num_samples == 3
    build_model().save_pretrained(tmp_path / "model")
    done = run_python("tools/evaluate.py", str(tmp_path / "model"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "model/evaluation/report.json").read_text())
    assert report["data"]["num_images"] == 3 and report["figures"]["psnr"] > 0
    assert report["classes"] == {}
    assert "member '1.json' cannot be read as a label" in report["left_out"]["classes"]

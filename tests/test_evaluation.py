"""Figures of images, the validation pass, calibration, grids and the summary of a run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.tiny import IMAGE_SIZE, PlainEngine, build_model, images_of
from vqrae_ds.calibration import calibrate
from vqrae_ds.data.stream import Batch, EvaluationBatch
from vqrae_ds.evaluation.metrics import mean_colour, psnr, validate
from vqrae_ds.evaluation.report import image_grid, save_grid
from vqrae_ds.evaluation.summary import summarize_run
from vqrae_ds.models.training_model import TrainingModel

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_psnr_is_that_of_its_definition():
    images, images_hat = torch.rand(2, 2, 3, 8, 8)
    images_hat[1] = images[1]
    error = ((images_hat[0].double().numpy() - images[0].double().numpy()) ** 2).mean()
    values = psnr(images_hat, images)
    assert values[0].item() == pytest.approx(10 * math.log10(1 / error))
    assert values[1] == math.inf


def test_mean_colour_is_flat_and_keeps_the_mean():
    images = torch.rand(2, 3, 8, 8)
    flat = mean_colour(images)
    assert flat.shape == images.shape
    assert torch.allclose(flat[:, :, 0, 0], images.mean((2, 3)))
    assert (flat == flat[:, :, :1, :1]).all()


def test_validation_counts_each_image_once_and_leaves_the_code_counts_alone(one_rank):
    model = TrainingModel(build_model(), build_model(seed=1).encoder)
    engine = PlainEngine(model)
    images = images_of(0, 0, batch=3)
    padded = torch.cat([images[2:], images[:1]])
    batches = [
        EvaluationBatch(images[:2], torch.tensor([True, True]), ["a", "b"]),
        EvaluationBatch(padded, torch.tensor([True, False]), ["c", "a"]),
    ]
    before = model.vqrae.quantizer.code_counts.clone()
    found = validate(engine, batches, lambda a, b: (a - b).abs().mean((1, 2, 3)), CPU)
    assert torch.equal(model.vqrae.quantizer.code_counts, before)
    with torch.no_grad():
        reconstruction = model.vqrae.eval()(images).reconstruction
    expected = psnr(reconstruction, images).mean().item()
    assert found.figures["validation/psnr"] == pytest.approx(expected)
    assert found.figures["validation/lpips"] == pytest.approx(
        (reconstruction - images).abs().mean().item(), rel=1e-5
    )
    assert -1 < found.figures["validation/teacher_cosine"] < 0.99
    assert torch.equal(found.images_hat_B3HW, reconstruction[:2])
    assert engine.training


def test_calibration_centres_and_scales_the_features(one_rank):
    model = TrainingModel(build_model())
    images = torch.cat([images_of(step, 0) for step in range(4)])
    batches = (Batch(x, []) for x in [*images.split(2), None])  # None: never asked for
    calibrate(PlainEngine(model), batches, num_images=8, device=CPU)
    with torch.no_grad():
        standardized = model.vqrae.standardize(model.vqrae.encode(images)).double()
    assert standardized.mean((0, 1)).abs().max() < 1e-5
    assert (standardized.std((0, 1), correction=0) - 1).abs().max() < 1e-5
    assert model.vqrae.get_codebook_usage() == 0


def test_calibration_of_a_constant_channel_stays_finite(one_rank):
    model = TrainingModel(build_model())
    features = torch.zeros(2, 16, 48)
    output = SimpleNamespace(vqrae=SimpleNamespace(features_BND=features))
    engine = PlainEngine(model)
    engine.forward = lambda images: output
    calibrate(engine, [Batch(images_of(0, 0), [])], num_images=2, device=CPU)
    assert model.vqrae.standardize(features).isfinite().all()


def test_grid_shows_each_image_beside_its_versions(tmp_path):
    red = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    red[:, 0] = 1
    grid = image_grid([red, 1 - red], min_side=2 * IMAGE_SIZE)
    save_grid(grid, tmp_path / "new" / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert pixels.shape == (2 * (64 + 4) + 4, 2 * (64 + 4) + 4, 3)
    assert (pixels[10, 10] == [255, 0, 0]).all()
    assert (pixels[10, 90] == [0, 255, 255]).all()


def test_summary_of_a_run_and_of_an_unfinished_one(tmp_path):
    entries = [
        {"step": 20, "loss/reconstruction": 0.5, "codebook/usage": 0.2},
        {"step": 40, "loss/reconstruction": 0.1, "codebook/usage": 0.9},
    ]
    validation = {
        "step": 40,
        "validation/psnr": 20.0,
        "validation/baseline_psnr": 15.0,
        "validation/lpips": 0.4,
    }
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in [*entries, validation]))
    summary = summarize_run(tmp_path)
    assert summary.baseline_psnr == 15.0
    assert summary.figures == {
        "steps": 40,
        "first_loss": 0.5,
        "last_loss": 0.1,
        "val_psnr": 20.0,
        "val_lpips": 0.4,
        "codebook_usage": 0.9,
    }
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    with pytest.raises(ValueError, match="not a finished run"):
        summarize_run(tmp_path)

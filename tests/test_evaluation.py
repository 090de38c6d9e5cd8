"""Figures of images, the validation pass, calibration, grids and the summary of a run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import IMAGE_SIZE, PlainEngine, build_model, images_of
from vqrae_ds.calibration import calibrate
from vqrae_ds.data.stream import Batch, EvaluationBatch
from vqrae_ds.evaluation.metrics import Validation, mean_colour, psnr, ssim, validate
from vqrae_ds.evaluation.report import ERROR_SCALE, error_map, image_grid, save_grid
from vqrae_ds.evaluation.summary import summarize_run
from vqrae_ds.models.training_model import TrainingModel

CPU = torch.device("cpu")


def test_psnr_is_that_of_its_definition():
    images, images_hat = torch.rand(2, 2, 3, 8, 8)
    images_hat[1] = images[1]
    error = ((images_hat[0].double().numpy() - images[0].double().numpy()) ** 2).mean()
    values = psnr(images_hat, images)
    assert values[0].item() == pytest.approx(10 * math.log10(1 / error))
    assert values[1] == math.inf


def ssim_of_one(first_3HW: np.ndarray, second_3HW: np.ndarray) -> float:
    """Equation 13 of Wang et al. (2004), window by window."""
    offsets = np.arange(11) - 5
    bell = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    C1, C2 = 0.01**2, 0.03**2
    found = []
    for x_HW, y_HW in zip(first_3HW, second_3HW, strict=True):
        for top in range(x_HW.shape[0] - 10):
            for left in range(x_HW.shape[1] - 10):
                place = np.s_[top : top + 11, left : left + 11]
                x, y = x_HW[place], y_HW[place]
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                variances = (window * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
                found.append(luminance * (2 * covariance + C2) / (variances + C2))
    return float(np.mean(found))


@pytest.mark.parametrize("size", [(11, 11), (11, 24), (32, 19)])
def test_ssim_is_that_of_its_definition(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    images_hat = (images + torch.tensor([0.05, 0.5]).view(2, 1, 1, 1) * noise).clamp(0, 1)
    pairs = zip(images_hat.double().numpy(), images.double().numpy(), strict=True)
    expected = [ssim_of_one(*pair) for pair in pairs]
    assert expected[0] > expected[1] + 0.1
    assert ssim(images_hat, images).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(images, images).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_ssim_needs_a_whole_window():
    with pytest.raises(ValueError, match="sides of 11 px or more, got 10 x 32 px"):
        ssim(torch.rand(1, 3, 10, 32), torch.rand(1, 3, 10, 32))


def test_mean_colour_is_flat_and_keeps_the_mean():
    images = torch.rand(2, 3, 8, 8)
    flat = mean_colour(images)
    assert flat.shape == images.shape
    assert torch.allclose(flat[:, :, 0, 0], images.mean((2, 3)))
    assert (flat == flat[:, :, :1, :1]).all()


def validation_of(model: TrainingModel, images: torch.Tensor) -> Validation:
    """Three images in two batches of two: the fourth place is a repeat of the first image."""
    padded = torch.cat([images[2:], images[:1]])
    batches = [
        EvaluationBatch(images[:2], torch.tensor([True, True]), ["a", "b"], torch.arange(2)),
        EvaluationBatch(padded, torch.tensor([True, False]), ["c", "a"], torch.arange(2, 4)),
    ]
    engine = PlainEngine(model)
    found = validate(engine, batches, lambda a, b: (a - b).abs().mean((1, 2, 3)), CPU)
    assert engine.training
    return found


def test_validation_counts_each_image_once_and_leaves_the_code_counts_alone(one_rank):
    model = TrainingModel(build_model(), build_model(seed=1).encoder)
    images = images_of(0, 0, batch=3)
    model.vqrae.quantizer.code_counts[3] = 7
    before = model.vqrae.quantizer.code_counts.clone()
    found = validation_of(model, images)
    assert torch.equal(model.vqrae.quantizer.code_counts, before)
    with torch.no_grad():
        output = model.eval()(images)
    reconstruction, features = output.vqrae.reconstruction, output.vqrae.features_BND
    teacher = output.teacher_features_BND
    used, counts = output.vqrae.indices_Bhw.unique(return_counts=True)
    share = counts / counts.sum()
    cosine = (features * teacher).sum(2) / (features.norm(dim=2) * teacher.norm(dim=2))
    expected = {
        "psnr": psnr(reconstruction, images).mean(),
        "baseline_psnr": psnr(mean_colour(images), images).mean(),
        "ssim": ssim(reconstruction, images).mean(),
        "lpips": (reconstruction - images).abs().mean(),
        "teacher_cosine": cosine.mean(),
        "teacher_l2": ((features - teacher) ** 2).mean(),
        "usage": len(used) / 64,
        "perplexity": (-(share * share.log()).sum()).exp(),
    }
    assert found.figures == pytest.approx(
        {f"validation/{name}": float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert torch.equal(found.images_B3HW, images), "the repeat is not shown"
    torch.testing.assert_close(found.images_hat_B3HW, reconstruction)


def test_a_frozen_encoder_is_the_first_one_and_without_a_teacher_nothing_is_known(one_rank):
    images = images_of(0, 0, batch=3)
    frozen = validation_of(TrainingModel(build_model(freeze_encoder=True)), images)
    assert frozen.figures["validation/teacher_cosine"] == pytest.approx(1, abs=1e-6)
    assert frozen.figures["validation/teacher_l2"] == 0
    trained = validation_of(TrainingModel(build_model(freeze_encoder=False)), images)
    assert trained.figures.keys() == frozen.figures.keys() - {
        "validation/teacher_cosine",
        "validation/teacher_l2",
    }


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


def test_error_map_is_grey_and_white_from_a_quarter_on():
    images = torch.full((1, 3, 2, 2), 0.5)
    images_hat = images.clone()
    images_hat[0, 0, 0, 0] += 0.3  # of one channel: a tenth of the range on average
    images_hat[0, :, 1, 1] -= 0.4
    expected = torch.tensor([[ERROR_SCALE * 0.1, 0], [0, 1]]).expand(1, 3, 2, 2)
    assert torch.allclose(error_map(images_hat, images), expected, atol=1e-6)


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
        "validation/usage": 0.3,
    }
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in [*entries, validation]))
    summary = summarize_run(tmp_path)
    assert summary.baseline_psnr == 15.0
    assert summary.figures == {
        "steps": 40,
        "first_reconstruction_loss": 0.5,
        "last_reconstruction_loss": 0.1,
        "val_psnr": 20.0,
        "val_lpips": 0.4,
        "val_codebook_usage": 0.3,
        "codebook_usage_training": 0.9,
    }
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    with pytest.raises(ValueError, match="not a finished run"):
        summarize_run(tmp_path)

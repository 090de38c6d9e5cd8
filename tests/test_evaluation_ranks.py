"""Evaluation over ranks: what a validation shows and means, and failures of the first rank."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.tars import write_tar
from tests.tiny import IMAGE_SIZE, PlainEngine, build_model
from vqrae_ds.config import DataConfig
from vqrae_ds.data.decode import load_image
from vqrae_ds.data.index import read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader, open_evaluation
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.evaluation.measuring import Instruments
from vqrae_ds.evaluation.metrics import validate
from vqrae_ds.evaluation.whole_set import measure_set
from vqrae_ds.models.training_model import TrainingModel

PHOTOS = find_images(ROOT / "tests/data/photos/train")[:11]
GREY, FLAT_AT, BAD_AT = 77, 3, 2  # a grey whose mean over pixels is not exact in float32
SHOWN = 5
READING = {"image_size": IMAGE_SIZE, "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with a flat and a bad image among photographs, and one of bad images alone."""
    folder = tmp_path_factory.mktemp("ranks")
    flat = io.BytesIO()
    Image.new("RGB", (40, 40), (GREY, GREY, GREY)).save(flat, "PNG")
    members = [(f"photo{i:02d}.webp", path.read_bytes()) for i, path in enumerate(PHOTOS)]
    members.insert(BAD_AT, ("bad.webp", b"no image"))
    members.insert(FLAT_AT, ("flat.png", flat.getvalue()))
    for name, content in (("set", members), ("bad", [(f"{i}.png", b"none") for i in range(5)])):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", content)
        index_shards(folder / name)
    return folder


def usable_images() -> torch.Tensor:
    """All images of the set that can be used, in its order, read from where they come from."""
    photos = [load_image(path, image_size=IMAGE_SIZE) for path in PHOTOS]
    photos.insert(FLAT_AT - 1, torch.full_like(photos[0], GREY / 255))
    return torch.stack(photos)


def validate_on(rank: int, world_size: int, tensor_size: int, folder: Path) -> None:
    """Neighbours of `tensor_size` ranks see the same images, as in a tensor-parallel group."""
    reader = Reader(rank // tensor_size, world_size // tensor_size, tensor_size > 1)
    data = DataConfig(train="set", bad_samples="skip")
    batches = open_evaluation(read_index(folder / "set"), data, reader, **READING)
    engine = PlainEngine(TrainingModel(build_model()))
    found = validate(engine, batches, None, torch.device("cpu"), num_shown=SHOWN)
    path = folder / f"validated{world_size}_{tensor_size}_{rank}.pt"
    torch.save((found.figures, found.images_B3HW, found.images_hat_B3HW), path)


@pytest.mark.parametrize(("world_size", "tensor_size"), [(1, 1), (2, 1), (4, 2)])
def test_a_validation_shows_the_first_images_and_means_what_is_finite(
    folder: Path, world_size: int, tensor_size: int
) -> None:
    run_ranks(world_size, validate_on, world_size, tensor_size, folder)
    images = usable_images()
    with torch.no_grad():
        images_hat = build_model().eval()(images).reconstruction
    pixels, pixels_hat = images.numpy().astype(np.float64), images_hat.numpy().astype(np.float64)
    mean_colours = pixels.mean((2, 3), keepdims=True)
    textured = np.arange(len(images)) != FLAT_AT - 1
    baseline = -10 * np.log10(((pixels - mean_colours) ** 2)[textured].mean((1, 2, 3)))
    psnr = -10 * np.log10(((pixels - pixels_hat) ** 2).mean((1, 2, 3)))
    for rank in range(world_size):
        path = folder / f"validated{world_size}_{tensor_size}_{rank}.pt"
        figures, shown, shown_hat = torch.load(path, weights_only=True)
        assert torch.equal(shown, images[:SHOWN])
        torch.testing.assert_close(shown_hat, images_hat[:SHOWN])
        assert figures["validation/baseline_psnr"] == pytest.approx(baseline.mean(), abs=1e-5)
        assert figures["validation/psnr"] == pytest.approx(psnr.mean(), abs=1e-4)


def huge_features(images: torch.Tensor) -> torch.Tensor:
    """In the place of Inception: finite values, the squares of which are not."""
    return 1e200 * images.double().mean((2, 3))


def fail_on(rank: int, folder: Path) -> None:
    """Both are found by the first rank alone, and raised on all."""
    model, reader = build_model().eval(), Reader(rank, 2)
    data = DataConfig(train="any", bad_samples="skip")
    index = read_index(folder / "bad")
    with pytest.raises(ValueError, match="not one of 5 images of the set can be used"):
        measure_set(Instruments(model, None, None, None), index, data, reader, **READING)
    index = read_index(folder / "set")
    with pytest.raises(RuntimeError, match="linalg.eigh" if rank == 0 else "rank 0 failed"):
        damaged = Instruments(model, None, None, huge_features)
        measure_set(damaged, index, data, reader, **READING)


def test_what_fails_where_the_ranks_results_meet_fails_on_all_of_them(folder: Path) -> None:
    run_ranks(2, fail_on, folder)

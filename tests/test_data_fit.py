"""Pictures of any shape: cropped, resized or padded to whole tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, run_python
from tests.encoder_families import model_config
from vqrae_ds import VQRAE
from vqrae_ds.data.decode import load_image
from vqrae_ds.data.fit import load_fitted, on_one_canvas


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """50 x 30 pixels, none like its neighbour, without loss."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255


def test_crop_is_the_centre_square(picture: Path) -> None:
    fitted = load_fitted(picture, "crop", multiple=8, size=24)
    assert (fitted.height, fitted.width) == (24, 24)
    assert torch.equal(fitted.image_3HW, load_image(picture, image_size=24))
    with pytest.raises(
        ValueError, match="25 pixels are no multiple of 8, a token's side; nearest: 24 or 32"
    ):
        load_fitted(picture, "crop", multiple=8, size=25)


def test_pad_keeps_every_pixel(picture: Path) -> None:
    fitted = load_fitted(picture, "pad", multiple=8)
    assert fitted.image_3HW.shape == (3, 32, 56)
    assert (fitted.height, fitted.width) == (30, 50)
    assert torch.equal(fitted.image_3HW[:, :30, :50], pixels_of(picture))
    assert torch.equal(fitted.image_3HW[:, 30:, :50], pixels_of(picture)[:, -1:].expand(3, 2, 50))


def test_resize_keeps_the_whole_picture_at_the_nearest_size(picture: Path) -> None:
    fitted = load_fitted(picture, "resize", multiple=8)
    assert fitted.image_3HW.shape == (3, fitted.height, fitted.width) == (3, 32, 48)
    assert load_fitted(picture, "resize", multiple=10).image_3HW.equal(pixels_of(picture))
    assert load_fitted(picture, "resize", multiple=64).image_3HW.shape == (3, 64, 64)


@pytest.mark.parametrize(("fit", "shape"), [("resize", (3, 48, 72)), ("pad", (3, 48, 80))])
def test_size_is_that_of_the_short_side(picture: Path, fit: str, shape: tuple) -> None:
    fitted = load_fitted(picture, fit, multiple=8, size=45)
    assert fitted.image_3HW.shape == shape
    if fit == "pad":
        assert (fitted.height, fitted.width) == (45, 75)


def test_images_of_several_sizes_share_a_canvas() -> None:
    canvas = on_one_canvas([torch.zeros(3, 2, 5), torch.full((3, 4, 1), 0.5)])
    assert canvas.shape == (2, 3, 4, 5)
    assert canvas[0, :, :2].eq(0).all() and canvas[0, :, 2:].eq(1).all()
    assert canvas[1, :, :, 0].eq(0.5).all() and canvas[1, :, :, 1:].eq(1).all()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = model_config("internvit_6b", output_patch_size=16, decoder={"num_layers": 1})
    VQRAE(config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ([], "16 x 16 codes"),
        (["--size", "64"], "4 x 4 codes"),
        (["--fit", "pad", "--size", "40"], "3 x 4 codes"),
        (["--fit", "resize", "--size", "40"], "2 x 3, 2 x 4 codes"),
    ],
)
def test_the_tool_takes_any_picture(
    model_folder: Path, tmp_path: Path, options: list[str], codes: str
) -> None:
    photos = sorted((ROOT / "tests/data/photos/val").glob("*.webp"))
    shapes = {Image.open(path).size for path in photos}
    assert len(shapes) > 1, "pictures of several shapes"
    out = tmp_path / "grid.png"
    done = run_python(
        "tools/reconstruct.py", str(model_folder), *map(str, photos), "--out", str(out), *options
    )
    assert done.returncode == 0, done.stderr
    assert codes in done.stdout
    assert Image.open(out).size[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--size", "100"],
            "error: 100 pixels are no multiple of 16, a token's side; nearest: 96 or 112",
        ),
        (["--size", "0"], "error: --size 0 is not a number of pixels"),
    ],
)
def test_a_wrong_size_is_one_line(
    model_folder: Path, picture: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "grid.png"
    done = run_python(
        "tools/reconstruct.py", str(model_folder), str(picture), "--out", str(out), *options
    )
    assert (done.returncode, done.stderr.strip()) == (2, message)
    assert not out.exists()

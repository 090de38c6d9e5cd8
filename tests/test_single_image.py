"""One picture of any size: its versions, figures and codes, and what the tool writes of it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from tests.conftest import ROOT, run_python
from tests.tiny import NUM_CODES, PATCH_SIZE, build_model
from vqrae_ds.data.fit import Fit, load_fitted
from vqrae_ds.evaluation.report import code_map
from vqrae_ds.evaluation.single_image import Version, reconstruct_file
from vqrae_ds.models.vqrae import VQRAE

PHOTO = ROOT / "tests/data/photos/val/categorization_fishes_fish5.webp"


@pytest.fixture(scope="module")
def model() -> VQRAE:
    return build_model().eval()


def test_a_code_has_one_colour_everywhere_and_no_two_are_alike() -> None:
    every = torch.arange(16384).view(1, 128, 128)
    colours = code_map(every, 1)
    assert colours.min() >= 0 and colours.max() <= 1
    assert len((colours[0].flatten(1).T * 1000).round().unique(dim=0)) == 16384
    neighbours = (colours[0, :, :, 1:] - colours[0, :, :, :-1]).abs().amax(0)
    assert neighbours.min() > 0.1, "codes with neighbouring numbers are told apart"
    some = code_map(every.flatten()[:12].view(2, 2, 3), 4)
    assert some.shape == (2, 3, 8, 12)
    expected = np.kron(colours[0, :, 0, 6:12].view(3, 2, 3), np.ones((4, 4)))
    np.testing.assert_array_equal(some[1].numpy(), expected)


def test_a_padded_picture_is_compared_without_its_padding(model: VQRAE) -> None:
    found = reconstruct_file(model, PHOTO, "pad", 30)
    fitted = load_fitted(PHOTO, "pad", multiple=PATCH_SIZE, size=30)
    height, width = fitted.height, fitted.width
    assert height % PATCH_SIZE and width % PATCH_SIZE
    with torch.no_grad():
        indices = model.encode_to_indices(fitted.image_3HW[None])
        image_hat = model.decode_from_indices(indices)[0, :, :height, :width]
    assert torch.equal(found.indices_hw, indices[0])
    assert (found.reconstruction_3HW - image_hat).abs().max() <= 0.5 / 255 + 1e-6
    for name in get_args(Version):
        assert found.version(name).shape == (3, height, width)
    ours, theirs = (
        (side * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        for side in (found.original_3HW, found.reconstruction_3HW)
    )
    expected = peak_signal_noise_ratio(ours, theirs)
    assert found.figures["psnr"] == pytest.approx(expected, abs=1e-4)
    assert found.as_json()["codes"] == indices[0].tolist()


def test_an_infinite_figure_is_none_in_json(model: VQRAE) -> None:
    found = reconstruct_file(model, PHOTO, "crop", None)
    assert found.original_3HW.shape[1] == model.config.image_size
    entry = found._replace(figures={"psnr": math.inf, "ssim": 0.5}).as_json()
    assert entry["figures"] == {"psnr": None, "ssim": 0.5}


def test_the_tool_writes_grid_codes_and_each_reconstruction(model: VQRAE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    photos = PHOTO.parent
    done = run_python(
        *("tools/reconstruct.py", str(tmp_path / "model"), str(PHOTO), str(photos)),
        *("--out", str(tmp_path / "grid.png"), "--fit", "resize", "--size", "32"),
        *("--show", "reconstruction", "codes", "--json", str(tmp_path / "codes.json")),
        *("--each", str(tmp_path / "each")),
    )
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "codes.json").read_text())
    files = sorted(photos.glob("*.webp"))
    assert [entry["image"] for entry in entries] == [str(path) for path in [PHOTO, *files]]
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        f"{number:05d}.png" for number in range(len(entries))
    ]
    for number, entry in enumerate(entries):
        codes = torch.tensor(entry["codes"])
        assert codes.min() >= 0 and codes.max() < NUM_CODES
        with torch.no_grad():
            image_hat = model.decode_from_indices(codes[None])[0]
        pixels = np.asarray(Image.open(tmp_path / "each" / f"{number:05d}.png")).astype(int)
        assert pixels.shape == (entry["height"], entry["width"], 3)
        expected = (image_hat * 255).permute(1, 2, 0).numpy()
        assert np.abs(pixels - expected).max() < 0.51, "the codes are all that an image needs"
    assert f"{PHOTO}: PSNR {entries[0]['figures']['psnr']:.2f} dB" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{}/grid"], "--out {}/grid has no name of a PNG file: let it end in .png"),
        (["--out", "{}/grid.jpg"], "--out {}/grid.jpg has no name of a PNG file"),
        (["--out", "{}/file/grid.png"], "--out: {}/file is a file, and no folder"),
        (["--out", "{}/grid.png", "--each", "{}/file"], "--each: {}/file is a file"),
        (["--out", "{}/file/below/grid.png"], "[Errno 20] Not a directory: '{}/file/below'"),
        (["--out", "{}/grid.png", "--each", "{}/file/below"], "[Errno 20] Not a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    arguments = [option.format(tmp_path) for option in options]
    done = run_python("tools/reconstruct.py", str(tmp_path / "no_model"), str(PHOTO), *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message.format(tmp_path)}")
    assert done.stderr.count("\n") == 1


def test_what_the_tool_offers_is_what_the_package_has() -> None:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/reconstruct.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert get_args(Fit) == tool.FITS
    assert get_args(Version) == tool.VERSIONS

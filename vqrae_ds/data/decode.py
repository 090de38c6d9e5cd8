"""Image bytes to pixels: safe decoding, a square crop, one antialiased resize.

Everything goes through Pillow. An image's header is read before its pixels, so that a giant is
refused before memory is spent on it.
Suffixes: 3 channels, H height, W width, S side of the square output, in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vqrae_ds.data.crops import Crop, centre_crop
from vqrae_ds.data.index import Sample

MAX_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb: 256 MiB of RGB
MAX_BYTES = 1 << 26
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """JPEG, PNG or WebP bytes to an upright 8-bit RGB image; of an animation, its first frame.

    EXIF orientation is applied, alpha laid on white, 16-bit grey scaled to 8; colour profiles are
    left out. Raises `ValueError` for an image of more than `max_pixels` pixels, before decoding it,
    and for bytes that are no image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} is over the {max_pixels} pixel limit")
        rgb = _to_rgb(image)
        turn = _TO_UPRIGHT.get(_orientation(image))
    except UnidentifiedImageError as error:
        raise ValueError("cannot decode the image: it is no JPEG, PNG or WebP") from error
    except Exception as error:  # Pillow's parsers raise whatever broken bytes lead them to
        raise ValueError(f"cannot decode the image: {error}") from error
    return rgb if turn is None else rgb.transpose(turn)


def crop_to_tensor(image: Image.Image, crop: Crop, *, image_size: int) -> torch.Tensor:
    """Cut `crop` out of an RGB image and resize it: float32 (3, S, S) in [0, 1]."""
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    square = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    pixels_SS3 = np.array(square)
    if crop.mirrored:
        pixels_SS3 = pixels_SS3[:, ::-1]
    return torch.from_numpy(pixels_SS3.transpose(2, 0, 1).astype(np.float32, order="C")) / 255


def decode_sample(
    sample: Sample,
    choose_crop: Callable[[int, int], Crop],
    *,
    image_size: int,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> torch.Tensor:
    """Read one image of a shard: float32 (3, S, S) in [0, 1], S = `image_size`.

    `choose_crop` gets the upright image's width and height. No sample is decoded anywhere else.
    Raises `ValueError` naming shard and key when the image is too large, damaged or cut short.
    """
    try:
        if sample.length > max_bytes:
            raise ValueError(f"{sample.length} bytes is over the limit of {max_bytes}")
        with open(sample.shard, "rb") as file:
            file.seek(sample.offset)
            data = file.read(sample.length)
        if len(data) < sample.length:
            raise ValueError("the shard ends inside the image, it has changed since it was indexed")
        image = decode_image(data, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"{sample.shard}, sample {sample.key!r}: {error}") from error
    return crop_to_tensor(image, choose_crop(image.width, image.height), image_size=image_size)


def broken_images(paths: Iterable[Path]) -> list[str]:
    """A line for each file that cannot be decoded: a bad one would end a training."""
    broken = []
    for path in paths:
        try:
            decode_image(path.read_bytes())
        except ValueError as error:
            broken.append(f"{path}: {error}")
    return broken


def open_image(path: Path) -> Image.Image:
    """A file as `decode_image` gives it; `ValueError` names a bad file."""
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_image(path: Path, *, image_size: int) -> torch.Tensor:
    """The largest centre square of a file, (3, S, S) in [0, 1]; `ValueError` names a bad file."""
    image = open_image(path)
    return crop_to_tensor(image, centre_crop(*image.size), image_size=image_size)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except SyntaxError:  # Pillow's word for EXIF that it cannot read; the pixels are sound
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image

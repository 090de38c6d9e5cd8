"""Image bytes to pixels: bounded decoding, a square crop, one antialiased resize.

The header is read first, so that a giant is refused before memory is spent on it. JPEGs in grey or
colour are decoded by libjpeg-turbo; what it objects to, and all else, goes through Pillow. Crops
are resized by PyTorch's antialiased bicubic filter on 8-bit values, which differs from Pillow's
`crop` and `resize` by rounding alone. Memory, in bytes a pixel of the image: up to 9 for a JPEG, 12
in CMYK; 8 for a PNG, 12 where it is turned; 16 for a WebP, of which Pillow's decoder takes 8.

`exact` decodes every pixel. `fast` has libjpeg-turbo leave out the frequencies of a JPEG that the
output has no room for (it decodes at 1/2, 1/4 or 1/8), wherever the crop stays at least as large as
the output; a crop then lies within a pixel of that scale. It is for images that are large: of 512
px to 256 it is `exact` for all crops but the whole image, of 1024 px to 256 for none. What is left
is the reading of the Huffman codes, most of the time at JPEG quality 95, which no scale shortens.
Suffixes: 3 channels, H height, W width, S side of the square output, in pixels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from vqrae_ds.data.crops import Crop, centre_crop
from vqrae_ds.data.faults import TOO_LARGE, BadSample
from vqrae_ds.data.image_header import Header, Limits, checked_header
from vqrae_ds.data.index import Sample
from vqrae_ds.data.reading import read_sample

_FORMATS = ("JPEG", "PNG", "WEBP")
_SCALES = (8, 4, 2, 1)  # of which libjpeg-turbo has fast transforms
_EXIF_ORIENTATION = 0x0112
_STRIP_PIXELS = 1 << 18  # are converted at a time: the steps of all pixels at once take far more
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoding(NamedTuple):
    """How images are decoded, and what is refused before."""

    mode: Literal["exact", "fast"] = "exact"
    limits: Limits = Limits()


EXACT = Decoding()


def decode_image(data: bytes, *, limits: Limits = EXACT.limits) -> Image.Image:
    """JPEG, PNG or WebP bytes to an upright 8-bit RGB image; of an animation, its first frame.

    EXIF orientation is applied, alpha laid on white, 16-bit grey scaled to 8; colour profiles are
    left out. Raises `BadSample` for an image over a limit, before decoding it, and for bytes that
    are no image.
    """
    image = _open_upright(data, limits)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    for box in _strips(0, 0, *image.size):
        rgb.paste(_to_rgb(image.crop(box)), box)
    return rgb


def decode_crop(
    data: bytes,
    choose_crop: Callable[[int, int], Crop],
    *,
    image_size: int,
    decoding: Decoding = EXACT,
) -> torch.Tensor:
    """A square of an image, uint8 (3, S, S), S = `image_size`; not always contiguous.

    `choose_crop` gets the upright image's width and height. Raises `BadSample`.
    """
    header = checked_header(data, decoding.limits)
    is_plain = header.components in (1, 3) and not header.is_turned_by_xmp
    if header.format == "JPEG" and is_plain:
        sides = (header.height, header.width)
        crop = choose_crop(*(sides if header.orientation >= 5 else sides[::-1]))
        scale = _scale(crop, image_size) if decoding.mode == "fast" else 1
        pixels_HW3 = _decode_jpeg(data, header, scale)
        if pixels_HW3 is not None:
            return _resized(pixels_HW3, _scaled(crop, scale, pixels_HW3), image_size)
    image = _open_upright(data, decoding.limits)
    return _resized_image(image, choose_crop(image.width, image.height), image_size)


def decode_sample(
    sample: Sample,
    choose_crop: Callable[[int, int], Crop],
    *,
    image_size: int,
    decoding: Decoding = EXACT,
) -> torch.Tensor:
    """Read one image of a shard: float32 (3, S, S) in [0, 1], S = `image_size`.

    `choose_crop` gets the upright image's width and height. No indexed sample is decoded anywhere
    else. Raises `BadSample` naming shard and key where it cannot be used.
    """
    try:
        data = read_sample(sample, decoding.limits.num_bytes)
        pixels_3SS = decode_crop(data, choose_crop, image_size=image_size, decoding=decoding)
    except BadSample as error:
        where = f"{sample.shard}, sample {sample.key!r}"
        raise BadSample(f"{where}: {error}", error.kind) from error
    return as_float(pixels_3SS)


def as_float(pixels_3SS: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [0, 1], contiguous."""
    return pixels_3SS.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Floats in [0, 1], of any shape, to the nearest of 256 values, uint8."""
    return (images * 255).round().to(torch.uint8)


def broken_images(paths: Iterable[Path]) -> dict[Path, BadSample]:
    """The files that cannot be decoded, each with its fault: a bad one would end a training."""
    broken = {}
    for path in paths:
        try:
            open_image(path)
        except BadSample as error:
            broken[path] = error
    return broken


def open_image(path: Path) -> Image.Image:
    """A file as `decode_image` gives it; `BadSample` names a bad file."""
    try:
        return decode_image(path.read_bytes())
    except BadSample as error:
        raise BadSample(f"{path}: {error}", error.kind) from error


def load_image(path: Path, *, image_size: int) -> torch.Tensor:
    """The largest centre square of a file, (3, S, S) in [0, 1]; `BadSample` names a bad file."""
    image = open_image(path)
    return as_float(_resized_image(image, centre_crop(*image.size), image_size))


def _decode_jpeg(data: bytes, header: Header, scale: int) -> np.ndarray | None:
    """Upright (H, W, 3) at 1 / `scale`, or None where libjpeg-turbo has a warning or an error."""
    sides = [-(-side // scale) for side in (header.height, header.width)]
    try:
        found = simplejpeg.decode_jpeg_header(data)
        if found[:2] != (header.height, header.width):
            return None
        options = {"min_height": sides[0], "min_width": sides[1], "min_factor": scale}
        pixels_HW3 = simplejpeg.decode_jpeg(data, "RGB", **options)
    except ValueError:
        return None
    turn = header.orientation
    if turn >= 5:
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels_HW3 = pixels_HW3[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels_HW3 = pixels_HW3[::-1]
    return np.ascontiguousarray(pixels_HW3)


def _scale(crop: Crop, image_size: int) -> int:
    """The largest reduction that leaves the crop as large as the output."""
    return next((scale for scale in _SCALES if crop.side >= scale * image_size), 1)


def _scaled(crop: Crop, scale: int, pixels_HW3: np.ndarray) -> Crop:
    """The crop in an image that was decoded at 1 / `scale`."""
    if scale == 1:
        return crop
    height, width = pixels_HW3.shape[:2]
    side = min(round(crop.side / scale), height, width)
    left, top = round(crop.left / scale), round(crop.top / scale)
    return Crop(min(left, width - side), min(top, height - side), side, crop.mirrored)


def _resized_image(image: Image.Image, crop: Crop, image_size: int) -> torch.Tensor:
    """A crop of an image of any mode, uint8 (3, S, S) in RGB."""
    left, top, side, mirrored = crop
    square_SS3 = np.empty((side, side, 3), np.uint8)
    for box in _strips(left, top, left + side, top + side):
        square_SS3[box[1] - top : box[3] - top] = _to_rgb(image.crop(box))
    return _resized(square_SS3, Crop(0, 0, side, mirrored), image_size)


def _resized(pixels_HW3: np.ndarray, crop: Crop, image_size: int) -> torch.Tensor:
    square_SS3 = pixels_HW3[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    # Channels last, with the stride of a true first dimension: a fifth faster than without.
    square_1SS3 = torch.from_numpy(np.ascontiguousarray(square_SS3)).view(
        1, crop.side, crop.side, 3
    )
    square_13SS = square_1SS3.permute(0, 3, 1, 2)
    if crop.side != image_size:
        square_13SS = F.interpolate(
            square_13SS, (image_size, image_size), mode="bicubic", antialias=True
        )
    return square_13SS[0].flip(-1) if crop.mirrored else square_13SS[0]


def _open_upright(data: bytes, limits: Limits) -> Image.Image:
    """As Pillow decodes it, in whatever mode it was stored."""
    checked_header(data, limits)
    with _pillow_errors_as_bad_samples():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > limits.pixels:  # should Pillow have read it differently
            size = f"{image.width} x {image.height}"
            raise BadSample(f"{size} is over the {limits.pixels} pixel limit", TOO_LARGE)
        image.load()
        turn = _TO_UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except SyntaxError:  # Pillow's word for EXIF that it cannot read; the pixels are sound
        return 1


def _strips(left: int, top: int, right: int, bottom: int) -> Iterator[tuple[int, int, int, int]]:
    """A box in strips of whole rows, each (left, top, right, bottom)."""
    rows = max(1, _STRIP_PIXELS // (right - left))
    for start in range(top, bottom, rows):
        yield left, start, right, min(start + rows, bottom)


def _to_rgb(strip: Image.Image) -> Image.Image:
    with _pillow_errors_as_bad_samples():
        if strip.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion would clip
            strip = Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8))
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        return strip if strip.mode == "RGB" else strip.convert("RGB")


@contextlib.contextmanager
def _pillow_errors_as_bad_samples() -> Iterator[None]:
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # Pillow's parsers raise whatever broken bytes lead them to
        raise BadSample(f"cannot decode the image: {error}") from error

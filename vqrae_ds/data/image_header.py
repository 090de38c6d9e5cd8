"""What the first bytes of a JPEG, PNG or WebP say: enough to refuse a giant before it is decoded.

Written after ITU-T T.81 annex B (JPEG markers), the PNG specification (IHDR) and RFC 9649 (WebP).
Nothing is decoded, and no more is read than the marker segments before the first scan.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

from vqrae_ds.data.faults import (
    CORRUPT,
    EMPTY,
    NOT_AN_IMAGE,
    TOO_LARGE,
    TOO_LONG,
    TOO_MANY_SCANS,
    BadSample,
)

MAX_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb: 256 MiB of RGB
MAX_BYTES = 1 << 26
MAX_SIDE = 65_535
# A progressive JPEG is written in about ten scans; each is a pass over all pixels, and may cost its
# author a few bytes. libjpeg-turbo's own fuzzers give up above this number.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 2_000_000_000  # of all scans: seconds; 22 scans of the largest image
# An encoder writes about ten markers before the first scan, and hundreds where a profile or a
# preview is cut up. Bytes of 0xFF and markers without a length cost their author nothing.
MAX_MARKERS = 10_000
_START_OF_SCAN = b"\xff\xda"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # what APP1 segments begin with
_ORIENTATION = 0x0112
_SHOWN_BYTES = 24


class Limits(NamedTuple):
    """The most that an image may have."""

    num_bytes: int = MAX_BYTES
    pixels: int = MAX_PIXELS
    side: int = MAX_SIDE


class Header(NamedTuple):
    """Sides in pixels as stored; `orientation` as in EXIF, 1 where none is said (JPEG alone)."""

    format: Literal["JPEG", "PNG", "WEBP"]
    width: int
    height: int
    components: int = 0  # JPEG alone: 1 grey, 3 colour, 4 CMYK
    orientation: int = 1
    has_scans: bool = False  # a JPEG of more than one scan, as every progressive one is
    is_turned_by_xmp: bool = False  # a JPEG with an orientation in its XMP, and none in its EXIF


def checked_header(data: bytes, limits: Limits) -> Header:
    """The header of an image that is worth decoding.

    Raises `BadSample` where it is none, or over a limit.
    """
    if not data:
        raise BadSample("it has no bytes", EMPTY)
    if len(data) > limits.num_bytes:
        raise BadSample(f"{len(data)} bytes is over the limit of {limits.num_bytes}", TOO_LONG)
    header = read_header(data)
    size = f"{header.width} x {header.height}"
    if header.width * header.height > limits.pixels:
        raise BadSample(f"{size} is over the {limits.pixels} pixel limit", TOO_LARGE)
    if max(header.width, header.height) > limits.side:
        raise BadSample(f"{size} has a side over the limit of {limits.side}", TOO_LARGE)
    if not (header.width and header.height):
        raise BadSample(f"cannot decode the image: it is {size}")
    if header.has_scans:
        _refuse_many_scans(data.count(_START_OF_SCAN), header.width * header.height)
    return header


def _refuse_many_scans(scans: int, pixels: int) -> None:
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // pixels)
    if scans > most:
        message = f"a JPEG of {scans} scans is over the limit of {most} for its {pixels} pixels"
        raise BadSample(message, TOO_MANY_SCANS)


def read_header(data: bytes) -> Header:
    """Raises `BadSample` for bytes that are no image, or end inside the header."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _read_jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return Header("PNG", *struct.unpack_from(">4x4xII", data, 8))
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return Header("WEBP", *_webp_size(data))
    except (struct.error, IndexError) as error:
        raise BadSample("cannot decode the image: it is cut inside its header") from error
    start = data[:_SHOWN_BYTES]
    message = f"cannot decode the image: it is no JPEG, PNG or WebP, and begins with {start!r}"
    raise BadSample(message, NOT_AN_IMAGE)


def _read_jpeg(data: bytes) -> Header:
    header, at, exif, has_xmp_orientation = None, 2, None, False
    for _ in range(MAX_MARKERS):
        if (at := data.find(b"\xff", at)) < 0:
            break
        marker = data[at + 1]
        if marker in _ALONE or marker in (0x00, 0xFF):
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9 or (marker == 0xDA and header is None):  # the end, or a scan of nothing
            break
        if marker == 0xDA:  # one scan of all components is the only one that is read
            exif_orientation = _exif_orientation(exif or b"")
            return header._replace(
                has_scans=header.has_scans or data[at + 4] < header.components,
                orientation=exif_orientation or 1,
                is_turned_by_xmp=has_xmp_orientation and exif_orientation is None,
            )
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _FRAMES and header is None:
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            header = Header("JPEG", width, height, components, has_scans=marker in _PROGRESSIVE)
        if marker == 0xE1 and exif is None and data.startswith(_EXIF, at + 4):
            exif = data[at + 10 : at + 2 + length]
        if marker == 0xE1 and data.startswith(_XMP, at + 4):
            has_xmp_orientation = data.find(b"tiff:Orientation", at, at + 2 + length) >= 0
        at += 2 + length
    else:
        message = f"cannot decode the image: more than {MAX_MARKERS} markers before its first scan"
        raise BadSample(message, CORRUPT)
    raise BadSample("cannot decode the image: a JPEG without a frame or a scan", CORRUPT)


def _exif_orientation(tiff: bytes) -> int | None:
    """Of the first directory; None where it is not said, or cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for number in range(entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * number)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return None
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        data[29]  # there, or the header is cut
        return width, height
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF

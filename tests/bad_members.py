"""Every kind of thing that a shard may hold beside sound images, made for real."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Fault(NamedTuple):
    """The bytes of a member KEY.`extension`, and how it is to be counted; None: it is usable."""

    name: str
    extension: str
    data: bytes
    kind: str | None


class _Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, body: bytes, chunks: bytes = b"") -> bytes:
    """8-bit RGB of whatever size it says, with more `chunks` before its `body` of packed rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunks
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def resized_jpeg(data: bytes, width: int, height: int) -> bytes:
    """The same bytes with other sides in the frame header."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def many_scans(data: bytes, number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    last = data.rfind(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + scan * number + b"\xff\xd9"


def make_faults(payload: Path) -> list[Fault]:
    """`payload` is a file that is there afterwards if any of them was executed."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    jpeg, progressive = encode(image, "JPEG"), encode(image, "JPEG", progressive=True)
    sound_png, webp = encode(image, "PNG"), encode(image, "WEBP")
    animation = encode(image, "WEBP", save_all=True, append_images=[image])
    code = pickle.dumps(_Payload(payload))
    script = f"#!/bin/sh\ntouch {payload}\n".encode()
    small = zlib.compress(bytes(8 * 25))
    huge_text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20)))
    huge_profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20)))
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    giant_webp = b"RIFF" + struct.pack("<I", 4 + len(vp8x) + 4000) + b"WEBP" + vp8x + bytes(4000)
    return [
        Fault("empty", "jpg", b"", "empty"),
        Fault("one byte", "jpg", b"\xff", "not_an_image"),
        Fault("web page", "jpg", b"<!DOCTYPE html><html>404</html>", "not_an_image"),
        Fault("json", "png", b'{"error": "gone"}', "not_an_image"),
        Fault("zeros", "jpg", bytes(4000), "not_an_image"),
        Fault("noise", "jpg", noise.tobytes(), "not_an_image"),
        Fault("pickle", "jpg", code, "not_an_image"),
        Fault("script", "jpg", script, "not_an_image"),
        Fault("gif", "jpg", encode(image.convert("P"), "GIF"), "not_an_image"),
        Fault("bmp", "png", encode(image, "BMP"), "not_an_image"),
        Fault("tiff", "jpg", encode(image, "TIFF"), "not_an_image"),
        Fault("eps", "jpg", encode(image, "EPS"), "not_an_image"),
        Fault("packed", "jpg", zlib.compress(jpeg), "not_an_image"),
        Fault("cut jpeg", "jpg", jpeg[: len(jpeg) // 2], "corrupt"),
        Fault("cut jpeg header", "jpg", jpeg[:30], "corrupt"),
        Fault("cut progressive", "jpg", progressive[: len(progressive) // 2], "corrupt"),
        Fault("cut png", "png", sound_png[: len(sound_png) // 2], "corrupt"),
        Fault("cut webp", "webp", webp[: len(webp) // 2], "corrupt"),
        Fault("jpeg of nothing", "jpg", b"\xff\xd8\xff\xd9" + bytes(100), "corrupt"),
        Fault("damaged png", "png", sound_png[:60] + b"\0" * 40 + sound_png[100:], "corrupt"),
        Fault("png without rows", "png", png(64, 64, b""), "corrupt"),
        Fault("no width", "jpg", resized_jpeg(jpeg, 0, 64), "corrupt"),
        Fault("jpeg bomb", "jpg", resized_jpeg(jpeg, 65000, 65000), "too_large"),
        Fault("progressive bomb", "jpg", resized_jpeg(progressive, 30000, 30000), "too_large"),
        Fault("png bomb", "png", png(13000, 13000, zlib.compress(bytes(9 << 20))), "too_large"),
        Fault("long png", "png", png(1, 80_000_000, b""), "too_large"),
        Fault("webp bomb", "webp", giant_webp, "too_large"),
        Fault("text bomb", "png", png(8, 8, small, huge_text), "corrupt"),
        Fault("profile bomb", "png", png(8, 8, small, huge_profile), "corrupt"),
        Fault("many scans", "jpg", many_scans(progressive, 2000), "too_many_scans"),
        Fault("long member", "png", sound_png + bytes(3 << 20), "too_long"),
        # Odd, and to be used all the same.
        Fault("wrong extension", "png", jpeg, None),
        Fault("code behind a jpeg", "jpg", jpeg + code, None),
        Fault("cmyk", "jpg", encode(image.convert("CMYK"), "JPEG"), None),
        Fault("grey", "jpg", encode(image.convert("L"), "JPEG"), None),
        Fault("alpha", "png", encode(image.convert("RGBA"), "PNG"), None),
        Fault("animation", "webp", animation, None),
        Fault("one pixel", "png", encode(image.crop((0, 0, 1, 1)), "PNG"), None),
    ]

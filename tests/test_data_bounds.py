"""What hostile input may cost: markers, scans, ranges and records are bounded, and so is memory."""

from __future__ import annotations

import io
import multiprocessing
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bad_members import encode, many_scans, resized_jpeg
from tests.distributed import FORK_SERVER, IMPORTED_ONCE
from tests.memory import sampled_memory
from vqrae_ds.config import patterns
from vqrae_ds.config.patterns import expand_braces
from vqrae_ds.config.schema import DataConfig
from vqrae_ds.data.crops import centre_crop
from vqrae_ds.data.decode import Decoding, decode_crop
from vqrae_ds.data.faults import BadSample
from vqrae_ds.data.image_header import MAX_MARKERS, Limits, checked_header
from vqrae_ds.data.indexing import index_shards

WITHOUT_LENGTH = [b"\xff", b"\xff\x00", b"\xff\xd0"]
COMMENT = b"\xff\xfe\x00\x03-"


SIDE = 2400
MiB = 1 << 20


def drawn(mode: str) -> Image.Image:
    """SIDE x SIDE pixels that pack to little, in files of every kind."""
    row = (np.arange(SIDE) // 32 % 256).astype(np.uint8)
    grey = Image.fromarray(np.broadcast_to(row, (SIDE, SIDE)).copy())
    if mode == "I;16":
        return Image.fromarray(np.broadcast_to(row.astype(np.uint16) * 257, (SIDE, SIDE)).copy())
    if mode in ("RGBA", "LA"):
        grey.putalpha(99)
    return grey.convert(mode)


def peaks_of_decoding(format: str, mode: str, options: dict[str, Any]) -> list[int]:
    """The most bytes that the decoding of SIDE x SIDE pixels took, each of three times."""
    decoding = Decoding(limits=Limits(pixels=SIDE * SIDE))
    small = encode(drawn("L").crop((0, 0, 64, 64)), format)
    decode_crop(small, centre_crop, image_size=64)  # libraries have their own first use
    data = encode(drawn(mode), format, **options)
    found = []
    for _ in range(3):
        peaks: dict[str, int] = {}
        with sampled_memory(peaks):
            decode_crop(data, centre_crop, image_size=64, decoding=decoding)
        found.append(peaks["RssAnon"])
    return found


@pytest.fixture(scope="module")
def fresh_processes() -> Iterator[ProcessPoolExecutor]:
    """One for each call: what the C library has kept of earlier work would be counted."""
    context = multiprocessing.get_context(FORK_SERVER)
    context.set_forkserver_preload(IMPORTED_ONCE)  # those of all tests: there is one server
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        yield processes


@pytest.mark.parametrize(
    ("format", "mode", "bytes_a_pixel", "options"),
    [
        ("JPEG", "RGB", 9, {"progressive": True, "subsampling": 0}),
        ("JPEG", "CMYK", 12, {"progressive": True}),
        ("PNG", "RGB", 8, {}),
        ("PNG", "RGBA", 8, {}),
        (
            "PNG",
            "RGBA",
            12,
            {"exif": b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"},
        ),
        ("PNG", "LA", 8, {}),
        ("PNG", "I;16", 6, {}),
        ("PNG", "P", 5, {}),
        ("WEBP", "RGB", 16, {"method": 0}),
        ("WEBP", "RGBA", 16, {"lossless": True, "quality": 0, "method": 0}),
    ],
)
def test_the_largest_image_takes_no_more_than_is_said(
    fresh_processes: ProcessPoolExecutor,
    format: str,
    mode: str,
    bytes_a_pixel: int,
    options: dict[str, Any],
) -> None:
    peaks = fresh_processes.submit(peaks_of_decoding, format, mode, options).result()
    # Whatever else the process does meanwhile can only add to what decoding takes.
    assert 3 * SIDE * SIDE < min(peaks) < bytes_a_pixel * SIDE * SIDE + 8 * MiB


@pytest.mark.parametrize("marker", [*WITHOUT_LENGTH, COMMENT])
def test_a_jpeg_of_nothing_but_markers_is_given_up_early(marker: bytes) -> None:
    jpeg = encode(Image.new("RGB", (8, 8)), "JPEG")
    padded = jpeg[:2] + marker * (MAX_MARKERS - 100) + jpeg[2:]
    assert checked_header(padded, Limits()).width == 8
    endless = b"\xff\xd8\xff" + marker * (MAX_MARKERS + 100)
    with pytest.raises(BadSample, match=f"more than {MAX_MARKERS} markers before") as refused:
        checked_header(endless + jpeg[2:], Limits())
    assert refused.value.kind == "corrupt"


def test_the_larger_a_jpeg_the_fewer_scans_it_may_have() -> None:
    progressive = encode(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scans = progressive.count(b"\xff\xda")
    for side, most in ((64, 500), (4000, 125), (9459, 22)):
        for number in (most - scans, most - scans + 1):
            data = resized_jpeg(many_scans(progressive, number), side, side)
            if scans + number <= most:
                assert checked_header(data, Limits()).width == side
                continue
            with pytest.raises(BadSample, match=f"of {most + 1} scans is over .* {most} for its"):
                checked_header(data, Limits())


def test_a_range_too_wide_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_PATHS", 1000)
    wide = ["{0..999999999999}", "a/{b,{-5..-2000000000}}", "{0..10..1}{1..9999999999..2}"]
    for pattern in [*wide, "{0.." + "9" * 5000 + "}", "{1..5.." + "9" * 5000 + "}", "{0..1000}"]:
        with pytest.raises(ValueError, match="means more than 1000 paths"):
            expand_braces(pattern)
    with pytest.raises(ValueError, match="means more than 1000 paths"):
        expand_braces("{0..99}{0..99}")
    assert expand_braces("a/{001..999}.tar")[::998] == ["a/001.tar", "a/999.tar"]
    assert expand_braces("{-1..1}") == ["-1", "0", "1"]
    assert expand_braces("{5000000..5000002}") == ["5000000", "5000001", "5000002"]
    assert expand_braces("{0..90000000..45000000}") == ["0", "45000000", "90000000"]


def test_a_record_whose_length_has_thousands_of_digits_is_a_damaged_shard(tmp_path: Path) -> None:
    record = b"9" * 5000 + b" path=a.jpg\n"
    for number, names in (("0", ["a.jpg"]), ("1", ["b.jpg"])):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"jpg"))
            if number == "1":
                member = tarfile.TarInfo("extended")
                member.type, member.size = tarfile.XHDTYPE, len(record)
                tar.addfile(member, io.BytesIO(record))
    with pytest.raises(ValueError, match=r"1\.tar is not a sound shard: a PAX record"):
        index_shards(tmp_path)
    index = index_shards(tmp_path, skip_bad=True)
    assert [index.sample(i).key for i in range(index.num_samples)] == ["a", "b"]
    assert index.shards[1].left_out == {"damaged_shard": 1}


def test_no_more_pixels_can_be_allowed_than_pillow_decodes() -> None:
    most = DataConfig.model_fields["max_image_pixels"].metadata
    assert max(getattr(bound, "le", 0) for bound in most) == 2 * Image.MAX_IMAGE_PIXELS
    DataConfig(train="data", max_image_pixels=178_956_970)
    with pytest.raises(ValueError, match="178956970"):
        DataConfig(train="data", max_image_pixels=178_956_971)

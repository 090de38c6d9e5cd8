"""Reading images: the trainer's data path against webdataset with Pillow, on the same shards.

Decoding: photographs as JPEGs of 512 px in shards as img2dataset writes them, each to 256 px in 8
bits, in one thread. The peer decodes with `.decode("pil")` and resizes by Pillow's bicubic filter;
all take turns, shard for shard, and processor time counts. Resuming: the time from nothing to the
first batch at a position of the stream; the peer, which has no positions, reads up to it, without
decoding.
"""

from __future__ import annotations

import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.data.crops import Augmentation, centre_crop
from vqrae_ds.data.decode import Decoding, decode_crop
from vqrae_ds.data.index import ShardIndex, read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.reading import read_sample
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.data.stream import training_batches

SOURCE_PX, OUTPUT_PX, TINY_PX, QUALITY = 512, 256, 64, 92
SHARDS, SAMPLES_A_SHARD = 2, 64
BATCH = 8
PEER = "webdataset + Pillow bicubic"


class Resumed(NamedTuple):
    """Seconds to the first batch by position, those of the peer at the last, and of the index."""

    seconds: dict[int, float]
    peer_seconds: float
    indexing_seconds: float
    bytes_a_sample: float


def measure_data(photos: Path, folder: Path | None, position: int, rounds: int) -> Report:
    """Make shards of the photographs below `photos` in `folder`, and measure; nothing stays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            rates, psnr = _measure_decoding(photos, Path(temporary) / "photographs", rounds)
            resumed = _measure_resuming(photos, Path(temporary) / "many", position, rounds)
    finally:
        torch.set_num_threads(threads)
    seconds = resumed.seconds[position]
    rows = [
        Row("exact_images_per_cpu_second", rates["exact"], rates["peer"], PEER, "images"),
        Row("fast_images_per_cpu_second", rates["fast"], rates["peer"], PEER, "images"),
        Row("resume_time", seconds, resumed.peer_seconds, "webdataset, reading up to it", "s"),
    ]
    details: dict[str, Any] = {
        "psnr_to_pillow_mean_and_least": psnr,
        "resume_seconds_by_position": {p: round(s, 4) for p, s in resumed.seconds.items()},
        "indexing_seconds": round(resumed.indexing_seconds, 1),
        "index_bytes_a_sample": round(resumed.bytes_a_sample, 2),
    }
    return Report("data", describe_machine("cpu"), rows, details)


def _measure_decoding(
    photos: Path, folder: Path, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    images = [photograph_jpeg(path, SOURCE_PX) for path in find_images(photos)]
    for number in range(SHARDS):
        some = itertools.islice(itertools.cycle(images), number, number + SAMPLES_A_SHARD)
        write_shard(folder / f"{number:05d}.tar", list(some))
    index = index_shards(folder)
    ways = {
        "peer": _by_peer,
        "exact": partial(_by_ours, index, Decoding("exact")),
        "fast": partial(_by_ours, index, Decoding("fast")),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first of each is not counted
        for shard, (way, decode) in itertools.product(index.shards, ways.items()):
            start = time.process_time()
            for _ in decode(shard.path):
                pass
            if number:
                seconds[way].append(time.process_time() - start)
    theirs = list(_by_peer(index.shards[0].path))
    psnr = {}
    for way in ("exact", "fast"):
        ours = list(ways[way](index.shards[0].path))
        found = [_psnr(*pair) for pair in zip(ours, theirs, strict=True)]
        psnr[way] = [round(statistics.mean(found), 1), round(min(found), 1)]
    return {way: SAMPLES_A_SHARD / statistics.median(s) for way, s in seconds.items()}, psnr


def _by_ours(index: ShardIndex, decoding: Decoding, shard: Path) -> Iterator[np.ndarray]:
    number = [entry.path for entry in index.shards].index(shard)
    for i in range(int(index.starts[number]), int(index.starts[number + 1])):
        data = read_sample(index.sample(i), decoding.limits.num_bytes)
        pixels = decode_crop(data, centre_crop, image_size=OUTPUT_PX, decoding=decoding)
        yield pixels.permute(1, 2, 0).numpy()


def _by_peer(shard: Path) -> Iterator[np.ndarray]:
    import webdataset

    for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"):
        size = (OUTPUT_PX, OUTPUT_PX)
        yield np.asarray(sample["jpg"].resize(size, Image.Resampling.BICUBIC))


def _measure_resuming(photos: Path, folder: Path, position: int, rounds: int) -> Resumed:
    images = [photograph_jpeg(path, TINY_PX) for path in find_images(photos)]
    a_shard = min(1000, position)
    some = list(itertools.islice(itertools.cycle(images), a_shard))
    write_shard(folder / "00000.tar", some)
    for number in range(1, -(-position // a_shard) + 1):
        os.link(folder / "00000.tar", folder / f"{number:05d}.tar")  # many shards, the room of one
    indexing = _seconds(lambda: index_shards(folder))
    index = read_index(folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("index.*"))

    def resume_at(start: int) -> None:
        read = read_index(folder, check_shards=False)
        next(_first_batches(read, start))

    resume_at(1)  # what is imported at the first use is no part of it
    seconds = {
        start: statistics.median(_seconds(partial(resume_at, start + r)) for r in range(rounds))
        for start in (0, position // 100, position // 2, position)
    }
    shards = [str(shard.path) for shard in index.shards]
    peer = _seconds(lambda: _replay(shards, position))
    return Resumed(seconds, peer, indexing, num_bytes / index.num_samples)


def _first_batches(index: ShardIndex, start: int) -> Iterator[Any]:
    return training_batches(
        index,
        image_size=TINY_PX,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=0,
        start=start,
        num_workers=0,
        augmentation=Augmentation(0.5, 1.0, horizontal_flip=True),
    )


def _replay(shards: list[str], position: int) -> None:
    import webdataset

    samples = iter(webdataset.WebDataset(shards, shardshuffle=False))
    for _ in itertools.islice(samples, position, position + BATCH):
        pass


def _seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def photograph_jpeg(path: Path, side: int) -> bytes:
    """A photograph's centre square of `side` pixels."""
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_shard(path: Path, images: list[bytes]) -> None:
    """JPEGs as img2dataset writes them, a json and a text beside each."""
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for number, image in enumerate(images):
            members = {"jpg": image, "json": b'{"width": 512}', "txt": b"a photograph"}
            writer.write({"__key__": f"{number:09d}", **members})


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """In dB, of 8-bit images; 100 where they are equal."""
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return min(100.0, float(10 * np.log10(255**2 / error))) if error else 100.0

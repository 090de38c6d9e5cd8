"""Reading images: the trainer's data path against webdataset with Pillow, on the same shards.

Decoding: photographs as JPEGs of 512 px in shards as img2dataset writes them, each to 256 px in 8
bits, in one thread; whole, and in the random crops of the default augmentation. The peer decodes
with `.decode("pil")`, crops and resizes by Pillow's bicubic filter. All take turns, shard for
shard, and processor time counts. Two rows are of libjpeg-turbo alone, which decodes the same bytes
whole and at a half and does nothing else: no reader that decodes with it can be faster.

Resuming: the time from nothing to the first batch at a position of the stream, out of one loader
process. Nothing of an earlier round is remembered. The peer, which has no positions, reads up to
it, without decoding; that takes minutes, so it may have fewer rounds than ours, each after one of
ours.
"""

from __future__ import annotations

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
import simplejpeg
import torch
from PIL import Image

from vqrae_ds.benchmarks.photo_shards import QUALITY, source_jpegs, tiny_jpegs, write_shard
from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.config import DataConfig
from vqrae_ds.data.crops import Augmentation, Crop, SampleSeed, centre_crop, random_crop
from vqrae_ds.data.decode import Decoding, decode_crop
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader, open_index, open_training
from vqrae_ds.data.reading import read_sample

SOURCE_PX, OUTPUT_PX, TINY_PX = 512, 256, 64
SHARDS, SAMPLES_A_SHARD = 2, 64
BATCH = 8
PEER = "webdataset + Pillow bicubic"

ChooseCrop = Callable[[int, int], Crop]
Way = Callable[[int], Iterator[np.ndarray]]  # a shard by its number, to its images (H, W, 3)


class Decoded(NamedTuple):
    """What decoding costs by each way, and how near to its peer each of ours comes."""

    rates: dict[str, float]  # images per second of processor time
    psnr: dict[str, list[float]]  # dB, mean and least
    sources: dict[str, int]


class Resumed(NamedTuple):
    """Seconds to the first batch, round by round, by position, the peer's at the last position.

    And what the index takes.
    """

    seconds: dict[int, list[float]]
    peer_seconds: list[float]
    indexing_seconds: float
    bytes_a_sample: float


def measure_data(
    photos: Path, folder: Path | None, position: int, rounds: int, peer_resume_rounds: int = 1
) -> Report:
    """Make shards of the photographs below `photos` in `folder`, and measure; nothing stays.

    All have `rounds` rounds, but the peer that reads up to `position`: of these it is in the first
    `peer_resume_rounds`, 1 or more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            decoded = _measure_decoding(photos, Path(temporary) / "photographs", rounds)
            many = Path(temporary) / "many"
            resumed = _measure_resuming(photos, many, position, rounds, peer_resume_rounds)
    finally:
        torch.set_num_threads(threads)
    rows = [
        Row(f"{ours}_per_cpu_second", decoded.rates[ours], decoded.rates[peer], PEER, "images")
        for ours, peer in (
            ("exact_images", "peer_images"),
            ("fast_images", "peer_images"),
            ("exact_random_crops", "peer_random_crops"),
            ("fast_random_crops", "peer_random_crops"),
            ("bare_decodes", "peer_images"),
            ("bare_half_decodes", "peer_images"),
        )
    ]
    seconds = {at: statistics.median(found) for at, found in resumed.seconds.items()}
    often = "once" if peer_resume_rounds == 1 else f"{peer_resume_rounds} times"
    peer_resuming = f"webdataset, reading up to it {often}"
    peer_seconds = statistics.median(resumed.peer_seconds)
    rows.append(Row("resume_time", seconds[position], peer_seconds, peer_resuming, "s"))
    details: dict[str, Any] = {
        "psnr_to_pillow_mean_and_least": decoded.psnr,
        "sources": decoded.sources,
        "resume_seconds_by_position": {at: round(median, 4) for at, median in seconds.items()},
        "resume_seconds_of_the_peer": [round(each, 2) for each in resumed.peer_seconds],
        "indexing_seconds": round(resumed.indexing_seconds, 1),
        "index_bytes_a_sample": round(resumed.bytes_a_sample, 2),
    }
    return Report("data", describe_machine("cpu"), rows, details)


def _measure_decoding(photos: Path, folder: Path, rounds: int) -> Decoded:
    jpegs = source_jpegs(photos, SOURCE_PX)
    for number in range(SHARDS):
        first = number * SAMPLES_A_SHARD
        some = itertools.islice(itertools.cycle(jpegs), first, first + SAMPLES_A_SHARD)
        write_shard(folder / f"{number:05d}.tar", list(some))
    index = index_shards(folder)
    ways = _ways(index)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first of each is not counted
        for shard, (name, decode) in itertools.product(range(SHARDS), ways.items()):
            start = time.process_time()
            for _ in decode(shard):
                pass
            if turn:
                seconds[name].append(time.process_time() - start)
    psnr = {}
    for mode, what in itertools.product(("exact", "fast"), ("images", "random_crops")):
        pairs = zip(ways[f"{mode}_{what}"](0), ways[f"peer_{what}"](0), strict=True)
        found = [_psnr(*pair) for pair in pairs]
        psnr[f"{mode}_{what}"] = [round(statistics.mean(found), 1), round(min(found), 1)]
    bytes_each = sum(map(len, jpegs)) // len(jpegs)
    sources = {"images": len(jpegs), "bytes_each": bytes_each, "quality": QUALITY}
    rates = {name: SAMPLES_A_SHARD / statistics.median(s) for name, s in seconds.items()}
    return Decoded(rates, psnr, sources)


def _ways(index: ShardIndex) -> dict[str, Way]:
    whole, cropped = [centre_crop] * SAMPLES_A_SHARD, _random_crops()
    exact, fast = Decoding("exact"), Decoding("fast")
    return {
        "peer_images": partial(_by_peer, index, whole),
        "exact_images": partial(_by_ours, index, exact, whole),
        "fast_images": partial(_by_ours, index, fast, whole),
        "peer_random_crops": partial(_by_peer, index, cropped),
        "exact_random_crops": partial(_by_ours, index, exact, cropped),
        "fast_random_crops": partial(_by_ours, index, fast, cropped),
        "bare_decodes": partial(_bare, index, 1),
        "bare_half_decodes": partial(_bare, index, 2),
    }


def _random_crops() -> list[ChooseCrop]:
    """Those of a training that says nothing of crops."""
    data = DataConfig(train="any")
    augmentation = Augmentation(data.crop_scale_min, data.crop_scale_max, data.horizontal_flip)
    return [
        partial(random_crop, augmentation=augmentation, seed=SampleSeed(0, 0, i))
        for i in range(SAMPLES_A_SHARD)
    ]


def _by_ours(
    index: ShardIndex, decoding: Decoding, choose_crops: list[ChooseCrop], shard: int
) -> Iterator[np.ndarray]:
    for data, choose_crop in zip(_bytes_of(index, shard), choose_crops, strict=True):
        pixels = decode_crop(data, choose_crop, image_size=OUTPUT_PX, decoding=decoding)
        yield pixels.permute(1, 2, 0).numpy()


def _by_peer(index: ShardIndex, choose_crops: list[ChooseCrop], shard: int) -> Iterator[np.ndarray]:
    import webdataset

    path = str(index.shards[shard].path)
    samples = webdataset.WebDataset(path, shardshuffle=False).decode("pil")
    for sample, choose_crop in zip(samples, choose_crops, strict=True):
        image = sample["jpg"]
        crop = choose_crop(*image.size)
        if (crop.side, crop.side) != image.size:
            right, bottom = crop.left + crop.side, crop.top + crop.side
            image = image.crop((crop.left, crop.top, right, bottom))
        image = image.resize((OUTPUT_PX, OUTPUT_PX), Image.Resampling.BICUBIC)
        if crop.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        yield np.asarray(image)


def _bare(index: ShardIndex, scale: int, shard: int) -> Iterator[np.ndarray]:
    least = SOURCE_PX // scale
    for data in _bytes_of(index, shard):
        yield simplejpeg.decode_jpeg(
            data, "RGB", min_height=least, min_width=least, min_factor=scale
        )


def _bytes_of(index: ShardIndex, shard: int) -> Iterator[bytes]:
    for number in range(int(index.starts[shard]), int(index.starts[shard + 1])):
        yield read_sample(index.sample(number), Decoding().limits.num_bytes)


def _measure_resuming(
    photos: Path, folder: Path, position: int, rounds: int, peer_rounds: int
) -> Resumed:
    a_shard = min(1000, position)
    jpegs = tiny_jpegs(photos, TINY_PX)
    write_shard(folder / "00000.tar", list(itertools.islice(itertools.cycle(jpegs), a_shard)))
    for number in range(1, -(-position // a_shard) + 1):
        os.link(folder / "00000.tar", folder / f"{number:05d}.tar")  # many shards, the room of one
    start = time.perf_counter()
    index = index_shards(folder)
    indexing = time.perf_counter() - start
    num_bytes = sum(path.stat().st_size for path in folder.glob("index.*"))
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count())
    _resume(folder, next(names), 0)  # what is imported at the first use is no part of it
    seconds: dict[int, list[float]] = {
        at: [] for at in (0, position // 100, position // 2, position)
    }
    peer = []
    for number in range(rounds):
        for at, found in seconds.items():
            found.append(_resume(folder, next(names), at))
        if number < peer_rounds:
            peer.append(_replay([str(shard.path) for shard in index.shards], position))
    return Resumed(seconds, peer, indexing, num_bytes / index.num_samples)


def _resume(folder: Path, link: Path, start: int) -> float:
    """Seconds to the first batch by a path, and in an order, that are remembered from nowhere."""
    link.symlink_to(folder)
    seed = int(link.name.rpartition("-")[2])
    data, reader = DataConfig(train=str(link), num_workers=1), Reader(0, 1)
    began = time.perf_counter()
    batches = open_training(
        data,
        open_index(data.train, data, reader),
        reader,
        image_size=TINY_PX,
        micro_batch_size=BATCH,
        seed=seed,
        start=start,
    )
    next(batches)
    return time.perf_counter() - began


def _replay(shards: list[str], position: int) -> float:
    import webdataset

    began = time.perf_counter()
    samples = iter(webdataset.WebDataset(shards, shardshuffle=False))
    for _ in itertools.islice(samples, position, position + BATCH):
        pass
    return time.perf_counter() - began


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """In dB, of 8-bit images; 100 where they are equal."""
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return min(100.0, float(10 * np.log10(255**2 / error))) if error else 100.0

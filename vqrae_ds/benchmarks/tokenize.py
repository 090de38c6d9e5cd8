"""Tokenizing a data set: ours against the loop that a user would write, the same model and batches.

Photographs as JPEGs of 512 px in tar shards as img2dataset writes them, json and txt beside each.
The peer reads them by webdataset, decodes and resizes by Pillow (`.decode("pil")`, centre crop,
bicubic), stacks, calls `model.encode_to_indices` and saves codes and keys; ours is what
tools/tokenize_shards.py does, with claims, checksums, syncs to the disk and a manifest. Both decode
in one process, that of the model, and the time is that of the whole job, the model loaded before:
what passes, and what the processor works, which other work on the machine does not change. They
take turns, and the first of each is not counted.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqrae_ds.benchmarks.photo_shards import source_jpegs, write_shard
from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.config import DataConfig, ModelConfig
from vqrae_ds.data.crops import centre_crop
from vqrae_ds.data.index import read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.device import choose_device
from vqrae_ds.models.vqrae import VQRAE, read_config
from vqrae_ds.tokenizing.code_shard import read_columns, read_header
from vqrae_ds.tokenizing.folder import code_path
from vqrae_ds.tokenizing.job import make_job
from vqrae_ds.tokenizing.model import default_dtype, load_for_encoding
from vqrae_ds.tokenizing.tokenize import Task, tokenize
from vqrae_ds.worker import Worker

SOURCE_PX = 512
SHARDS, SAMPLES_A_SHARD = 4, 64
SMALL_MODEL: dict[str, Any] = {"image_size": 64, "num_embeddings": 1024, "embedding_dim": 64}
PEER = "webdataset + Pillow + model.encode_to_indices"

Encode = Callable[[Tensor], Tensor]


def measure_tokenize(
    photos: Path,
    model: Path | None,
    encoder: Path,
    folder: Path | None,
    batch_size: int,
    rounds: int,
    shards: int = SHARDS,
) -> Report:
    """Tokenize `shards` shards by both ways `rounds` times; nothing stays in `folder`.

    Without a `model` it is a small one with random weights, whose encoder is described in the
    folder `encoder`.
    """
    device = choose_device()
    dtype = default_dtype(device)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        if model is None:
            model = root / "model"
            torch.manual_seed(0)
            small = ModelConfig(encoder_config_path=str(encoder), **SMALL_MODEL)
            VQRAE(config=small).save_pretrained(model)
        _make_shards(photos, root / "shards", shards)
        config = read_config(model)
        encode_ours = load_for_encoding(model, device, dtype)
        encode_theirs = _as_a_user_would(model, device, dtype)
        ways: dict[str, Callable[[Path], object]] = {
            "ours": lambda output: _ours(root, output, model, encode_ours, dtype, batch_size),
            "peer": lambda output: _theirs(
                root / "shards", output, encode_theirs, config.image_size, batch_size
            ),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        cpu_seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, run in ways.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                run(root / f"{way}{number}")
                if number:
                    seconds[way].append(time.perf_counter() - start)
                    cpu_seconds[way].append(time.process_time() - cpu_start)
        same = _share_of_same_codes(root, number, shards)
    images = shards * SAMPLES_A_SHARD
    rows = []
    for metric, found in (("images_per_second", seconds), ("images_per_cpu_second", cpu_seconds)):
        ours, peer = (images / statistics.median(found[way]) for way in ("ours", "peer"))
        rows.append(Row(metric, ours, peer, PEER, "images"))
    details: dict[str, Any] = {
        "images": images,
        "batch_size": batch_size,
        "dtype": dtype,
        "image_size": config.image_size,
        "seconds_of_a_job": {way: [round(s, 3) for s in found] for way, found in seconds.items()},
        "share_of_codes_that_are_the_same": round(same, 4),
    }
    return Report("tokenize", describe_machine(device.type), rows, details)


def _make_shards(photos: Path, folder: Path, shards: int) -> None:
    images = source_jpegs(photos, SOURCE_PX)
    for number in range(shards):
        some = itertools.islice(itertools.cycle(images), number, number + SAMPLES_A_SHARD)
        write_shard(folder / f"{number:05d}.tar", list(some))
    index_shards(folder)


def _ours(
    root: Path, output: Path, model: Path, encode: Encode, dtype: str, batch_size: int
) -> None:
    """From the index to the manifest, the checksum of the model's weights with it."""
    config, data = read_config(model), DataConfig(train=str(root / "shards"), num_workers=0)
    index = read_index(root / "shards")
    job = make_job(model, config, index, data, image_size=None, dtype=dtype)
    made_with = {"batch_size": batch_size}
    task = Task(output, job, index, data, Worker(), batch_size, made_with)
    outcome = tokenize(task, lambda: encode)
    assert outcome.totals is not None and outcome.made.images == index.num_samples


def _as_a_user_would(model: Path, device: torch.device, dtype: str) -> Encode:
    whole = VQRAE.from_pretrained(model).to(device)
    if dtype == "bf16":
        for parameter in whole.parameters():
            parameter.data = parameter.data.bfloat16()
    return lambda images_B3HW: whole.encode_to_indices(images_B3HW.to(device))


def _theirs(shards: Path, output: Path, encode: Encode, image_size: int, batch_size: int) -> None:
    """A file of codes and keys a shard."""
    import webdataset

    output.mkdir()
    for shard in sorted(shards.glob("*.tar")):
        keys, codes, batch = [], [], []
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"):
            keys.append(sample["__key__"])
            batch.append(_pixels(sample["jpg"], image_size))
            if len(batch) == batch_size:
                codes.append(encode(torch.stack(batch)).cpu().numpy().astype(np.uint16))
                batch = []
        if batch:
            codes.append(encode(torch.stack(batch)).cpu().numpy().astype(np.uint16))
        np.savez(output / f"{shard.stem}.npz", codes=np.concatenate(codes), keys=np.array(keys))


def _pixels(image: Image.Image, image_size: int) -> Tensor:
    """(3, S, S) in [0, 1] of the largest centre square."""
    crop = centre_crop(*image.size)
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    square = image.convert("RGB").crop(box)
    square = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def _share_of_same_codes(root: Path, number: int, shards: int) -> float:
    """Both resize in 8 bits and round differently, so that a few codes differ."""
    same = []
    for shard in range(shards):
        ours = read_columns(read_header(code_path(root / f"ours{number}", shard)))
        theirs = np.load(root / f"peer{number}" / f"{shard:05d}.npz")
        assert list(theirs["keys"]) == ours.keys
        same.append((theirs["codes"] == ours.codes_Nhw).mean())
    return float(np.mean(same))

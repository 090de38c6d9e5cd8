"""A small tokenizer, shards of real pictures, and jobs over them."""

from __future__ import annotations

import io
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from tests.conftest import ROOT
from tests.tiny import build_model
from vqrae_ds.config import DataConfig
from vqrae_ds.data.decode import load_image
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader, open_index
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.models.vqrae import VQRAE, read_config
from vqrae_ds.tokenizing.job import make_job
from vqrae_ds.tokenizing.model import load_for_encoding
from vqrae_ds.tokenizing.tokenize import Encode, Outcome, Task, tokenize
from vqrae_ds.tokenizing.verifying import verify
from vqrae_ds.worker import Worker

PHOTOS = ROOT / "tests/data/photos"
CPU = torch.device("cpu")
BATCH = 4
ALONE = Worker()
SIZES = [9, 0, 4, 10, 1]  # of the shards: an empty one, and some that batches of 4 do not divide


def make_model(folder: Path) -> VQRAE:
    """Saved in `folder`, and as it is read from there."""
    build_model().save_pretrained(folder)
    return VQRAE.from_pretrained(folder)


def crops_of_photos(number: int) -> list[bytes]:
    """JPEGs of several shapes, no two alike."""
    photos = [Image.open(path).convert("RGB") for path in find_images(PHOTOS)]
    draw = np.random.default_rng(0)
    crops = []
    for i in range(number):
        photo = photos[i % len(photos)]
        width, height = (int(side) for side in draw.integers(40, 90, 2))
        left = int(draw.integers(0, photo.width - width))
        top = int(draw.integers(0, photo.height - height))
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        crops.append(buffer.getvalue())
    return crops


def write_shards_of(folder: Path, images: list[bytes], sizes: list[int]) -> ShardIndex:
    """Shards of so many images each, keys counted through, and their index."""
    folder.mkdir(parents=True)
    left = iter(enumerate(images))
    for shard, size in enumerate(sizes):
        with open(folder / f"{shard:05d}.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
            for _ in range(size):
                number, data = next(left)
                tar.write({"__key__": f"class/{number:05d}", "jpg": data})
    return index_shards(folder)


def make_codes(root: Path, images: list[bytes]) -> VQRAE:
    """A model, shards of `SIZES` and their codes of one straight run, in `root`."""
    model = make_model(root / "model")
    write_shards_of(root / "shards", images, SIZES)
    run(root)
    return model


def copy_to(root: Path, made: Path) -> Path:
    """What `make_codes` made, in `root` once more, to do harm to."""
    for name in ("model", "shards", "codes"):
        shutil.copytree(made / name, root / name)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damage_of(root: Path, **data: Any) -> list[str]:
    """What --verify finds in the codes of `root`."""
    task = task_of(root, **data)
    return verify(task.output, task.job, task.index).damage


def task_of(root: Path, output: str = "codes", worker: Worker = ALONE, **data: Any) -> Task:
    """The job of `root`/model over `root`/shards."""
    section = DataConfig(train=str(root / "shards"), num_workers=0, **data)
    index = open_index(section.train, section, Reader(worker.rank, worker.world_size))
    model = root / "model"
    job = make_job(model, read_config(model), index, section, image_size=None, dtype="fp32")
    made_with = {"batch_size": BATCH}
    return Task(root / output, job, index, section, worker, BATCH, made_with)


def run(root: Path, *arguments: Any, **data: Any) -> Outcome:
    """A rank of `task_of`, from its beginning to its end."""
    return tokenize(task_of(root, *arguments, **data), encoder(root))


def run_here(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> int:
    """The exit status of a command line, in this process, which has torch already."""
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    try:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def encoder(root: Path) -> Callable[[], Encode]:
    """What loads `root`/model."""
    return lambda: load_for_encoding(root / "model", CPU, "fp32")


def direct_codes(model: VQRAE, images: list[bytes], folder: Path, batch: int = BATCH) -> np.ndarray:
    """(N, h, w): what a script makes of image files that it reads itself, in batches."""
    folder.mkdir()
    for number, data in enumerate(images):
        (folder / f"{number:05d}.jpg").write_bytes(data)
    side = model.config.image_size
    pixels = [load_image(path, image_size=side) for path in sorted(folder.iterdir())]
    found = [
        model.encode_to_indices(torch.stack(pixels[first : first + batch]))
        for first in range(0, len(pixels), batch)
    ]
    return torch.cat(found).numpy()

"""Ranks that are killed, and a launcher's: every sample once, and the codes of one straight run.

VQRAE_TOKENIZED_IMAGES=2000 takes more images than the 200 of every day.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.distributed import FORK_SERVER, IMPORTED_ONCE
from tests.launching import environment
from tests.tokenizing import (
    BATCH,
    CPU,
    crops_of_photos,
    direct_codes,
    make_model,
    run,
    task_of,
    write_shards_of,
)
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.tokenizing.code_shard import read_columns, read_header
from vqrae_ds.tokenizing.dataset import CodeDataset
from vqrae_ds.tokenizing.decoding import decoded_batches
from vqrae_ds.tokenizing.folder import code_path, finished_shards
from vqrae_ds.tokenizing.model import load_for_decoding
from vqrae_ds.tokenizing.verifying import verify

IMAGES = int(os.environ.get("VQRAE_TOKENIZED_IMAGES", "200"))
A_SHARD = 9  # images: two whole batches of 4, and one
KILLS = (  # of each start: where its two ranks end, as shares of what one of them has to do
    ({"batch": 0.2}, {"publishing": 0.3}),
    ({"publishing": 0.1}, {"batch": 0.3}),
)


class Death(NamedTuple):
    """Where a rank is killed: at a batch, or where a file is complete and has not its name yet."""

    place: str
    number: int  # of the batch, or of the file, that it is killed at


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images as files and as shards, a model, and the codes of one straight run."""
    folder = tmp_path_factory.mktemp("ranks")
    images = crops_of_photos(IMAGES)
    make_model(folder / "model")
    sizes = [A_SHARD] * (IMAGES // A_SHARD)
    write_shards_of(folder / "shards", images, [*sizes, IMAGES - sum(sizes)])
    (folder / "files").mkdir()
    for number, data in enumerate(images):
        (folder / "files" / f"{number:05d}.jpg").write_bytes(data)
    run(folder, "straight")
    return folder


def command(root: Path, output: str, *options: str) -> list[str]:
    folders = [str(root / name) for name in ("model", "shards", output)]
    return ["tools/tokenize_shards.py", *folders, "--batch-size", str(BATCH), *options]


def tokenize_until(rank: int, arguments: list[str], death: Death | None) -> None:
    """A rank of two, by the command line, that kill -9 ends at its place."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if death is not None:
        owner, name = (VQRAE, "encode_to_indices") if death.place == "batch" else (os, "replace")
        setattr(owner, name, _killed_at(getattr(owner, name), death))
    sys.argv = arguments
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def _killed_at(act: Callable, death: Death) -> Callable:
    calls = iter(range(1, death.number))

    def act_or_die(*arguments, **options):
        if death.place == "publishing" and ".codes-" not in str(arguments[0]):
            return act(*arguments, **options)
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments, **options)

    return act_or_die


def start_ranks(root: Path, deaths: list[Death | None]) -> list[int]:
    """The exit statuses of two ranks that begin together."""
    context = get_context(FORK_SERVER)
    context.set_forkserver_preload(IMPORTED_ONCE)
    arguments = command(root, "killed", "--num-workers", "0")
    ranks = [
        context.Process(target=tokenize_until, args=(rank, arguments, death))
        for rank, death in enumerate(deaths)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        process.kill()
    return [process.exitcode for process in ranks]


def deaths_of(start: tuple[dict[str, float], ...]) -> list[Death]:
    shards = -(-IMAGES // A_SHARD) / 2  # of a rank
    units = {"batch": 3 * shards, "publishing": shards}
    return [
        Death(place, round(share * units[place]) + 1)
        for death in start
        for place, share in death.items()
    ]


def test_two_ranks_killed_twice_and_resumed(root):
    output, expected = root / "killed", set(finished_shards(root / "straight"))
    finished: set[int] = set()
    for start in KILLS:
        assert start_ranks(root, deaths_of(start)) == [-signal.SIGKILL] * 2
        before, finished = finished, set(finished_shards(output))
        assert before < finished < expected, "some more, and not all"
        partial = [path for path in output.iterdir() if path.name.startswith(".codes-")]
        assert partial, "one was killed with a file that has no name yet"
        assert not (output / "manifest.json").exists()
    kept = {shard: code_path(output, shard).stat().st_mtime_ns for shard in finished}
    assert start_ranks(root, [None, None]) == [0, 0]
    assert all(code_path(output, s).stat().st_mtime_ns == time for s, time in kept.items())

    task = task_of(root, "killed")
    verdict = verify(output, task.job, task.index)
    assert verdict.damage == [] and verdict.totals.samples == IMAGES
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    keys, codes = [], []
    for shard in sorted(expected):
        ours, straight = (
            read_columns(read_header(code_path(folder, shard)))
            for folder in (output, root / "straight")
        )
        np.testing.assert_array_equal(ours.codes_Nhw, straight.codes_Nhw)
        keys += ours.keys
        codes.append(ours.codes_Nhw)
    assert keys == [f"class/{number:05d}" for number in range(IMAGES)], "each once, in order"
    assert len(CodeDataset(output)) == IMAGES
    check_against_direct_reconstruction(root, np.concatenate(codes))


def check_against_direct_reconstruction(root: Path, codes_Nhw: np.ndarray) -> None:
    """A script that reads the files itself, in the same batches, has the same codes and pixels."""
    model = VQRAE.from_pretrained(root / "model")
    decode = load_for_decoding(root / "model", CPU, "fp32")
    decoded = decoded_batches(root / "killed", decode)
    files = sorted((root / "files").iterdir())
    for first in range(0, IMAGES, A_SHARD):
        data = [path.read_bytes() for path in files[first : first + A_SHARD]]
        direct = direct_codes(model, data, root / f"direct{first}")
        np.testing.assert_array_equal(codes_Nhw[first : first + A_SHARD], direct)
        for start in range(0, len(data), BATCH):
            with torch.no_grad():
                images = model.decode_from_indices(torch.from_numpy(direct[start : start + BATCH]))
            assert torch.equal(next(decoded).images_B3HW, images)
    assert next(decoded, None) is None


@pytest.mark.slow
def test_deepspeeds_launcher_starts_the_ranks(root):
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    done = subprocess.run(
        [*launcher, *command(root, "launched", "--num-workers", "1")],
        env=environment() | {"PYTHONPATH": str(ROOT), "VQRAE_LOG_LEVEL": "INFO"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "rank 0: " in said and "rank 1: " in said
    assert "images/s by this rank" in said and f"all is there: {IMAGES} images" in said
    found = {
        shard: read_columns(read_header(code_path(root / "launched", shard))).codes_Nhw
        for shard in finished_shards(root / "launched")
    }
    for shard in finished_shards(root / "straight"):
        straight = read_columns(read_header(code_path(root / "straight", shard)))
        np.testing.assert_array_equal(found.pop(shard), straight.codes_Nhw)
    assert not found

"""How much a save will write, computed by two ranks, against what it writes; and room for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.disks import DISK_BYTES, Level, leave, mounted
from tests.distributed import run_ranks
from tests.tiny import GAN, images_of, make_rank_folders, make_run, make_setup
from vqrae_ds import manifest

pytestmark = pytest.mark.slow

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ENGINES = {
    "zero3": {},
    "zero3_bf16": BF16 | FP32_SUMS,
    "zero3_momentum": {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
    "zero2_bf16": BF16 | {"zero_optimization": {"stage": 2}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1_bf16": BF16 | FP32_SUMS | {"zero_optimization": {"stage": 1}},
}
FROZEN = ("sharded", "resident")
# Names and shapes in pickles and JSON, and DeepSpeed's two scripts: the margin of the check is for
# these.
OVERHEAD_BYTES = 250_000


def content_of(run: Any) -> Any:
    from vqrae_ds.checkpoint import Content, TrainState, write_pretrained

    setup = make_setup(run)
    pretrained = write_pretrained(run, setup.generator)
    content = Content(setup.generator, setup.discriminator, TrainState(1), setup.ema)
    return setup, content._replace(pretrained=pretrained)


def compute_and_save(rank: int, folder: Path, disk: Path) -> None:
    from vqrae_ds.checkpoint import save
    from vqrae_ds.checkpoint.space import own_bytes
    from vqrae_ds.ranks import gather
    from vqrae_ds.train import micro_step

    figures = {}
    for name, deepspeed in ENGINES.items():
        for frozen in FROZEN:
            run = make_run(
                folder / f"rank{rank}",
                1,
                losses={"perceptual": None, "adversarial": {"weight": 0.1, **GAN}},
                deepspeed={"optimizer": ADAMW, **deepspeed},
                ema={"decay": 0.9},
                memory={"frozen_encoder": frozen},
                run={"output_dir": str(folder / name / frozen)},
            )
            setup, content = content_of(run)
            everything = (*content[:2], content.ema)
            before = sum(gather(own_bytes(*everything)))
            micro_step(setup, images_of(0, rank), 0)
            computed = sum(gather(own_bytes(*everything)))
            saved = save(run, content)
            written = manifest.read_manifest(saved)
            figures[f"{name}_{frozen}"] = (before, computed, written.num_bytes)
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    make_room(rank, run, content, disk, folder)


def make_room(rank: int, run: Any, content: Any, disk: Path, folder: Path) -> None:
    """Save beside what a killed save left, and where there is no room at all."""
    import torch.distributed as dist

    from vqrae_ds.checkpoint import Saver, TrainState, warn_of_shortage

    logging.basicConfig(filename=folder / f"rank{rank}.log", level=logging.INFO, force=True)
    section = run.config.run.model_copy(update={"output_dir": str(disk / "run")})
    run = run._replace(config=run.config.model_copy(update={"run": section}))
    checkpoints = disk / "run" / "checkpoints"
    if rank == 0:  # of a save of a step before, and of the same one
        for step, size in ((1, 100_000), (2, DISK_BYTES - 1_100_000)):
            left = checkpoints / f"step_0000000{step}"
            left.mkdir(parents=True)
            (left / "half").write_bytes(b"1" * size)
    dist.barrier()
    saver = Saver(run)
    saver.save(content._replace(state=TrainState(2)))
    assert saver.failed_saves == 0 and not list(checkpoints.glob("*/half"))
    if rank == 0:
        leave(disk, Level(num_bytes=1_000_000))
    dist.barrier()
    warn_of_shortage(run, *content[:2], content.ema)
    saver.save(content._replace(state=TrainState(3)))
    assert saver.failed_saves == 1
    assert "are needed and 1.00 MB are free, so nothing was written" in saver.failure
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    make_rank_folders(folder, 2)
    with mounted(folder / "disk") as disk:
        run_ranks(2, compute_and_save, folder, disk)
    return folder


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_computed_is_what_is_written(folder, engine, frozen):
    figures = json.loads((folder / "figures.json").read_text())
    before, computed, written = figures[f"{engine}_{frozen}"]
    assert 0 < written - computed < OVERHEAD_BYTES < computed
    assert before == pytest.approx(computed, abs=1000), "before the optimizers have a state too"


def test_a_disk_without_room_is_told_at_the_start_and_at_the_save(folder):
    log = (folder / "rank0.log").read_text()
    assert "WARNING:vqrae_ds.checkpoint.space:the checkpoints of this run may not fit: " in log
    assert "THE CHECKPOINT AFTER STEP 3 WAS NOT SAVED" in log

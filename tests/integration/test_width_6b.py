"""The 6B recipe's own files on two CPU ranks: full width, one block, a real step of each stage.

3200 wide, 25 heads, an MLP of 12800, 16384 codes of 1536, 224 px, bf16; stage 2 starts from the
checkpoint of stage 1. Only depth, batch and the sizes of ZeRO's buckets are smaller.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.bf16 import fast_products
from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.memory import read_memory, sampled_memory
from tests.tiny import make_setup
from vqrae_ds.config import Run, read_run
from vqrae_ds.losses.perceptual import PerceptualLoss
from vqrae_ds.planning import peak_bytes, plan, state_bytes

pytestmark = pytest.mark.slow

RANKS, BLOCKS, SIDE = 2, 1, 224
RECIPES = ROOT / "ds_configs"
SMALLER = (
    "deepspeed.train_batch_size=2",
    "deepspeed.train_micro_batch_size_per_gpu=1",
    "deepspeed.zero_optimization.reduce_bucket_size=2e7",
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size=2e7",
    "deepspeed.scheduler.params.warmup_min_ratio=0.5",  # else the first step has a rate of 0
    "data.validation=null",
)


class Measured(NamedTuple):
    """What one rank found: bytes above those before the engines, and what the step did."""

    tensors: int  # all that live after the step
    settled: int  # of the process, after the step
    peak: int  # during the step
    loss: float
    moved: float  # largest change of a master
    taken: bool


def read_stage(folder: Path, stage: int, lpips: Path) -> Run:
    """The recipe of a stage, reduced in depth; stage 2 starts from the run of stage 1."""
    encoder = json.loads((RECIPES / "internvit_6b/encoder/config.json").read_text())
    (folder / "encoder").mkdir(exist_ok=True)
    (folder / "encoder" / "config.json").write_text(
        json.dumps(encoder | {"num_hidden_layers": BLOCKS})
    )
    start = {
        1: ("init.encoder_weights=null", "init.allow_untrained_encoder=true"),
        2: ("init.model=null", f"init.from_run={folder / 'stage1'}"),
    }
    gan = ("losses.adversarial.discriminator_start_step=0", "losses.adversarial.start_step=0")
    return read_run(
        RECIPES / f"internvit_6b/stage{stage}.yaml",
        RECIPES / f"stage{stage}_zero3.json",
        overrides=[
            *SMALLER,
            *start[stage],
            *(gan if stage == 1 else ()),
            f"model.encoder_config_path={folder / 'encoder'}",
            f"losses.perceptual.weights={lpips}",
            f"run.output_dir={folder / f'stage{stage}'}",
        ],
        world_size=RANKS,
        check_paths=False,
    )


def settled_memory() -> int:
    """Anonymous bytes of this process, without what is free and only not yet given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return read_memory()["RssAnon"]


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors of this process."""
    tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def take_a_step(rank: int, folder: Path, stage: int, lpips: Path) -> None:
    from vqrae_ds import checkpoint, engines  # noqa: F401
    from vqrae_ds.monitoring import monitor  # noqa: F401
    from vqrae_ds.sharding.partitions import masters
    from vqrae_ds.train import finish_step, micro_step

    run = read_stage(folder / f"rank{rank}", stage, lpips)
    output = run.config.run.model_copy(update={"output_dir": str(folder / f"stage{stage}")})
    run = run._replace(config=run.config.model_copy(update={"run": output}))
    PerceptualLoss(lpips)  # the libraries are there before the baseline is taken
    before = settled_memory()
    setup = make_setup(checkpoint.resolve_start(run), PerceptualLoss(lpips))
    first = [master[:1000].clone() for master in masters(setup.generator)]
    peaks: dict[str, int] = {}
    built = read_memory()["RssAnon"] - before
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(rank))
    with sampled_memory(peaks), fast_products():
        terms, _ = micro_step(setup, images, 0)
        finish_step(setup, 0)
    settled = settled_memory() - before
    now = [master[:1000] for master in masters(setup.generator)]
    moved = [(a - b).abs().max() for a, b in zip(first, now, strict=True)]
    measured = Measured(
        tensors=tensor_bytes(),
        settled=settled,
        peak=built + peaks["RssAnon"],
        loss=terms["loss/total"].item(),
        moved=max(moved).item(),
        taken=setup.guard.skipped_steps == 0,
    )
    (folder / f"stage{stage}_rank{rank}.json").write_text(json.dumps(measured._asdict()))
    if stage == 1:
        checkpoint.save(
            run,
            checkpoint.Content(setup.generator, setup.discriminator, checkpoint.TrainState(1, 2)),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("width_6b")
    for rank in range(RANKS):
        (folder / f"rank{rank}").mkdir()
        (folder / f"rank{rank}" / "stage1").symlink_to(folder / "stage1")
    for stage in (1, 2):
        run_ranks(RANKS, take_a_step, folder, stage, lpips_weights, timeout_seconds=1200)
    return folder


@pytest.mark.timeout(2600)
@pytest.mark.parametrize("stage", [1, 2])
def test_one_step_at_full_width_in_the_memory_of_the_plan(folder, lpips_weights, stage):
    run = read_stage(folder / "rank0", stage, lpips_weights)
    model = run.config.model
    assert model.encoder_shape.hidden_size == model.decoder.hidden_size == 3200
    states = sum(state_bytes(plan(run), RANKS))
    for rank in range(RANKS):
        found = Measured(**json.loads((folder / f"stage{stage}_rank{rank}.json").read_text()))
        print(f"stage {stage} rank {rank}: plan {states / 1e9:.3f} GB, {found}")
        assert math.isfinite(found.loss) and found.taken and found.moved > 0
        assert found.tensors == pytest.approx(states, rel=0.05)
        # The process also has what the C library and the kernels of the CPU keep for themselves.
        assert found.settled == pytest.approx(states, rel=0.1)
        assert found.peak == pytest.approx(peak_bytes(plan(run), RANKS).total, rel=0.15)

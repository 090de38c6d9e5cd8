"""InternViT-6B with as many decoder blocks as this machine holds, partitioned over two ranks.

A measurement that takes most of a machine, so it is asked for:

    VQRAE_FULL_DEPTH=1 python -m pytest -s tests/integration/test_full_depth.py

It builds as the trainer does, without an optimizer, and runs an image through all of it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.memory import available_memory, sampled_memory
from vqrae_ds.config import Run, read_run
from vqrae_ds.planning import GB, plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("VQRAE_FULL_DEPTH"),
        reason="takes most of the memory of a machine: VQRAE_FULL_DEPTH=1 runs it",
    ),
]

RANKS, FULL = 2, 45
LEFT_FREE = 6 * GB  # two processes, what is whole in them, and room for others
LITTLE_GATHERED = {
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1e8,
    "stage3_max_reuse_distance": 0,
}


class Built(NamedTuple):
    """What one rank measured: bytes of its share, its anonymous memory, seconds."""

    share: int
    anonymous: int  # most, above that before
    build_seconds: float
    forward_seconds: float
    is_finite: bool


def run_of(blocks: int) -> Run:
    """Stage 1 with a decoder of `blocks` blocks."""
    zero = [f"deepspeed.zero_optimization.{k}={v:.0f}" for k, v in LITTLE_GATHERED.items()]
    return read_run(
        ROOT / "ds_configs/internvit_6b/stage1.yaml",
        ROOT / "ds_configs/stage1_zero3.json",
        overrides=[
            f"model.encoder_config_path={ROOT / 'ds_configs/internvit_6b/encoder'}",
            f"model.decoder.num_layers={blocks}",
            "init.encoder_weights=null",
            "init.allow_untrained_encoder=true",
            *zero,
        ],
        world_size=RANKS,
        check_paths=False,
    )


def deepest() -> int:
    """The most decoder blocks beside the whole encoder, in bf16."""
    one, two = (plan(run_of(blocks)).parts for blocks in (1, 2))
    smallest, block = (sum(p.count for p in parts) * 2 for parts in (one, two))
    block -= smallest
    return min(FULL, 1 + int((available_memory() - LEFT_FREE - smallest) // block))


def build(rank: int, folder: Path, blocks: int) -> None:
    """All weights drawn and partitioned, then an image forward."""
    import deepspeed

    from vqrae_ds import engines
    from vqrae_ds.sharding.first_weights import freed_memory_returned

    run, peaks, start = run_of(blocks), {}, time.perf_counter()
    unused = ("optimizer", "scheduler", "data_types")
    config = {key: value for key, value in run.deepspeed.items() if key not in unused}
    with freed_memory_returned(), sampled_memory(peaks):
        model = engines.build_model(run)
        engines.fill_weights(model, {})
        built = time.perf_counter()
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()
        with torch.no_grad():
            side = run.config.model.image_size
            reconstruction = engine(torch.rand(1, 3, side, side)).vqrae.reconstruction
    done = time.perf_counter()
    share = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    finite = bool(reconstruction.isfinite().all())
    measured = Built(share, peaks["RssAnon"], built - start, done - built, finite)
    (folder / f"built{rank}.json").write_text(json.dumps(measured))


@pytest.mark.timeout(3600)
def test_as_deep_as_this_machine_goes(tmp_path: Path) -> None:
    blocks = deepest()
    if blocks < 1:
        pytest.skip(f"{available_memory() / GB:.0f} GB free do not hold the encoder")
    run_ranks(RANKS, build, tmp_path, blocks, timeout_seconds=3500)
    planned = sum(part.count for part in plan(run_of(blocks)).parts if part.engine == "generator")
    for rank in range(RANKS):
        built = Built(*json.loads((tmp_path / f"built{rank}.json").read_text()))
        print(
            f"\nrank {rank}: 45 encoder and {blocks} decoder blocks of 3200, share "
            f"{built.share / GB:.2f} GB, most memory {built.anonymous / GB:.2f} GB, built in "
            f"{built.build_seconds:.0f} s, forward in {built.forward_seconds:.0f} s"
        )
        assert built.is_finite
        assert built.share == pytest.approx(2 * planned / RANKS, rel=0.01)
        assert built.anonymous < built.share + 1 * GB

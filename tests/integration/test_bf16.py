"""How near training in bf16 stays to training in fp32: the same steps from the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import GAN, images_of, make_rank_folders, make_run, make_setup

pytestmark = pytest.mark.slow

RANKS, STEPS = 2, 10
LOSS_BOUND = 0.01  # of each total loss, relative
PATH_BOUND = 0.05  # of the way that the weights go: |bf16 - fp32| / |fp32 - first|
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
LOW = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}
RECIPES = {
    "stage1": (1, {"perceptual": None, "adversarial": {"weight": 0.1, "adaptive": True, **GAN}}),
    "stage2": (2, {"perceptual": None, "adversarial": {"weight": 0.1, "adaptive": False, **GAN}}),
}


def train_all(rank: int, folder: Path) -> None:
    from vqrae_ds.sharding.partitions import masters
    from vqrae_ds.train import finish_step, micro_step

    for name, (stage, losses) in RECIPES.items():
        for dtype, deepspeed in (("fp32", {}), ("bf16", BF16)):
            run = make_run(folder / f"rank{rank}", stage, losses=losses, deepspeed=deepspeed)
            setup, totals = make_setup(run), []
            first = [master.clone() for master in masters(setup.generator)]
            for step in range(STEPS):
                terms, _ = micro_step(setup, images_of(step, rank), step)
                finish_step(setup, step)
                totals.append(terms["loss/total"].item())
            flats = [master.clone() for master in masters(setup.generator)]
            found = {"totals": totals, "first": first, "flats": flats}
            torch.save(found, folder / f"{name}_{dtype}_{rank}.pt")


def discriminator_of_bf16_states(rank: int, folder: Path) -> None:
    """Two micro batches a step: their gradients are summed before it is taken."""
    from vqrae_ds.sharding.partitions import masters
    from vqrae_ds.train import micro_step

    stage, losses = RECIPES["stage1"]
    run = make_run(
        folder / f"rank{rank}", stage, losses=losses, deepspeed=LOW | {"train_batch_size": 8}
    )
    setup = make_setup(run)
    micro_step(setup, images_of(0, rank), 0)
    engine = setup.discriminator
    assert engine.get_data_types() == (torch.bfloat16, torch.float32)
    assert {m.dtype for m in masters(engine)} == {torch.float32}
    assert {m.dtype for m in masters(setup.generator)} == {torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    make_rank_folders(folder, RANKS)
    run_ranks(RANKS, train_all, folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_tracks_fp32(folder, recipe):
    for rank in range(RANKS):
        whole, half = (
            torch.load(folder / f"{recipe}_{dtype}_{rank}.pt") for dtype in ("fp32", "bf16")
        )
        assert half["totals"] == pytest.approx(whole["totals"], rel=LOSS_BOUND)
        assert half["totals"] != whole["totals"], "it was rounded"
        first, fp32, bf16 = (torch.cat(s) for s in (whole["first"], whole["flats"], half["flats"]))
        assert torch.equal(first, torch.cat(half["first"])), "the masters begin unrounded"
        drift = ((bf16 - fp32).norm() / (fp32 - first).norm()).item()
        assert drift < PATH_BOUND


def test_the_discriminator_keeps_fp32_beside_a_generator_that_keeps_bf16(folder):
    run_ranks(RANKS, discriminator_of_bf16_states, folder)

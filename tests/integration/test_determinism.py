"""`run.deterministic`: its flags are set, and every operator of a step has a deterministic form.

That two runs are the same shows on CPUs no more than that: there they are without the flags too.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import GAN, images_of, make_rank_folders, make_run, make_setup
from vqrae_ds.losses.perceptual import PerceptualLoss

pytestmark = pytest.mark.slow


def train(rank: int, folder: Path, lpips: Path, name: str) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    from vqrae_ds import engines
    from vqrae_ds.sharding.first_weights import uninitialized_is_nan
    from vqrae_ds.train import micro_step

    engines.start(timedelta(minutes=1), deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    bf16 = {"bf16": {"enabled": True}}
    perceptual = {"weight": 0.1, "weights": str(lpips)}
    losses = {"perceptual": perceptual, "adversarial": {"weight": 0.1, **GAN}}
    run = make_run(folder / f"rank{rank}", 2, losses=losses, deepspeed=bf16)
    setup = make_setup(run, PerceptualLoss(lpips))
    assert torch.get_deterministic_debug_mode() == 2, "the first weights left it as it was"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with uninitialized_is_nan():
        assert torch.empty(1000).isnan().all()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))

    for step in range(3):
        micro_step(setup, images_of(step, rank), step)
    trainable = {n: p for n, p in setup.generator.module.named_parameters() if p.requires_grad}
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in trainable.items()}
    weights |= {f"gan.{n}": p.detach() for n, p in setup.discriminator.module.named_parameters()}
    torch.save(weights, folder / f"{name}{rank}.pt")


def test_a_step_with_every_loss_runs_under_the_flags_and_two_runs_are_the_same(
    tmp_path: Path, lpips_weights: Path
) -> None:
    make_rank_folders(tmp_path, 2)
    for name in ("first", "second"):
        run_ranks(2, train, tmp_path, lpips_weights, name)
    for rank in range(2):
        first, second = (torch.load(tmp_path / f"{n}{rank}.pt") for n in ("first", "second"))
        for name, weight in first.items():
            assert torch.equal(weight, second[name]), name

"""Activation checkpointing under ZeRO-3 against one process of plain PyTorch without it.

DeepSpeed replaces `F.linear` for the whole process, or not (`memory_efficient_linear`), so each of
the two has its own start of the ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import run_ranks
from tests.integration.test_exactness import (
    largest_difference,
    relative_difference,
    train_with_engines,
)
from tests.plain_training import CLIP, DISTILLATION, STEPS, WEIGHTS
from tests.test_activation_checkpointing import ATTENTION, CountedOperators
from tests.tiny import build_model, images_of, make_run, save_initial
from vqrae_ds.config import Run
from vqrae_ds.models.decoder import unpatchify

pytestmark = pytest.mark.slow

WORLD_SIZE, BLOCKS = 2, 2  # blocks of the encoder, of the decoder and of the teacher


class Setting(NamedTuple):
    """One cell of the matrix."""

    stage: int
    encoder: str
    decoder: str
    replaced_linear: bool

    @property
    def name(self) -> str:
        linear = "replaced" if self.replaced_linear else "plain"
        return f"stage{self.stage}-{self.encoder}-{self.decoder}-{linear}"

    @property
    def attentions(self) -> int:
        """How often attention runs in a step, the teacher's included."""
        once = BLOCKS * (3 if self.stage == 2 else 2)
        again = BLOCKS * [self.encoder, self.decoder].count("full")
        return once + again


SETTINGS = [
    Setting(2, "full", "full", True),
    Setting(2, "none", "full", True),
    Setting(2, "full", "full", False),
    Setting(2, "selective", "selective", False),
    Setting(2, "full", "selective", False),
    Setting(1, "none", "selective", False),
]


def make_setting(folder: Path, setting: Setting) -> Run:
    losses = {
        "reconstruction": {"weight": WEIGHTS["reconstruction"]},
        "perceptual": None,
        "quantizer": {"weight": WEIGHTS["quantizer"]},
        "adversarial": None,
    }
    if setting.stage == 2:
        losses["distillation"] = {name: {"weight": w} for name, w in DISTILLATION.items()}
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": setting.replaced_linear,
    }
    kinds = {"encoder_checkpointing": setting.encoder, "decoder_checkpointing": setting.decoder}
    deepspeed = {"zero_optimization": zero}
    return make_run(folder, setting.stage, losses=losses, deepspeed=deepspeed, memory=kinds)


def train_all(rank: int, folder: Path, replaced_linear: bool, lpips: Path) -> None:
    for setting in SETTINGS:
        if setting.replaced_linear != replaced_linear:
            continue
        result = folder / setting.name
        result.mkdir(exist_ok=True)
        shared = [make_setting(folder, setting) if rank == 0 else None]
        torch.distributed.broadcast_object_list(shared, 0)
        with CountedOperators() as counted:
            train_with_engines(rank, shared[0], lpips, result)
        assert counted.counts[ATTENTION] == STEPS * setting.attentions
        replacement = F.linear.__module__.startswith("deepspeed")
        assert replacement == replaced_linear, "the comparison is of what it says"


def reference(stage: int):
    """Plain PyTorch over all ranks' batches: losses of every rank, gradients, weights."""
    model, teacher = build_model(freeze_encoder=stage == 1), build_model().encoder
    trainable = {f"vqrae.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.05)
    losses, gradients = [[] for _ in range(WORLD_SIZE)], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD_SIZE):
            images = images_of(10 * step, rank)
            output = model(images)
            loss = WEIGHTS["reconstruction"] * F.mse_loss(unpatchify(output.patches_BhwP), images)
            loss = loss + WEIGHTS["quantizer"] * output.vq_loss
            if stage == 2:
                kept = F.mse_loss(output.features_BND, teacher(images).detach())
                quantized = F.mse_loss(output.code_BNE, output.z_BNE.detach())
                loss = loss + DISTILLATION["teacher"] * kept
                loss = loss + DISTILLATION["quantized"] * quantized
            (loss / WORLD_SIZE).backward()
            losses[rank].append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in trainable.items()})
        torch.nn.utils.clip_grad_norm_(trainable.values(), CLIP)
        optimizer.step()
    return losses, gradients, {n: p.detach() for n, p in trainable.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("checkpointing")
    save_initial(folder / "initial")
    for replaced_linear in (True, False):
        run_ranks(WORLD_SIZE, train_all, folder, replaced_linear, lpips_weights)
    return folder


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_steps_equal_those_without(trained: Path, setting: Setting) -> None:
    losses, gradients, weights = reference(setting.stage)
    for rank in range(WORLD_SIZE):
        ours = torch.load(trained / setting.name / f"rank{rank}.pt", weights_only=True)
        found = [terms["loss/total"] for terms in ours["losses"]]
        assert found == pytest.approx(losses[rank], rel=1e-6)
        for mine, theirs in zip(ours["gradients"], gradients, strict=True):
            assert largest_difference(mine, theirs) < 1e-5
        assert relative_difference(ours["weights"], weights) < 1e-6

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
from tests.plain_training import DISTILLATION, STEPS, WEIGHTS, Cell, train_plainly
from tests.test_activation_checkpointing import ATTENTION, CountedOperators
from tests.tiny import make_run, save_initial
from vqrae_ds.config import Run

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


def make_setting(folder: Path, setting: Setting, lpips: Path) -> Run:
    losses = {
        "reconstruction": {"weight": WEIGHTS["reconstruction"]},
        "perceptual": {"weight": WEIGHTS["perceptual"], "weights": str(lpips)},
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
        shared = [make_setting(folder, setting, lpips) if rank == 0 else None]
        torch.distributed.broadcast_object_list(shared, 0)
        with CountedOperators() as counted:
            train_with_engines(rank, shared[0], lpips, result)
        assert counted.counts[ATTENTION] == STEPS * setting.attentions
        replacement = F.linear.__module__.startswith("deepspeed")
        assert replacement == replaced_linear, "the comparison is of what it says"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("checkpointing")
    save_initial(folder / "initial")
    for replaced_linear in (True, False):
        run_ranks(WORLD_SIZE, train_all, folder, replaced_linear, lpips_weights)
    return folder


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_steps_equal_those_without(trained: Path, lpips_weights, setting: Setting) -> None:
    without = Cell(setting.stage, "off", 1, "none", False)
    plain = train_plainly(trained / "initial", without, WORLD_SIZE, lpips_weights)
    for rank in range(WORLD_SIZE):
        ours = torch.load(trained / setting.name / f"rank{rank}.pt", weights_only=True)
        found = [terms["loss/total"] for terms in ours["losses"]]
        expected = [terms["loss/total"] for terms in plain.losses[rank]]
        assert found == pytest.approx(expected, rel=1e-6)
        for mine, theirs in zip(ours["gradients"], plain.gradients, strict=True):
            assert largest_difference(mine, theirs) < 1e-5
        assert relative_difference(ours["weights"], plain.weights) < 1e-6

"""Tiny runs in each way in which an engine keeps frozen weights, and what is frozen in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.distributed import gathered
from tests.tiny import images_of, make_run
from vqrae_ds.config import Run

CODEBOOK = "vqrae.quantizer.embedding.weight"


class Case(NamedTuple):
    """A way in which the engine keeps the frozen weights."""

    stage: int
    zero: int
    bf16: bool
    where: str
    persistent: int = 0  # parameters up to that size stay whole under ZeRO-3

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


CASES = {
    "stage1-zero1-fp32-sharded": Case(1, 1, False, "sharded"),
    "stage1-zero1-bf16-sharded": Case(1, 1, True, "sharded"),
    "stage1-zero2-bf16-resident": Case(1, 2, True, "resident"),
    "stage1-zero3-fp32-sharded": Case(1, 3, False, "sharded"),
    "stage1-zero3-bf16-resident": Case(1, 3, True, "resident"),
    "stage1-zero3-fp32-persistent": Case(1, 3, False, "sharded", persistent=100_000),
    "stage2-zero1-fp32-resident": Case(2, 1, False, "resident"),
    "stage2-zero2-fp32-sharded": Case(2, 2, False, "sharded"),
    "stage2-zero3-bf16-sharded": Case(2, 3, True, "sharded"),
}


def run_of(folder: Path, rank: int, name: str, **changes: Any) -> Run:
    case = CASES[name]
    zero = {"stage": case.zero}
    if case.zero == 3:
        zero["stage3_param_persistence_threshold"] = case.persistent
    ranks = torch.distributed.get_world_size()
    deepspeed = {"train_batch_size": 2 * ranks, "zero_optimization": zero}
    if case.bf16:
        deepspeed["bf16"] = {"enabled": True}
    sections = {"run": {"output_dir": str(folder / name)}, "memory": {"frozen_encoder": case.where}}
    return make_run(
        folder / f"rank{rank}",
        case.stage,
        deepspeed=deepspeed,
        world_size=ranks,
        **{"losses": {"adversarial": None} if case.stage == 1 else None, **sections, **changes},
    )


def take_step(engine: Any, rank: int, step: int) -> float:
    output, teacher_BND = engine(images_of(step, rank))
    loss = output.patches_BhwP.float().square().mean() + output.vq_loss
    target_BND = 0.0 if teacher_BND is None else teacher_BND.float()
    loss = loss + (output.features_BND.float() - target_BND).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def held_frozen(engine: Any) -> dict[str, torch.Tensor]:
    """Gathered by DeepSpeed, and what is outside the module's tree."""
    from vqrae_ds.sharding import resident

    held = {n: t.clone() for n, t in resident.state(engine.module).items()}
    with gathered(engine.module):
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                held[name] = parameter.detach().clone()
    return held

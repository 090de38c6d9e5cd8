"""Codes that are kept between micro batches, on two and four ranks: never those of other weights.

What the search is given is compared with the projection of the weights as they are, gathered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import gathered, run_ranks
from tests.integration.test_memory_keys import BF16_STATES, HPZ, OFFLOAD, ZERO3, shared_run
from tests.integration.test_tensor_parallel_checkpoints import FIELDS, KINDS, make
from tests.tiny import (
    GAN,
    images_of,
    make_rank_folders,
    make_run,
    make_setup,
    save_initial,
)
from vqrae_ds import checkpoint
from vqrae_ds.config import Run
from vqrae_ds.ops.nearest_code import CodeNorms, Search
from vqrae_ds.preparation import Setup

pytestmark = pytest.mark.slow

RANKS, FOUR, ACCUMULATION, STEPS = 2, 4, 2, 3
LOSSES = {"perceptual": None, "adversarial": {"weight": 0.1, **GAN}}
BATCH = {"train_batch_size": RANKS * 2 * ACCUMULATION}
FAST = {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}}  # seen in bf16 after a step
VARIANTS = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1_bf16_sums": {
        "zero_optimization": {"stage": 1},
        "optimizer": FAST,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero2_bf16_states": {
        "zero_optimization": {"stage": 2},
        "optimizer": FAST,
        "bf16": {"enabled": True} | BF16_STATES,
    },
    "zero3_bf16": {
        "zero_optimization": ZERO3,
        "optimizer": FAST,
        "bf16": {"enabled": True},
    },
    "zero3_offload": {
        "zero_optimization": ZERO3 | OFFLOAD,
        "zero_force_ds_cpu_optimizer": False,
    },
    "zero3_resident": {},
    "zero3_stage2": {},
    "zero3": {},
}
STAGE_2 = {"distillation": {"teacher": {"weight": 0.1}}}
DRIFT = 0.1
MEMORY = {
    "zero3_resident": {"frozen_encoder": "resident", "decoder_checkpointing": "full"},
}


class Watch:
    """How often all codes were projected, and what the last search was given."""

    def __init__(self, setup: Setup) -> None:
        self.projections, self.searches = 0, 0
        self.codes_KD, self.norms = torch.empty(0), None
        quantizer = setup.generator.module.vqrae.quantizer
        self.held = quantizer.embedding.num_embeddings
        quantizer.embedding_proj.register_forward_hook(self._count)
        self._search: Search = quantizer.search
        quantizer.search = self

    def _count(self, _: Any, __: Any, output: Tensor) -> None:
        self.projections += output.shape[0] == self.held

    def __call__(self, z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
        self.searches += 1
        self.codes_KD, self.norms = codes_KD, norms
        return self._search(z_ND, codes_KD, norms)


class Trace:
    """How often DeepSpeed threw away the order in which it fetches weights ahead."""

    def __init__(self, setup: Setup) -> None:
        self.thrown_away = 0
        self._coordinator = setup.generator.optimizer.parameter_offload.get_param_coordinator()
        self._throw_away = self._coordinator._invalidate_trace
        self._coordinator._invalidate_trace = self._count

    def _count(self) -> None:
        self.thrown_away += 1
        self._throw_away()

    @property
    def is_complete(self) -> bool:
        return self._coordinator.is_complete_trace()


def fresh_codes(setup: Setup) -> Tensor:
    """The codes (K, D) that this rank holds, projected from the weights as they are."""
    quantizer = setup.generator.module.vqrae.quantizer
    with torch.no_grad(), gathered(quantizer):
        projection = quantizer.embedding_proj
        return F.linear(quantizer.embedding.weight, projection.weight, projection.bias)


def take_step(setup: Setup, rank: int, step: int, *, spoiled: bool = False) -> None:
    from vqrae_ds.train import finish_step, micro_step

    for micro in range(ACCUMULATION):
        images = images_of(10 * step + micro, rank)
        if spoiled and rank == 1:
            images[0, 0, 0, 0] = torch.nan
        micro_step(setup, images, step)
    finish_step(setup, step)


def evaluate(setup: Setup, rank: int) -> None:
    setup.generator.eval()
    with torch.no_grad():
        setup.generator(images_of(99, rank))
    setup.generator.train()


def check_steps(rank: int, setup: Setup, *, tolerance: float) -> None:
    """The codes of each step, of the validation behind it, and of a step that is skipped."""
    watch, at_zero3 = Watch(setup), setup.generator.zero_optimization_stage() == 3
    trace, before_KD = Trace(setup) if at_zero3 else None, None
    for step in range(STEPS):
        codes_KD = fresh_codes(setup)
        if before_KD is not None:
            change = (codes_KD - before_KD).abs().max()
            assert change > 10 * tolerance, "else stale codes would not be seen"
        before_KD = codes_KD
        if trace is not None:
            trace.thrown_away = 0
        take_step(setup, rank, step)
        torch.testing.assert_close(watch.codes_KD, codes_KD, rtol=0, atol=tolerance)
        assert (watch.projections, watch.searches) == (step + 1, ACCUMULATION * (step + 1))
        if trace is not None and step > 0:
            assert trace.is_complete and trace.thrown_away == 0
    assert setup.generator.was_step_applied()

    evaluate(setup, rank)
    codes_KD = fresh_codes(setup)
    torch.testing.assert_close(watch.codes_KD, codes_KD, rtol=0, atol=tolerance)
    evaluate(setup, rank)
    assert watch.projections == STEPS + 1, "a validation projects once, and so does no step after"
    take_step(setup, rank, STEPS, spoiled=True)
    assert not setup.generator.was_step_applied()
    take_step(setup, rank, STEPS + 1)
    torch.testing.assert_close(watch.codes_KD, codes_KD, rtol=0, atol=tolerance)
    assert watch.projections == STEPS + 1, "a step that is skipped changes no weight"
    evaluate(setup, rank)
    torch.testing.assert_close(watch.codes_KD, fresh_codes(setup), rtol=0, atol=tolerance)
    assert watch.projections == STEPS + 2


def check_resume(rank: int, run: Run, setup: Setup) -> None:
    """Codes that were kept from other weights are not those of the checkpoint that is loaded."""
    content = checkpoint.Content(setup.generator, setup.discriminator, checkpoint.TrainState(7, 28))
    saved, saved_KD = checkpoint.save(run, content), fresh_codes(setup)
    take_step(setup, rank, 8)
    evaluate(setup, rank)
    watch = Watch(setup)
    evaluate(setup, rank)
    assert watch.projections == 0, "codes of the weights before the load are kept"
    assert not torch.allclose(watch.codes_KD, saved_KD, rtol=0, atol=1e-4)
    checkpoint.resume(saved, setup.generator, setup.discriminator)
    evaluate(setup, rank)
    assert watch.projections == 1
    torch.testing.assert_close(watch.codes_KD, saved_KD, rtol=0, atol=1e-6)


def check_equalize(rank: int, setup: Setup) -> None:
    """The first of each group moves its weights, and all ranks of the group take them over."""
    from vqrae_ds.sharding.partitions import parameter_groups, stepped
    from vqrae_ds.sharding.replicas import equalize

    engine, watch = setup.generator, Watch(setup)
    evaluate(setup, rank // 2)
    before_KD, projections = watch.codes_KD.clone(), watch.projections
    if rank % 2 == 0:
        for vector, group in zip(stepped(engine), parameter_groups(engine), strict=True):
            if not group.get("split"):
                vector.detach().add_(DRIFT * torch.rand_like(vector))
    assert equalize(engine) > DRIFT / 2
    evaluate(setup, rank // 2)
    assert watch.projections == projections + 1
    torch.testing.assert_close(watch.codes_KD, fresh_codes(setup), rtol=0, atol=1e-6)
    assert (watch.codes_KD - before_KD).abs().max() > 1e-3


def check_nodes(rank: int, folder: Path) -> None:
    """Each node of two ranks has all weights: ZeRO-3's hpZ, which gathers from other tensors."""
    batch = {"train_batch_size": FOUR * 2 * ACCUMULATION}
    setup = make_setup(shared_run(rank, folder, HPZ | batch, FOUR))
    check_steps(rank, setup, tolerance=1e-6)


def check_groups(rank: int, folder: Path) -> None:
    """Two data ranks of two each, that hold half of the codes."""
    from deepspeed.utils import groups

    batch = {"train_batch_size": 2 * 2 * ACCUMULATION, "train_micro_batch_size_per_gpu": 2}
    for kind in ("zero1", "zero3"):
        groups.mpu = None  # DeepSpeed keeps that of an engine before
        setup = make_setup(make(rank, folder, kind, 2, deepspeed=KINDS[kind] | batch))
        check_steps(rank // 2, setup, tolerance=1e-6)
        check_equalize(rank, setup)


def check_all(rank: int, folder: Path) -> None:
    for name, deepspeed in VARIANTS.items():
        in_stage_2 = name == "zero3_stage2"
        run = make_run(
            folder / f"rank{rank}",
            2 if in_stage_2 else 1,
            losses=LOSSES | (STAGE_2 if in_stage_2 else {}),
            deepspeed=BATCH | deepspeed,
            run={"output_dir": str(folder / name)},
            memory=MEMORY.get(name, {}),
        )
        setup = make_setup(run)
        check_steps(rank, setup, tolerance=1e-2 if "bf16" in name else 1e-6)
        if name in ("zero1", "zero3"):
            check_resume(rank, run, setup)


def test_codes_are_projected_once_a_step_and_are_those_of_the_weights(tmp_path: Path) -> None:
    make_rank_folders(tmp_path, RANKS)
    run_ranks(RANKS, check_all, tmp_path)


def test_so_it_is_with_secondary_partitions(tmp_path: Path) -> None:
    save_initial(tmp_path / "initial")
    run_ranks(FOUR, check_nodes, tmp_path, timeout_seconds=400)


def test_so_it_is_with_the_codes_of_a_tensor_parallel_rank(tmp_path: Path) -> None:
    save_initial(tmp_path / "initial", FIELDS)
    run_ranks(FOUR, check_groups, tmp_path, timeout_seconds=400)

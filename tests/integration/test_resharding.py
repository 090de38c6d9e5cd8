"""A run that goes on over another number of ranks, in every ZeRO layout: 2 -> 1 -> 2, 2 -> 4 -> 2.

And some of them 2 -> 1 -> 4.

The reference is the run that was never interrupted, and what DeepSpeed itself gathers of an engine.
Masters, moments, averages, frozen weights, buffers and counters must come back bit for bit. The
steps that follow sum the same gradients in another order, so losses are held to fp32 rounding:
AdamW's eps is 1e-3 here, because it would divide that rounding by itself where a gradient vanishes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.distributed import gathered, run_ranks
from tests.integration.test_partitions import (
    BF16,
    BF16_MASTERS,
    FP32_SUMS,
    ON_HOST,
    full,
    gathered_vectors,
    held_averages,
)
from tests.tiny import GAN, images_of, make_run, make_setup, save_initial, setup_of
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run

pytestmark = pytest.mark.slow

BATCH, FIRST_STEPS, NEXT_STEPS = 4, 3, 2
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-3, "torch_adam": True}}
MOMENTUM = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
PARAMETERS_ON_HOST = {"offload_param": {"device": "cpu"}}
FP32_BOUND, BF16_BOUND = 1e-6, 1e-2  # of each loss, relative


class Layout(NamedTuple):
    """One way in which DeepSpeed keeps a run, and the numbers of ranks that take it over from 2."""

    stage: int
    precision: dict[str, Any]
    zero: dict[str, Any]
    over: tuple[int, ...]
    optimizer: dict[str, Any] = ADAMW


LAYOUTS = {
    # How many parameters make a sub-group depends on the number of ranks.
    "zero3-fp32": Layout(3, {}, {"sub_group_size": 5000}, (1, 4)),
    "zero2-fp32": Layout(2, {}, {}, (1, 4)),
    "zero1-fp32": Layout(1, {}, {}, (4,)),
    "zero3-momentum": Layout(3, {}, {}, (1,), MOMENTUM),
    "zero3-bf16": Layout(3, BF16, {"stage3_param_persistence_threshold": 100}, (1, 4)),
    "zero1-bf16-sums": Layout(1, BF16 | FP32_SUMS, {}, (1, 4)),
    "zero3-bf16-masters": Layout(3, BF16_MASTERS, {}, (4,)),
    "zero2-host": Layout(2, BF16, ON_HOST, (1,)),
    "zero3-host": Layout(3, BF16, ON_HOST | PARAMETERS_ON_HOST, (4,)),
}

ONE_TO_FOUR = ("zero3-fp32", "zero1-bf16-sums")
ROUTES = [(n, f"{o}", f"{o}-2") for n, layout in LAYOUTS.items() for o in layout.over]
ROUTES += [(name, "1", "1-4") for name in ONE_TO_FOUR]


def layout_run(rank: int, folder: Path, name: str, output: str) -> Run:
    """Stage 2, so that there are frozen weights, with GAN and averages; the same on all ranks."""
    layout, ranks = LAYOUTS[name], dist.get_world_size()
    losses = {"perceptual": None, "adversarial": {"weight": 0.1, "adaptive": False, **GAN}}
    deepspeed = {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": 1}
    deepspeed |= {"optimizer": layout.optimizer, **layout.precision}
    run = None
    if rank == 0:
        run = make_run(
            folder,
            2,
            losses=losses,
            deepspeed=deepspeed,
            world_size=ranks,
            ema={"decay": 0.7},
            run={"output_dir": str(folder / output)},
        )
        zero = {"stage": layout.stage, **layout.zero}
        if layout.stage == 3:
            zero.setdefault("stage3_param_persistence_threshold", 0)
        complete = {**run.deepspeed, "zero_optimization": zero}
        if "offload_optimizer" in zero:
            complete["zero_force_ds_cpu_optimizer"] = False
        run = run._replace(deepspeed=complete)
    shared = [run]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def take_steps(setup: Any, rank: int, steps: range) -> list[float]:
    """The trainer's steps on batches that do not depend on the ranks; losses of whole batches."""
    from vqrae_ds.train import finish_step, micro_step

    ranks, losses = dist.get_world_size(), []
    for step in steps:
        loss = torch.zeros(2, dtype=torch.float64)
        for sample in range(rank, BATCH, ranks):
            terms, _ = micro_step(setup, images_of(step, sample, batch=1), step)
            loss[0] += terms["loss/total"].item() / BATCH
            loss[1] += terms["gan/discriminator"].item() / BATCH
        finish_step(setup, step)
        dist.all_reduce(loss)
        losses += loss.tolist()
    return losses


def whole_state(setup: Any) -> dict[str, Any]:
    """All that the engines hold, gathered by DeepSpeed: the same for every number of ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    from vqrae_ds.sharding.partitions import stepped

    state: dict[str, Any] = {"averages": held_averages(setup.generator, setup.ema)}
    for tag, engine in (("generator", setup.generator), ("discriminator", setup.discriminator)):
        state[f"{tag}.masters"] = full(engine, safe_get_full_fp32_param)
        kept = [engine.optimizer.optimizer.state[vector] for vector in stepped(engine)]
        for key, value in kept[0].items():
            own = [s[key] for s in kept]
            is_kept_once = not isinstance(value, torch.Tensor) or value.ndim == 0
            state[f"{tag}.{key}"] = (
                set(map(float, own)) if is_kept_once else gathered_vectors(engine, own)
            )
        fields = ("global_steps", "global_samples", "skipped_steps")
        state[f"{tag}.counters"] = {field: getattr(engine, field) for field in fields}
        with gathered(engine.module):
            state[tag] = {n: t.clone() for n, t in engine.module.state_dict().items()}
    return state


def assert_same(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where} {key}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def save(run: Run, setup: Any, step: int) -> None:
    """A checkpoint, and beside it what DeepSpeed gathers of the engines."""
    setup.objective.settle()
    reached = TrainState(step, step * BATCH)
    folder = checkpoint.save(
        run, checkpoint.Content(setup.generator, setup.discriminator, reached, ema=setup.ema)
    )
    state = whole_state(setup)
    if dist.get_rank() == 0:
        torch.save(state, folder.parent.parent / "state.pt")
    dist.barrier()


def resumed(run: Run, step: int) -> Any:
    """The setup that goes on from the newest checkpoint of the run, checked to the last bit."""
    from vqrae_ds import engines
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.preparation import set_learning_rates
    from vqrae_ds.sharding.ema import WeightAverage

    config = run.config
    generator = engines.build_generator(run, fill=False)
    discriminator = engines.build_discriminator(run, fill=False)
    ema = WeightAverage(generator, config.ema.decay)
    newest = checkpoint.find(run)
    state = checkpoint.resume(newest, generator, discriminator, ema).state
    assert state == TrainState(step, step * BATCH)
    set_learning_rates(generator, discriminator, config.losses, state.step)
    objective = Objective(config.losses, None, None, discriminator.module, engines.mean_over_ranks)
    setup = setup_of(generator, discriminator, objective)._replace(ema=ema)
    saved = torch.load(newest.parent.parent / "state.pt", weights_only=False)
    assert_same(whole_state(setup), saved, f"{run.config.run.output_dir}:")
    return setup


def begin(rank: int, folder: Path) -> None:
    """Two ranks: the run that goes on over the others, and what comes of it uninterrupted."""
    for name in LAYOUTS:
        run = layout_run(rank, folder, name, f"{name}-2")
        setup = make_setup(run)
        take_steps(setup, rank, range(FIRST_STEPS))
        save(run, setup, FIRST_STEPS)
        losses = take_steps(setup, rank, range(FIRST_STEPS, FIRST_STEPS + 2 * NEXT_STEPS))
        if rank == 0:
            torch.save(losses, folder / f"{name}-losses.pt")


def go_on(rank: int, folder: Path, step: int) -> None:
    """Take over what 2 ranks left, or as 2 ranks what others made of it, and save it further on."""
    ranks = dist.get_world_size()
    for name, layout in LAYOUTS.items():
        if ranks == 2:
            for over in layout.over:
                take_over(rank, folder, name, f"{name}-{over}", f"{name}-{over}-2", step)
        elif ranks in layout.over:
            take_over(rank, folder, name, f"{name}-2", f"{name}-{ranks}", step)
        if ranks == 4 and name in ONE_TO_FOUR:
            take_over(rank, folder, name, f"{name}-1", f"{name}-1-4", step + NEXT_STEPS)


def take_over(rank: int, folder: Path, name: str, source: str, output: str, step: int) -> None:
    """Go on from a copy of what `source` left at `step`."""
    if rank == 0:
        shutil.copytree(folder / source, folder / output)
    run = layout_run(rank, folder, name, output)
    setup = resumed(run, step)
    losses = take_steps(setup, rank, range(step, step + NEXT_STEPS))
    save(run, setup, step + NEXT_STEPS)
    if rank == 0:
        torch.save(losses, folder / f"{output}-losses.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharding")
    save_initial(folder / "initial")
    run_ranks(2, begin, folder, timeout_seconds=400)
    for ranks in (1, 4):
        run_ranks(ranks, go_on, folder, FIRST_STEPS, timeout_seconds=400)
    run_ranks(2, go_on, folder, FIRST_STEPS + NEXT_STEPS, timeout_seconds=400)
    return folder


@pytest.mark.parametrize(("name", "first", "second"), ROUTES)
def test_the_steps_are_those_of_the_uninterrupted_run(
    runs: Path, name: str, first: str, second: str
) -> None:
    straight = torch.load(runs / f"{name}-losses.pt")
    assert len(straight) == 2 * 2 * NEXT_STEPS and len(set(straight)) == len(straight)
    there = torch.load(runs / f"{name}-{first}-losses.pt")
    back = torch.load(runs / f"{name}-{second}-losses.pt")
    bound = BF16_BOUND if LAYOUTS[name].precision else FP32_BOUND
    assert there + back == pytest.approx(straight, rel=bound)

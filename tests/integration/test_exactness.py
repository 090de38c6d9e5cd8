"""Real ranks under ZeRO-3 against one process of plain PyTorch that sees every rank's batch.

The matrix is stage x GAN x accumulation x activation checkpointing x EMA on two ranks, and its
cells with accumulation on four. `--all-cells` runs all of them, else those that pair every two
values (tests/plain_training.py).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import plain_training
from tests.distributed import gathered, run_ranks
from tests.plain_training import (
    ADAMW,
    ALL_CELLS,
    DISTILLATION,
    EMA_DECAY,
    MICRO_BATCH,
    OPTIMIZERS,
    PAIRWISE,
    STEPS,
    WEIGHTS,
    Cell,
    smooth_lpips,
    train_plainly,
)
from tests.tiny import GAN, images_of, make_run, make_setup, save_initial
from vqrae_ds.config import Run
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

pytestmark = pytest.mark.slow


def make_cell(
    folder: Path,
    cell: Cell,
    world_size: int,
    lpips: Path,
    *,
    zero_stage: int = 3,
    tensor_size: int = 1,
    fields: dict[str, Any] | None = None,
) -> Run:
    losses = {
        "reconstruction": {"weight": WEIGHTS["reconstruction"]},
        "perceptual": {"weight": WEIGHTS["perceptual"], "weights": str(lpips)},
        "quantizer": {"weight": WEIGHTS["quantizer"]},
        "adversarial": None,
    }
    if cell.gan != "off":
        gan = {"weight": WEIGHTS["adversarial"], "adaptive": cell.gan == "adaptive", **GAN}
        losses["adversarial"] = gan
    if cell.stage == 2:
        losses["distillation"] = {name: {"weight": w} for name, w in DISTILLATION.items()}
    policy = {"decoder_checkpointing": cell.checkpointing}
    if cell.stage == 2:
        policy["encoder_checkpointing"] = cell.checkpointing
    zero = {"stage": zero_stage}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if cell.checkpointing == "selective":
        zero["memory_efficient_linear"] = False
    deepspeed = {
        "train_batch_size": world_size // tensor_size * MICRO_BATCH * cell.accumulation,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": cell.optimizer, "params": OPTIMIZERS[cell.optimizer]},
        "zero_optimization": zero,
        "tensor_parallel": {"autotp_size": tensor_size},
    }
    sections = {
        "model": fields or {},
        "memory": policy,
        "run": {"output_dir": str(folder / cell.name)},
    }
    if cell.ema:
        sections["ema"] = {"decay": EMA_DECAY}
    return make_run(
        folder, cell.stage, losses=losses, deepspeed=deepspeed, world_size=world_size, **sections
    )


def train_all(rank: int, folder: Path, cells: list[Cell], world_size: int, lpips: Path) -> None:
    """All cells in one start of the ranks, which costs more than the steps."""
    for cell in cells:
        shared = [make_cell(folder, cell, world_size, lpips) if rank == 0 else None]
        torch.distributed.broadcast_object_list(shared, 0)
        train_with_engines(rank, shared[0], lpips, folder / cell.name)


def train_with_engines(rank: int, run: Run, lpips: Path, result: Path) -> None:
    """The trainer's own steps; losses of this rank, whole gradients and weights go to a file."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from vqrae_ds import checkpoint
    from vqrae_ds.train import finish_step, micro_step

    setup = make_setup(run, smooth_lpips(lpips))
    generator, discriminator = setup.generator, setup.discriminator
    is_partitioned = generator.module.vqrae.decoder.head.weight.numel() == 0
    assert is_partitioned == (run.deepspeed["zero_optimization"]["stage"] == 3)
    data_rank = rank // run.schedule.batch.tensor_size
    trainable = {n: p for n, p in generator.module.named_parameters() if p.requires_grad}
    losses, indices, gradients, norms = [], [], [], []
    generator.module.register_forward_hook(
        lambda _module, _images, output: indices.append(output.vqrae.indices_Bhw)
    )
    take_step = generator.step

    def record_and_step() -> None:
        if generator.is_gradient_accumulation_boundary():
            gradients.append({n: safe_get_full_grad(p).clone() for n, p in trainable.items()})
        take_step()

    generator.step = record_and_step
    accumulation = run.schedule.batch.accumulation
    for step in range(STEPS):
        for micro in range(accumulation):
            images = images_of(10 * step + micro, data_rank, MICRO_BATCH)
            is_last = micro == accumulation - 1
            terms, squares = micro_step(setup, images, step, measure=is_last)
            losses.append({name: value.item() for name, value in terms.items()})
        norms.append({part: square.item() for part, square in squares.items()})
        finish_step(setup, step)
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in trainable.items()}
    with gathered(generator.module):
        frozen = {
            n: p.detach().clone()
            for n, p in generator.module.named_parameters()
            if not p.requires_grad
        }
    state = checkpoint.TrainState(STEPS, STEPS * run.schedule.batch.global_batch)
    folder = checkpoint.save(
        run, checkpoint.Content(generator, discriminator, state, ema=setup.ema)
    )
    saved = {
        "losses": losses,
        "indices": indices,
        "gradients": gradients,
        "norms": norms,
        "weights": weights,
        "frozen": frozen,
        "checkpoint": str(folder),
    }
    if discriminator is not None:
        saved["discriminator"] = discriminator.module.state_dict()
    torch.save(saved, result / f"rank{rank}.pt")


def relative_difference(ours: dict, theirs: dict) -> float:
    """|ours - theirs| / |theirs| over all tensors together."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs)
    return (difference / sum(t.double().square().sum() for t in theirs.values())).sqrt().item()


def largest_difference(ours: dict, theirs: dict) -> float:
    """The worst |ours - theirs| / |theirs| of one tensor.

    The norm of a tensor is taken as at least a thousandth of all together: a gradient that is zero
    but for rounding has no relative precision.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * torch.stack([t.norm() for t in theirs.values()]).norm()
    return max(
        ((ours[n] - theirs[n]).norm() / torch.maximum(theirs[n].norm(), floor)).item()
        for n in theirs
    )


def cells_for(world_size: int, every: bool) -> list[Cell]:
    """Four ranks take the cells with accumulation, which could mistake ranks for micro batches."""
    cells = ALL_CELLS if every else PAIRWISE
    if world_size == 4:
        return [cell for cell in cells if cell.accumulation == 2]
    return cells + ADAMW


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lpips_weights, request):
    """By world size, the folder with what the ranks wrote for each cell."""
    folders = {}
    for world_size in (2, 4):
        folder = folders[world_size] = tmp_path_factory.mktemp(f"exactness{world_size}")
        save_initial(folder / "initial")
        cells = cells_for(world_size, request.config.getoption("--all-cells"))
        # DeepSpeed's replacement of F.linear, which selective checkpointing cannot stand, stays in
        # a process for ever.
        for selective in (False, True):
            some = [c for c in cells if (c.checkpointing == "selective") == selective]
            arguments = (folder, some, world_size, lpips_weights)
            run_ranks(world_size, train_all, *arguments, timeout_seconds=60 + 30 * len(some))
    return folders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-cells")
        pairs = [(size, cell) for size in (2, 4) for cell in cells_for(size, every)]
        names = [f"{size}ranks-{cell.name}" for size, cell in pairs]
        metafunc.parametrize(("world_size", "cell"), pairs, ids=names)


def test_steps_equal_single_process(trained, lpips_weights, world_size, cell):
    folder = trained[world_size]
    plain = train_plainly(folder / "initial", cell, world_size, lpips_weights)
    initial = load_file(folder / "initial" / "model.safetensors")
    ranks = [
        torch.load(folder / cell.name / f"rank{rank}.pt", weights_only=True)
        for rank in range(world_size)
    ]
    for rank, ours in enumerate(ranks):
        assert len(ours["losses"]) == len(plain.losses[rank]) == STEPS * cell.accumulation
        for mine, theirs in zip(ours["indices"], plain.indices[rank], strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(ours["losses"], plain.losses[rank], strict=True):
            for name, expected in theirs.items():
                assert mine[name] == pytest.approx(expected, rel=1e-6), name
        for step in range(STEPS):
            if cell.optimizer == "SGD" or step == 0:
                assert largest_difference(ours["gradients"][step], plain.gradients[step]) < 1e-5
        if cell.optimizer == "SGD":
            assert relative_difference(ours["weights"], plain.weights) < 1e-6
            if cell.gan != "off":
                assert relative_difference(ours["discriminator"], plain.discriminator) < 1e-6
        for name, value in ours["frozen"].items():
            first = name.replace("teacher.", "encoder.").removeprefix("vqrae.")
            assert torch.equal(value, initial[first]), f"{name} was frozen and has changed"
    for step in range(STEPS):
        whole = plain.gradients[step].values()
        expected = sum(g.double().square().sum().item() for g in whole)
        measured = sum(sum(ours["norms"][step].values()) for ours in ranks)
        assert measured == pytest.approx(expected, rel=1e-4), "the shares make the whole norm"
    moved = relative_difference(
        plain.weights, {n: initial[n.removeprefix("vqrae.")] for n in plain.weights}
    )
    assert moved > 1e-4, "the steps must have moved the weights for this to prove anything"
    if cell.ema:
        saved = ZeroCheckpoint(Path(ranks[0]["checkpoint"]) / "generator", averages=True)
        averages = {name: saved.read(name) for name in plain.averages}
        assert relative_difference(averages, plain.averages) < 1e-6
        assert relative_difference(averages, plain.weights) > 1e-5, "an average is something else"


def test_the_pairwise_cells_hold_every_pair():
    columns = list(zip(*(cell[:5] for cell in ALL_CELLS), strict=True))
    for i, j in itertools.combinations(range(len(columns)), 2):
        pairs = set(zip(columns[i], columns[j], strict=True))
        held = {(cell[i], cell[j]) for cell in PAIRWISE}
        assert held == pairs, f"columns {i} and {j}"
    assert len(ALL_CELLS) == 72 and set(PAIRWISE) <= set(ALL_CELLS)
    assert plain_training.CLIP == 1.0, "as tests/tiny.py has it for the engines"

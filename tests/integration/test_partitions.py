"""Shares of gradients and the moving average of the weights on real ranks, in every ZeRO layout.

The references are DeepSpeed's own gathered gradients and masters, and the textbook average.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.tiny import images_of, make_rank_folders, make_run
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

pytestmark = pytest.mark.slow

STEPS, ACCUMULATION, DECAY = 5, 2, 0.9
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_MASTERS = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
ON_HOST = {"offload_optimizer": {"device": "cpu"}}


class Layout(NamedTuple):
    """One way in which DeepSpeed keeps masters and gradients."""

    stage: int
    precision: dict[str, Any]
    more: dict[str, Any]
    ranks: int = 2  # 3 divide few of the sizes: the shares of the last one are padded


LAYOUTS = {
    "zero1-fp32": Layout(1, {}, {}),
    "zero2-fp32": Layout(2, {}, {}),
    "zero3-fp32": Layout(3, {}, {"sub_group_size": 5000}),
    "zero1-bf16": Layout(1, BF16, {}),
    "zero2-bf16": Layout(2, BF16, {}),
    "zero3-bf16": Layout(3, BF16, {}),
    "zero1-bf16-sums": Layout(1, BF16 | FP32_SUMS, {}),
    "zero2-bf16-sums": Layout(2, BF16 | FP32_SUMS, {}),
    "zero3-bf16-sums": Layout(3, BF16 | FP32_SUMS, {"sub_group_size": 5000}),
    "zero2-bf16-masters": Layout(2, BF16_MASTERS, {}),
    "zero3-bf16-masters": Layout(3, BF16_MASTERS, {}),
    "zero2-host": Layout(2, BF16, ON_HOST),
    "zero3-host": Layout(3, BF16, ON_HOST),
    "zero2-fp32-uneven": Layout(2, {}, {}, ranks=3),
    "zero1-bf16-sums-uneven": Layout(1, BF16 | FP32_SUMS, {}, ranks=3),
    "zero3-bf16-uneven": Layout(3, BF16, {}, ranks=3),
}
PARTS = {"vqrae.encoder.": "encoder", "vqrae.decoder.": "decoder"}  # the rest is the quantizer's


def make_layout(folder: Path, rank: int, name: str) -> Run:
    """Stage 2, where all three parts are trained; clipped, so that clipping would be noticed."""
    layout = LAYOUTS[name]
    mine = folder / f"rank{rank}"
    deepspeed = {
        "train_batch_size": 2 * layout.ranks * ACCUMULATION,
        "gradient_clipping": 1e-3,
        "optimizer": {"type": "SGD", "params": {"lr": 30.0}},
    }
    run = make_run(
        mine,
        2,
        deepspeed=deepspeed,
        world_size=layout.ranks,
        run={"output_dir": str(folder / name)},
        ema={"decay": DECAY},
    )
    zero = {"stage": layout.stage, **layout.more}
    if layout.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    complete = {**run.deepspeed, **layout.precision, "zero_optimization": zero}
    if layout.more == ON_HOST:
        complete["zero_force_ds_cpu_optimizer"] = False
    return run._replace(deepspeed=complete)


def full(engine: Any, read: Any) -> dict[str, torch.Tensor]:
    """What DeepSpeed gathers of each trained parameter, in float64."""
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    return {name: read(parameter).detach().double().clone() for name, parameter in trained.items()}


def check_gradients(engine: Any) -> float:
    """Compare the squares with the whole gradients; returns the norm of all of them."""
    from deepspeed.utils import safe_get_full_grad

    from vqrae_ds.sharding.partitions import gradient_squares

    squares = gradient_squares(engine)
    assert set(squares) == {"encoder", "quantizer", "decoder"}
    for square in squares.values():
        assert (square.dtype, square.shape) == (torch.float32, ())
        torch.distributed.all_reduce(square)
    expected = dict.fromkeys(squares, 0.0)
    for name, gradient in full(engine, safe_get_full_grad).items():
        part = next((p for prefix, p in PARTS.items() if name.startswith(prefix)), "quantizer")
        expected[part] += gradient.square().sum().item()
    for part, square in expected.items():
        assert square > 0
        assert squares[part].item() == pytest.approx(square, rel=1e-5), part
    return sum(s.item() for s in squares.values()) ** 0.5


def take_step(engine: Any, rank: int, step: int, check: bool = False) -> None:
    for micro in range(ACCUMULATION):
        images = images_of(10 * step + micro, rank)
        output = engine(images).vqrae
        loss = (output.patches_BhwP.float() ** 2).mean() + output.vq_loss
        loss = loss + output.features_BND.float().square().mean()
        engine.backward(loss)
        if check and micro == ACCUMULATION - 1:
            norm = check_gradients(engine)
        engine.step()
    if check:
        assert norm == pytest.approx(float(engine.get_global_grad_norm()), rel=1e-5)
        assert norm > engine.gradient_clipping(), "it was to be clipped"


def held_averages(engine: Any, ema: Any) -> dict[str, torch.Tensor]:
    """The averages gathered by DeepSpeed itself; where its masters are in bf16, rounded."""
    return gathered_vectors(engine, ema.state_dict()["averages"])


def gathered_vectors(engine: Any, vectors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vectors in the layout of the masters, gathered as these are: for a moment they take their
    place. DeepSpeed's own way to a moment knows no group but the first one below ZeRO-3."""
    from deepspeed.utils import safe_get_full_fp32_param

    from vqrae_ds.sharding.partitions import masters

    kept = [master.clone() for master in masters(engine)]
    for master, vector in zip(masters(engine), vectors, strict=True):
        master.copy_(vector[: master.numel()])
    gathered = full(engine, safe_get_full_fp32_param)
    for master, value in zip(masters(engine), kept, strict=True):
        master.copy_(value)
    return gathered


def train_layout(rank: int, folder: Path, name: str) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    from vqrae_ds import engines
    from vqrae_ds.sharding.ema import WeightAverage

    run = make_layout(folder, rank, name)
    engine = engines.build_generator(run)
    ema = WeightAverage(engine, DECAY)
    first = textbook = full(engine, safe_get_full_fp32_param)
    for step in range(STEPS):
        take_step(engine, rank, step, check=True)
        ema.update()
        weights = full(engine, safe_get_full_fp32_param)
        textbook = {n: DECAY * textbook[n] + (1 - DECAY) * weights[n] for n in weights}
    held = held_averages(engine, ema)
    precision = 4e-3 if LAYOUTS[name].precision == BF16_MASTERS else 1e-6
    for parameter, average in textbook.items():
        torch.testing.assert_close(held[parameter], average, rtol=precision, atol=precision)
    moved = torch.cat([(held[n] - weights[n]).abs().flatten() for n in first]).max()
    began = torch.cat([(held[n] - first[n]).abs().flatten() for n in first]).max()
    assert moved > 1e-3 and began > 1e-3, "the weights must have moved for this to prove anything"
    if rank == 0:
        torch.save(held, folder / f"{name}.pt")

    saved = checkpoint.save(run, checkpoint.Content(engine, None, TrainState(STEPS), ema=ema))
    again = engines.build_generator(run, fill=False)
    resumed_ema = WeightAverage(again, DECAY)
    assert checkpoint.find(run) == saved
    assert checkpoint.resume(saved, again, None, resumed_ema).state.step == STEPS
    for both in ((engine, ema), (again, resumed_ema)):
        take_step(both[0], rank, STEPS)
        both[1].update()
    mine, other = (held_averages(*both) for both in ((engine, ema), (again, resumed_ema)))
    for parameter in mine:
        assert torch.equal(mine[parameter], other[parameter]), parameter


def train_layouts(rank: int, folder: Path, names: list[str]) -> None:
    for name in names:
        train_layout(rank, folder, name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partitions")
    make_rank_folders(folder, 3)
    for ranks in (2, 3):
        names = [name for name, layout in LAYOUTS.items() if layout.ranks == ranks]
        run_ranks(ranks, train_layouts, folder, names, timeout_seconds=400)
    return folder


def rounded(average: torch.Tensor, layout: str) -> torch.Tensor:
    """As `held_averages` gives it."""
    in_bf16 = LAYOUTS[layout].precision == BF16_MASTERS
    return (average.bfloat16() if in_bf16 else average).double()


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversion_takes_the_averages_that_the_engine_held(trained, name, tmp_path):
    saved = trained / name / "checkpoints" / f"step_{STEPS:08d}"
    held = torch.load(trained / f"{name}.pt")
    reader, masters = (ZeroCheckpoint(saved / "generator", averages=a) for a in (True, False))
    assert reader.tensors.keys() == masters.tensors.keys()
    trainable = {n for n, info in reader.tensors.items() if info.kind == "trainable"}
    assert trainable == held.keys()
    for tensor in reader.tensors:
        if tensor in held:
            assert reader.tensors[tensor].dtype == torch.float32
            assert torch.equal(rounded(reader.read(tensor), name), held[tensor]), tensor
        else:
            assert torch.equal(reader.read(tensor), masters.read(tensor)), tensor
    for to in ("stage2", "inference"):
        output = tmp_path / to
        consolidate(saved, output, to=to, ema=True)
        verify(saved, output)
        converted = load_file(output / "model.safetensors")
        for tensor, average in held.items():
            found = rounded(converted[tensor.removeprefix("vqrae.")], name)
            assert torch.equal(found, average), tensor

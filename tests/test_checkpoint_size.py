"""The size of a checkpoint by formula: against the planner, and against real checkpoints."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.tiny import ENCODER, GAN, MODEL, make_rank_folders, make_run, make_setup, random_images
from vqrae_ds.config import DecoderConfig, ModelConfig, Run, read_run
from vqrae_ds.launching.checkpoint_size import (
    Counts,
    checkpoint_bytes,
    count_parameters,
    pretrained_bytes,
)
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.planning import disk_bytes, plan

if TYPE_CHECKING:
    from vqrae_ds.preparation import Setup

RECIPES = sorted((ROOT / "ds_configs").rglob("*.yaml"))
BF16 = {"bf16": {"enabled": True}}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
# Wide enough that DeepSpeed's own files and the pickles' words do not count.
WIDE = {"hidden_size": 256, "num_heads": 4, "intermediate_size": 1024, "num_layers": 4}
# Frozen in stage 1, and as large as all else.
LARGE = {**ENCODER, "hidden_size": 384, "intermediate_size": 1536}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_counts_of_every_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stage = 2 if "stage2" in recipe.name else 1
    kind = "cpu" if recipe.parent.name == "tiny" else "zero3"
    json_path = ROOT / f"ds_configs/stage{stage}_{kind}.json"
    run = read_run(recipe, json_path, world_size=2, check_paths=False)
    exact: Counter[str] = Counter()
    for part in plan(run).parts:
        if part.engine == "discriminator":
            exact["discriminator"] += part.count
        elif part.kind == "frozen" and part.name in ("encoder", "teacher"):
            exact["pretrained"] += part.count
        elif part.name not in ("LPIPS", "ConvNeXt-S"):  # nowhere in a run's folder
            exact[part.kind] += part.count
    counts = count_parameters(run)._asdict()
    for kind in Counts._fields:
        assert counts[kind] == pytest.approx(exact[kind], rel=0.01), kind


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_tensor_group_save_the_encoder_each(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Master and moments of it in fp32, in stage 2 at 6B."""
    monkeypatch.chdir(ROOT)
    alone, group = (
        read_run(
            ROOT / "ds_configs/internvit_6b_tp/stage2.yaml",
            ROOT / "ds_configs/stage2_zero3.json",
            overrides=[f"deepspeed.tensor_parallel.autotp_size={number}"],
            world_size=8,
            check_paths=False,
        )
        for number in (1, size)
    )
    encoder = next(part.count for part in plan(group).parts if part.name == "encoder")
    more = (size - 1) * 12 * encoder
    assert checkpoint_bytes(group) - checkpoint_bytes(alone) == pytest.approx(more, rel=0.02)
    assert checkpoint_bytes(group) == pytest.approx(disk_bytes(plan(group)).checkpoint, rel=0.01)
    assert pretrained_bytes(group) == pretrained_bytes(alone)


def save_checkpoints(rank: int, folder: Path) -> None:
    """A checkpoint of each kind on one real rank, held against the formula."""
    from vqrae_ds import checkpoint

    wide = ModelConfig(encoder_config=LARGE, decoder=DecoderConfig(**WIDE), **MODEL)
    VQRAE(config=wide).save_pretrained(folder / "wide")
    (folder / "large").mkdir()
    (folder / "large" / "config.json").write_text(json.dumps(LARGE))
    cases = [
        {"stage": 1, "losses": {"perceptual": None, "adversarial": GAN}, "ema": {"decay": 0.9}},
        {"stage": 2, "losses": {"perceptual": None}, "deepspeed": BF16},
        {
            "stage": 1,
            "losses": {"perceptual": None, "adversarial": None},
            "deepspeed": {**BF16, "zero_optimization": {"stage": 2}},
        },
    ]
    for case in cases:
        deepspeed = {**ADAMW, **case.pop("deepspeed", {})}
        model = {"decoder": WIDE, "encoder_config_path": str(folder / "large")}
        options = {"model": model, "init": {"model": str(folder / "wide")}, **case}
        run = make_run(folder, deepspeed=deepspeed, world_size=1, **options)
        setup = make_setup(run)
        assert saved_bytes(run, setup) == pytest.approx(checkpoint_bytes(run), rel=0.03), case
        frozen = checkpoint.write_pretrained(run, setup.generator)
        assert (frozen.size if frozen else 0) == pytest.approx(pretrained_bytes(run), rel=0.03), (
            case
        )


def saved_bytes(run: Run, setup: Setup) -> int:
    """The size of a checkpoint after a step, when all moments are there; it is removed again."""
    from vqrae_ds import checkpoint

    for _ in range(run.schedule.batch.accumulation):
        output = setup.generator(random_images()).vqrae
        setup.generator.backward(output.patches_BhwP.mean() + output.vq_loss)
        setup.generator.step()
    state = checkpoint.TrainState(1, 4)
    saved = checkpoint.save(
        run, checkpoint.Content(setup.generator, setup.discriminator, state, ema=setup.ema)
    )
    files = json.loads((saved / "manifest.json").read_text())["files"]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(saved)
    return sum(file["size"] for file in files.values())


def save_moving_averages(rank: int, folder: Path) -> None:
    """Codes that are buffers, under ZeRO-3 and below it."""
    model = {"use_simvq": False, "num_embeddings": 1 << 14}
    config = ModelConfig(encoder_config=ENCODER, **{**MODEL, **model})
    if rank == 0:
        VQRAE(config=config).save_pretrained(folder / "initial")
    for stage in (3, 1):
        runs: list[Any] = [None]
        if rank == 0:
            losses = {"perceptual": None, "adversarial": None}
            deepspeed = {**ADAMW, "zero_optimization": {"stage": stage}}
            runs = [make_run(folder, 1, losses=losses, deepspeed=deepspeed, model=model)]
        dist.broadcast_object_list(runs, 0)
        run, one = runs[0], 2 * model["num_embeddings"] * MODEL["embedding_dim"] * 4
        size = saved_bytes(run, make_setup(run))
        assert size > (2 if stage == 3 else 1) * one, "buffers are most of it"
        assert size == pytest.approx(checkpoint_bytes(run), rel=0.1)


@pytest.mark.slow
def test_real_checkpoints(tmp_path: Path) -> None:
    make_rank_folders(tmp_path, 1)
    run_ranks(1, save_checkpoints, tmp_path / "rank0")


@pytest.mark.slow
def test_every_rank_saves_codes_that_are_buffers(tmp_path: Path) -> None:
    run_ranks(2, save_moving_averages, tmp_path)

"""What the planner says of tensor parallelism, against a real group of 2 ranks: FLOPs and disk."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_ranks
from tests.test_checkpoint_size import saved_bytes
from tests.test_flops import any_codes
from tests.tiny import ENCODER, GAN, IMAGE_SIZE, MODEL, make_run, make_setup
from vqrae_ds.config import ModelConfig, Run
from vqrae_ds.launching.checkpoint_size import checkpoint_bytes
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.monitoring.flops import flops_per_image
from vqrae_ds.planning import Speed, disk_bytes, plan, work

pytestmark = pytest.mark.slow

RANKS = 2
# As large as the decoder, and wide enough that pickled names do not count.
LARGE = {**ENCODER, "hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 768}
DECODER = {"hidden_size": 192, "num_heads": 4, "intermediate_size": 767, "num_layers": 4}
FIELDS = {**MODEL, "decoder": DECODER, "num_embeddings": 255, "embedding_dim": 64}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
BF16 = {"bf16": {"enabled": True}}
TENSORS = {"tensor_parallel": {"autotp_size": RANKS}}
NO_JUDGE = {"losses": {"perceptual": None}}
CASES: dict[str, dict[str, Any]] = {
    "stage1": {
        "stage": 1,
        "losses": {"perceptual": None, "adversarial": GAN},
        "ema": {"decay": 0.9},
    },
    "stage2-bf16": {"stage": 2, **NO_JUDGE, "deepspeed": BF16},
    "stage2-zero2": {
        "stage": 2,
        **NO_JUDGE,
        "deepspeed": {**BF16, "zero_optimization": {"stage": 2}},
    },
}


def run_of(folder: Path, case: dict[str, Any]) -> Run:
    """A run of one tensor-parallel group, its files in `folder`."""
    case = dict(case)
    deepspeed = {**TENSORS, **ADAMW, **case.pop("deepspeed", {})}
    model = {**FIELDS, "encoder_config_path": str(folder / "large")}
    options = {"model": model, "init": {"model": str(folder / "initial")}, **case}
    return make_run(folder, deepspeed=deepspeed, world_size=RANKS, **options)


def counted_flops(run: Run) -> float:
    """FLOPs that this rank computes for each image of a step, as PyTorch counts its operators."""
    from vqrae_ds.parallel.groups import make_groups
    from vqrae_ds.parallel.model import sliced_parts

    model, batch = run.config.model, run.schedule.batch
    groups = make_groups(RANKS, timedelta(minutes=1))
    parts = sliced_parts(model.num_embeddings, groups, any_codes)
    vqrae = VQRAE(config=model, freeze_encoder=run.config.stage == 1, **parts)
    teacher = build_encoder(model) if run.config.losses.distillation else None
    training, images = TrainingModel(vqrae, teacher), torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.micro_batch == len(images)
    vqrae.quantizer.keep_codes()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in range(batch.accumulation):
            output = training(images).vqrae
            (output.patches_BhwP.sum() + output.vq_loss).backward()
    return counter.get_total_flops() / (batch.micro_batch * batch.accumulation)


def measure(rank: int, folder: Path) -> None:
    found = {}
    for name, case in CASES.items():
        run = [run_of(folder, case)] if rank == 0 else [None]
        dist.broadcast_object_list(run, 0)
        found[name] = {
            "flops": counted_flops(run[0]),
            "bytes": saved_bytes(run[0], make_setup(run[0])),
        }
    (folder / f"found{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel_plan")
    model = ModelConfig(encoder_config=LARGE, **FIELDS)
    VQRAE(config=model).save_pretrained(folder / "initial")
    (folder / "large").mkdir()
    (folder / "large" / "config.json").write_text(json.dumps(LARGE))
    run_ranks(RANKS, measure, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_flops_of_a_group_are_those_of_its_ranks(folder: Path, name: str) -> None:
    found = [json.loads((folder / f"found{r}.json").read_text())[name] for r in range(RANKS)]
    run = run_of(folder, CASES[name])
    done = work(plan(run), RANKS, Speed(1.0, 1.0))
    images = run.schedule.batch.global_batch
    assert (done.flops + done.repeated) / images == pytest.approx(
        sum(each["flops"] for each in found), rel=0.01
    )
    assert done.flops == flops_per_image(run) * images < 0.8 * (done.flops + done.repeated)
    assert done.mfu_seconds == (done.flops + done.repeated) / (RANKS * 1e12)


@pytest.mark.parametrize("name", CASES)
def test_disk_is_what_the_ranks_of_a_group_save(folder: Path, name: str) -> None:
    real = json.loads((folder / "found0.json").read_text())[name]["bytes"]
    run = run_of(folder, CASES[name])
    assert disk_bytes(plan(run)).checkpoint == pytest.approx(real, rel=0.03)
    assert checkpoint_bytes(run) == pytest.approx(real, rel=0.03)

"""Model FLOPs against PyTorch's own counter, on small models that run and on 6B without values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT
from tests.encoder_families import FAMILIES
from tests.tiny import DEEPSPEED, ENCODER, MODEL
from vqrae_ds.config import Run, read_run
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.monitoring.flops import flops_per_image
from vqrae_ds.ops.nearest_code import CodeNorms


def any_codes(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
    """A search that needs no values, and takes each product once: the whole matrix of them."""
    return (z_ND @ codes_KD.T).argmin(1)


def counted(run: Run, device: str = "cpu") -> float:
    """FLOPs an image of one step of a rank, forward and backward, as PyTorch counts its operators.

    With attention as two products: the counter adds what fused kernels compute twice.
    """
    config, batch = run.config, run.schedule.batch.micro_batch
    accumulation = run.schedule.batch.accumulation
    with torch.device(device):
        vqrae = VQRAE(config=config.model, freeze_encoder=config.stage == 1, search=any_codes)
        teacher = build_encoder(config.model) if config.losses.distillation else None
        model = TrainingModel(vqrae, teacher)
        images = torch.rand(batch, 3, config.model.image_size, config.model.image_size)
    vqrae.quantizer.keep_codes()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in range(accumulation):
            output = model(images).vqrae
            (output.patches_BhwP.sum() + output.vq_loss).backward()
    return counter.get_total_flops() / (batch * accumulation)


def run_of(
    folder: Path,
    stage: int,
    encoder: dict[str, Any],
    model: dict[str, Any],
    global_batch: int = DEEPSPEED["train_batch_size"],
) -> Run:
    """A run without data and weights, on two ranks."""
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text(json.dumps(encoder))
    losses = {}
    if stage == 2:  # codes that are moving averages have no gradient to distil with
        quantized = {"weight": float(model.get("use_simvq", True))}
        losses = {"distillation": {"quantized": quantized}}
    config = {
        "stage": stage,
        "run": {"output_dir": str(folder / "run"), "total_steps": 10},
        "model": {"encoder_config_path": str(folder / "encoder"), **model},
        "init": {"model": "initial"},
        "losses": losses,
        "data": {"train": "data"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    deepspeed = DEEPSPEED | {"train_batch_size": global_batch}
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    files = (folder / "config.yaml", folder / "deepspeed.json")
    return read_run(*files, world_size=2, check_paths=False)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"use_simvq": False},
        {"output_patch_size": 16, "image_size": 64},
        {"use_projections": False, "embedding_dim": 48},
        {"feature_layer": 1, "decoder": {"num_layers": 3, "hidden_size": 32, "num_heads": 2}},
    ],
    ids=["plain", "moving_averages", "larger_tokens", "no_projections", "other_depths"],
)
def test_small_models(tmp_path, stage, model):
    run = run_of(tmp_path, stage, ENCODER, {**MODEL, **model})
    assert flops_per_image(run) == pytest.approx(counted(run), rel=1e-3)


@pytest.mark.parametrize("use_simvq", [True, False])
def test_accumulation_projects_the_codes_once(tmp_path, use_simvq):
    run = run_of(tmp_path, 1, ENCODER, {**MODEL, "use_simvq": use_simvq}, global_batch=16)
    assert run.schedule.batch.accumulation == 4
    assert flops_per_image(run) == pytest.approx(counted(run), rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", [*FAMILIES, "dinov2_giant"])
def test_encoder_families(tmp_path, family, stage):
    encoder_cls, encoder = FAMILIES[family.removesuffix("_giant")]
    if family.endswith("_giant"):
        encoder = {**encoder, "use_swiglu_ffn": True}
    model = {"encoder_cls": encoder_cls, "num_embeddings": 64, "embedding_dim": 16}
    run = run_of(tmp_path, stage, encoder, model)
    assert flops_per_image(run) == pytest.approx(counted(run, "meta"), rel=1e-3)


@pytest.mark.parametrize(("stage", "tera"), [(1, 11.5), (2, 20.2)])
def test_the_6b_recipe(stage, tera):
    folder = ROOT / "ds_configs"
    run = read_run(
        folder / "internvit_6b" / f"stage{stage}.yaml",
        folder / f"stage{stage}_zero3.json",
        world_size=64,  # so that a step has few micro batches to count
        check_paths=False,
    )
    assert flops_per_image(run) == pytest.approx(counted(run, "meta"), rel=1e-3)
    assert flops_per_image(run) / 1e12 == pytest.approx(tera, abs=0.05)

"""Every encoder family, either quantiser and a larger output: stage 2 under ZeRO-3 on two ranks.

The reference is one process of plain PyTorch that sees the batches of both ranks as one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import gathered, run_ranks
from tests.encoder_families import FAMILIES, model_config
from tests.tiny import make_run, make_setup
from vqrae_ds import VQRAE
from vqrae_ds.config import Run
from vqrae_ds.losses.distillation import quantized_loss, teacher_loss
from vqrae_ds.models.training_model import TrainingModel

STEPS, BATCH, LEARNING_RATE, CLIP = 3, 2, 0.05, 1.0  # as in tests/tiny.py
LOSSES = {"perceptual": None, "adversarial": None, "distillation": {}}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "plain_norm_of_an_earlier_layer": ("siglip", {"plain_norm": True, "feature_layer": -2}),
    "larger_output": ("internvit_6b", {"output_patch_size": 16}),
    "moving_averages": ("siglip", {"use_simvq": False}),
    "no_projections": ("dinov2", {"use_projections": False, "embedding_dim": 32}),
}


def image_size(name: str) -> int:
    family, options = SETTINGS[name]
    return 4 * options.get("output_patch_size", model_config(family).patch_size)


def build(name: str) -> VQRAE:
    """The first weights, the same wherever they are drawn."""
    torch.manual_seed(0)
    family, options = SETTINGS[name]
    model = VQRAE(
        config=model_config(family, image_size=image_size(name), **options), freeze_encoder=False
    )
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_setting(folder: Path, name: str) -> Run:
    family, options = SETTINGS[name]
    (folder / "config").mkdir(parents=True, exist_ok=True)
    (folder / "config" / "config.json").write_text(json.dumps(FAMILIES[family][1]))
    config = model_config(family, image_size=image_size(name), **options)
    model = {key: getattr(config, key) for key in ("encoder_cls", "embedding_dim", "image_size")}
    model |= {key: value for key, value in options.items() if key != "plain_norm"}
    losses = LOSSES
    if not config.use_simvq:  # its codes have no gradient
        losses = LOSSES | {"distillation": {"quantized": {"weight": 0.0}}}
    return make_run(
        folder, 2, losses=losses, model={**model, "encoder_config_path": str(folder / "config")}
    )


def images_of(name: str, step: int, rank: int) -> torch.Tensor:
    side = image_size(name)
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.rand(BATCH, 3, side, side, generator=generator)


def train_all(rank: int, folder: Path) -> None:
    from vqrae_ds import engines
    from vqrae_ds.train import micro_step

    for name in SETTINGS:
        runs = [make_setting(folder / name, name) if rank == 0 else None]
        torch.distributed.broadcast_object_list(runs, 0)
        setup, losses = make_setup(runs[0]), []
        for step in range(STEPS):
            terms, _ = micro_step(setup, images_of(name, step, rank), step)
            losses.append(engines.mean_over_ranks(terms["loss/total"].clone()).item())
        with gathered(setup.generator.module):
            state = {n: t.clone() for n, t in setup.generator.module.vqrae.state_dict().items()}
        torch.save({"losses": losses, "state": state}, folder / name / f"rank{rank}.pt")


def reference(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the joint batch, and all weights after the steps."""
    model = TrainingModel(build(name), build(name).encoder).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        images = torch.cat([images_of(name, step, rank) for rank in range(2)])
        output = model(images)
        vqrae = output.vqrae
        images_hat = torch.nn.functional.pixel_shuffle(
            vqrae.patches_BhwP.permute(0, 3, 1, 2), round((vqrae.patches_BhwP.shape[-1] / 3) ** 0.5)
        )
        loss = (
            F.mse_loss(images_hat, images)
            + vqrae.vq_loss
            + model.vqrae.config.use_simvq * quantized_loss(vqrae.code_BNE, vqrae.z_BNE, "l2")
            + teacher_loss(vqrae.features_BND, output.teacher_features_BND, "l2")
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.vqrae.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in SETTINGS:
        build(name).save_pretrained(folder / name / "initial")
    run_ranks(2, train_all, folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_decay_and_nothing_else(family: str) -> None:
    from vqrae_ds.config import LearningRateMultiplierConfig
    from vqrae_ds.sharding.parameter_groups import parameter_groups

    model = TrainingModel(build(family))
    groups = parameter_groups(model, {"lr": 1.0}, LearningRateMultiplierConfig())
    decaying = {id(p) for g in groups if "weight_decay" not in g for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decaying}
    assert all(name.endswith(".weight") and "norm" not in name for name in names)
    assert not [name for name in names if "position" in name or "token" in name]
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
    kept = {name.rsplit(".", 1)[-1] for name in matrices - names} | {"weight"}
    assert kept <= {"weight", "position_embeddings", "cls_token", "register_tokens"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_equal_one_process(trained: Path, name: str) -> None:
    losses, state = reference(name)
    first = build(name).state_dict()
    for rank in range(2):
        ours = torch.load(trained / name / f"rank{rank}.pt", weights_only=True)
        assert ours["losses"] == pytest.approx(losses, rel=1e-5)
        assert ours["state"].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(
                ours["state"][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    moved = {key for key, value in state.items() if not torch.equal(value, first[key])}
    assert any(key.startswith("encoder.") for key in moved)
    assert any(key.startswith("decoder.") for key in moved)
    codebook = {k for k in moved if k.startswith("quantizer.") and "embedding_proj" not in k}
    assert bool(codebook) == (name == "moving_averages"), "SimVQ's codebook is never trained"

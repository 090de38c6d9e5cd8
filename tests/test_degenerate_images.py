"""Black images and reconstructions without texture: every loss and every gradient is finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import convnext_small

from tests.tiny import GAN, build_model
from vqrae_ds.config import LossConfig
from vqrae_ds.losses.convnext import ConvNextLoss
from vqrae_ds.losses.objective import Objective
from vqrae_ds.losses.perceptual import PerceptualLoss
from vqrae_ds.models.discriminator import build_discriminator
from vqrae_ds.models.training_model import TrainingModel


@pytest.fixture(scope="module")
def networks(
    lpips_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PerceptualLoss, ConvNextLoss]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("convnext") / "random.pth"
    torch.save(convnext_small().state_dict(), path)
    return PerceptualLoss(lpips_weights), ConvNextLoss(path)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("kind", ["patch", "blur_pool"])
@pytest.mark.parametrize("value_hat", [0.0, 0.5, 7.0])
def test_black_images(
    networks: tuple[PerceptualLoss, ConvNextLoss], value_hat: float, kind: str, distance: str
) -> None:
    config = LossConfig(
        convnext={},
        adversarial={"discriminator": kind, "lecam_weight": 0.1, **GAN},
        distillation={name: {"distance": distance} for name in ("quantized", "teacher")},
    )
    torch.manual_seed(1)
    discriminator = build_discriminator(config.adversarial)
    vqrae = build_model(freeze_encoder=False)
    with torch.no_grad():  # the head ignores what it is given
        vqrae.decoder.head.weight.zero_()
        vqrae.decoder.head.bias.fill_(value_hat)
    model = TrainingModel(vqrae, build_model().encoder)  # the encoder is the teacher's
    objective = Objective(config, *networks, discriminator, lambda tensor: tensor)
    images = torch.zeros(2, 3, 32, 32)
    for step in range(2):
        loss = objective.generator(model(images), images, step)
        assert (loss.images_hat_B3HW == value_hat).all()
        loss.surrogate.backward()
        verdict = objective.discriminator_loss(discriminator, images, loss.images_hat_B3HW, step)
        verdict.total.backward()
        for name, term in (loss.terms | verdict.terms).items():
            assert term.isfinite(), name
    named = [*model.named_parameters(), *discriminator.named_parameters()]
    trained = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    assert len(trained) > 50
    for name, grad in trained.items():
        assert grad.isfinite().all(), name

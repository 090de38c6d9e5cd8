"""The objective of both stages: the only place where loss weights and start steps are applied.

The image losses are differentiated down to the output of the decoder's head and no further; the
engine then runs one backward of a surrogate with the same gradient. So no loss reaches through an
engine's output, each image loss is differentiated once, and the adaptive weight comes from
gradients that are there anyway.

Shapes: B batch, H x W pixels, h x w grid of patches, P values a patch, N = h*w tokens, D width of
the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.config import LossConfig
from vqrae_ds.losses import adversarial, distillation
from vqrae_ds.models.decoder import unpatchify
from vqrae_ds.models.training_model import TrainingOutput


class GeneratorLoss(NamedTuple):
    """`surrogate` has the gradient of `total`, and another value.

    `terms` holds detached scalars by their stable names: `loss/total`, each term that took part
    without its weight, and the adaptive weight.
    """

    surrogate: Tensor
    total: Tensor
    terms: dict[str, Tensor]
    images_hat_B3HW: Tensor  # detached, not clamped: what the discriminator sees


class DiscriminatorLoss(NamedTuple):
    """The hinge loss and what to watch: mean logits, and the share of patches judged right."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Composes the losses.

    `perceptual(images_hat, images)` gives distances (B,). `discriminator` is the plain module,
    never its engine. `mean_over_ranks` reduces a small tensor over the data-parallel ranks.
    """

    def __init__(
        self,
        config: LossConfig,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        discriminator: nn.Module | None,
        mean_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.config, self.perceptual, self.discriminator = config, perceptual, discriminator
        self.mean_over_ranks = mean_over_ranks

    def generator(self, output: TrainingOutput, images_B3HW: Tensor, step: int) -> GeneratorLoss:
        """The generator's loss at `step`, counted from 0, on images in [0, 1]."""
        config, vqrae, terms = self.config, output.vqrae, {}
        patches_BhwP = vqrae.patches_BhwP.detach().float().requires_grad_()
        images_hat_B3HW = unpatchify(patches_BhwP)

        image_loss = self._image_loss(images_hat_B3HW, images_B3HW, step, terms)
        (grad_BhwP,) = torch.autograd.grad(image_loss, patches_BhwP)
        total = image_loss.detach()
        if is_on(config.adversarial, step):
            loss, adversarial_grad_BhwP = self._adversarial(
                patches_BhwP, grad_BhwP, vqrae.hidden_BND.detach(), terms
            )
            grad_BhwP, total = grad_BhwP + adversarial_grad_BhwP, total + loss

        feature_loss = self._feature_loss(output, step, terms)
        total = total + feature_loss.detach()
        terms["loss/total"] = total
        surrogate = (vqrae.patches_BhwP.float() * grad_BhwP).sum() + feature_loss
        return GeneratorLoss(surrogate, total, terms, images_hat_B3HW.detach())

    def trains_discriminator(self, step: int) -> bool:
        """Whether the discriminator takes a step at `step`."""
        gan = self.config.adversarial
        return gan is not None and gan.weight > 0 and step >= gan.first_discriminator_step

    def _image_loss(
        self, images_hat_B3HW: Tensor, images_B3HW: Tensor, step: int, terms: dict[str, Tensor]
    ) -> Tensor:
        loss = images_hat_B3HW.sum() * 0  # a loss with a gradient even where every term is off
        if is_on(self.config.reconstruction, step):
            reconstruction = F.mse_loss(images_hat_B3HW, images_B3HW)
            terms["loss/reconstruction"] = reconstruction.detach()
            loss = loss + self.config.reconstruction.weight * reconstruction
        perceptual = self.config.perceptual
        if is_on(perceptual, step) and (step - perceptual.start_step) % perceptual.every_steps == 0:
            distance = self.perceptual(images_hat_B3HW, images_B3HW).mean()
            terms["loss/perceptual"] = distance.detach()
            loss = loss + perceptual.weight * perceptual.every_steps * distance
        return loss

    def _adversarial(
        self,
        patches_BhwP: Tensor,
        image_grad_BhwP: Tensor,
        hidden_BND: Tensor,
        terms: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weighted term (detached) and its weighted gradient at the patches."""
        self.discriminator.requires_grad_(False)  # its gradients belong to its own step
        # A second unpatchify keeps this graph apart from that of the image losses, which is freed.
        loss = adversarial.generator_loss(self.discriminator(unpatchify(patches_BhwP)))
        (grad_BhwP,) = torch.autograd.grad(loss, patches_BhwP)
        self.discriminator.requires_grad_(True)
        terms["loss/adversarial"] = loss.detach()
        weight = self.config.adversarial.weight
        if self.config.adversarial.adaptive:
            adaptive = adversarial.adaptive_weight(
                image_grad_BhwP.flatten(1, 2),
                grad_BhwP.flatten(1, 2),
                hidden_BND,
                self.mean_over_ranks,
            )
            terms["gan/adaptive_weight"] = adaptive
            weight = weight * adaptive
        return weight * loss.detach(), weight * grad_BhwP

    def _feature_loss(self, output: TrainingOutput, step: int, terms: dict[str, Tensor]) -> Tensor:
        config, vqrae = self.config, output.vqrae
        loss = vqrae.vq_loss * 0  # again, a gradient whatever is off
        if is_on(config.quantizer, step):
            terms["loss/quantizer"] = vqrae.vq_loss.detach()
            loss = loss + config.quantizer.weight * vqrae.vq_loss
        if config.distillation is None:
            return loss
        if is_on(config.distillation.quantized, step):
            term = distillation.quantized_loss(vqrae.code_BNE, vqrae.z_BNE)
            terms["loss/distillation_quantized"] = term.detach()
            loss = loss + config.distillation.quantized.weight * term
        if is_on(config.distillation.teacher, step):
            term = distillation.teacher_loss(vqrae.features_BND, output.teacher_features_BND)
            terms["loss/distillation_teacher"] = term.detach()
            loss = loss + config.distillation.teacher.weight * term
        return loss


def discriminator_loss(
    discriminate: Callable[[Tensor], Tensor], images_B3HW: Tensor, images_hat_B3HW: Tensor
) -> DiscriminatorLoss:
    """The discriminator's loss; `discriminate` is its engine, called once with real and fake."""
    real, fake = discriminate(torch.cat([images_B3HW, images_hat_B3HW])).chunk(2)
    total = adversarial.discriminator_loss(real, fake)
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    terms = {
        "gan/discriminator": total.detach(),
        "gan/logits_real": real.detach().mean(),
        "gan/logits_fake": fake.detach().mean(),
        "gan/accuracy": right,
    }
    return DiscriminatorLoss(total, terms)


def is_on(term: Any, step: int) -> bool:
    """Whether a loss section (None: switched off) takes part at `step`."""
    return term is not None and term.weight > 0 and step >= term.start_step

"""The objective of both stages: the only place where loss weights and start steps are applied.

The image losses are differentiated down to the image, which is the output of the decoder's head in
another order, and no further; the engine then runs one backward of a surrogate with the same
gradient. So no loss reaches through an engine's output, each image loss is differentiated once, and
the adaptive weight comes from gradients that are there anyway.

A step reduces over the ranks once at most, four numbers: two for the adaptive weight, which is that
of the first micro batch, and the mean logits of the step before for LeCam.

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
from vqrae_ds.losses.lecam import LeCam
from vqrae_ds.models.decoder import patchify, unpatchify
from vqrae_ds.models.training_model import TrainingOutput


class GeneratorLoss(NamedTuple):
    """`surrogate` has the gradient of `total`, and another value.

    `terms` holds detached scalars by their stable names: `loss/total`, each term that took part
    without its weight, the adaptive weight, and `retention/..` where there are teacher features.
    """

    surrogate: Tensor
    total: Tensor
    terms: dict[str, Tensor]
    images_hat_B3HW: Tensor  # detached, not clamped: what the discriminator sees


class DiscriminatorLoss(NamedTuple):
    """The weighted sum of hinge loss and LeCam, and what to watch.

    `terms` holds both without a weight, the mean logits, and the share of patches judged right.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Composes the losses.

    `perceptual(images_hat, images)` and `convnext(images_hat, images)` give distances (B,).
    `discriminator` is the plain module of `build_discriminator`, never its engine.
    `mean_over_ranks` reduces a small tensor over the data-parallel ranks.
    """

    def __init__(
        self,
        config: LossConfig,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        convnext: Callable[[Tensor, Tensor], Tensor] | None,
        discriminator: nn.Module | None,
        mean_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.config, self.perceptual, self.convnext = config, perceptual, convnext
        self.discriminator, self.mean_over_ranks = discriminator, mean_over_ranks
        self._lecam = None
        self._adaptive_of_step: tuple[int, Tensor] | None = None
        if discriminator is not None and discriminator.averages is not None:
            self._lecam = LeCam(discriminator.averages)

    def generator(self, output: TrainingOutput, images_B3HW: Tensor, step: int) -> GeneratorLoss:
        """The generator's loss at `step`, counted from 0, on images in [0, 1]."""
        config, vqrae, terms = self.config, output.vqrae, {}
        images_hat_B3HW = unpatchify(vqrae.patches_BhwP.detach().float()).requires_grad_()

        image_loss = self._image_loss(images_hat_B3HW, images_B3HW, step, terms)
        (grad_B3HW,) = torch.autograd.grad(image_loss, images_hat_B3HW)
        grad_BhwP, total = patchify(grad_B3HW, vqrae.patches_BhwP.shape[1]), image_loss.detach()
        if is_on(config.adversarial, step):
            loss, adversarial_grad_BhwP = self._adversarial(
                images_hat_B3HW, grad_BhwP, vqrae.hidden_BND.detach(), step, terms
            )
            grad_BhwP, total = grad_BhwP + adversarial_grad_BhwP, total + loss

        feature_loss = self._feature_loss(output, step, terms)
        total = total + feature_loss.detach()
        terms["loss/total"] = total
        surrogate = (vqrae.patches_BhwP.float() * grad_BhwP).sum() + feature_loss
        return GeneratorLoss(surrogate, total, terms, images_hat_B3HW.detach())

    def discriminator_loss(
        self,
        discriminate: Callable[[Tensor], Tensor],
        images_B3HW: Tensor,
        images_hat_B3HW: Tensor,
        step: int,
    ) -> DiscriminatorLoss:
        """The discriminator's loss at `step`, after `generator`.

        `discriminate` is its engine, called once with real and fake.
        """
        real, fake = discriminate(torch.cat([images_B3HW, images_hat_B3HW])).float().chunk(2)
        total = hinge = adversarial.discriminator_loss(real, fake)
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        terms = {
            "gan/discriminator": hinge.detach(),
            "gan/logits_real": real.detach().mean(),
            "gan/logits_fake": fake.detach().mean(),
            "gan/accuracy": right,
        }
        if self._lecam is not None:
            self._reduce(None, step)  # where no adaptive weight took the logits along
            lecam = self._lecam.term(real, fake)
            self._lecam.add(real, fake, step)
            terms["gan/lecam"] = lecam.detach()
            total = total + self.config.adversarial.lecam_weight * lecam
        return DiscriminatorLoss(total, terms)

    def settle(self) -> None:
        """Take in what waits for the next step; every rank calls it before a checkpoint.

        The steps that follow are the same bits with and without it.
        """
        self._reduce(None, None)

    def forget(self) -> None:
        """Drop what waits for the next step: the step was not taken, on all ranks alike."""
        if self._lecam is not None:
            self._lecam.forget()

    def trains_discriminator(self, step: int) -> bool:
        """Whether the discriminator takes a step at `step`."""
        gan = self.config.adversarial
        return gan is not None and gan.weight > 0 and step >= gan.first_discriminator_step

    def _image_loss(
        self, images_hat_B3HW: Tensor, images_B3HW: Tensor, step: int, terms: dict[str, Tensor]
    ) -> Tensor:
        losses: list[Tensor] = []
        if is_on(self.config.reconstruction, step):
            reconstruction = F.mse_loss(images_hat_B3HW, images_B3HW.float())
            terms["loss/reconstruction"] = reconstruction.detach()
            losses.append(self.config.reconstruction.weight * reconstruction)
        networks = {
            "perceptual": (self.config.perceptual, self.perceptual),
            "convnext": (self.config.convnext, self.convnext),
        }
        for name, (term, measure) in networks.items():
            if is_on(term, step) and (step - term.start_step) % term.every_steps == 0:
                distance = measure(images_hat_B3HW, images_B3HW).mean()
                terms[f"loss/{name}"] = distance.detach()
                losses.append(term.weight * term.every_steps * distance)
        # Where every term is off, 0 with a gradient.
        return torch.stack(losses).sum() if losses else images_hat_B3HW.sum() * 0

    def _adversarial(
        self,
        images_hat_B3HW: Tensor,
        image_grad_BhwP: Tensor,
        hidden_BND: Tensor,
        step: int,
        terms: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weighted term (detached) and its weighted gradient at the patches."""
        self.discriminator.requires_grad_(False)  # its gradients belong to its own step
        loss = adversarial.generator_loss(self.discriminator(images_hat_B3HW))
        (grad_B3HW,) = torch.autograd.grad(loss, images_hat_B3HW)
        grad_BhwP = patchify(grad_B3HW, image_grad_BhwP.shape[1])
        self.discriminator.requires_grad_(True)
        terms["loss/adversarial"] = loss.detach()
        weight = self.config.adversarial.weight
        if self.config.adversarial.adaptive:
            if self._adaptive_of_step is None or self._adaptive_of_step[0] != step:
                squares_2 = adversarial.head_gradient_squares(
                    image_grad_BhwP.flatten(1, 2), grad_BhwP.flatten(1, 2), hidden_BND
                )
                adaptive = adversarial.adaptive_weight(self._reduce(squares_2, step))
                self._adaptive_of_step = (step, adaptive)
            terms["gan/adaptive_weight"] = self._adaptive_of_step[1]
            weight = weight * self._adaptive_of_step[1]
        return weight * loss.detach(), weight * grad_BhwP

    def _reduce(self, squares_2: Tensor | None, step: int | None) -> Tensor | None:
        """The mean of `squares_2` over the ranks; the logits that wait from before `step` go along.

        Without either nothing is reduced. The size is always the same: which of the two are there
        must not change the order in which a backend adds up the ranks.
        """
        means_2 = None if self._lecam is None else self._lecam.waiting(step)
        given = [part for part in (squares_2, means_2) if part is not None]
        if not given:
            return None
        nothing_2 = torch.zeros_like(given[0])
        parts = [nothing_2 if part is None else part for part in (squares_2, means_2)]
        reduced_4 = self.mean_over_ranks(torch.cat(parts))
        if means_2 is not None:
            self._lecam.take_in(reduced_4[2:])
        return reduced_4[:2]

    def _feature_loss(self, output: TrainingOutput, step: int, terms: dict[str, Tensor]) -> Tensor:
        config, vqrae = self.config, output.vqrae
        loss = vqrae.vq_loss * 0  # again, a gradient whatever is off
        if is_on(config.quantizer, step):
            terms["loss/quantizer"] = vqrae.vq_loss.detach()
            loss = loss + config.quantizer.weight * vqrae.vq_loss
        features_BND, teacher_BND = vqrae.features_BND, output.teacher_features_BND
        if teacher_BND is not None:
            terms |= distillation.retention(features_BND, teacher_BND)
        if config.distillation is None:
            return loss
        quantized, teacher = config.distillation.quantized, config.distillation.teacher
        if is_on(quantized, step):
            term = distillation.quantized_loss(vqrae.code_BNE, vqrae.z_BNE, quantized.distance)
            terms["loss/distillation_quantized"] = term.detach()
            loss = loss + quantized.weight * term
        if is_on(teacher, step):
            term = distillation.teacher_loss(features_BND, teacher_BND, teacher.distance)
            terms["loss/distillation_teacher"] = term.detach()
            loss = loss + teacher.weight * term
        return loss


def is_on(term: Any, step: int) -> bool:
    """Whether a loss section (None: switched off) takes part at `step`."""
    return term is not None and term.weight > 0 and step >= term.start_step

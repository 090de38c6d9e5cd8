"""The peer of the trainer's loop: what the same training is with DeepSpeed and nothing else.

No monitoring, no guard, no schedule of losses; every loss has the weight 1. The losses are written
out here once more, so that the trainer's own are not compared with themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vqrae_ds.models.decoder import unpatchify

if TYPE_CHECKING:
    from vqrae_ds.engines import DeepSpeedEngine


def gan_step(
    generator: DeepSpeedEngine, discriminator: DeepSpeedEngine, images_B3HW: Tensor
) -> None:
    """Stage 1: mean squared error, SimVQ and hinge GAN with VQGAN's adaptive weight.

    The weight is each rank's own, as in VQGAN's code (arXiv:2012.09841, eq. 7). The graph is cut at
    the output of the decoder's head: under ZeRO-3 no loss may be differentiated through an engine's
    output twice, nor with respect to the weight of a layer.
    """
    output = generator(images_B3HW).vqrae
    patches_BhwP = output.patches_BhwP.detach().float().requires_grad_()
    images_hat_B3HW = unpatchify(patches_BhwP)
    image_loss = F.mse_loss(images_hat_B3HW, images_B3HW)
    (image_grad_BhwP,) = torch.autograd.grad(image_loss, patches_BhwP, retain_graph=True)
    discriminator.module.requires_grad_(False)
    gan_loss = -discriminator.module(images_hat_B3HW).mean()
    (gan_grad_BhwP,) = torch.autograd.grad(gan_loss, patches_BhwP)
    discriminator.module.requires_grad_(True)

    hidden_BND = output.hidden_BND.detach().float()
    norms = [
        torch.einsum("bnp,bnd->pd", grad.flatten(1, 2), hidden_BND).norm()
        for grad in (image_grad_BhwP, gan_grad_BhwP)
    ]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
    grad_BhwP = image_grad_BhwP + weight * gan_grad_BhwP
    generator.backward((output.patches_BhwP.float() * grad_BhwP).sum() + output.vq_loss)
    generator.step()

    both = torch.cat([images_B3HW, images_hat_B3HW.detach()])
    real, fake = discriminator(both).chunk(2)
    discriminator.backward((F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2)
    discriminator.step()


def distillation_step(generator: DeepSpeedEngine, images_B3HW: Tensor) -> None:
    """Stage 2 without a GAN: mean squared error, SimVQ, and both terms of self-distillation."""
    output, teacher_features_BND = generator(images_B3HW)
    images_hat_B3HW = unpatchify(output.patches_BhwP.float())
    loss = (
        F.mse_loss(images_hat_B3HW, images_B3HW)
        + output.vq_loss
        + F.mse_loss(output.code_BNE.float(), output.z_BNE.detach().float())
        + F.mse_loss(output.features_BND.float(), teacher_features_BND.float())
    )
    generator.backward(loss)
    generator.step()

"""The reference of the exactness matrix: plain PyTorch in one process that sees all ranks' batches.

Written out, with the textbook adaptive weight (`autograd.grad` at the head's weight). It shares
with the trainer nothing but the networks, `unpatchify` and the LPIPS distance.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny import GAN, build_model, images_of
from vqrae_ds.losses.perceptual import PerceptualLoss
from vqrae_ds.models.decoder import unpatchify
from vqrae_ds.models.discriminator import PatchDiscriminator

MICRO_BATCH, STEPS, CLIP, EMA_DECAY = 2, 3, 1.0, 0.7
WEIGHTS = {"reconstruction": 1.0, "perceptual": 0.7, "adversarial": 0.3, "quantizer": 0.9}
DISTILLATION = {"quantized": 0.8, "teacher": 0.6}
OPTIMIZERS = {
    "SGD": {"lr": 0.05},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True},
}


class Cell(NamedTuple):
    """One cell of the matrix."""

    stage: Literal[1, 2]
    gan: Literal["off", "fixed", "adaptive"]
    accumulation: Literal[1, 2]
    checkpointing: Literal["none", "full", "selective"]
    ema: bool
    optimizer: Literal["SGD", "AdamW"] = "SGD"

    @property
    def name(self) -> str:
        ema = "ema-" if self.ema else ""
        return (
            f"stage{self.stage}-gan_{self.gan}-x{self.accumulation}-{self.checkpointing}-"
            f"{ema}{self.optimizer}"
        )


ALL_CELLS = [
    Cell(*values)
    for values in itertools.product(
        (1, 2), ("off", "fixed", "adaptive"), (1, 2), ("none", "full", "selective"), (False, True)
    )
]
# Every two values of two columns are together in one of these; a test makes sure of it.
PAIRWISE = [
    Cell(1, "off", 1, "none", False),
    Cell(2, "off", 2, "full", True),
    Cell(1, "off", 2, "selective", True),
    Cell(2, "fixed", 1, "none", True),
    Cell(1, "fixed", 2, "full", False),
    Cell(2, "fixed", 1, "selective", False),
    Cell(1, "adaptive", 2, "none", True),
    Cell(2, "adaptive", 1, "full", False),
    Cell(1, "adaptive", 1, "full", True),
    Cell(2, "adaptive", 2, "selective", False),
]
# AdamW divides rounding noise by itself where a gradient is about zero, so its losses are compared
# and not its weights; and without a GAN: while all logits lie within the hinge's margin, the
# discriminator's last bias has a gradient of zero, and AdamW makes a full step out of the noise.
ADAMW = [Cell(stage, "off", 1, "none", False, "AdamW") for stage in (1, 2)]


class Trained(NamedTuple):
    """By rank and micro batch, by step, and by name what the steps led to."""

    losses: list[list[dict[str, float]]]
    indices: list[list[Tensor]]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    discriminator: dict[str, Tensor]


def smooth_lpips(weights: Path) -> PerceptualLoss:
    """LPIPS without kinks, for both sides of the comparison.

    At the zero of a ReLU and at a tie in a max-pool the gradient jumps: noise of 1e-7 was seen to
    change it by 2e-3. One of its hundred thousands of units is soon that near.
    """
    perceptual = PerceptualLoss(weights)
    for module in list(perceptual.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta=4.0))
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride))
    return perceptual


def train_plainly(
    initial: Path, cell: Cell, world_size: int, lpips: Path, fields: dict[str, Any] | None = None
) -> Trained:
    """All steps of a cell. Activation checkpointing, which changes no number, is left out."""
    model = build_model(fields=fields, freeze_encoder=cell.stage == 1)
    teacher = build_model(fields=fields).encoder.requires_grad_(False)
    discriminator = PatchDiscriminator(**GAN)
    discriminator.load_state_dict(load_file(initial / "discriminator.safetensors"))
    perceptual = smooth_lpips(lpips)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averages = {n: p.detach().clone() for n, p in trained.items()}
    optimizers = [_optimizer(cell, trained.values()), _optimizer(cell, discriminator.parameters())]
    losses, indices = [[] for _ in range(world_size)], [[] for _ in range(world_size)]
    gradients = []
    share = 1 / (world_size * cell.accumulation)
    for step in range(STEPS):
        g_gradients = {n: torch.zeros_like(p) for n, p in trained.items()}
        d_gradients = [torch.zeros_like(p) for p in discriminator.parameters()]
        for micro in range(cell.accumulation):
            batches = [
                images_of(10 * step + micro, rank, MICRO_BATCH) for rank in range(world_size)
            ]
            if micro == 0:
                adaptive = None  # the weight of the first micro batch is that of the step
            networks = (teacher, discriminator, perceptual, model.decoder.head.weight)
            outputs = [model(images) for images in batches]
            for rank, output in enumerate(outputs):
                indices[rank].append(output.indices_Bhw)
            totals, hinges, terms, adaptive = _losses(cell, batches, outputs, adaptive, *networks)
            for rank, total in enumerate(totals):
                whole = torch.autograd.grad(
                    total, list(trained.values()), allow_unused=True, materialize_grads=True
                )
                _add(g_gradients.values(), whole, share)
                losses[rank].append({"loss/total": total.item(), **terms[rank]})
            for hinge in hinges:
                d_parameters = list(discriminator.parameters())
                _add(d_gradients, torch.autograd.grad(hinge, d_parameters), share)
        gradients.append({f"vqrae.{n}": g for n, g in g_gradients.items()})
        _take_step(optimizers[0], trained.values(), g_gradients.values())
        if cell.gan != "off":
            _take_step(optimizers[1], discriminator.parameters(), d_gradients)
        for name, average in averages.items():
            average.copy_(EMA_DECAY * average + (1 - EMA_DECAY) * trained[name].detach())
    weights = {f"vqrae.{n}": p.detach() for n, p in trained.items()}
    averages = {f"vqrae.{n}": average for n, average in averages.items()}
    return Trained(losses, indices, gradients, weights, averages, discriminator.state_dict())


def _losses(cell, batches, outputs, adaptive, teacher, discriminator, perceptual, head_weight):
    """Total loss of the generator, hinge loss of the discriminator, and named terms, by rank.

    And the adaptive weight, computed where none is given.
    """
    fakes = [unpatchify(output.patches_BhwP) for output in outputs]
    image_losses = [
        WEIGHTS["reconstruction"] * F.mse_loss(fake, images)
        + WEIGHTS["perceptual"] * perceptual(fake, images).mean()
        for fake, images in zip(fakes, batches, strict=True)
    ]
    adversarial = [-discriminator(fake).mean() for fake in fakes]
    if adaptive is None:
        adaptive = _adaptive_weight(image_losses, adversarial, head_weight)
    totals, hinges, terms = [], [], []
    for rank, (images, fake, output) in enumerate(zip(batches, fakes, outputs, strict=True)):
        total, named = image_losses[rank] + WEIGHTS["quantizer"] * output.vq_loss, {}
        if cell.gan != "off":
            weight = WEIGHTS["adversarial"] * (adaptive if cell.gan == "adaptive" else 1.0)
            total = total + weight * adversarial[rank]
            real_logits, fake_logits = discriminator(images), discriminator(fake.detach())
            hinge = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
            hinges.append(hinge)
            named["gan/discriminator"] = hinge.item()
            if cell.gan == "adaptive":
                named["gan/adaptive_weight"] = adaptive.item()
        if cell.stage == 2:
            quantized = F.mse_loss(output.code_BNE, output.z_BNE.detach())
            kept = F.mse_loss(output.features_BND, teacher(images))
            total = total + DISTILLATION["quantized"] * quantized
            total = total + DISTILLATION["teacher"] * kept
        totals.append(total)
        terms.append(named)
    return totals, hinges, terms, adaptive


def _adaptive_weight(image_losses, adversarial, head_weight) -> Tensor:
    """VQGAN's ratio of gradient norms at the last layer; norms are root mean squares over ranks."""

    def norm(losses):
        grads = [torch.autograd.grad(x, head_weight, retain_graph=True)[0] for x in losses]
        return torch.stack([g.square().sum() for g in grads]).mean().sqrt()

    return (norm(image_losses) / (norm(adversarial) + 1e-4)).clamp(0, 1e4).detach()


def _optimizer(cell: Cell, parameters) -> torch.optim.Optimizer:
    if cell.optimizer == "SGD":
        return torch.optim.SGD(parameters, lr=OPTIMIZERS["SGD"]["lr"])
    return torch.optim.AdamW(parameters, lr=OPTIMIZERS["AdamW"]["lr"], weight_decay=0.0)


def _add(sums, gradients, share: float) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        total += share * gradient


def _take_step(optimizer, parameters, gradients) -> None:
    parameters = list(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()

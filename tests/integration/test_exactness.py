"""Two ranks under ZeRO-3 against one process of plain PyTorch that sees every rank's batch.

The reference is written out here, with the textbook adaptive weight (`autograd.grad` at the head's
weight), and shares with the trainer nothing but the model and the LPIPS distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from tests.distributed import gathered, run_ranks
from tests.tiny import GAN, build_model, images_of, make_run, save_initial
from vqrae_ds.config import Run
from vqrae_ds.losses.perceptual import PerceptualLoss
from vqrae_ds.models.decoder import unpatchify
from vqrae_ds.models.discriminator import PatchDiscriminator

WORLD_SIZE, MICRO_BATCH, STEPS, CLIP = 2, 2, 3, 1.0
WEIGHTS = {"reconstruction": 1.0, "perceptual": 0.7, "adversarial": 0.3, "quantizer": 0.9}
DISTILLATION = {"quantized": 0.8, "teacher": 0.6}
OPTIMIZERS = {
    "SGD": {"lr": 0.05},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True},
}


class Setting(NamedTuple):
    """One cell of the matrix."""

    stage: int
    gan: bool
    optimizer: str
    accumulation: int = 1

    @property
    def name(self) -> str:
        accumulated = f"-x{self.accumulation}" if self.accumulation > 1 else ""
        return f"stage{self.stage}-{'gan-' if self.gan else ''}{self.optimizer}{accumulated}"


# AdamW divides rounding noise by itself where a gradient is about zero, so its losses are compared
# and not its weights; and without a GAN: while all logits lie within the hinge's margin, the
# discriminator's last bias has a gradient of zero, and AdamW makes a full step out of the noise.
SETTINGS = [
    Setting(1, True, "SGD"),
    Setting(1, False, "AdamW"),
    Setting(2, False, "SGD"),
    Setting(2, True, "SGD"),
    Setting(2, False, "AdamW"),
    Setting(1, True, "SGD", accumulation=2),
]


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


def make_setting(folder: Path, setting: Setting, lpips: Path) -> Run:
    stage, gan, optimizer, accumulation = setting
    losses = {
        "reconstruction": {"weight": WEIGHTS["reconstruction"]},
        "perceptual": {"weight": WEIGHTS["perceptual"], "weights": str(lpips)},
        "quantizer": {"weight": WEIGHTS["quantizer"]},
        "adversarial": {"weight": WEIGHTS["adversarial"], **GAN} if gan else None,
    }
    if stage == 2:
        losses["distillation"] = {name: {"weight": w} for name, w in DISTILLATION.items()}
    deepspeed = {
        "train_batch_size": WORLD_SIZE * MICRO_BATCH * accumulation,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
    }
    return make_run(folder, stage, losses=losses, deepspeed=deepspeed)


def train_all(rank: int, folder: Path, lpips: Path) -> None:
    """All settings in one start of the ranks, which costs more than the steps."""
    for setting in SETTINGS:
        result = folder / setting.name
        result.mkdir(exist_ok=True)
        run = make_setting(folder, setting, lpips) if rank == 0 else None
        shared = [run]
        torch.distributed.broadcast_object_list(shared, 0)
        train_with_engines(rank, shared[0], lpips, result)


def train_with_engines(rank: int, run: Run, lpips: Path, result: Path) -> None:
    """The trainer's own step; losses of this rank, whole gradients and weights go to a file."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from vqrae_ds import engines
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.train import micro_step

    generator, discriminator = engines.build_generator(run), engines.build_discriminator(run)
    objective = Objective(
        run.config.losses,
        smooth_lpips(lpips),
        None,
        discriminator and discriminator.module,
        engines.mean_over_ranks,
    )
    weight = generator.module.vqrae.decoder.head.weight
    assert weight.numel() == 0, "the head's weight is partitioned"
    trainable = {n: p for n, p in generator.module.named_parameters() if p.requires_grad}
    losses, gradients = [], []
    take_step = generator.step

    def record_and_step() -> None:
        if generator.is_gradient_accumulation_boundary():
            gradients.append({n: safe_get_full_grad(p).clone() for n, p in trainable.items()})
        take_step()

    generator.step = record_and_step
    for step in range(STEPS):
        for micro in range(run.schedule.batch.accumulation):
            images = images_of(10 * step + micro, rank, MICRO_BATCH)
            terms = micro_step(generator, discriminator, objective, images, step)
            losses.append({name: value.item() for name, value in terms.items()})
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in trainable.items()}
    with gathered(generator.module):
        frozen = {
            n: p.detach().clone()
            for n, p in generator.module.named_parameters()
            if not p.requires_grad
        }
    saved = {"losses": losses, "gradients": gradients, "weights": weights, "frozen": frozen}
    if discriminator is not None:
        saved["discriminator"] = discriminator.module.state_dict()
    torch.save(saved, result / f"rank{rank}.pt")


def optimizer_of(name: str, parameters) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=OPTIMIZERS[name]["lr"])
    return torch.optim.AdamW(parameters, lr=OPTIMIZERS[name]["lr"], weight_decay=0.0)


def reference(folder: Path, setting: Setting, lpips: Path):
    """Plain PyTorch over all ranks' batches: losses of every rank, gradients, weights."""
    stage, gan, optimizer, accumulation = setting
    model = build_model(freeze_encoder=stage == 1)
    teacher = build_model().encoder.requires_grad_(False)
    discriminator = PatchDiscriminator(**GAN)
    discriminator.load_state_dict(load_file(folder / "initial" / "discriminator.safetensors"))
    perceptual = smooth_lpips(lpips)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    g_optimizer = optimizer_of(optimizer, trainable.values())
    d_optimizer = optimizer_of(optimizer, discriminator.parameters())
    losses, gradients = [[] for _ in range(WORLD_SIZE)], []
    for step in range(STEPS):
        g_gradients = {n: torch.zeros_like(p) for n, p in trainable.items()}
        d_gradients = [torch.zeros_like(p) for p in discriminator.parameters()]
        share = 1 / (WORLD_SIZE * accumulation)
        for micro in range(accumulation):
            batches = [images_of(10 * step + micro, r, MICRO_BATCH) for r in range(WORLD_SIZE)]
            outputs = [model(x) for x in batches]
            fakes = [unpatchify(o.patches_BhwP) for o in outputs]
            image_losses = [
                WEIGHTS["reconstruction"] * F.mse_loss(fake, x)
                + WEIGHTS["perceptual"] * perceptual(fake, x).mean()
                for fake, x in zip(fakes, batches, strict=True)
            ]
            adversarial = [-discriminator(fake).mean() for fake in fakes]
            adaptive = textbook_adaptive_weight(
                image_losses, adversarial, model.decoder.head.weight
            )
            for rank, (x, fake, output) in enumerate(zip(batches, fakes, outputs, strict=True)):
                total = image_losses[rank] + WEIGHTS["quantizer"] * output.vq_loss
                terms = {}
                if gan:
                    total = total + WEIGHTS["adversarial"] * adaptive * adversarial[rank]
                    real_logits, fake_logits = discriminator(x), discriminator(fake.detach())
                    hinge = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
                    add(
                        d_gradients,
                        torch.autograd.grad(hinge, list(discriminator.parameters())),
                        share,
                    )
                    terms["gan/adaptive_weight"] = adaptive.item()
                    terms["gan/discriminator"] = hinge.item()
                if stage == 2:
                    quantized = F.mse_loss(output.code_BNE, output.z_BNE.detach())
                    kept = F.mse_loss(output.features_BND, teacher(x))
                    total = total + DISTILLATION["quantized"] * quantized
                    total = total + DISTILLATION["teacher"] * kept
                whole = torch.autograd.grad(
                    total, list(trainable.values()), allow_unused=True, materialize_grads=True
                )
                add(list(g_gradients.values()), whole, share)
                losses[rank].append({"loss/total": total.item(), **terms})
        gradients.append({f"vqrae.{n}": g for n, g in g_gradients.items()})
        take_step(g_optimizer, trainable.values(), g_gradients.values())
        if gan:
            take_step(d_optimizer, discriminator.parameters(), d_gradients)
    weights = {f"vqrae.{n}": p.detach() for n, p in trainable.items()}
    return losses, gradients, weights, discriminator.state_dict()


def add(sums, gradients, share: float) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        total += share * gradient


def take_step(optimizer, parameters, gradients) -> None:
    parameters = list(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()


def textbook_adaptive_weight(image_losses, adversarial, head_weight) -> torch.Tensor:
    """VQGAN's ratio of gradient norms at the last layer; norms are root mean squares over ranks."""

    def norm(losses):
        grads = [torch.autograd.grad(x, head_weight, retain_graph=True)[0] for x in losses]
        return torch.stack([g.square().sum() for g in grads]).mean().sqrt()

    return (norm(image_losses) / (norm(adversarial) + 1e-4)).clamp(0, 1e4)


def relative_difference(ours: dict, theirs: dict) -> float:
    """|ours - theirs| / |theirs| over all tensors together."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs)
    return (difference / sum(t.double().square().sum() for t in theirs.values())).sqrt().item()


def largest_difference(ours: dict, theirs: dict) -> float:
    """The worst |ours - theirs| / |theirs| of one tensor.

    The norm of a tensor is taken as at least a thousandth of all together: a gradient that is zero
    but for rounding has no relative precision.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * torch.stack([t.norm() for t in theirs.values()]).norm()
    return max(
        ((ours[n] - theirs[n]).norm() / torch.maximum(theirs[n].norm(), floor)).item()
        for n in theirs
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("exactness")
    save_initial(folder / "initial")
    run_ranks(WORLD_SIZE, train_all, folder, lpips_weights)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_steps_equal_single_process(trained, lpips_weights, setting):
    losses, gradients, weights, discriminator = reference(trained, setting, lpips_weights)
    initial = load_file(trained / "initial" / "model.safetensors")
    for rank in range(WORLD_SIZE):
        ours = torch.load(trained / setting.name / f"rank{rank}.pt", weights_only=True)
        for mine, theirs in zip(ours["losses"], losses[rank], strict=True):
            for name, expected in theirs.items():
                assert mine[name] == pytest.approx(expected, rel=1e-6), name
        for step in range(STEPS):
            if setting.optimizer == "SGD" or step == 0:
                assert largest_difference(ours["gradients"][step], gradients[step]) < 1e-5
        if setting.optimizer == "SGD":
            assert relative_difference(ours["weights"], weights) < 1e-6
            if setting.gan:
                assert relative_difference(ours["discriminator"], discriminator) < 1e-6
        for name, value in ours["frozen"].items():
            first = name.replace("teacher.", "encoder.").removeprefix("vqrae.")
            assert torch.equal(value, initial[first]), f"{name} was frozen and has changed"
    moved = relative_difference(weights, {n: initial[n.removeprefix("vqrae.")] for n in weights})
    assert moved > 1e-4, "the steps must have moved the weights for this to prove anything"

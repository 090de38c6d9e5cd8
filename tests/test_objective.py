"""The objective against the plainly composed loss, its schedule, and who receives gradients."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import GAN, build_model, images_of
from vqrae_ds.config import LossConfig
from vqrae_ds.losses import adversarial
from vqrae_ds.losses.objective import GeneratorLoss, Objective
from vqrae_ds.models.decoder import unpatchify
from vqrae_ds.models.discriminator import PatchDiscriminator
from vqrae_ds.models.training_model import TrainingModel, TrainingOutput

WEIGHTS = {"reconstruction": 1.3, "perceptual": 0.7, "convnext": 0.4, "quantizer": 0.9}
IMAGE_LOSSES = ("reconstruction", "perceptual", "convnext")
DISTILLATION = {"quantized": 0.8, "teacher": 0.6}
RETENTION = ("retention/cosine", "retention/l2")
GAN_WEIGHT = 0.3
IMAGES = images_of(0, 0)


def perceptual(images_hat: Tensor, images: Tensor) -> Tensor:
    """A smooth stand-in for LPIPS: (B,), with a gradient that is no multiple of the pixel error."""
    return (images_hat.pow(2) - images.pow(2)).diff(dim=-1).square().mean((1, 2, 3))


def convnext(images_hat: Tensor, images: Tensor) -> Tensor:
    """The same for the ConvNeXt term, with a gradient of its own."""
    return (images_hat.mean(1) - images.mean(1)).pow(4).sum((1, 2))


def refuse(tensor: Tensor) -> Tensor:
    pytest.fail("nothing is to be reduced here")


def make_config(**changes: Any) -> LossConfig:
    sections: dict[str, Any] = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    sections["distillation"] = {name: {"weight": w} for name, w in DISTILLATION.items()}
    return LossConfig(**{**sections, **changes})


def make_discriminator() -> PatchDiscriminator:
    torch.manual_seed(1)
    return PatchDiscriminator(**GAN)


def make_model() -> TrainingModel:
    """Its encoder has moved away from the teacher."""
    return TrainingModel(build_model(freeze_encoder=False), build_model(seed=5).encoder)


def evaluate(
    config: LossConfig, step: int = 0, discriminator: PatchDiscriminator | None = None
) -> GeneratorLoss:
    objective = Objective(config, perceptual, convnext, discriminator, lambda tensor: tensor)
    return objective.generator(make_model()(IMAGES), IMAGES, step)


def composed(
    model: TrainingModel, output: TrainingOutput, gan: dict[str, Any] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as a textbook has it, in one graph, with VQGAN's weight by autograd at the head."""
    vqrae = output.vqrae
    images_hat = unpatchify(vqrae.patches_BhwP)
    terms = {
        "loss/reconstruction": F.mse_loss(images_hat, IMAGES),
        "loss/perceptual": perceptual(images_hat, IMAGES).mean(),
        "loss/convnext": convnext(images_hat, IMAGES).mean(),
        "loss/quantizer": vqrae.vq_loss,
        "loss/distillation_quantized": F.mse_loss(vqrae.code_BNE, vqrae.z_BNE.detach()),
        "loss/distillation_teacher": F.mse_loss(vqrae.features_BND, output.teacher_features_BND),
    }
    weights = {f"loss/{n}": w for n, w in WEIGHTS.items()}
    weights |= {f"loss/distillation_{n}": w for n, w in DISTILLATION.items()}
    total = sum(weights[name] * term for name, term in terms.items())
    if gan is not None:
        image_loss = sum(weights[f"loss/{n}"] * terms[f"loss/{n}"] for n in IMAGE_LOSSES)
        terms["loss/adversarial"] = -make_discriminator()(images_hat).mean()
        weight = GAN_WEIGHT
        if gan["adaptive"]:
            head = model.vqrae.decoder.head.weight
            image_norm, gan_norm = (
                torch.autograd.grad(loss, head, retain_graph=True)[0].norm()
                for loss in (image_loss, terms["loss/adversarial"])
            )
            terms["gan/adaptive_weight"] = image_norm / (gan_norm + 1e-4)
            weight = weight * terms["gan/adaptive_weight"].detach()
        total = total + weight * terms["loss/adversarial"]
    return total, {**terms, **retention_of(output), "loss/total": total}


def retention_of(output: TrainingOutput) -> dict[str, Tensor]:
    ours, theirs = output.vqrae.features_BND.detach(), output.teacher_features_BND
    cosine_BN = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    return {"retention/cosine": cosine_BN.mean(), "retention/l2": F.mse_loss(ours, theirs)}


@pytest.mark.parametrize("gan", [None, {"adaptive": False}, {"adaptive": True}])
def test_value_terms_and_gradients_are_those_of_the_composed_loss(
    gan: dict[str, Any] | None,
) -> None:
    ours, theirs = make_model(), make_model()
    section = gan and {"weight": GAN_WEIGHT, **GAN, **gan}
    config = make_config(adversarial=section)
    objective = Objective(config, perceptual, convnext, make_discriminator(), lambda tensor: tensor)
    loss = objective.generator(ours(IMAGES), IMAGES, step=0)
    loss.surrogate.backward()
    expected, terms = composed(theirs, theirs(IMAGES), gan)
    expected.backward()

    torch.testing.assert_close(loss.total, expected.detach())
    assert loss.terms.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(loss.terms[name], term.detach(), msg=name)
    assert not any(term.requires_grad for term in loss.terms.values())
    reached = 0
    for (name, found), parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (found.grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-4, atol=1e-5 * scale)
            reached += 1
    frozen = [n for n, p in ours.named_parameters() if p.grad is None]
    assert all(n.startswith("teacher.") or n == "vqrae.quantizer.embedding.weight" for n in frozen)
    assert reached > 50


def test_bfloat16_patches_are_compared_in_fp32() -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    output = model(IMAGES)
    objective = Objective(make_config(), perceptual, convnext, None, lambda tensor: tensor)
    loss = objective.generator(output, IMAGES, step=0)
    pixels = unpatchify(output.vqrae.patches_BhwP).float()
    assert torch.equal(loss.terms["loss/reconstruction"], F.mse_loss(pixels, IMAGES))
    assert {t.dtype for t in loss.terms.values()} == {torch.float32}
    assert loss.images_hat_B3HW.dtype == torch.float32
    loss.surrogate.backward()
    assert model.vqrae.decoder.head.weight.grad.any()


def test_images_for_the_discriminator_are_detached_and_not_clamped() -> None:
    model = make_model()
    with torch.no_grad():
        model.vqrae.decoder.head.bias.fill_(3.0)
    objective = Objective(make_config(), perceptual, convnext, None, lambda tensor: tensor)
    output = model(IMAGES)
    images_hat = objective.generator(output, IMAGES, step=0).images_hat_B3HW
    assert not images_hat.requires_grad and images_hat.max() > 1
    assert torch.equal(images_hat, unpatchify(output.vqrae.patches_BhwP))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_generator_leaves_the_discriminator_alone(adaptive: bool) -> None:
    discriminator = make_discriminator()
    section = {"adaptive": adaptive, **GAN}
    evaluate(make_config(adversarial=section), 0, discriminator).surrogate.backward()
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_the_graph_of_the_perceptual_loss_is_freed_before_the_discriminator_runs() -> None:
    """VGG's activations are the largest thing around."""
    alive: list[Any] = []

    class Saved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            kept = x * 1
            alive.append(weakref.ref(kept))
            ctx.save_for_backward(kept)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    def watched(images_hat: Tensor, images: Tensor) -> Tensor:
        return Saved.apply(images_hat).mean((1, 2, 3))

    discriminator = make_discriminator()
    seen: list[Any] = []
    discriminator.register_forward_pre_hook(lambda *_: seen.append(alive[0]()))
    config = make_config(adversarial={"adaptive": True, **GAN})
    objective = Objective(config, watched, convnext, discriminator, lambda tensor: tensor)
    objective.generator(make_model()(IMAGES), IMAGES, step=0)
    assert seen == [None]


def test_terms_wait_for_their_start_step() -> None:
    starts = {"reconstruction": 1, "perceptual": 2, "convnext": 3, "quantizer": 4, "adversarial": 5}
    sections: dict[str, Any] = {name: {"start_step": start} for name, start in starts.items()}
    sections["adversarial"] |= {"adaptive": False, **GAN}
    sections["distillation"] = {"quantized": {"start_step": 6}, "teacher": {"start_step": 7}}
    names = [f"loss/{name}" for name in starts]
    names += ["loss/distillation_quantized", "loss/distillation_teacher"]
    for step in range(8):
        terms = evaluate(make_config(**sections), step, make_discriminator()).terms
        assert terms.keys() == {"loss/total", *RETENTION, *names[:step]}


def test_a_weight_of_zero_or_a_missing_section_switches_a_term_off() -> None:
    off = {name: {"weight": 0.0} for name in ("reconstruction", "quantizer", "adversarial")}
    loss = evaluate(make_config(**off, perceptual=None, convnext=None, distillation=None))
    assert loss.terms.keys() == {"loss/total", *RETENTION}
    assert loss.total == 0
    loss.surrogate.backward()  # there is a graph whatever is off


@pytest.mark.parametrize("name", ["perceptual", "convnext"])
def test_a_network_on_every_third_step_counts_three_times(name: str) -> None:
    section = {"weight": 0.7, "start_step": 2, "every_steps": 3}
    losses = [evaluate(make_config(**{name: section}), step) for step in range(9)]
    took_part = [step for step, loss in enumerate(losses) if f"loss/{name}" in loss.terms]
    assert took_part == [2, 5, 8]
    distance = losses[2].terms[f"loss/{name}"]
    torch.testing.assert_close(losses[2].total - losses[1].total, 3 * 0.7 * distance)
    every = evaluate(make_config(**{name: {"weight": 2.1}}), step=2)
    torch.testing.assert_close(losses[2].surrogate, every.surrogate)


@pytest.mark.parametrize(
    ("section", "first"),
    [
        (None, None),
        ({"weight": 0.0}, None),
        ({}, 0),
        ({"start_step": 3}, 3),
        ({"start_step": 3, "discriminator_start_step": 1}, 1),
    ],
)
def test_the_discriminator_trains_from_its_own_start(
    section: dict[str, Any] | None, first: int | None
) -> None:
    objective = Objective(make_config(adversarial=section), None, None, None, lambda tensor: tensor)
    trained = [step for step in range(5) if objective.trains_discriminator(step)]
    assert trained == ([] if first is None else list(range(first, 5)))


def test_the_adaptive_weight_is_the_root_mean_square_over_ranks_and_limited() -> None:
    torch.manual_seed(0)
    image_grad, gan_grad, hidden = (torch.randn(2, 5, width) for width in (3, 3, 4))
    norms_2 = torch.stack(
        [(g.flatten(0, 1).T @ hidden.flatten(0, 1)).norm() for g in (image_grad, gan_grad)]
    )
    squares_2 = adversarial.head_gradient_squares(image_grad, gan_grad, hidden)
    torch.testing.assert_close(squares_2, norms_2.square())
    torch.testing.assert_close(
        adversarial.adaptive_weight(squares_2), norms_2[0] / (norms_2[1] + 1e-4)
    )

    other_2 = torch.tensor([30.0, 40.0])  # of a second rank
    means_2 = ((norms_2.square() + other_2) / 2).sqrt()
    torch.testing.assert_close(
        adversarial.adaptive_weight((squares_2 + other_2) / 2), means_2[0] / (means_2[1] + 1e-4)
    )
    assert adversarial.adaptive_weight(torch.tensor([1e6, 0.0])) == 1e4
    assert adversarial.adaptive_weight(torch.zeros(2)) == 0


def test_norms_of_bfloat16_gradients_are_taken_in_fp32() -> None:
    """bf16 has no 6000: it would be 6016."""
    grad = torch.full((1, 1000, 1), 2.0, dtype=torch.bfloat16)
    hidden = torch.full((1, 1000, 1), 3.0, dtype=torch.bfloat16)
    squares_2 = adversarial.head_gradient_squares(grad, grad / 2, hidden)
    assert squares_2.tolist() == [6000.0**2, 3000.0**2]


def test_the_hinge_loss_asks_for_no_more_than_one() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert adversarial.discriminator_loss(real, fake) == (0.5 / 2 + 2.0 / 2) / 2
    assert adversarial.generator_loss(fake) == 1.0
    real, fake = real.bfloat16(), fake.bfloat16()
    assert adversarial.discriminator_loss(real, fake).dtype == torch.float32
    assert adversarial.generator_loss(fake).dtype == torch.float32


def test_the_discriminator_sees_real_and_fake_in_one_call() -> None:
    calls = []

    def discriminate(images: Tensor) -> Tensor:
        calls.append(images)
        return (images.mean((1, 2, 3), keepdim=True) * 8 - 4).bfloat16()

    real, fake = torch.full((2, 3, 8, 8), 0.75), torch.full((2, 3, 8, 8), 0.25)
    fake[1] = 0.625
    objective = Objective(make_config(adversarial={}), None, None, make_discriminator(), refuse)
    total, terms = objective.discriminator_loss(discriminate, real, fake, step=0)
    assert len(calls) == 1 and total.dtype == torch.float32
    assert total.item() == (0 + (0 + 2) / 2) / 2
    values = {name: term.item() for name, term in terms.items()}
    assert values == {
        "gan/discriminator": 0.5,
        "gan/logits_real": 2.0,
        "gan/logits_fake": -0.5,
        "gan/accuracy": 0.75,
    }

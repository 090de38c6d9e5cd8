"""LeCam against a plain reference: term, averages, what waits for the next reduction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import GAN, build_model, images_of
from vqrae_ds.config import LossConfig
from vqrae_ds.losses.objective import Objective
from vqrae_ds.models.discriminator import LogitAverages, build_discriminator
from vqrae_ds.models.training_model import TrainingModel

WEIGHT, DECAY = 0.3, 0.999
IMAGES = torch.zeros(2, 3, 16, 16)


class Reduction:
    """Mean over ranks that counts its calls; the other rank's numbers are `offset` higher."""

    def __init__(self, offset: float = 0.0) -> None:
        self.calls, self.offset = 0, offset

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor + self.offset / 2


def make_objective(reduction: Reduction, **options: Any) -> Objective:
    section = {"lecam_weight": WEIGHT, "adaptive": False, **GAN, **options}
    config = LossConfig(perceptual=None, adversarial=section)
    torch.manual_seed(1)
    discriminator = build_discriminator(config.adversarial)
    return Objective(config, None, None, discriminator, reduction)


def logits_of(step: int, micro: int) -> Tensor:
    """(2 B, 1, h, w), real images first."""
    torch.manual_seed(100 * step + micro)
    return torch.randn(4, 1, 2, 2) + torch.tensor([2.0, 1, -1, 0]).view(4, 1, 1, 1)


def squares_beyond(real: Tensor, fake: Tensor, averages: list[float] | None) -> Tensor:
    """The term, logit by logit."""
    if averages is None:
        return torch.zeros(())
    real_mean, fake_mean = averages
    beyond = [max(x - fake_mean, 0) ** 2 for x in real.flatten().tolist()]
    below = [max(real_mean - x, 0) ** 2 for x in fake.flatten().tolist()]
    return torch.tensor(sum(beyond) / len(beyond) + sum(below) / len(below))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_term_and_averages_over_several_steps(accumulation: int) -> None:
    """All micro batches of a step are compared with the averages of the steps before."""
    reduction = Reduction(offset=0.5)
    objective = make_objective(reduction)
    averages: list[float] | None = None
    for step in range(4):
        seen = []
        for micro in range(accumulation):
            logits = logits_of(step, micro)
            total, terms = objective.discriminator_loss(lambda _, x=logits: x, IMAGES, IMAGES, step)
            real, fake = logits[:2], logits[2:]
            lecam = squares_beyond(real, fake, averages)
            torch.testing.assert_close(terms["gan/lecam"], lecam)
            hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            torch.testing.assert_close(terms["gan/discriminator"], hinge)
            torch.testing.assert_close(total, hinge + WEIGHT * lecam)
            seen.append([real.mean().item(), fake.mean().item()])
        means = [sum(side) / accumulation + 0.25 for side in zip(*seen, strict=True)]
        if averages is None:
            averages = means
        averages = [DECAY * a + (1 - DECAY) * m for a, m in zip(averages, means, strict=True)]
    assert reduction.calls == 3, "one a step, and the last one still waits"
    objective.settle()
    objective.settle()  # nothing is left
    assert reduction.calls == 4
    found = objective.discriminator.averages.means_2
    torch.testing.assert_close(found, torch.tensor(averages))


def test_the_gradient_pulls_logits_towards_the_average_of_the_other_side() -> None:
    objective = make_objective(Reduction())
    objective.discriminator.averages.update(torch.tensor([2.0, -1.0]))
    logits = torch.tensor([3.0, -2.0, 1.0, 4.0]).view(4, 1, 1, 1).requires_grad_()
    total, _ = objective.discriminator_loss(lambda _: logits, IMAGES, IMAGES, step=0)
    total.backward()
    # Each hinge is a quarter of (1 - real) or (1 + fake) where positive, each square a half.
    hinge = torch.tensor([0.0, -0.25, 0.25, 0.25])
    lecam = torch.tensor([3.0 + 1, 0, -(2 - 1.0), 0])
    torch.testing.assert_close(logits.grad.flatten(), hinge + WEIGHT * lecam)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_adaptive_weight_takes_the_logits_along(adaptive: bool) -> None:
    """One reduction a step, from the first one on with the adaptive weight."""
    reduction = Reduction()
    objective = make_objective(reduction, weight=0.2, adaptive=adaptive)
    model, images = TrainingModel(build_model()), images_of(0, 0)
    calls = []
    for step in range(3):
        for _ in range(2):
            before = reduction.calls
            loss = objective.generator(model(images), images, step)
            objective.discriminator_loss(
                objective.discriminator, images, loss.images_hat_B3HW, step
            )
            calls.append(reduction.calls - before)
    assert calls == [1 if adaptive else 0, 0, 1, 0, 1, 0]
    assert objective.discriminator.averages.started == 1


def test_the_adaptive_weight_is_the_same_with_and_without_lecam() -> None:
    model, images = TrainingModel(build_model()), images_of(0, 0)
    weights = []
    for lecam_weight in (0.0, WEIGHT):
        objective = make_objective(
            Reduction(0.125), lecam_weight=lecam_weight, weight=0.2, adaptive=True
        )
        for step in range(2):
            loss = objective.generator(model(images), images, step)
            objective.discriminator_loss(
                objective.discriminator, images, loss.images_hat_B3HW, step
            )
        weights.append(loss.terms["gan/adaptive_weight"])
    assert weights[0] == weights[1]


def test_without_lecam_nothing_is_kept_nor_reduced() -> None:
    reduction = Reduction()
    objective = make_objective(reduction, lecam_weight=0.0)
    for step in range(2):
        loss = objective.discriminator_loss(lambda _: logits_of(0, 0), IMAGES, IMAGES, step)
    objective.settle()
    assert "gan/lecam" not in loss.terms and reduction.calls == 0
    assert not [n for n in objective.discriminator.state_dict() if "averages" in n]


def test_settling_before_a_checkpoint_changes_no_bit_of_what_follows() -> None:
    found = []
    for settles in (False, True):
        objective = make_objective(Reduction(0.3))
        for step in range(4):
            logits = logits_of(step, 0)
            loss = objective.discriminator_loss(lambda _, x=logits: x, IMAGES, IMAGES, step)
            if settles and step == 1:
                objective.settle()
                resumed = make_objective(objective.mean_over_ranks)
                resumed.discriminator.load_state_dict(objective.discriminator.state_dict())
                objective = resumed
        found.append((loss.total, objective.discriminator.averages.means_2))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_logits_that_are_not_finite_leave_the_averages_alone() -> None:
    objective = make_objective(Reduction())
    for step, value in enumerate([float("nan"), 1.0, float("inf"), 1.0]):
        logits = torch.full((4, 1, 1, 1), value)
        objective.discriminator_loss(lambda _, x=logits: x, IMAGES, IMAGES, step)
        objective.settle()
        assert objective.discriminator.averages.started == (step > 0)
    assert objective.discriminator.averages.means_2.tolist() == pytest.approx([1.0, 1.0])


def test_a_change_of_a_thousandth_is_not_rounded_away() -> None:
    averages = LogitAverages()
    averages.update(torch.tensor([1.0, -1.0]))
    for _ in range(1000):
        averages.update(torch.tensor([2.0, 0.0]))
    expected = torch.tensor([2 - DECAY**1000, -(DECAY**1000)])
    torch.testing.assert_close(averages.means_2, expected, rtol=1e-4, atol=1e-5)


def test_the_averages_are_in_the_state_of_both_discriminators() -> None:
    for kind in ("patch", "blur_pool"):
        module: nn.Module = make_objective(Reduction(), discriminator=kind).discriminator
        names = {n for n in module.state_dict() if not n.startswith("layers.")}
        assert names == {"averages.means_2", "averages.started"}

"""The terms of self-distillation: both distances, who receives a gradient, and the retention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import build_model, images_of
from vqrae_ds.config import LossConfig
from vqrae_ds.losses import distillation
from vqrae_ds.losses.objective import Objective
from vqrae_ds.models.training_model import TrainingModel

OFF = {"reconstruction": {"weight": 0.0}, "perceptual": None, "quantizer": {"weight": 0.0}}


def one_minus_cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """By the angle: unit vectors at an angle a are 2 - 2 cos(a) apart, squared."""
    units = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (ours, theirs))
    return (next(units) - next(units)).square().sum(-1).mean() / 2


DISTANCES = {"l2": F.mse_loss, "cosine": one_minus_cosine}


@pytest.mark.parametrize("kind", DISTANCES)
def test_value_and_gradient_of_a_distance(kind: distillation.Distance) -> None:
    torch.manual_seed(0)
    features, mine = (torch.randn(2, 3, 4).requires_grad_() for _ in range(2))
    mine.data.copy_(features)
    teacher = torch.randn(2, 3, 4)
    ours = distillation.teacher_loss(features, teacher, kind)
    theirs = DISTANCES[kind](mine, teacher)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(features.grad, mine.grad)
    rounded = distillation.teacher_loss(features.bfloat16(), teacher.bfloat16(), kind)
    expected = DISTANCES[kind](features.bfloat16().float(), teacher.bfloat16().float())
    torch.testing.assert_close(rounded, expected)


@pytest.mark.parametrize("kind", DISTANCES)
def test_features_of_zero_have_finite_gradients(kind: distillation.Distance) -> None:
    for other in (torch.zeros(1, 2, 4), torch.ones(1, 2, 4)):
        features = torch.zeros(1, 2, 4, requires_grad=True)
        distillation.teacher_loss(features, other, kind).backward()
        assert features.grad.isfinite().all()


@pytest.mark.parametrize("kind", DISTANCES)
def test_distillation_of_the_code_does_not_hold_the_encoder(kind: distillation.Distance) -> None:
    """After the straight-through step it would: with the opposite of the commitment's gradient."""
    code, z, mine = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
    mine.data.copy_(code)
    distillation.quantized_loss(code, z, kind).backward()
    DISTANCES[kind](mine, z.detach()).backward()
    assert z.grad is None
    torch.testing.assert_close(code.grad, mine.grad)


def test_feature_cosine_is_a_mean_over_tokens() -> None:
    first = torch.tensor([[[1.0, 0], [0, 2]], [[1, 1], [3, 0]]])
    features = torch.tensor([[[5.0, 0], [2, 0]], [[2, 2], [-1, 0]]])
    torch.testing.assert_close(
        distillation.feature_cosine(features, first), torch.tensor([0.5, 0.0])
    )


def test_retention_of_what_did_not_change() -> None:
    features = torch.randn(2, 3, 4, requires_grad=True)
    terms = distillation.retention(features, features.detach().clone())
    assert terms["retention/l2"] == 0 and not terms["retention/l2"].requires_grad
    torch.testing.assert_close(terms["retention/cosine"], torch.tensor(1.0))


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_a_teacher_without_weight_runs_in_validation_alone(weight: float) -> None:
    vqrae, teacher = build_model(freeze_encoder=False), build_model(seed=5).encoder
    model = TrainingModel(vqrae, teacher, teacher_in_training=weight > 0)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    section = {"quantized": {"weight": 0.0}, "teacher": {"weight": weight, "distance": "cosine"}}
    objective = Objective(LossConfig(**OFF, distillation=section), None, None, None, lambda t: t)
    images = images_of(0, 0)
    terms = objective.generator(model.train()(images), images, step=0).terms
    assert ("retention/cosine" in terms) == ("loss/distillation_teacher" in terms) == (weight > 0)
    assert len(calls) == (weight > 0)
    output = model.eval()(images)
    torch.testing.assert_close(output.teacher_features_BND, teacher(images).detach())
    if weight:
        torch.testing.assert_close(terms["loss/total"], 0.6 * (1 - terms["retention/cosine"]))


@pytest.mark.parametrize("name", ["quantized", "teacher"])
def test_the_objective_takes_the_distance_of_each_term(name: str) -> None:
    model = TrainingModel(build_model(freeze_encoder=False), build_model(seed=5).encoder)
    images = images_of(0, 0)
    output = model(images)
    pairs = {
        "quantized": (output.vqrae.code_BNE, output.vqrae.z_BNE),
        "teacher": (output.vqrae.features_BND, output.teacher_features_BND),
    }
    for kind, distance in DISTANCES.items():
        config = LossConfig(**OFF, distillation={name: {"distance": kind}})
        objective = Objective(config, None, None, None, lambda tensor: tensor)
        terms = objective.generator(output, images, step=0).terms
        expected = distance(*pairs[name]).detach()
        torch.testing.assert_close(terms[f"loss/distillation_{name}"], expected)

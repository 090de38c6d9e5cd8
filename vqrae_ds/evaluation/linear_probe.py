"""A linear classifier on frozen features: how much of the classes can be read off them.

Multinomial logistic regression on features that are standardised by the training part, with an L2
penalty, which makes the best classifier unique: L-BFGS from zero finds it whatever the machine.

Shapes: n images, D width, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TESTED_EVERY = 5  # of the images of a class, in the order of the index: the last of five is tested
PENALTY = 1e-2  # times half the squared weights, beside the mean cross-entropy
_STEPS, _TOLERANCE = 500, 1e-7


class ProbeResult(NamedTuple):
    """Share of tested images with the right class, and that of always saying the most frequent."""

    accuracy: float
    chance: float
    num_trained: int
    num_tested: int


def choose_tested(labels_n: Tensor) -> Tensor:
    """Which images are tested, (n,) bool: the fifth, tenth, ... of each class."""
    is_tested_n = torch.zeros(len(labels_n), dtype=torch.bool)
    for label in labels_n.unique():
        places = (labels_n == label).nonzero().flatten()
        is_tested_n[places[TESTED_EVERY - 1 :: TESTED_EVERY]] = True
    return is_tested_n


def linear_probe(features_nD: Tensor, labels_n: Tensor) -> ProbeResult | None:
    """Train on four fifths of each class, test on the rest; None where no class has five images.

    `labels_n` are int64 from 0 on.
    """
    is_tested_n = choose_tested(labels_n)
    if not is_tested_n.any():
        return None
    features_nD = features_nD.double()
    trained_mD = features_nD[~is_tested_n]
    mean_D, std_D = trained_mD.mean(0), trained_mD.std(0, correction=0)
    std_D = torch.where(std_D > 0, std_D, 1.0)  # a constant channel says nothing either way
    features_nD = (features_nD - mean_D) / std_D
    num_classes = int(labels_n.max()) + 1
    weight_CD, bias_C = fit(features_nD[~is_tested_n], labels_n[~is_tested_n], num_classes)
    said = F.linear(features_nD[is_tested_n], weight_CD, bias_C).argmax(1)
    truth = labels_n[is_tested_n]
    most_frequent = labels_n[~is_tested_n].mode().values
    return ProbeResult(
        accuracy=(said == truth).double().mean().item(),
        chance=(truth == most_frequent).double().mean().item(),
        num_trained=int((~is_tested_n).sum()),
        num_tested=int(is_tested_n.sum()),
    )


class Classifier(NamedTuple):
    """Weights (C, D) and offsets (C,), float64."""

    weight_CD: Tensor
    bias_C: Tensor


def fit(features_nD: Tensor, labels_n: Tensor, num_classes: int) -> Classifier:
    """The classifier of the least penalised mean cross-entropy; the offsets are not penalised."""
    weight_CD = torch.zeros(num_classes, features_nD.shape[1], dtype=torch.float64)
    bias_C = torch.zeros(num_classes, dtype=torch.float64)
    parameters = [weight_CD.requires_grad_(), bias_C.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_STEPS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features_nD, weight_CD, bias_C), labels_n)
        loss = loss + PENALTY / 2 * weight_CD.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Classifier(weight_CD.detach(), bias_C.detach())

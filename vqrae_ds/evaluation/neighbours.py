"""What the nearest neighbours of images say about features: agreement of two encoders, and classes.

An image's feature is the mean over its tokens. From it the mean of the set is taken: the tokens of
a vision transformer share a large offset, which would make all images alike. Neighbours are those
of the largest cosine, never the image itself, and of equal ones the earlier image.

Shapes: n images, D width, k neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AGREEMENT_NEIGHBOURS, VOTES = 10, 20
TEMPERATURE = 0.07  # of the votes: DINO's, arXiv:2104.14294, appendix F
_ROWS = 1024  # of similarities that are held at a time


class Neighbours(NamedTuple):
    """Numbers of the k nearest images of each image, nearest first, and their cosines."""

    numbers_nk: Tensor  # int64
    cosines_nk: Tensor  # float64


def nearest(features_nD: Tensor, num_neighbours: int) -> Neighbours:
    """The neighbours of each image among the others, of which there are enough."""
    number = len(features_nD)
    assert 0 < num_neighbours < number
    # float64: which of two neighbours is nearer must not hang on the order of a sum.
    directions_nD = F.normalize(features_nD.double() - features_nD.double().mean(0), dim=1)
    found = []
    for first in range(0, number, _ROWS):
        cosines_rn = directions_nD[first : first + _ROWS] @ directions_nD.T
        rows_r = torch.arange(len(cosines_rn))
        cosines_rn[rows_r, first + rows_r] = -torch.inf
        ordered = cosines_rn.sort(dim=1, descending=True, stable=True)
        found.append((ordered.indices[:, :num_neighbours], ordered.values[:, :num_neighbours]))
    return Neighbours(*(torch.cat(side) for side in zip(*found, strict=True)))


def agreement(first_nD: Tensor, second_nD: Tensor, num_neighbours: int) -> float:
    """Mean share of an image's neighbours that two encoders have in common, 0 .. 1.

    The mutual nearest neighbours of Huh et al., "The Platonic Representation Hypothesis"
    (arXiv:2405.07987). Of unrelated features it is k / (n - 1) on average.
    """
    first_nk = nearest(first_nD, num_neighbours).numbers_nk
    second_nk = nearest(second_nD, num_neighbours).numbers_nk
    is_shared_nk = (first_nk[:, :, None] == second_nk[:, None, :]).any(2)
    return is_shared_nk.double().mean().item()


def vote_accuracy(features_nD: Tensor, labels_n: Tensor, num_neighbours: int = VOTES) -> float:
    """Share of images whose class their neighbours name, each image left out once, 0 .. 1.

    A neighbour's vote weighs exp(cosine / 0.07), as in DINO (arXiv:2104.14294). `labels_n` are
    int64 from 0 on.
    """
    num_neighbours = min(num_neighbours, len(labels_n) - 1)
    found = nearest(features_nD, num_neighbours)
    votes_nC = torch.zeros(len(labels_n), int(labels_n.max()) + 1, dtype=torch.float64)
    weights_nk = (found.cosines_nk / TEMPERATURE).exp()
    votes_nC.scatter_add_(1, labels_n[found.numbers_nk], weights_nk)
    return (votes_nC.argmax(1) == labels_n).double().mean().item()

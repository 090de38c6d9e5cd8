"""The Frechet distance of two sets of features, each kept as its first two moments.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"
(arXiv:1706.08500, equation 6). Sums are in float64 and in the order of the calls, so that whoever
adds the same rows in the same pieces gets the same distance to the last bit.

Shapes: n samples, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of rows that are added piece by piece; the rows are not kept."""

    def __init__(self) -> None:
        self.number = 0
        self._shift_F: Tensor | None = None
        self._sum_F = self._products_FF = torch.zeros(0, dtype=torch.float64)

    def add(self, rows_nF: Tensor) -> None:
        """Count these rows too, on the CPU, of any floating type."""
        if len(rows_nF) == 0:
            return
        rows_nF = rows_nF.double()
        if self._shift_F is None:
            # Sums of squares far from 0 lose the digits that a small variance is made of.
            self._shift_F = rows_nF.mean(0)
            self._sum_F = torch.zeros_like(self._shift_F)
            self._products_FF = torch.outer(self._sum_F, self._sum_F)
        rows_nF = rows_nF - self._shift_F
        self.number += len(rows_nF)
        self._sum_F += rows_nF.sum(0)
        self._products_FF += rows_nF.T @ rows_nF

    def mean(self) -> Tensor:
        """(F,) float64."""
        assert self._shift_F is not None, "no rows"
        return self._shift_F + self._sum_F / self.number

    def covariance(self) -> Tensor:
        """(F, F) float64, divided by n - 1 as `numpy.cov` does. Needs two rows."""
        assert self.number > 1, "a covariance needs two rows"
        outer_FF = torch.outer(self._sum_F, self._sum_F) / self.number
        return (self._products_FF - outer_FF) / (self.number - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); 0 for equal moments.

    The trace of the root is taken of the symmetric C1^(1/2) C2 C1^(1/2), which has the same
    eigenvalues as C1 C2 but cannot have complex ones: with fewer samples than features the
    covariances are singular.
    """
    C1_FF, C2_FF = first.covariance(), second.covariance()
    values_F, vectors_FF = torch.linalg.eigh(C1_FF)
    root_FF = vectors_FF * values_F.clamp(min=0).sqrt()  # root_FF @ root_FF.T is C1
    trace = torch.linalg.eigvalsh(root_FF.T @ C2_FF @ root_FF).clamp(min=0).sqrt().sum()
    offset = (first.mean() - second.mean()).square().sum()
    return float(offset + C1_FF.trace() + C2_FF.trace() - 2 * trace)

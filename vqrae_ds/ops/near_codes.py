"""The codes that may be a token's nearest, kept while their scores come tile by tile.

A code may be the nearest where its score is within a window above the smallest one of its token.
That leaves a few of thousands, so a tile is looked at in columns: the smallest score of each tells
which of them to look into. A token that has more candidates than are worth keeping is crowded, if
what it lost still counts at the end.

Shapes: n tokens and k codes of a tile, P pairs of a token and a code; m members of each of c
columns, which are the codes j, j + c, j + 2c, ...
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CANDIDATES = 32  # that are kept for each token
MEMBERS = 16  # of a column


class Pairs(NamedTuple):
    """Tokens and codes of those tokens; their scores."""

    token_P: Tensor
    code_P: Tensor
    score_P: Tensor

    def where(self, is_kept_P: Tensor) -> Pairs:
        """Those that are kept."""
        kept_p = is_kept_P.nonzero().flatten()  # once, for a GPU is waited for
        return Pairs(*(each_P[kept_p] for each_P in self))

    def per_token(self, num_tokens: int) -> Tensor:
        """How many pairs each token is in (n,)."""
        return torch.bincount(self.token_P, minlength=num_tokens)


class Found(NamedTuple):
    """The candidates of tokens that are not crowded, and which tokens are."""

    candidates: Pairs
    is_crowded_n: Tensor


class NearCodes:
    """Collects candidates of n tokens: CANDIDATES of each at most, and as many of a tile."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self._smallest_n = torch.full((num_tokens,), torch.inf, device=device)
        self._lost_n = self._smallest_n.clone()  # the smallest score that was not kept
        self._limit_n = self._smallest_n.clone()
        none = torch.empty(0, dtype=torch.int64, device=device)
        self._pairs = Pairs(none, none, self._smallest_n[:0])

    def add(self, scores_nk: Tensor, first: int, window_n: Tensor) -> None:
        """Take in the scores of the codes from `first` on, fp32.

        What lies above the smallest score so far by more than the window is out for good.
        """
        scores_nmc = _in_columns(scores_nk)
        column_nc = scores_nmc.amin(1)
        smallest_n = column_nc.amin(1)
        self._smallest_n = torch.minimum(self._smallest_n, smallest_n)
        self._limit_n = self._smallest_n + window_n
        limit_n = self._limit_n.clamp(max=torch.finfo(torch.float32).max)  # below what pads
        is_near_nc = column_nc <= limit_n[:, None]
        is_kept_n = is_near_nc.sum(1) <= CANDIDATES
        self._lose(~is_kept_n, smallest_n)
        token_p, column_p = (is_near_nc & is_kept_n[:, None]).nonzero(as_tuple=True)
        score_pm = scores_nmc[token_p, :, column_p]
        is_near_pm = score_pm <= limit_n[token_p, None]
        number_n = torch.zeros_like(is_kept_n, dtype=torch.int64)
        is_kept_n = number_n.index_add_(0, token_p, is_near_pm.sum(1)) <= CANDIDATES
        self._lose(~is_kept_n, smallest_n)
        place_P, member_P = (is_near_pm & is_kept_n[token_p, None]).nonzero(as_tuple=True)
        code_P = first + member_P * scores_nmc.shape[2] + column_p[place_P]
        new = Pairs(token_p[place_P], code_P, score_pm[place_P, member_P])
        pairs = Pairs(*(torch.cat(both) for both in zip(self._pairs, new, strict=True)))
        pairs = pairs.where(pairs.score_P <= limit_n[pairs.token_P])
        is_kept_n = pairs.per_token(len(scores_nk)) <= CANDIDATES
        self._lose(~is_kept_n, self._smallest_n)
        self._pairs = pairs.where(is_kept_n[pairs.token_P])

    def _lose(self, is_lost_n: Tensor, smallest_n: Tensor) -> None:
        lost_n = torch.minimum(self._lost_n, smallest_n)
        self._lost_n = torch.where(is_lost_n, lost_n, self._lost_n)

    def found(self) -> Found:
        """What all the scores say. Where a limit is not finite fp32 was too small: crowded, too."""
        is_crowded_n = (self._lost_n <= self._limit_n) | ~self._limit_n.isfinite()
        candidates = self._pairs.where(~is_crowded_n[self._pairs.token_P])
        return Found(candidates, is_crowded_n)


def _in_columns(scores_nk: Tensor) -> Tensor:
    """The scores as (n, m, c); infinity stands where there is no code."""
    n, k = scores_nk.shape
    if more := -k % MEMBERS:
        scores_nk = F.pad(scores_nk, (0, more), value=torch.inf)
    return scores_nk.view(n, MEMBERS, -1)

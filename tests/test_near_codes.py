"""Which codes are kept for a token, compared with all of its scores at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.storages import Storages
from vqrae_ds.ops.near_codes import CANDIDATES, MEMBERS, Found, NearCodes, Pairs


def collect(scores_nK: Tensor, window_n: Tensor, tile: int) -> Found:
    near = NearCodes(len(scores_nK), scores_nK.device)
    for first in range(0, scores_nK.shape[1], tile):
        near.add(scores_nK[:, first : first + tile].contiguous(), first, window_n)
    return near.found()


def codes_of(pairs: Pairs, token: int) -> list[int]:
    return sorted(pairs.code_P[pairs.token_P == token].tolist())


@pytest.mark.parametrize("tile", [1, 7, MEMBERS, 5 * MEMBERS, 5 * MEMBERS + 3, 1000])
@pytest.mark.parametrize("order", ["as drawn", "falling", "rising"])
def test_what_is_within_the_window_is_kept(tile: int, order: str) -> None:
    """Falling scores are the worst: each tile has candidates, and all but the last are lost."""
    scores_nK = torch.randn(12, 1000, generator=torch.Generator().manual_seed(0))
    if order != "as drawn":
        scores_nK = scores_nK.sort(1, descending=order == "falling").values
    limits = torch.linspace(0, 1.5, 12)
    pairs, is_crowded_n = collect(scores_nK, limits, tile)
    assert torch.equal(pairs.score_P, scores_nK[pairs.token_P, pairs.code_P])
    is_near_nK = scores_nK <= (scores_nK.amin(1) + limits)[:, None]
    assert 0 < is_crowded_n.sum() < 12
    for token in range(12):
        near = is_near_nK[token].nonzero().flatten().tolist()
        if is_crowded_n[token]:
            assert codes_of(pairs, token) == []
        else:
            assert codes_of(pairs, token) == near
    few_n = is_near_nK.sum(1) <= CANDIDATES
    assert is_crowded_n[~few_n].all(), "else candidates were lost without a word"


MANY = (CANDIDATES + 8) * MEMBERS  # a tile of which all are near has too many near columns


@pytest.mark.parametrize("tile", [64, MANY])
@pytest.mark.parametrize("best", [10, 2 * MANY + 20])
def test_a_token_is_crowded_only_if_what_it_lost_still_counts(tile: int, best: int) -> None:
    scores_nK = torch.zeros(2, 3 * MANY)
    scores_nK[0, best] = -9.0  # far below the many that are as good as each other
    pairs, is_crowded_n = collect(scores_nK, torch.ones(2), tile)
    assert is_crowded_n.tolist() == [False, True]
    assert pairs.token_P.tolist() == [0] and pairs.code_P.tolist() == [best]


@pytest.mark.parametrize("tile", [64, MANY])
def test_the_smallest_of_what_was_lost_counts(tile: int) -> None:
    scores_nK = torch.cat([torch.zeros(1, MANY), torch.full((1, 2 * MANY), 0.9)], 1)
    scores_nK[0, -1] = -0.5
    pairs, is_crowded_n = collect(scores_nK, torch.ones(1), tile)
    assert is_crowded_n.item() and not len(pairs.token_P), "0 is still within 1 of the smallest"


def test_near_columns_full_of_near_codes_take_no_more_memory_than_a_tile() -> None:
    scores_nk = torch.full((256, 1024), 5.0)
    scores_nk.view(256, MEMBERS, -1)[:, :, :CANDIDATES] = 0.0
    near = NearCodes(256, scores_nk.device)
    with Storages([scores_nk]) as storages:
        near.add(scores_nk, 0, torch.ones(256))
    assert storages.peak < 1.5 * scores_nk.nbytes
    assert near.found().is_crowded_n.all()


def test_columns_that_are_near_hold_others_that_are_not() -> None:
    scores_nK = torch.full((1, 2 * MEMBERS), 5.0)
    scores_nK[0, [3, 2 * MEMBERS - 1]] = 0.0
    pairs, is_crowded_n = collect(scores_nK, torch.ones(1), 2 * MEMBERS)
    assert codes_of(pairs, 0) == [3, 2 * MEMBERS - 1] and not is_crowded_n.any()


@pytest.mark.parametrize("tile", [3, 40])
def test_what_fp32_has_no_room_for_is_left_to_others(tile: int) -> None:
    """No code is made up, even where infinity is as good as anything."""
    scores_nK = torch.zeros(5, 40)
    scores_nK[0], scores_nK[1, 3], scores_nK[2, 3] = torch.inf, torch.nan, -torch.inf
    scores_nK[4] = torch.arange(40.0)
    windows_n = torch.tensor([0.0, 0.0, 0.0, torch.inf, 0.5])
    pairs, is_crowded_n = collect(scores_nK, windows_n, tile)
    assert is_crowded_n.tolist() == [True, True, True, True, False]
    assert pairs.token_P.tolist() == [4] and pairs.code_P.tolist() == [0]

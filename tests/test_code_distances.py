"""Distances in float64 and ties: whichever way the codes are searched, the first of equals wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqrae_ds.ops import code_distances, nearest_code
from vqrae_ds.ops.code_distances import SAME, lowest_tied, pair_distances, search_in_float64


def permuted_codes(K: int = 200, D: int = 300) -> Tensor:
    """Codes (K, D) of the same values in another order: from 0 they are all as far."""
    generator = torch.Generator().manual_seed(0)
    values_D = torch.randn(D, generator=generator)
    return torch.stack([values_D[torch.randperm(D, generator=generator)] for _ in range(K)])


def test_equal_distances_are_not_equal_in_float64() -> None:
    """Else the tests of ties below would say nothing."""
    codes_KD = permuted_codes()
    token_P, code_P = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    distances_P = pair_distances(torch.zeros(1, 300), codes_KD, token_P, code_P)
    assert len(distances_P.unique()) > 1 and distances_P.argmin() > 0
    assert distances_P.max() < SAME * distances_P.min()


@pytest.mark.parametrize("dtypes", [(), (torch.bfloat16,), (torch.float32,)])
def test_the_first_of_equals_wins(monkeypatch: pytest.MonkeyPatch, dtypes: tuple) -> None:
    monkeypatch.setattr(nearest_code, "_screening_dtypes", lambda *_: dtypes)
    codes_KD = permuted_codes()
    for K in (20, 200):  # fewer than a screening keeps, and more
        assert nearest_code.nearest_code(torch.zeros(3, 300), codes_KD[:K]).tolist() == [0, 0, 0]
    codes_KD[0] *= 1.0001
    assert nearest_code.nearest_code(torch.zeros(3, 300), codes_KD).tolist() == [1, 1, 1]


def test_which_of_some_codes_is_the_nearest() -> None:
    distances_NM = torch.tensor(
        [[2.0, 1.0, 1.0 + 2.0**-45], [1.0, 1.0 + 2.0**-30, 3.0], [torch.nan, 1.0, torch.inf]],
        dtype=torch.float64,
    )
    indices_NM = torch.tensor([[3, 9, 5], [8, 2, 1], [4, 6, 5]])
    assert lowest_tied(distances_NM, indices_NM).tolist() == [5, 8, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_found_and_nothing_else(dtype: torch.dtype) -> None:
    codes_KD = torch.randn(700, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes_KD[[10, 600, 699]] = codes_KD[3].clone()
    codes_KD[601, :4] = codes_KD[3, :4]
    is_copy_K = code_distances._is_copy(codes_KD)
    assert is_copy_K.nonzero().flatten().tolist() == [10, 600, 699]


def test_codes_that_have_become_one_cost_one_pair_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them would be as near, and each to be measured."""
    pairs = []

    def counted(z_ND: Tensor, codes_KD: Tensor, token_P: Tensor, code_P: Tensor) -> Tensor:
        pairs.append(len(token_P))
        return pair_distances(z_ND, codes_KD, token_P, code_P)

    monkeypatch.setattr(code_distances, "pair_distances", counted)
    codes_KD = torch.randn(1, 20).repeat(2000, 1)
    assert search_in_float64(torch.randn(9, 20), codes_KD).tolist() == [0] * 9
    assert sum(pairs) == 2 * 9, "for the smallest distance, and for the first code that has it"

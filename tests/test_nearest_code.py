"""The tiled search against a float64 search over the whole matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqrae_ds.ops import nearest_code as module
from vqrae_ds.ops.nearest_code import nearest_code

EPSILON = torch.finfo(torch.float32).eps


def make_inputs(kind: str, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Tokens (N, D) and codes (K, D): `random`, `clustered` or with a `shared offset`."""
    generator = torch.Generator().manual_seed(N + K + D)
    z_ND = torch.randn(N, D, generator=generator)
    codes_KD = torch.randn(K, D, generator=generator)
    if kind == "clustered":
        centres_5D = 4 * torch.randn(5, D, generator=generator)
        codes_KD = centres_5D[torch.arange(K) % 5] + 0.1 * codes_KD
        z_ND = centres_5D[torch.arange(N) % 5] + 0.1 * z_ND
    if kind == "shared offset":
        offset_D = 100 * torch.randn(D, generator=generator)
        z_ND, codes_KD = z_ND + offset_D, codes_KD + offset_D
    return z_ND, codes_KD


def assert_nearest(index_N: Tensor, z_ND: Tensor, codes_KD: Tensor) -> None:
    """`index_N` is that of a float64 search, but for codes that fp32 cannot tell apart."""
    z_ND, codes_KD = z_ND.double(), codes_KD.double()
    distance_NK = torch.cdist(z_ND, codes_KD, compute_mode="donot_use_mm_for_euclid_dist").square()
    best_N, expected_N = distance_NK.min(1)
    gap_N = distance_NK.gather(1, index_N[:, None])[:, 0] - best_N
    origin_D = codes_KD[0]
    scale_N = (z_ND - origin_D).norm(dim=1) * (codes_KD - origin_D).norm(dim=1).max()
    assert (gap_N <= 4 * EPSILON * scale_N).all(), "a code that is provably not the nearest"
    assert (index_N != expected_N).float().mean() <= 0.01, "more ties than rounding explains"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "TILE_TOKENS", 7)
    monkeypatch.setattr(module, "TILE_CODES", 16)


@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset"])
@pytest.mark.parametrize(("N", "K", "D"), [(300, 1000, 64), (65, 37, 3), (1, 2, 1)])
def test_equals_float64(kind: str, N: int, K: int, D: int) -> None:
    z_ND, codes_KD = make_inputs(kind, N, K, D)
    assert_nearest(nearest_code(z_ND, codes_KD), z_ND, codes_KD)


@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset"])
@pytest.mark.parametrize(("N", "K"), [(20, 50), (14, 64), (6, 15), (7, 17)])
def test_tiles_need_not_divide(small_tiles: None, kind: str, N: int, K: int) -> None:
    z_ND, codes_KD = make_inputs(kind, N, K, 12)
    index_N = nearest_code(z_ND, codes_KD)
    assert index_N.dtype == torch.int64 and index_N.shape == (N,)
    assert_nearest(index_N, z_ND, codes_KD)


def test_every_code_finds_itself(small_tiles: None) -> None:
    _, codes_KD = make_inputs("random", 1, 50, 8)
    assert nearest_code(codes_KD.flip(0), codes_KD).tolist() == list(range(49, -1, -1))


def test_ties_go_to_the_lowest_index(small_tiles: None) -> None:
    """Whole numbers, so that distances are exact; the tied codes lie in one tile and in others."""
    codes_KD = torch.full((60, 2), 9.0)
    codes_KD[[11, 13, 40, 59]] = torch.tensor([[2.0, 0], [0.0, 2], [2.0, 0], [-2.0, 0]])
    z_ND = torch.tensor([[0.0, 0], [3.0, 0], [-3.0, 0], [0.0, 3], [20.0, 20]])
    assert nearest_code(z_ND, codes_KD).tolist() == [11, 11, 59, 13, 0]


def test_a_repeated_code_is_never_found_twice(small_tiles: None) -> None:
    for K, D in ((10, 12), (37, 24), (50, 100)):
        z_ND, codes_KD = make_inputs("random", 30, K, D)
        assert nearest_code(z_ND, codes_KD.repeat(3, 1)).max() < K


def test_bfloat16_inputs_are_compared_in_fp32() -> None:
    z_ND, codes_KD = (t.bfloat16() for t in make_inputs("random", 300, 1000, 64))
    index_N = nearest_code(z_ND, codes_KD)
    assert_nearest(index_N, z_ND, codes_KD)
    assert torch.equal(index_N, nearest_code(z_ND.float(), codes_KD.float()))


def test_autocast_changes_nothing() -> None:
    z_ND, codes_KD = make_inputs("random", 300, 1000, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_N = nearest_code(z_ND, codes_KD)
    assert torch.equal(mixed_N, nearest_code(z_ND, codes_KD))


def test_values_that_are_not_finite_find_a_code_all_the_same() -> None:
    z_ND, codes_KD = make_inputs("random", 6, 10, 4)
    z_ND[0, 0], z_ND[2, 1], z_ND[4, 2] = torch.nan, torch.inf, -torch.inf
    index_N = nearest_code(z_ND, codes_KD)
    assert ((index_N >= 0) & (index_N < 10)).all()
    finite = [1, 3, 5]
    assert torch.equal(index_N[finite], nearest_code(z_ND[finite], codes_KD))


def test_no_tokens_have_no_codes() -> None:
    assert nearest_code(torch.zeros(0, 4), torch.ones(10, 4)).shape == (0,)


def test_no_graph_is_built() -> None:
    z_ND, codes_KD = (t.requires_grad_() for t in make_inputs("random", 5, 9, 4))

    class SavesNothing(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self) -> None:
            super().__init__(lambda _: pytest.fail("a tensor was kept for backward"), lambda t: t)

    with SavesNothing():
        nearest_code(z_ND, codes_KD)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "TILE_TOKENS", 32)
    monkeypatch.setattr(module, "TILE_CODES", 64)
    z_ND, codes_KD = (t.to(dtype) for t in make_inputs("random", 200, 300, 16))
    with LargestTensor() as largest:
        nearest_code(z_ND, codes_KD)
    assert largest.numel == 32 * 64

"""The tiled search against a float64 search over the whole matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqrae_ds.ops import code_distances
from vqrae_ds.ops import nearest_code as module
from vqrae_ds.ops.code_distances import SAME
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


def exact(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """The lowest index at the smallest distance, in float64 from the differences."""
    z_ND, codes_KD = z_ND.double(), codes_KD.double()
    distance_NK = (z_ND[:, None] - codes_KD).square().sum(2)
    is_nearest_NK = distance_NK <= SAME * distance_NK.amin(1, keepdim=True)
    return torch.where(is_nearest_NK, torch.arange(len(codes_KD)), len(codes_KD)).amin(1)


def extremes() -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and codes whose squares fp32 has no room for, above or below, and some of each."""
    z_ND, codes_KD = make_inputs("random", 12, 70, 24)
    for of_tokens, of_codes in (
        (1e-24, 1e-24),
        (1e-38, 1e-38),
        (1e-20, 1),
        (1, 1e-20),
        (1e-44, 1e30),
        (1e30, 1e-44),
        (1e25, 1e25),
        (5e37, 5e37),
        (5e37, 1),
        (1, 5e37),
    ):
        yield of_tokens * z_ND, of_codes * codes_KD
    scale_N1 = 10 ** torch.linspace(-40, 37, 12)[:, None]
    yield scale_N1 * z_ND, codes_KD
    yield z_ND, codes_KD * 10 ** torch.linspace(-40, 37, 70)[:, None]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "TILE_TOKENS", 7)
    monkeypatch.setattr(module, "TILE_CODES", 16)
    monkeypatch.setattr(code_distances, "TILE_CODES", 16)


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


SCREENINGS = [(), (torch.bfloat16,), (torch.float32,), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtypes", SCREENINGS, ids=["float64", "bf16", "fp32", "bf16 and fp32"])
@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset", "near ties", "repeated"])
def test_the_way_to_the_result_does_not_matter(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch, kind: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Among codes that fp32 cannot tell apart too, and more of them than a screening keeps."""
    monkeypatch.setattr(module, "_screening_dtypes", lambda *_: dtypes)
    z_ND, codes_KD = make_inputs(kind, 40, 200, 24)
    if kind == "near ties":
        codes_KD[50:150] = codes_KD[0] + 1e-7 * codes_KD[50:150]
        z_ND[:20] = codes_KD[0] + 1e-2 * z_ND[:20]
    if kind == "repeated":
        codes_KD = codes_KD[:4].repeat(50, 1)
    assert torch.equal(nearest_code(z_ND, codes_KD), exact(z_ND, codes_KD))


@pytest.mark.parametrize("dtypes", SCREENINGS, ids=["float64", "bf16", "fp32", "bf16 and fp32"])
def test_what_fp32_has_no_room_for(
    monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Where scores or bounds overflow, or are taken for 0."""
    monkeypatch.setattr(module, "_screening_dtypes", lambda *_: dtypes)
    for z_ND, codes_KD in extremes():
        assert torch.equal(nearest_code(z_ND, codes_KD), exact(z_ND, codes_KD))


def test_each_way_is_taken(small_tiles: None) -> None:
    """Else the test above would say nothing: the screenings settle some tokens, and not others."""
    z_ND, codes_KD = make_inputs("random", 40, 200, 24)
    codes_KD[50:150] = codes_KD[0] + 1e-4 * codes_KD[50:150]
    codes_KD[100:150] = codes_KD[0] + 1e-4 * codes_KD[100:150]
    z_ND[:20] = codes_KD[0] + 1e-2 * z_ND[:20]
    z_ND[20:30] = (codes_KD[1:11] + codes_KD[11:21]) / 2  # about as near to the one as to the other
    norms, crowded = module.code_norms(codes_KD), []
    for dtype in (torch.bfloat16, torch.float32):
        candidates, is_crowded_N = module._screen(z_ND, codes_KD, norms, dtype)
        near_N = candidates.per_token(40)
        assert (near_N > 1).any() and (near_N == 1).any()
        assert torch.equal(near_N == 0, is_crowded_N)
        crowded.append(int(is_crowded_N.sum()))
    assert crowded[0] >= crowded[1] > 0
    assert torch.equal(nearest_code(z_ND, codes_KD), exact(z_ND, codes_KD))


def test_torch_may_be_told_to_round_matrix_products() -> None:
    z_ND, codes_KD = make_inputs("clustered", 100, 300, 64)
    expected_N = nearest_code(z_ND, codes_KD)
    before = torch.get_float32_matmul_precision()
    for precision in ("medium", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert torch.equal(nearest_code(z_ND, codes_KD), expected_N)
        finally:
            torch.set_float32_matmul_precision(before)


def test_nor_does_it_matter_by_which_switch() -> None:
    """Once the newer one is used, torch refuses to say what the older one stands at."""
    z_ND, codes_KD = make_inputs("clustered", 100, 300, 64)
    expected_N = nearest_code(z_ND, codes_KD)
    switches = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}
    for device_type, switch in switches.items():
        switch.fp32_precision = "tf32"
        try:
            assert module._rounds_fp32(device_type)
            assert torch.equal(nearest_code(z_ND, codes_KD), expected_N)
        finally:
            switch.fp32_precision = "ieee"  # what nothing was told means
        assert not module._rounds_fp32(device_type)


@pytest.mark.parametrize("name", ["DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"])
def test_nor_by_the_variable_of_onednn(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "bf16")
    assert module._rounds_fp32("cpu") and not module._rounds_fp32("cuda")
    monkeypatch.setenv(name, "STRICT")
    assert not module._rounds_fp32("cpu")


def test_on_a_gpu_products_of_bfloat16_are_not_rounded_to_it() -> None:
    """Nor any part of a sum, then. Fake tensors say which kernel would run."""
    with FakeTensorMode():
        z_nD, codes_kD = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (4, 5))
        origin_D = torch.zeros(8, device="cuda")
        assert module._products(z_nD, codes_kD, origin_D).dtype == torch.float32


def test_given_norms_change_nothing() -> None:
    z_ND, codes_KD = make_inputs("shared offset", 100, 300, 64)
    norms = module.code_norms(codes_KD)
    assert torch.equal(nearest_code(z_ND, codes_KD, norms), nearest_code(z_ND, codes_KD))
    moved_KD = codes_KD.double() - codes_KD[0].double()
    torch.testing.assert_close(norms.half_norms_K, (moved_KD.square().sum(1) / 2).float())
    torch.testing.assert_close(norms.largest, moved_KD.norm(dim=1).max().float())


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
    monkeypatch.setattr(module, "TILE_NORMS", 64)
    z_ND, codes_KD = (t.to(dtype) for t in make_inputs("random", 200, 300, 16))
    with LargestTensor() as largest:
        nearest_code(z_ND, codes_KD)
    assert largest.numel == 32 * 64

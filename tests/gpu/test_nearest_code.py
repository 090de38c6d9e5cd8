"""The Triton kernels on a GPU: the codes that float64 finds, and next to no memory."""

from __future__ import annotations

import pytest
import torch

from tests.test_nearest_code import make_inputs
from vqrae_ds.benchmarks.simvq import find_mistakes
from vqrae_ds.ops.code_search import choose_search
from vqrae_ds.ops.nearest_code import code_norms, nearest_code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [(16384, 16384, 1536), (1024, 16384, 1536), (300, 1000, 65), (1, 37, 3), (9, 1, 16)]


@DTYPES
@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset"])
@pytest.mark.parametrize(("N", "K", "D"), SHAPES)
def test_both_searches_equal_float64(kind: str, N: int, K: int, D: int, dtype: torch.dtype) -> None:
    search = choose_search(on_gpu=True)
    assert search is not nearest_code, "the log says why"
    z_ND, codes_KD = (t.to("cuda", dtype) for t in make_inputs(kind, N, K, D))
    norms = code_norms(codes_KD)
    for each in (search, nearest_code):
        assert find_mistakes(each(z_ND, codes_KD, norms), z_ND, codes_KD).wrong == 0


@DTYPES
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    search = choose_search(on_gpu=True)
    z_ND, codes_KD = (t.to("cuda", dtype) for t in make_inputs("random", 500, 300, 64))
    codes_KD = codes_KD.repeat(20, 1)
    assert search(z_ND, codes_KD, code_norms(codes_KD)).max() < 300


def test_memory_and_the_host_that_does_not_wait() -> None:
    search = choose_search(on_gpu=True)
    z_ND, codes_KD = (t.to("cuda", torch.bfloat16) for t in make_inputs("random", *SHAPES[0]))
    norms = code_norms(codes_KD)
    search(z_ND, codes_KD, norms)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index_N = search(z_ND, codes_KD, norms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before - index_N.nbytes
    assert extra < 2e6

"""The Triton kernels in Triton's interpreter on the CPU: equal to the PyTorch search.

The interpreter must be chosen before Triton is imported, so all runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.storages import Storages
from tests.test_code_distances import permuted_codes
from tests.test_nearest_code import assert_nearest, exact, extremes, make_inputs
from vqrae_ds.ops.nearest_code import code_norms, nearest_code

pytest.importorskip("triton")

SHAPES = [
    (130, 129, 65),
    (20, 1000, 64),
    (9, 37, 3),
    (1, 200, 16),
    (7, 1, 5),
    (40, 70, 1),
    (3, 300, 1536),
]


@pytest.mark.timeout(1500)
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.test_nearest_code_triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def search(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """With the kernels, compared with the search of PyTorch."""
    from vqrae_ds.ops import nearest_code_triton

    found_N = nearest_code_triton.nearest_code(z_ND, codes_KD, code_norms(codes_KD))
    expected_N = nearest_code(z_ND, codes_KD)
    assert found_N.dtype == torch.int64
    assert torch.equal(found_N, expected_N), (found_N - expected_N).nonzero().flatten()
    return found_N


def check_kinds_and_shapes() -> None:
    for kind in ("random", "clustered", "shared offset"):
        for N, K, D in SHAPES:
            z_ND, codes_KD = make_inputs(kind, N, K, D)
            assert_nearest(search(z_ND, codes_KD), z_ND, codes_KD)


def check_bfloat16() -> None:
    """Of tokens, of codes, or of both."""
    for N, K, D in SHAPES[1:5]:
        z_ND, codes_KD = make_inputs("random", N, K, D)
        search(z_ND.bfloat16(), codes_KD)
        search(z_ND, codes_KD.bfloat16())
        z_ND, codes_KD = z_ND.bfloat16(), codes_KD.bfloat16()
        assert_nearest(search(z_ND, codes_KD), z_ND.float(), codes_KD.float())


def check_ties() -> None:
    """In one block of codes and in several, a few of them and a hundred."""
    codes_KD = torch.full((600, 2), 9.0)
    codes_KD[[11, 13, 140, 259, 400]] = torch.tensor(
        [[2.0, 0], [0.0, 2], [2.0, 0], [-2.0, 0], [0, 2.0]]
    )
    z_ND = torch.tensor([[0.0, 0], [3.0, 0], [-3.0, 0], [0.0, 3], [20.0, 20]])
    assert search(z_ND, codes_KD).tolist() == [11, 11, 259, 13, 0]
    z_ND, codes_KD = make_inputs("random", 9, 100, 24)
    assert search(z_ND, codes_KD.repeat(9, 1)).max() < 100
    assert not search(z_ND, codes_KD[:1].repeat(140, 1)).any()
    codes_KD = permuted_codes(K=70)
    assert not search(torch.zeros(3, codes_KD.shape[1]), codes_KD).any()


def check_near_ties() -> None:
    """Halfway between two codes, so near that bf16 cannot tell which is nearer."""
    _, codes_KD = make_inputs("random", 1, 300, 48)
    near_K = torch.cdist(codes_KD, codes_KD).fill_diagonal_(torch.inf).argmin(1)
    for share in (0.4999, 0.5001):
        z_ND = torch.lerp(codes_KD, codes_KD[near_K], share)[:12]
        expected_N = (torch.arange(300) if share < 0.5 else near_K)[:12]
        assert (search(z_ND, codes_KD) == expected_N).float().mean() > 0.7


def check_what_is_not_finite() -> None:
    z_ND, codes_KD = make_inputs("random", 9, 300, 20)
    z_ND[0, 0], z_ND[2, 1], z_ND[4, 2] = torch.nan, torch.inf, -torch.inf
    from vqrae_ds.ops import nearest_code_triton

    found_N = nearest_code_triton.nearest_code(z_ND, codes_KD)
    assert ((found_N >= 0) & (found_N < 300)).all()
    finite = [1, 3, 5, 6, 7, 8]
    assert torch.equal(found_N[finite], nearest_code(z_ND[finite], codes_KD))
    found_N = nearest_code_triton.nearest_code(z_ND, torch.full_like(codes_KD, torch.nan))
    assert ((found_N >= 0) & (found_N < 300)).all()
    assert nearest_code_triton.nearest_code(z_ND[:0], codes_KD).shape == (0,)


def check_what_fp32_has_no_room_for() -> None:
    for z_ND, codes_KD in extremes():
        assert torch.equal(search(z_ND, codes_KD), exact(z_ND, codes_KD))


def check_that_each_kernel_has_something_to_do() -> None:
    """Else the checks above would say nothing about it."""
    from vqrae_ds.ops import nearest_code_triton as kernels

    z_ND, codes_KD = make_inputs("random", 200, 500, 64)
    codes_KD[40:60] = codes_KD[40] + 1e-7 * codes_KD[40:60]  # too near to one another for fp32
    z_ND[:3] = codes_KD[40] + 0.1
    z_ND[3:6] = (codes_KD[100] + codes_KD[200]) / 2
    norms, plan = code_norms(codes_KD), kernels._plan(z_ND, codes_KD)
    smallest_Ns, _, second_Ns = kernels._screen(z_ND, codes_KD, norms, plan)
    assert smallest_Ns.shape[1] > 1, "several splits"
    scores_NS = torch.cat([smallest_Ns, second_Ns], 1)
    limit_N = scores_NS.amin(1) + 2 * kernels._bound(z_ND, norms, plan)
    is_near_N = (scores_NS <= limit_N[:, None]).sum(1) > 1
    assert is_near_N[:6].all()
    assert is_near_N[6:].float().mean() < 0.01, "the bound is tight"
    search(z_ND, codes_KD)


def check_memory() -> None:
    """All that is allocated at once beside inputs and result, where the tokens fill the GPU.

    The goal of 2 MB is that of 16384 tokens.
    """
    from vqrae_ds.ops import nearest_code_triton

    z_ND, codes_KD = make_inputs("random", 2048, 40, 16)
    norms = code_norms(codes_KD)
    with Storages([z_ND, codes_KD, *norms]) as storages:
        index_N = nearest_code_triton.nearest_code(z_ND, codes_KD, norms)
    assert storages.peak - index_N.nbytes < 2e6 / 16384 * 2048


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_that_each_kernel_has_something_to_do()
    check_kinds_and_shapes()
    check_bfloat16()
    check_ties()
    check_near_ties()
    check_what_is_not_finite()
    check_what_fp32_has_no_room_for()
    check_memory()

"""The Triton kernels compiled for GPUs that need not be there: registers, shared memory, sums.

And the error of sums like theirs against the bound, on a machine that rounds as badly as it may.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqrae_ds.ops.nearest_code import code_norms, error_bound

triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = pytest.mark.skipif(
    not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists(),
    reason="this triton has no compiler for NVIDIA's GPUs",
)

CAPABILITIES = (80, 86, 90, 100)  # Ampere, its smaller ones, Hopper, Blackwell
MOST_SHARED = 99 << 10  # bytes of a program on 8.6; the others have more
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TYPES = {
    "norm_N": "*fp32",
    "origin_D": "*fp32",
    "half_norms_K": "*fp32",
    "smallest_Ns": "*fp32",
    "second_Ns": "*fp32",
    "index_Ns": "*i32",
    "limit_N": "*fp32",
    "order_N": "*i64",
    "count": "*i64",
    "distance_N": "*fp64",
    "index_N": "*i64",
    "N": "i32",
    "K": "i32",
    "D": "i32",
    "codes_per_split": "i32",
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(name: str, capability: int, dtype: str, **options: Any) -> Any:
    """For pointers that are aligned, as those of torch, and sizes that are multiples of 16.

    Options that are arguments of the kernel are constants, as Triton makes one of a size of 1.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vqrae_ds.ops import nearest_code_kernels

    kernel = getattr(nearest_code_kernels, name)
    constants = {key: value for key, value in options.items() if key in kernel.arg_names}
    for_compiler = {key: value for key, value in options.items() if key not in constants}
    signature = {
        argument: "constexpr" if argument in constants else TYPES.get(argument, f"*{dtype}")
        for argument in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument not in constants
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=for_compiler)


def stack_bytes(kernel: Any, folder: Path) -> int:
    """Of each thread: what does not fit into its registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_and_fit(capability: int, dtype: str, tmp_path: Path) -> None:
    from vqrae_ds.ops import nearest_code_triton as module

    plan = module.plan_of((DTYPES[dtype],) * 2, capability // 10)
    kernels = {
        "screening": compile_kernel(
            "screening_kernel", capability, dtype, **module._options(plan.screening, plan)
        )
    }
    settling = module._options(plan.settling, plan)
    settling["BLOCK_PAIRS_D"] = module.PAIRS_DIMENSIONS
    for is_last in (False, True):
        kernels[f"settling, {is_last}"] = compile_kernel(
            "settling_kernel", capability, dtype, IS_LAST=is_last, **settling
        )
    kernels["norms"] = compile_kernel(
        "norms_kernel", capability, dtype, BLOCK_D=512, num_warps=2, enable_fp_fusion=True
    )
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= MOST_SHARED, name
        assert stack_bytes(kernel, tmp_path) == 0, f"{name} spills"


def test_sizes_may_be_one() -> None:
    from vqrae_ds.ops import nearest_code_triton as module

    plan, sizes = module.plan_of((torch.bfloat16,) * 2, 9), {"K": 1, "D": 1}
    options = module._options(plan.screening, plan)
    compile_kernel("screening_kernel", 90, "bf16", N=1, **sizes, **options)
    options = module._options(plan.settling, plan) | {"BLOCK_PAIRS_D": module.PAIRS_DIMENSIONS}
    compile_kernel("settling_kernel", 90, "bf16", IS_LAST=False, **sizes, **options)
    compile_kernel("norms_kernel", 90, "bf16", BLOCK_D=512, D=1, num_warps=2, enable_fp_fusion=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_compiler_keeps_the_sums_apart(capability: int) -> None:
    """That of each block of dimensions is subtracted, value by value, from those before it."""
    from vqrae_ds.ops import nearest_code_triton as module

    plan = module.plan_of((torch.bfloat16,) * 2, capability // 10)
    for name, blocks in (("screening_kernel", plan.screening), ("settling_kernel", plan.settling)):
        options = module._options(blocks, plan)
        if name == "settling_kernel":
            options |= {"IS_LAST": True, "BLOCK_PAIRS_D": module.PAIRS_DIMENSIONS}
        assembly = compile_kernel(name, capability, "bf16", **options).asm["ptx"]
        values = blocks.tokens * blocks.codes // (32 * blocks.num_warps)  # of a thread
        assert len(re.findall(r"\bsub(?:\.rn)?\.f32", assembly)) >= values


def truncated(values: Tensor) -> Tensor:
    """Float64 values to the 24 bits of fp32, towards 0, which is the most that it may lose."""
    return (values.view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


def to_tf32(values: Tensor) -> Tensor:
    """Rounded to 11 bits."""
    bits = values.view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def sum_of_products(start_N: Tensor, z_ND: Tensor, codes_ND: Tensor) -> Tensor:
    """(N,) each product exact, each addition truncated."""
    for z_N, code_N in zip(z_ND.double().T, codes_ND.double().T, strict=True):
        start_N = truncated(start_N + z_N * code_N)
    return start_N


def scores_of_a_bad_machine(z_ND: Tensor, codes_ND: Tensor, dtype: str, block: int) -> Tensor:
    """Of token n and code n (N,), as the kernels sum them in blocks of dimensions."""
    score_N = torch.zeros(len(z_ND), dtype=torch.float64)
    for z_Nd, codes_Nd in zip(z_ND.split(block, 1), codes_ND.split(block, 1), strict=True):
        part_N = torch.zeros_like(score_N)
        z_big, codes_big = z_Nd, codes_Nd
        if dtype == "fp32":
            z_big, codes_big = to_tf32(z_Nd), to_tf32(codes_Nd)
            z_small, codes_small = to_tf32(z_Nd - z_big), to_tf32(codes_Nd - codes_big)
            part_N = sum_of_products(part_N, z_small, codes_big)
            part_N = sum_of_products(part_N, z_big, codes_small)
        part_N = sum_of_products(part_N, z_big, codes_big)
        score_N = truncated(score_N - part_N)
    return score_N


@pytest.mark.parametrize("generation", [8, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_holds_for_sums_in_blocks_alone(dtype: str, generation: int) -> None:
    """One product is large, beside which all the others are rounded, and in the same direction."""
    from vqrae_ds.ops import nearest_code_triton as module

    generator = torch.Generator().manual_seed(0)
    N, D = 200, 1536
    z_ND, codes_ND = (1 + torch.rand(N, D, generator=generator) / 8 for _ in range(2))
    z_ND[:, 0] *= 64
    codes_ND[:, 0] *= 64
    z_ND *= 16
    if dtype == "bf16":
        z_ND, codes_ND = (t.bfloat16().float() for t in (z_ND, codes_ND))
    norms = code_norms(codes_ND.bfloat16())._replace(largest=codes_ND.norm(dim=1).max())
    exact_N = -(z_ND.double() * codes_ND.double()).sum(1)
    plan = module.plan_of((DTYPES[dtype],) * 2, generation)
    for blocks in (plan.screening, plan.settling):
        terms = module.num_additions(blocks, D)
        bound_N = error_bound(z_ND.norm(dim=1), norms, D, terms)
        score_N = scores_of_a_bad_machine(z_ND, codes_ND, dtype, blocks.dimensions)
        assert ((score_N - exact_N).abs() < bound_N).all()
        score_N = scores_of_a_bad_machine(z_ND, codes_ND, dtype, D)
        assert ((score_N - exact_N).abs() > bound_N).any(), "so the blocks are needed"

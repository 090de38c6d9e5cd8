"""Which search for the nearest codes a machine can run."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from vqrae_ds.ops.nearest_code import CodeNorms, Search, code_norms, nearest_code

logger = logging.getLogger(__name__)

FIRST_CAPABILITY = (8, 0)  # Ampere: the first with products of bf16 and TF32
TRIAL = (200, 300, 96)  # tokens, codes and dimensions


def choose_search(*, on_gpu: bool) -> Search:
    """The search for the nearest codes; both find the same. The log says which, and why."""
    obstacle = obstacle_of_kernels(on_gpu=on_gpu)
    if obstacle is not None:
        logger.info("nearest codes: tiles in PyTorch (%s)", obstacle)
        return nearest_code
    from vqrae_ds.ops import nearest_code_triton  # imports Triton

    logger.info("nearest codes: Triton kernels")
    return nearest_code_triton.nearest_code


def search_where_they_are(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
    """The search of a model that may be moved: it is chosen when the first tokens come."""
    return _search_on(on_gpu=z_ND.is_cuda)(z_ND, codes_KD, norms)


@functools.cache
def _search_on(*, on_gpu: bool) -> Search:
    return choose_search(on_gpu=on_gpu)


def obstacle_of_kernels(*, on_gpu: bool) -> str | None:
    """Why the Triton kernels cannot run here; `None` where they can, and find the right codes."""
    if not on_gpu:
        return "the Triton kernels need CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"the Triton kernels need compute capability 8.0, this GPU has {found}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _trial(torch.device("cuda"))


def _trial(device: torch.device) -> str | None:
    """A small search by the kernels, which a compiler may refuse to build for this GPU.

    In both precisions, for they are compiled for each. Better no kernel than a wrong one.
    """
    from vqrae_ds.ops import nearest_code_triton

    num_tokens, num_codes, dim = TRIAL
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(num_tokens, dim, generator=generator)
    codes_KD = torch.randn(num_codes, dim, generator=generator)
    z_ND[1::2] = (codes_KD[1:num_tokens:2] + codes_KD[: num_tokens - 1 : 2]) / 2  # near ties
    for dtype in (torch.bfloat16, torch.float32):
        z, codes = z_ND.to(device, dtype), codes_KD.to(device, dtype)
        try:  # what a GPU refuses may show as late as where the result is read
            found_N = nearest_code_triton.nearest_code(z, codes, code_norms(codes))
            is_right = torch.equal(found_N, nearest_code(z, codes))
        except Exception as error:  # of Triton's, its compiler's or the driver's own classes
            first_line = str(error).partition("\n")[0]
            return f"the Triton kernels cannot be built here: {type(error).__name__}: {first_line}"
        if not is_right:
            return f"the Triton kernels find other codes in {dtype} on this GPU"
    return None

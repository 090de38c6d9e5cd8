"""Which search for the nearest codes a machine can run."""

from __future__ import annotations

import importlib.util
import logging

import torch

from vqrae_ds.models.quantizer import Search
from vqrae_ds.ops.nearest_code import code_norms, nearest_code

logger = logging.getLogger(__name__)

FIRST_CAPABILITY = (8, 0)  # Ampere: the first with products of bf16 and TF32
TRIAL = (200, 300, 96)  # tokens, codes and dimensions


def choose_search(*, on_gpu: bool) -> Search:
    """The search for the nearest codes; both find the same. The log says which, and why."""
    obstacle = _obstacle(on_gpu)
    if obstacle is not None:
        logger.info("nearest codes: tiles in PyTorch (%s)", obstacle)
        return nearest_code
    from vqrae_ds.ops import nearest_code_triton  # imports Triton

    logger.info("nearest codes: Triton kernels")
    return nearest_code_triton.nearest_code


def _obstacle(on_gpu: bool) -> str | None:
    """Why the kernels cannot run here."""
    if not on_gpu:
        return "the Triton kernels need CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"the Triton kernels need compute capability 8.0, this GPU has {found}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _trial()


def _trial() -> str | None:
    """A small search by the kernels, which a compiler may refuse to build for this GPU.

    In both precisions, for they are compiled for each. Better no kernel than a wrong one.
    """
    from vqrae_ds.ops import nearest_code_triton

    num_tokens, num_codes, dim = TRIAL
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(num_tokens, dim, generator=generator).cuda()
    codes_KD = torch.randn(num_codes, dim, generator=generator).cuda()
    for dtype in (torch.bfloat16, torch.float32):
        z, codes = z_ND.to(dtype), codes_KD.to(dtype)
        try:
            found_N = nearest_code_triton.nearest_code(z, codes, code_norms(codes))
        except Exception as error:  # of Triton's, its compiler's or the driver's own classes
            first_line = str(error).partition("\n")[0]
            return f"the Triton kernels cannot be built here: {type(error).__name__}: {first_line}"
        if not torch.equal(found_N, nearest_code(z, codes)):
            return f"the Triton kernels find other codes in {dtype} on this GPU"
    return None

"""Runs that are the same bit for bit."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """From here on the same run gives the same numbers. Call it before CUDA starts.

    On a CPU that holds with the same number of ranks and threads. On a GPU it holds for PyTorch's
    own operations, for cuBLAS and for flash attention, on the same model of GPU with the same
    versions of all libraries; NCCL's sums depend on the topology that it finds. It was not run on
    a GPU.

    An operation without a deterministic version then raises `RuntimeError` with its name. On a GPU
    that is, among others, the gradient of bicubic interpolation: of the positions of an encoder
    that trains at another size than its own, and of images that are resized for a loss
    (`losses.convnext`); and of the pooling of the `blur_pool` discriminator.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # of the two values that cuBLAS documents
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by the transformers library
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and finds bugs only
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by measured time

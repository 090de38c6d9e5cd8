"""Products of bf16 on CPUs that have no instructions for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
}


class ProductsInFp32(TorchDispatchMode):
    """Multiplies bf16 as a GPU does: sums in fp32, results in bf16."""

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function not in PRODUCTS or args[0].dtype is not torch.bfloat16:
            return function(*args, **kwargs)
        return tree_map(_to_bf16, function(*tree_map(_to_fp32, args), **kwargs))


def fast_products() -> AbstractContextManager[Any]:
    """Where PyTorch multiplies bf16 in a plain loop, 200 times slower than fp32: in fp32."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return contextlib.nullcontext()
    return ProductsInFp32()


def _to_fp32(value: Any) -> Any:
    is_bf16 = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    return value.float() if is_bf16 else value


def _to_bf16(value: Any) -> Any:
    is_fp32 = isinstance(value, torch.Tensor) and value.dtype is torch.float32
    return value.bfloat16() if is_fp32 else value

"""Activation checkpointing: a block's results are computed again in the backward pass, not kept.

`full` keeps the input of a block alone (arXiv:1604.06174). `selective` also keeps what is dear to
compute, the results of matrix products and of attention, and computes norms, activations and sums
again, which cost little (arXiv:2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Checkpointing = Literal["none", "full", "selective"]

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")
# Every kernel behind PyTorch's scaled_dot_product_attention, and the package flash-attn.
ATTENTION = ("aten::_scaled_dot_product_", "flash_attn::")


def checkpointed(function: Callable[..., Any], *arguments: Any, kind: Checkpointing) -> Any:
    """`function(*arguments)`; the backward pass gets what it needs as `kind` says.

    The gradients are those without checkpointing. `function` has no side effects, for it may run
    twice; random numbers are the same both times. Without gradient it simply runs.
    """
    if kind == "none":
        return function(*arguments)
    # The other implementation runs no hooks of the inner modules, by which ZeRO-3 brings weights.
    run = partial(checkpoint, function, *arguments, use_reentrant=False)
    if kind == "full":
        return run()
    return run(context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]  # without the overload
    if name in PRODUCTS or name.startswith(ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE

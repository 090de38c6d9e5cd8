"""What the tokenizer is made of where a tensor-parallel group divides it."""

from __future__ import annotations

import functools
from typing import Any

from vqrae_ds.parallel.codebook import GroupSearch, ShardedCodebook
from vqrae_ds.parallel.groups import Groups
from vqrae_ds.parallel.layers import sliced_layers


def sliced_parts(num_codes: int, groups: Groups | None) -> dict[str, Any]:
    """Arguments of `VQRAE`, none for a rank that is alone: the model is that of one process."""
    if groups is None:
        return {}
    return {
        "search": GroupSearch(num_codes, groups),
        "codebook": functools.partial(ShardedCodebook, groups=groups),
        "layers": sliced_layers(groups),
    }

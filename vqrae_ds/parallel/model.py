"""What the tokenizer is made of where a tensor-parallel group divides it."""

from __future__ import annotations

import functools
from typing import Any

from vqrae_ds.ops.nearest_code import Search
from vqrae_ds.parallel.codebook import GroupSearch, ShardedCodebook
from vqrae_ds.parallel.groups import Groups
from vqrae_ds.parallel.layers import sliced_layers


def sliced_parts(num_codes: int, groups: Groups | None, search: Search) -> dict[str, Any]:
    """Arguments of `VQRAE`: of a rank that is alone `search`, for the model of one process.

    In a group every rank finds the nearest of its own codes with it.
    """
    if groups is None:
        return {"search": search}
    return {
        "search": GroupSearch(num_codes, groups, search),
        "codebook": functools.partial(ShardedCodebook, groups=groups),
        "layers": sliced_layers(groups),
    }

"""Which search for the nearest codes a machine can run."""

from __future__ import annotations

import logging

from vqrae_ds.models.quantizer import Search
from vqrae_ds.ops.nearest_code import nearest_code

logger = logging.getLogger(__name__)


def choose_search(*, on_gpu: bool) -> Search:
    """The search of the nearest codes; the log says which and why."""
    logger.info("nearest codes: PyTorch (the kernel needs CUDA)")
    return nearest_code

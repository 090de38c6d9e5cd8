"""Measures mean and scale of the frozen encoder's features, once, before stage 1."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from vqrae_ds.data.loader import Batch

logger = logging.getLogger(__name__)

SMALLEST_STD = 1e-6  # a channel that never changes carries nothing: it must not be blown up


@torch.no_grad()
def calibrate(
    engine: nn.Module,
    batches: Iterable[Batch],
    num_images: int,
    device: torch.device,
    data_size: int | None = None,
) -> None:
    """Set `vqrae.standardize` from at least `num_images` images; every rank calls it.

    `data_size` of the ranks see different images, all of them if left out. Images that several
    ranks see change neither mean nor scale, for all are seen as often.

    Sums are float64: the variance is the small difference of two large numbers.
    """
    vqrae = engine.module.vqrae
    sums_3D = torch.zeros(3, len(vqrae.standardize.mean), dtype=torch.float64, device=device)
    engine.eval()
    seen = 0
    for batch in batches:
        features = engine(batch.images_B3HW.to(device)).vqrae.features_BND.double()
        ones = torch.ones_like(features)
        sums_3D += torch.stack([t.sum((0, 1)) for t in (ones, features, features.square())])
        seen += len(features) * (data_size or dist.get_world_size())
        if seen >= num_images:
            break
    engine.train()
    vqrae.quantizer.reset_codebook_usage()
    dist.all_reduce(sums_3D)
    count_D, sum_D, square_D = sums_3D
    mean_D = sum_D / count_D
    std_D = (square_D / count_D - mean_D.square()).clamp(min=0).sqrt()
    vqrae.standardize.mean.copy_(mean_D)
    vqrae.standardize.std.copy_(std_D.clamp(min=SMALLEST_STD))
    logger.info("features calibrated on %d images", seen)

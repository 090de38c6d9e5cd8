"""Figures of single images, and their means over a validation set that is spread over ranks.

Shapes: B batch, H x W pixels, h x w grid of tokens, N = h*w tokens, D encoder width, K codes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqrae_ds.data.stream import EvaluationBatch
from vqrae_ds.evaluation.first_images import FirstImages
from vqrae_ds.losses.distillation import feature_cosine
from vqrae_ds.models.quantizer import codebook_statistics
from vqrae_ds.models.training_model import TrainingOutput

SSIM_WINDOW = 11  # px, with a Gaussian of 1.5 px
PSNRS = ("psnr", "baseline_psnr")


class Validation(NamedTuple):
    """Figures of the set by name; its first images and their reconstructions, in [0, 1]."""

    figures: dict[str, float]
    images_B3HW: Tensor
    images_hat_B3HW: Tensor


def psnr(images_hat_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,); images in [0, 1], infinite if equal."""
    error_B = (images_hat_B3HW.double() - images_B3HW.double()).square().mean((1, 2, 3))
    return -10 * error_B.log10()


def ssim(images_hat_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), 1 if equal; images in [0, 1] of any size.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004):
    mean over the channels and over all places at which the window lies inside the image, as in the
    authors' code. Raises `ValueError` for a side that is smaller than the window.
    """
    if min(images_B3HW.shape[2:]) < SSIM_WINDOW:
        size = " x ".join(map(str, images_B3HW.shape[2:]))
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} px or more, got {size} px")
    # Imported here, for it takes as long to import as torch.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, similarity_B3HW = structural_similarity_index_measure(
        images_hat_B3HW.double(),  # variances are small differences of squares
        images_B3HW.double(),
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    border = SSIM_WINDOW // 2  # the library mirrors the image there
    inside_B3HW = similarity_B3HW[..., border:-border, border:-border]
    return inside_B3HW.mean((1, 2, 3))


def mean_colour(images_B3HW: Tensor) -> Tensor:
    """Each image replaced by its mean colour: the reconstruction that needs no tokenizer."""
    # In float64, where a flat image is its mean to the last bit: in float32 most grey ones are not.
    mean_B311 = images_B3HW.double().mean((2, 3), keepdim=True)
    return mean_B311.to(images_B3HW.dtype).expand_as(images_B3HW)


@torch.no_grad()
def validate(
    engine: nn.Module,
    batches: Iterable[EvaluationBatch],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    device: torch.device,
    num_shown: int = 8,
) -> Validation:
    """One pass over the validation set; every rank calls it, with equally many batches.

    The first `num_shown` images of the index that can be used come back on each of them, with their
    reconstructions. Images that fill up a batch count for nothing, and those of an infinite PSNR
    not in its mean, which is NaN where no image is left. Codes are counted for the training alone,
    so those of the pass are taken back.
    """
    vqrae = engine.module.vqrae
    training_counts_K = vqrae.quantizer.code_counts.clone()
    shown = FirstImages(num_shown)
    engine.eval()
    sums: dict[str, Tensor] = {}  # of a figure, and how many images are in it
    counts_K = torch.zeros(vqrae.quantizer.num_embeddings, dtype=torch.float64, device=device)
    for batch in batches:
        images, is_real_B = batch.images_B3HW.to(device), batch.is_real_B.to(device)
        output = engine(images)
        images_hat = output.vqrae.reconstruction
        shown.add(batch, images, images_hat)
        for name, value_B in itertools.chain(
            image_figures(images_hat, images, perceptual), _retention(output, vqrae.freeze_encoder)
        ):
            value_n = value_B[is_real_B & counts_in_mean(name, value_B)].double()
            both_2 = torch.stack([value_n, torch.ones_like(value_n)]).sum(1)
            sums[name] = sums.get(name, 0) + both_2
        used = output.vqrae.indices_Bhw[is_real_B].flatten()
        counts_K.index_add_(0, used, torch.ones_like(used, dtype=torch.float64))
    engine.train()
    vqrae.quantizer.code_counts.copy_(training_counts_K)
    assert sums, "the validation set is empty"
    totals = torch.cat([*sums.values(), counts_K])
    dist.all_reduce(totals)
    sums_M2, counts_K = totals[: -len(counts_K)].view(-1, 2), totals[-len(counts_K) :]
    means = (sums_M2[:, 0] / sums_M2[:, 1]).tolist()
    figures = {f"validation/{name}": mean for name, mean in zip(sums, means, strict=True)}
    codes = codebook_statistics(counts_K)
    figures |= {"validation/usage": codes.usage, "validation/perplexity": codes.perplexity}
    return Validation(figures, *shown.of_all_ranks())


def counts_in_mean(name: str, values_n: Tensor) -> Tensor:
    """Which images count in the mean of a figure, (n,) bool.

    An image without any error has an infinite PSNR, with which the mean of all would be infinite.
    """
    is_infinite_n = values_n == math.inf
    return ~is_infinite_n if name in PSNRS else torch.ones_like(is_infinite_n)


def image_figures(
    images_hat_B3HW: Tensor,
    images_B3HW: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and values (B,) of all that compares images with their reconstructions, in [0, 1].

    psnr, baseline_psnr (of the mean colour), ssim where the images have room for its window, and
    lpips with a `perceptual` distance.
    """
    yield "psnr", psnr(images_hat_B3HW, images_B3HW)
    yield "baseline_psnr", psnr(mean_colour(images_B3HW), images_B3HW)
    if min(images_B3HW.shape[2:]) >= SSIM_WINDOW:
        yield "ssim", ssim(images_hat_B3HW, images_B3HW)
    if perceptual is not None:
        yield "lpips", perceptual(images_hat_B3HW, images_B3HW)


def _retention(output: TrainingOutput, is_frozen: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and values (B,) of how much the features are still those of the first encoder.

    In stage 1 the frozen encoder is the first one: its features are compared with themselves, which
    is 1 and 0 unless they are not finite. In stage 2 without a teacher nothing is known.
    """
    features_BND, first_BND = output.vqrae.features_BND, output.teacher_features_BND
    if first_BND is None and is_frozen:
        first_BND = features_BND
    if first_BND is not None:
        yield "teacher_cosine", feature_cosine(features_BND, first_BND)
        difference_BND = features_BND.float() - first_BND.float()
        yield "teacher_l2", difference_BND.square().mean((1, 2))

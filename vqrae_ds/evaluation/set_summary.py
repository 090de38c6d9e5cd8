"""From what was measured on a set to the numbers of its report.

Nothing in it depends on the number of ranks, the machine's speed or the date: two evaluations of
one model on one set give the same file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqrae_ds.config import ModelConfig
from vqrae_ds.evaluation.labels import Labels
from vqrae_ds.evaluation.linear_probe import linear_probe
from vqrae_ds.evaluation.measuring import ORIGINAL, TRAINED
from vqrae_ds.evaluation.metrics import counts_in_mean
from vqrae_ds.evaluation.neighbours import (
    AGREEMENT_NEIGHBOURS,
    TEMPERATURE,
    VOTES,
    agreement,
    vote_accuracy,
)
from vqrae_ds.evaluation.whole_set import SetFigures
from vqrae_ds.models.quantizer import codebook_statistics

IMAGE_FIGURES = ("psnr", "baseline_psnr", "ssim", "lpips")
RETENTION_FIGURES = ("cosine", "l2")
BITS_A_PIXEL = 24  # of an image before it is encoded: three channels of 8 bit
PROTOCOL = {
    "crop": "the largest centre square",
    "resize": "bicubic with antialiasing, on 8-bit values, to the side that is evaluated",
    "rounding": "reconstructions are clamped to [0, 1] and rounded to the nearest 8-bit value",
    "psnr": "of each image over all pixels and channels, then the mean over the images that are "
    "not reconstructed without any error",
    "ssim": "11 x 11 Gaussian window of 1.5 px, mean over channels and whole windows (Wang 2004)",
    "lpips": "VGG16, version 0.1",
    "rfid": "originals against reconstructions, both at the side that is evaluated; "
    "torch-fidelity's Inception resizes them to 299 px; moments in float64",
    "cosine": "of the features of each token with the original encoder's",
    "neighbours": f"mean over tokens, mean of the set subtracted, cosine; {AGREEMENT_NEIGHBOURS} "
    f"neighbours for the agreement, {VOTES} votes of weight exp(cosine / {TEMPERATURE}) for the "
    "classes, each image left out once",
    "linear_probe": "logistic regression on the mean over tokens, standardised; every fifth image "
    "of a class is tested, the others train",
}


class Subject(NamedTuple):
    """What was evaluated; `image_size` is the side in pixels."""

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    shards: str
    image_size: int


def summarize_set(
    subject: Subject,
    found: SetFigures,
    labels: Labels | None,
    *,
    is_canonical: bool,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """All numbers of the report; `left_out` has the reason for each figure that is not there.

    `is_canonical` says whether the distance of Inception features may be called rFID. A figure that
    is infinite or undefined is None, with the reason in `left_out`.
    """
    left_out = dict(left_out)
    figures = {n: _mean(n, found, left_out) for n in IMAGE_FIGURES if n in found.figures}
    if found.frechet is not None:
        figures["rfid" if is_canonical else "frechet_other_inception"] = found.frechet
    return {
        "model": {
            "folder": str(subject.folder),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "encoder": subject.config.encoder_cls,
            "num_embeddings": subject.config.num_embeddings,
            "embedding_dim": subject.config.embedding_dim,
        },
        "data": {
            "shards": subject.shards,
            "image_size": subject.image_size,
            "num_images": len(found.numbers_n),
            "num_left_out": found.num_left_out,
            "num_without_error": found.num_same,
        },
        "rate": _rate(found.tokens, subject),
        "figures": figures,
        "spread": {n: _spread(v) for n, v in found.figures.items() if n in IMAGE_FIGURES},
        "codebook": _codebook(found.counts_K, found.tokens),
        "retention": _retention(found, left_out),
        "classes": _classes(found, labels, left_out),
        "left_out": left_out,
        "protocol": PROTOCOL,
    }


def _rate(tokens: int, subject: Subject) -> dict[str, float]:
    """What an image costs in codes, and how much less that is than its 8-bit pixels."""
    bits_a_token = math.log2(subject.config.num_embeddings)
    num_pixels = subject.image_size**2
    return {
        "tokens_per_image": tokens,
        "bits_per_token": bits_a_token,
        "bits_per_pixel": tokens * bits_a_token / num_pixels,
        "compression_ratio": BITS_A_PIXEL * num_pixels / (tokens * bits_a_token),
    }


def _codebook(counts_K: Tensor, tokens: int) -> dict[str, Any]:
    """Usage over the set, and how many codes were used how often, in powers of two."""
    statistics = codebook_statistics(counts_K)
    counts = counts_K.numpy()
    histogram = [{"uses_from": 0, "uses_to": 0, "codes": int((counts == 0).sum())}]
    low = 1
    while low <= counts.max():
        high = 2 * low - 1
        codes = int(((counts >= low) & (counts <= high)).sum())
        histogram.append({"uses_from": low, "uses_to": high, "codes": codes})
        low = high + 1
    return {
        "num_codes": len(counts),
        "num_tokens": int(counts.sum()),
        "usage": statistics.usage,
        "perplexity": statistics.perplexity,
        "dead_codes": statistics.dead_codes,
        "histogram": histogram,
    }


def _retention(found: SetFigures, left_out: dict[str, str]) -> dict[str, float | None]:
    if ORIGINAL not in found.pooled:
        return {}
    figures = {name: _mean(name, found, left_out) for name in RETENTION_FIGURES}
    number = len(found.pooled_numbers_m)
    # Of a small set ten neighbours would be most of it, and agree whatever the features are.
    num_neighbours = min(AGREEMENT_NEIGHBOURS, (number - 1) // 4)
    if num_neighbours < 1:
        left_out["knn_agreement"] = f"{number} images are too few to be neighbours, 5 are needed"
        return figures
    both = (found.pooled[TRAINED], found.pooled[ORIGINAL])
    return figures | {
        "knn_agreement": agreement(*both, num_neighbours),
        "knn_agreement_by_chance": num_neighbours / (number - 1),
        "knn_neighbours": num_neighbours,
        "knn_images": number,
    }


def _classes(found: SetFigures, labels: Labels | None, left_out: dict[str, str]) -> dict[str, Any]:
    """Accuracies by whose features they are of; empty without labels of two classes."""
    if labels is None:
        why = "no image has a .cls member, or the label's field in a .json one"
        left_out.setdefault("classes", why)
        return {}
    labels_m = labels.labels_n[found.pooled_numbers_m]
    is_labelled_m = labels_m >= 0
    # Counted anew: the index may have classes of which no image was measured.
    classes, labels_m = labels_m[is_labelled_m].unique(return_inverse=True)
    if len(classes) < 2:
        number = f"{len(labels_m)} images with a class are of {len(classes)} classes"
        left_out["classes"] = f"the {number}, and it takes two to tell apart"
        return {}
    result: dict[str, Any] = {"num_images": len(labels_m), "num_classes": len(classes)}
    for whose, pooled_mD in found.pooled.items():
        features_nD = pooled_mD[is_labelled_m]
        accuracies: dict[str, Any] = {"knn_accuracy": vote_accuracy(features_nD, labels_m)}
        probe = linear_probe(features_nD, labels_m)
        if probe is None:
            left_out["linear_probe"] = "no class has five images, of which one would be tested"
        else:
            accuracies["linear_probe"] = probe._asdict()
        result[whose] = accuracies
    return result


def _mean(name: str, found: SetFigures, left_out: dict[str, str]) -> float | None:
    """Over the images that count in it; undefined where the figure of one of them is not finite."""
    values_n = found.figures[name]
    values_n = values_n[counts_in_mean(name, values_n)]
    if not len(values_n):
        left_out[name] = "it is infinite for each image"
        return None
    if bad := int((~values_n.isfinite()).sum()):
        left_out[name] = f"it is not a finite number for {bad} of {len(values_n)} images"
        return None
    return values_n.mean().item()


def _spread(values_n: Tensor) -> dict[str, float | None]:
    """Least, 5 %, median, 95 % and largest of the values, each that of an image."""
    found = np.quantile(values_n.numpy(), [0, 0.05, 0.5, 0.95, 1], method="nearest")
    names = ("least", "p05", "median", "p95", "largest")
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in zip(names, found, strict=True)
    }

"""One picture of a set: its best, median and worst images by PSNR, and how often codes are used.

Each image stands above its reconstruction, the map of its errors and the map of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqrae_ds.data.crops import centre_crop
from vqrae_ds.data.decode import Decoding, decode_sample
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.evaluation.measuring import reconstruct
from vqrae_ds.evaluation.report import ERROR_SCALE, code_map, error_map
from vqrae_ds.evaluation.whole_set import SetFigures
from vqrae_ds.models.vqrae import VQRAE

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

MOST_IMAGES = 4  # of a band
IMAGE_INCHES, TITLE_INCHES, USAGE_INCHES, LABEL_INCHES, DPI = 2.0, 0.7, 2.4, 0.25, 130
_ROWS = ("original", "reconstruction", f"error x {ERROR_SCALE:g}", "codes")
_KEY_LETTERS = 22


class Band(NamedTuple):
    """Some images of the set, by their places in the figures, best first."""

    title: str
    places: list[int]


def choose_bands(psnr_n: Tensor) -> list[Band]:
    """The best, median and worst images, none of them twice; equal ones in the set's order."""
    order = psnr_n.argsort(descending=True, stable=True).tolist()
    number = len(order)
    count = max(1, min(MOST_IMAGES, number // 3))
    if number < 3:
        return [Band("all", order)]
    middle = (number - count) // 2
    return [
        Band("best", order[:count]),
        Band("median", order[middle : middle + count]),
        Band("worst", order[-count:]),
    ]


def draw_page(
    model: VQRAE,
    index: ShardIndex,
    found: SetFigures,
    path: Path,
    *,
    image_size: int,
    decoding: Decoding,
) -> None:
    """Read the images again, reconstruct them, and write the page as PNG. Needs no display."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    bands = choose_bands(found.figures["psnr"])
    counts = [len(band.places) for band in bands]
    heights = [len(_ROWS) * IMAGE_INCHES + TITLE_INCHES, USAGE_INCHES]
    widths = [count * IMAGE_INCHES for count in counts]
    widths[0] += LABEL_INCHES
    figure = Figure((max(6.0, sum(widths)), sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    parts = upper.subfigures(1, len(bands), width_ratios=widths, squeeze=False)[0]
    for part, band in zip(parts, bands, strict=True):
        samples = [index.sample(int(found.numbers_n[place])) for place in band.places]
        images = [
            decode_sample(sample, centre_crop, image_size=image_size, decoding=decoding)
            for sample in samples
        ]
        captions = [
            f"{_short(sample.key)}\n{_figures_of(found, place)}"
            for sample, place in zip(samples, band.places, strict=True)
        ]
        part.suptitle(f"{band.title} by PSNR")
        _draw_band(part, versions(model, torch.stack(images)), captions)
        if band is bands[0]:
            for axes, name in zip(part.axes[:: len(images)], _ROWS, strict=True):
                axes.set_ylabel(name, fontsize=9)
    _draw_usage(lower, found.counts_K)
    figure.savefig(path, dpi=DPI, format="png")


def versions(model: VQRAE, images_B3SS: Tensor) -> list[Tensor]:
    """What stands below one another: images, reconstructions, error maps and code maps."""
    device = next(model.parameters()).device
    found = reconstruct(model, images_B3SS.to(device))
    images_hat = found.images_hat_B3SS.cpu()
    token_side = model.config.output_patch_size
    grid = (images_B3SS.shape[2] // token_side, images_B3SS.shape[3] // token_side)
    codes = code_map(found.indices_BN.cpu().unflatten(1, grid), token_side)
    return [images_B3SS, images_hat, error_map(images_hat, images_B3SS), codes]


def _draw_band(part: SubFigure, rows: Sequence[Tensor], captions: Sequence[str]) -> None:
    """A row a version, a column an image."""
    grid = part.subplots(len(rows), len(captions), squeeze=False)
    for row, images in enumerate(rows):
        for axes, image_3SS in zip(grid[row], images, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            # Smooth where pixels are lost, and as it is where each of them can be seen.
            axes.imshow(image_3SS.permute(1, 2, 0).numpy(), interpolation="antialiased")
    for axes, caption in zip(grid[0], captions, strict=True):
        axes.set_title(caption, fontsize=7, parse_math=False)


def _draw_usage(part: SubFigure, counts_K: Tensor) -> None:
    """Uses of each code, the most frequent first."""
    axes = part.subplots()
    uses = np.sort(counts_K.numpy())[::-1]
    axes.plot(np.arange(1, len(uses) + 1), uses)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(1, len(uses))
    axes.set_xlabel("codes, the most used first")
    axes.set_ylabel("uses in the set")
    mean = uses.sum() / len(uses)
    axes.axhline(mean, color="grey", linestyle=":", label=f"all alike: {mean:.3g}")
    axes.legend(fontsize=8)


def _figures_of(found: SetFigures, place: int) -> str:
    shown = f"{float(found.figures['psnr'][place]):.2f} dB"
    if "lpips" in found.figures:
        shown += f", LPIPS {float(found.figures['lpips'][place]):.3f}"
    return shown


def _short(key: str) -> str:
    """The end of a key, where keys of one folder differ."""
    return key if len(key) <= _KEY_LETTERS else f"...{key[-_KEY_LETTERS:]}"

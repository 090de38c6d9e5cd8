"""One picture of any size through a model: what it becomes, from which codes, how far off.

Shapes: H x W pixels of the picture as it was brought to whole tokens, h x w its tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vqrae_ds.data.fit import Fit, load_fitted
from vqrae_ds.evaluation.measuring import reconstruct
from vqrae_ds.evaluation.metrics import image_figures
from vqrae_ds.evaluation.report import code_map, error_map
from vqrae_ds.models.vqrae import VQRAE

Version = Literal["original", "reconstruction", "error", "codes"]


class ImageResult(NamedTuple):
    """All on the CPU; images are 8-bit values as floats in [0, 1], without any padding.

    `figures` are PSNR in dB, that of the mean colour, and SSIM where its window fits.
    """

    path: Path
    original_3HW: Tensor
    reconstruction_3HW: Tensor
    indices_hw: Tensor
    figures: dict[str, float]
    token_side: int  # px

    def version(self, name: Version) -> Tensor:
        """What is seen in a column of a grid: an image (3, H, W)."""
        height, width = self.original_3HW.shape[1:]
        if name == "error":
            return error_map(self.reconstruction_3HW[None], self.original_3HW[None])[0]
        if name == "codes":
            return code_map(self.indices_hw[None], self.token_side)[0, :, :height, :width]
        return self.original_3HW if name == "original" else self.reconstruction_3HW

    def as_json(self) -> dict[str, Any]:
        """What a script wants to know; an infinite figure, of equal images, is None."""
        height, width = self.original_3HW.shape[1:]
        finite = {n: v if v < float("inf") else None for n, v in self.figures.items()}
        return {
            "image": str(self.path),
            "height": height,
            "width": width,
            "figures": finite,
            "codes": self.indices_hw.tolist(),
        }


def reconstruct_file(model: VQRAE, path: Path, fit: Fit, size: int | None) -> ImageResult:
    """Read a picture, bring it to whole tokens as `load_fitted` does, and reconstruct it.

    Raises `ValueError` for a file that is no picture and for a `size` that does not fit.
    """
    token_side = model.config.output_patch_size
    if size is None and fit == "crop":
        size = model.config.image_size
    fitted = load_fitted(path, fit, multiple=token_side, size=size)
    image_13HW = fitted.image_3HW[None]
    found = reconstruct(model, image_13HW.to(next(model.parameters()).device))
    grid = (image_13HW.shape[2] // token_side, image_13HW.shape[3] // token_side)
    # What was padded is no part of the picture, and counts in no figure.
    original, reconstruction = (
        images[..., : fitted.height, : fitted.width].cpu()
        for images in (image_13HW, found.images_hat_B3SS)
    )
    figures = image_figures(reconstruction, original, perceptual=None)
    return ImageResult(
        path=path,
        original_3HW=original[0],
        reconstruction_3HW=reconstruction[0],
        indices_hw=found.indices_BN[0].unflatten(0, grid).cpu(),
        figures={name: value_1.item() for name, value_1 in figures},
        token_side=token_side,
    )

"""The ConvNeXt term: how differently a classifier of ImageNet sees two images.

After `PerceptualLoss` of github.com/bytedance/1d-tokenizer (modeling/modules/perceptual_loss.py):
mean squared error of the 1000 logits of ConvNeXt-S (arXiv:2201.03545), images resized to 224 px.
The weights come from a file on this machine: nothing is ever downloaded.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import convnext_small

from vqrae_ds.losses.perceptual import check_shapes, find_file
from vqrae_ds.models.encoders import IMAGENET_MEAN, IMAGENET_STD

FILE_NAME = "convnext_small-0c510722.pth"  # torchvision's IMAGENET1K_V1
SIDE = 224  # px
_REMEDY = (
    f"fetch https://download.pytorch.org/models/{FILE_NAME} and set `losses.convnext.weights` to "
    "that file, or set `losses.convnext: null`"
)


class ConvNextLoss(nn.Module):
    """Squared distance of the logits of each image of a batch, 0 for equal images; frozen.

    `weights` is torchvision's file, or safetensors with the names of its `convnext_small`. With
    None it is the file in torchvision's cache. Raises `ValueError` when the file is missing or
    holds something else.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        path = find_weights(weights)
        with torch.device("meta"):  # parameters without values cannot be left at random by mistake
            self.graph = convnext_small()
        try:
            self.graph.load_state_dict(_read(path), assign=True)
        except (
            SafetensorError,
            pickle.UnpicklingError,
            EOFError,
            RuntimeError,
            TypeError,  # a pickle of something else than a dict
            ValueError,  # a pickle of a dict with something else than tensors
        ) as error:
            raise ValueError(
                f"{path} does not hold the weights of ConvNeXt-S: {_REMEDY}"
            ) from error
        mean_311, std_311 = (torch.tensor(s).view(3, 1, 1) for s in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean_311", mean_311, persistent=False)
        self.register_buffer("std_311", std_311, persistent=False)
        self.float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ConvNextLoss:
        """Stay in eval mode, whatever the model around does: the network drops whole blocks."""
        return super().train(False)

    def forward(self, images_hat_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """Distance of each reconstruction to its target, both in [0, 1]: (B,), fp32 in any context.

        Only `images_hat_B3HW` receives a gradient. Raises `ValueError` for other shapes.
        """
        check_shapes(images_hat_B3HW, images_B3HW, min_side=1)
        # Frozen weights and a detached target: the target's pass records nothing for backward.
        images_hat, images = images_hat_B3HW.float(), images_B3HW.detach().float()
        with torch.autocast(images_hat.device.type, enabled=False):
            difference_BK = self._logits(images_hat) - self._logits(images)
        return difference_BK.square().mean(1)

    def _logits(self, images_B3HW: Tensor) -> Tensor:
        resized = F.interpolate(images_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.graph((resized - self.mean_311) / self.std_311)


def find_weights(weights: Path | None) -> Path:
    """The file that `ConvNextLoss(weights)` reads; builds nothing, so that a run can fail early.

    Raises `ValueError`, saying what to do, when there is no such file.
    """
    return find_file(weights, FILE_NAME, "the ConvNeXt loss", _REMEDY)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)

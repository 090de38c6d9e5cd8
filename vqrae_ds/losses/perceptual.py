"""LPIPS with VGG16: how different two images look, for training and for evaluation.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv
1801.03924), version 0.1, through the graph of the `lpips` package. The weights come from a file on
this machine: nothing is ever downloaded.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

MIN_SIDE = 16  # px: four poolings come before the last features
_REMEDY = (
    "run `python tools/make_lpips_weights.py OUT` and set `losses.perceptual.weights` to that file"
)


class PerceptualLoss(nn.Module):
    """LPIPS distance of each image of a batch, 0 for equal images and seldom above 1; frozen.

    `weights` is a file of `tools/make_lpips_weights.py`, trunk and heads. With None the trunk is
    torchvision's cached VGG16, and the heads are those that the `lpips` package brings along.
    Raises `ValueError` when the file is missing or holds something else.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        path = find_weights(weights)
        self.graph = _build_graph()
        try:
            state = _read_torchvision(path, self.graph) if weights is None else load_file(path)
            self.graph.load_state_dict(state, assign=True)
        except (SafetensorError, pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold the weights of LPIPS: {_REMEDY}") from error
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in eval mode, whatever the model around does: the heads have a dropout."""
        return super().train(False)

    def forward(self, images_hat_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """Distance of each reconstruction to its target, both in [0, 1]: (B,), fp32 in any context.

        Only `images_hat_B3HW` receives a gradient. Values that are not finite come out as a
        distance that is not finite; looking for them here would make every step wait for the GPU.
        Raises `ValueError` for other shapes and for sides below 16 px.
        """
        check_shapes(images_hat_B3HW, images_B3HW, MIN_SIDE)
        # Frozen weights and a detached target: the target's pass records nothing for backward.
        images_hat, images = images_hat_B3HW.float(), images_B3HW.detach().float()
        with torch.autocast(images_hat.device.type, enabled=False):
            distances_B111 = self.graph(images_hat, images, normalize=True)
        return distances_B111.flatten()


def find_weights(weights: Path | None) -> Path:
    """The file that `PerceptualLoss(weights)` reads; builds nothing, so that a run can fail early.

    Raises `ValueError`, saying what to do, when there is no such file.
    """
    return find_file(weights, "vgg16-397923af.pth", "the perceptual loss", _REMEDY)


def find_file(weights: Path | None, cached: str, needed_by: str, remedy: str) -> Path:
    """`weights`, or with None the file `cached` of torchvision's cache.

    Raises `ValueError` with `needed_by` and the `remedy` when there is no such file.
    """
    in_cache = Path(torch.hub.get_dir(), "checkpoints", cached)
    path = in_cache if weights is None else Path(weights)
    if not path.is_file():
        raise ValueError(f"{needed_by} needs {path}, which is missing: {remedy}")
    return path


def check_shapes(images_hat: Tensor, images: Tensor, min_side: int) -> None:
    """Raise `ValueError` unless both are (B, 3, H, W) with sides of `min_side` px or more."""
    if images_hat.shape != images.shape or images.ndim != 4 or images.shape[1] != 3:
        shapes = f"{tuple(images_hat.shape)} and {tuple(images.shape)}"
        raise ValueError(f"the perceptual loss needs two batches (B, 3, H, W), got {shapes}")
    height, width = images.shape[2:]
    if min(height, width) < min_side:
        size = f"{height} x {width} px"
        raise ValueError(f"the perceptual loss needs sides of {min_side} px or more, got {size}")


def _build_graph() -> nn.Module:
    """LPIPS on the meta device: parameters without values cannot be left at random by mistake."""
    import lpips  # takes two seconds, which `find_weights` does not need

    with torch.device("meta"), warnings.catch_warnings():
        # lpips asks torchvision for an untrained VGG16 with an argument that is deprecated.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)


def _read_torchvision(path: Path, graph: nn.Module) -> dict[str, Tensor]:
    """State dict of `graph`: trunk of torchvision from `path`, heads of the lpips package."""
    import lpips

    heads_path = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(heads_path, map_location="cpu", weights_only=True)
    vgg16 = torch.load(path, map_location="cpu", weights_only=True)
    state = {f"scaling_layer.{k}": v for k, v in lpips.ScalingLayer().state_dict().items()}
    for name in graph.state_dict():
        if name.startswith("net."):  # net.slice3.12.bias is features.12.bias
            state[name] = vgg16["features." + name.split(".", 2)[2]]
        elif name.startswith("lin"):  # lin3.model.1.weight has a second name, lins.3.model.1.weight
            state[name] = heads[name.replace("lins.", "lin")]
    return state

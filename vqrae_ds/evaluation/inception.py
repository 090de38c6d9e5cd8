"""The network behind rFID: TensorFlow's Inception of 2015, from a file on this machine.

The graph is that of the `torch-fidelity` package: 8-bit images, resized to 299 x 299 as
TensorFlow 1 did, and the 2048 features behind the last pooling. With other weights a distance of
its features is not comparable with any published FID, so `is_canonical` says which ones these are.
Nothing is downloaded, and no pickled code is run.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_FEATURES = "2048"  # as the package calls those behind the last pooling
# The file of pytorch-fid and torch-fidelity ends in the first digits of its sha256.
CANONICAL_SHA256 = "6726825d"
WEIGHTS = f"pt_inception-2015-12-05-{CANONICAL_SHA256}.pth"
_REMEDY = (
    f"give {WEIGHTS} (github.com/mseitzer/pytorch-fid, release fid_weights), or leave the option "
    "out and with it rFID"
)


class Inception(nn.Module):
    """8-bit images (B, 3, H, W) -> features (B, 2048), fp32; frozen.

    Raises `ValueError` where `path` is missing or does not hold this network.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state = _read(path)
        # The package unpickles whatever file it is given: it gets these tensors and nothing else.
        tensors = io.BytesIO()
        torch.save(state, tensors)
        tensors.seek(0)
        try:
            self.graph = FeatureExtractorInceptionV3("inception", [_FEATURES], tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} holds another network than this Inception") from error
        self.is_canonical = _sha256(path).startswith(CANONICAL_SHA256)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Raises an error of the package for images that are not uint8."""
        with torch.no_grad():
            return self.graph(images_B3HW)[0]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file, or of a state dict without code."""
    if not path.is_file():
        raise ValueError(f"rFID needs {path}, which is missing: {_REMEDY}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is not a file of weights: {_REMEDY}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a file of weights: {_REMEDY}")
    return dict(state)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

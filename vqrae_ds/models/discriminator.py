"""The patch discriminator of pix2pix and VQGAN: each logit judges one patch of the image.

After `NLayerDiscriminator` of github.com/CompVis/taming-transformers (arXiv:1611.07004), with two
differences: GroupNorm instead of BatchNorm, because the logits of an image must not depend on how a
batch is split over ranks; and PyTorch's own initialisation.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

MAX_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """4 x 4 convolutions: `num_layers` that halve the image, one that does not, and the logits.

    The first has `channels` channels, each other twice those before it, up to 8 times `channels`.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (width_in, width_out) in enumerate(pairwise(widths), start=1):
            layers += [
                nn.Conv2d(width_in, width_out, 4, 2 if i < num_layers else 1, 1, bias=False),
                nn.GroupNorm(math.gcd(MAX_GROUPS, width_out), width_out),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, h, w) in fp32 of images in [0, 1]; positive means real."""
        dtype = self.layers[0].weight.dtype
        return self.layers((images_B3HW * 2 - 1).to(dtype)).float()

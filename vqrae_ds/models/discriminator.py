"""The patch discriminator of pix2pix and VQGAN: each logit judges one patch of the image (arXiv:1611.07004).

GroupNorm instead of BatchNorm: the logits of an image must not depend on how a batch is split over ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Strided 4 x 4 convolutions, `num_layers` of them halving the image, then one logit a position."""

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (width_in, width_out) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(width_in, width_out, 4, stride, 1, bias=False),
                nn.GroupNorm(min(GROUPS, width_out), width_out),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images in [0, 1]; high means real."""
        dtype = self.layers[0].weight.dtype
        return self.layers((images_B3HW * 2 - 1).to(dtype)).float()

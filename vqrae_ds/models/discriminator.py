"""The discriminators: `patch` of pix2pix and VQGAN, `blur_pool` of the 1d-tokenizer.

Both use GroupNorm, because the logits of an image must not depend on how a batch is split over
ranks, and PyTorch's own initialisation.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.config import AdversarialConfig

MAX_GROUPS = 32
BINOMIAL_4 = (1.0, 3.0, 3.0, 1.0)
POOLED_SIDE = 16  # logits a side, whatever the image's size
AVERAGE_DECAY = 0.999


def build_discriminator(config: AdversarialConfig) -> nn.Module:
    """The discriminator that `config` asks for, with random weights.

    Its attribute `averages` is a `LogitAverages` where LeCam is on, else None.
    """
    lecam = config.lecam_weight > 0
    if config.discriminator == "blur_pool":
        return BlurPoolDiscriminator(config.channels, config.num_layers, lecam=lecam)
    return PatchDiscriminator(config.channels, config.num_layers, lecam=lecam)


class PatchDiscriminator(nn.Module):
    """4 x 4 convolutions: `num_layers` that halve the image, one that does not, and the logits.

    After `NLayerDiscriminator` of github.com/CompVis/taming-transformers (arXiv:1611.07004), but
    for the norms and the initialisation. The first convolution has `channels` channels, each other
    twice those before it, up to 8 times `channels`.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, *, lecam: bool = False) -> None:
        super().__init__()
        self.averages = LogitAverages() if lecam else None
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (width_in, width_out) in enumerate(pairwise(widths), start=1):
            layers += [
                nn.Conv2d(width_in, width_out, 4, 2 if i < num_layers else 1, 1, bias=False),
                _group_norm(width_out),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, h, w) in fp32 of images in [0, 1]; positive means real."""
        dtype = self.layers[0].weight.dtype
        return self.layers((images_B3HW * 2 - 1).to(dtype)).float()


class BlurPoolDiscriminator(nn.Module):
    """`num_layers` stages that blur before they halve, and 16 x 16 logits.

    After `NLayerDiscriminator` of github.com/bytedance/1d-tokenizer
    (modeling/modules/discriminator.py): the first stage keeps `channels` channels, each other
    doubles them; images are not centred. Where 32 groups do not divide a narrow stage it has fewer.
    """

    def __init__(self, channels: int = 128, num_layers: int = 3, *, lecam: bool = False) -> None:
        super().__init__()
        self.averages = LogitAverages() if lecam else None
        widths = [channels, *(channels * 2**i for i in range(num_layers))]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 5, 1, 2), nn.LeakyReLU(0.1)]
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.Conv2d(width_in, width_out, 3, 1, 1),
                BlurPool(),
                _group_norm(width_out),
                nn.LeakyReLU(0.1),
            ]
        self.layers = nn.Sequential(
            *layers,
            nn.AdaptiveMaxPool2d(POOLED_SIDE),
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(widths[-1], 1, 5, 1, 2),
        )

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, 16, 16) in fp32 of images in [0, 1]; positive means real.

        Any size of 2 ** num_layers pixels or more will do.
        """
        return self.layers(images_B3HW.to(self.layers[0].weight.dtype)).float()


class BlurPool(nn.Module):
    """Halves a map: each channel is smoothed with the binomial kernel 1 3 3 1, every second kept.

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv:1904.11486). An odd side is
    rounded up. The kernel is no part of the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        row_4 = torch.tensor(BINOMIAL_4)
        # Multiples of 1/64 up to 9/64: a cast to bf16 changes none of them.
        kernel_44 = torch.outer(row_4, row_4) / row_4.sum().square()
        self.register_buffer("kernel_44", kernel_44, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), beyond the border zeros."""
        _, channels, height, width = x_BCHW.shape
        padded = F.pad(x_BCHW, (1, 1 + width % 2, 1, 1 + height % 2))
        kernels_C144 = self.kernel_44.to(x_BCHW.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(padded, kernels_C144, stride=2, groups=channels)


class LogitAverages(nn.Module):
    """Moving averages of the mean logits of real and of fake images, which LeCam compares with.

    A step moves them by a thousandth. The first one sets them: from zero they would hold all
    logits near zero for a thousand steps. Buffers, because they are part of a checkpoint; fp32,
    because a thousandth of a change is lost in bf16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means_2", torch.zeros(2, dtype=torch.float32))  # real, fake
        self.register_buffer("started", torch.zeros((), dtype=torch.float32))  # 1 once there is one

    @torch.no_grad()
    def update(self, means_2: Tensor) -> None:
        """Take in the mean logits, real and fake, of a step; none of a step that diverged."""
        usable = means_2.isfinite().all()
        decay = AVERAGE_DECAY * self.started
        moved_2 = decay * self.means_2 + (1 - decay) * means_2
        # Chosen on the device: to ask would make every step wait for it.
        self.means_2.copy_(torch.where(usable, moved_2, self.means_2))
        self.started.copy_(torch.where(usable, torch.ones_like(self.started), self.started))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)

"""The patch discriminator: what a logit sees, and that it sees its own image alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vqrae_ds.models.discriminator import PatchDiscriminator


def make_discriminator(channels: int = 8, num_layers: int = 2) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(channels, num_layers)


def random_images(batch: int, side: int) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_judges_a_patch_of_the_published_size(num_layers: int, field: int) -> None:
    """Isola et al., section 4.4: receptive fields of 16, 34 and 70 pixels."""
    discriminator = make_discriminator(4, num_layers)
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # its statistics are those of the whole image
    images = random_images(1, 128).requires_grad_()
    logits = discriminator(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert len(rows) == rows.max() - rows.min() + 1 == field


@pytest.mark.parametrize(("num_layers", "side"), [(1, 30), (2, 14), (3, 6)])
def test_one_logit_a_position(num_layers: int, side: int) -> None:
    assert make_discriminator(4, num_layers)(random_images(2, 64)).shape == (2, 1, side, side)


def test_layers_are_those_of_the_reference() -> None:
    """NLayerDiscriminator with ndf=64 and n_layers=3, by its kernels."""
    convolutions = [m for m in PatchDiscriminator().modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(c.weight.shape[:2]) for c in convolutions] == [
        (64, 3),
        (128, 64),
        (256, 128),
        (512, 256),
        (1, 512),
    ]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert [c.bias is not None for c in convolutions] == [True, False, False, False, True]
    assert all(c.kernel_size == (4, 4) and c.padding == (1, 1) for c in convolutions)


def test_logits_do_not_depend_on_the_other_images() -> None:
    discriminator, images = make_discriminator(), random_images(4, 32)
    together = discriminator(images)
    apart = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, apart)


def test_images_are_centred() -> None:
    """Mid-grey is zero inside: with all biases at zero nothing is left."""
    discriminator = make_discriminator()
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert not discriminator(torch.full((1, 3, 32, 32), 0.5)).any()
    assert discriminator(torch.ones(1, 3, 32, 32)).any()


@pytest.mark.parametrize("channels", [1, 20, 24])
def test_any_number_of_channels_can_be_grouped(channels: int) -> None:
    assert make_discriminator(channels, 3)(random_images(1, 32)).isfinite().all()


def test_bfloat16_parameters_give_fp32_logits_of_fp32_images() -> None:
    discriminator, images = make_discriminator(), random_images(2, 32)
    expected = discriminator(images)
    logits = discriminator.bfloat16()(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.05)

"""The discriminators: their layers, what a logit sees, and that it sees its own image alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.config import AdversarialConfig
from vqrae_ds.models.discriminator import (
    BlurPool,
    BlurPoolDiscriminator,
    PatchDiscriminator,
    build_discriminator,
)

BOTH = [PatchDiscriminator, BlurPoolDiscriminator]


def make_discriminator(
    channels: int = 8, num_layers: int = 2, kind: type[nn.Module] = PatchDiscriminator
) -> nn.Module:
    torch.manual_seed(0)
    return kind(channels, num_layers)


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


@pytest.mark.parametrize("kind", BOTH)
def test_logits_do_not_depend_on_the_other_images(kind: type[nn.Module]) -> None:
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


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("channels", [1, 20, 24])
def test_any_number_of_channels_can_be_grouped(channels: int, kind: type[nn.Module]) -> None:
    assert make_discriminator(channels, 3, kind)(random_images(1, 32)).isfinite().all()


@pytest.mark.parametrize("kind", BOTH)
def test_bfloat16_parameters_give_fp32_logits_of_fp32_images(kind: type[nn.Module]) -> None:
    discriminator, images = make_discriminator(kind=kind), random_images(2, 32)
    expected = discriminator(images)
    logits = discriminator.bfloat16()(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.05)


def blurred_by_hand(x_BCHW: Tensor) -> Tensor:
    """The binomial kernel is three averages of two neighbours, one after the other."""
    height, width = x_BCHW.shape[2:]
    x_BCHW = F.pad(x_BCHW, (1, 1 + width % 2, 1, 1 + height % 2))
    for dim in (2, 3):
        for _ in range(3):
            size = x_BCHW.shape[dim] - 1
            x_BCHW = (x_BCHW.narrow(dim, 0, size) + x_BCHW.narrow(dim, 1, size)) / 2
    return x_BCHW[:, :, ::2, ::2]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (1, 2)])
def test_blur_pooling_smooths_and_halves(height: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width)
    pooled = BlurPool()(x)
    assert pooled.shape == (2, 3, -(-height // 2), -(-width // 2))
    torch.testing.assert_close(pooled, blurred_by_hand(x))
    constant = BlurPool()(torch.full((1, 1, 16, 16), 3.0))
    assert (constant[..., 1:-1, 1:-1] == 3).all(), "the kernel sums to one"


def test_bfloat16_changes_no_number_of_the_kernel() -> None:
    kernel = BlurPool().kernel_44
    assert torch.equal(kernel.bfloat16().float(), kernel)


def test_layers_of_the_blur_pool_discriminator() -> None:
    """NLayerDiscriminator of the 1d-tokenizer with hidden_channels=128 and num_stages=3."""
    layers = list(BlurPoolDiscriminator().layers)
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    assert [(*c.weight.shape[:2], c.kernel_size[0]) for c in convolutions] == [
        (128, 3, 5),
        (128, 128, 3),
        (256, 128, 3),
        (512, 256, 3),
        (512, 512, 1),
        (1, 512, 5),
    ]
    assert all(c.stride == (1, 1) and c.bias is not None for c in convolutions)
    assert all(2 * c.padding[0] + 1 == c.kernel_size[0] for c in convolutions)
    assert [m.num_groups for m in layers if isinstance(m, nn.GroupNorm)] == [32, 32, 32]
    stage = ["Conv2d", "BlurPool", "GroupNorm", "LeakyReLU"]
    end = ["AdaptiveMaxPool2d", "Conv2d", "LeakyReLU", "Conv2d"]
    assert [type(m).__name__ for m in layers] == ["Conv2d", "LeakyReLU", *stage * 3, *end]
    assert {m.negative_slope for m in layers if isinstance(m, nn.LeakyReLU)} == {0.1}


def test_the_blur_pool_discriminator_step_by_step() -> None:
    """The same logits from its weights by functions alone; 80 px are 20 before the pooling."""
    discriminator, x = make_discriminator(8, 2, BlurPoolDiscriminator), random_images(2, 80)
    logits, w = discriminator(x), dict(discriminator.named_parameters())
    convolved = F.conv2d(x, w["layers.0.weight"], w["layers.0.bias"], padding=2)
    x = F.leaky_relu(convolved, 0.1)
    for i, groups in ((2, 8), (6, 16)):
        x = F.conv2d(x, w[f"layers.{i}.weight"], w[f"layers.{i}.bias"], padding=1)
        x = blurred_by_hand(x)
        x = F.group_norm(x, groups, w[f"layers.{i + 2}.weight"], w[f"layers.{i + 2}.bias"])
        x = F.leaky_relu(x, 0.1)
    starts, ends = [i * 20 // 16 for i in range(16)], [-(-(i + 1) * 20 // 16) for i in range(16)]
    windows = list(zip(starts, ends, strict=True))
    pooled = [[x[:, :, a:b, c:d].amax((2, 3)) for c, d in windows] for a, b in windows]
    x = torch.stack([torch.stack(row, -1) for row in pooled], -2)
    x = F.leaky_relu(F.conv2d(x, w["layers.11.weight"], w["layers.11.bias"]), 0.1)
    x = F.conv2d(x, w["layers.13.weight"], w["layers.13.bias"], padding=2)
    torch.testing.assert_close(logits, x)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (30, 37)])
def test_the_blur_pool_discriminator_gives_as_many_logits_at_any_size(
    height: int, width: int
) -> None:
    images = torch.rand(2, 3, height, width)
    assert make_discriminator(4, 3, BlurPoolDiscriminator)(images).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("lecam_weight", [0.0, 0.001])
@pytest.mark.parametrize(("name", "kind"), [("patch", BOTH[0]), ("blur_pool", BOTH[1])])
def test_the_configuration_chooses(name: str, kind: type[nn.Module], lecam_weight: float) -> None:
    config = AdversarialConfig(
        discriminator=name, channels=4, num_layers=2, lecam_weight=lecam_weight
    )
    discriminator = build_discriminator(config)
    assert type(discriminator) is kind
    assert (discriminator.averages is not None) == (lecam_weight > 0)
    plain = {n for n, _ in kind(4, 2).named_parameters()}
    averages = {"averages.means_2", "averages.started"} if lecam_weight else set()
    assert set(discriminator.state_dict()) == plain | averages, "no kernel of the blur"

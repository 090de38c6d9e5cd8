"""The decoder: its blocks against the formulas, its grids, and patches back to pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.config import DecoderConfig
from vqrae_ds.models.decoder import (
    Attention,
    Block,
    Decoder,
    PositionEmbedding,
    patchify,
    unpatchify,
)

CONFIG = {
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 3,
    "intermediate_size": 40,
    "norm_type": "rms_norm",
    "use_qk_norm": True,
    "layer_scale_init_value": 0.1,
}
SIDE, PATCH_SIZE = 4, 2


def make_config(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**CONFIG, **changes})


def make_decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(make_config(**changes), SIDE, PATCH_SIZE)


def cut_in_patches(images_B3HW: Tensor, q: int) -> Tensor:
    """Images -> patches (B, h, w, 3 * q * q), patch by patch."""
    H, W = images_B3HW.shape[2:]
    rows = [
        torch.stack([images_B3HW[:, :, y : y + q, x : x + q].flatten(1) for x in range(0, W, q)], 1)
        for y in range(0, H, q)
    ]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("h", "w", "q"), [(2, 3, 4), (1, 1, 14), (5, 2, 1)])
def test_patchify_cuts_and_unpatchify_is_its_inverse(h: int, w: int, q: int) -> None:
    images = torch.rand(2, 3, h * q, w * q)
    patches = cut_in_patches(images, q)
    assert patches.shape == (2, h, w, 3 * q * q)
    assert torch.equal(unpatchify(patches), images)
    assert torch.equal(patchify(images, h), patches)


def test_attention_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(make_config())
    with torch.no_grad():
        attention.q_norm.weight.uniform_(0.5, 2)
        attention.k_norm.weight.uniform_(0.5, 2)
    x_BND = torch.randn(2, 5, 24)
    heads = []
    for head in range(3):
        q, k, v = (attention.qkv(x_BND)[..., part * 24 + head * 8 :][..., :8] for part in range(3))
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for x, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
        heads.append((q @ k.mT / 8**0.5).softmax(-1) @ v)
    torch.testing.assert_close(attention(x_BND), attention.proj(torch.cat(heads, -1)))


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_a_block_is_pre_norm_with_layer_scale(norm_type: str) -> None:
    torch.manual_seed(0)
    block, x_BND = Block(make_config(norm_type=norm_type)), torch.randn(2, 5, 24)
    norm = nn.LayerNorm if norm_type == "layer_norm" else nn.RMSNorm
    assert type(block.norm1) is type(block.norm2) is norm
    with torch.no_grad():
        for index, parameter in enumerate(block.parameters()):
            if parameter.ndim == 1:  # norms, scales and biases, all different
                parameter.add_(0.01 * index)
    half = x_BND + block.scale1.scale * block.attention(block.norm1(x_BND))
    hidden = F.gelu(block.mlp.fc1(block.norm2(half)))
    torch.testing.assert_close(block(x_BND), half + block.scale2.scale * block.mlp.fc2(hidden))


def test_the_head_makes_patches_of_the_hidden_features_in_row_major_order() -> None:
    decoder, x_BND = make_decoder(), torch.randn(2, 6, 24)
    output = decoder(x_BND, 2, 3)
    assert output.patches_BhwP.shape == (2, 2, 3, 3 * PATCH_SIZE**2)
    assert output.hidden_BND.shape == (2, 6, 24)
    tokens_BNP = decoder.head(output.hidden_BND)
    assert torch.equal(output.patches_BhwP[:, 1, 0], tokens_BNP[:, 3])


def test_it_starts_mid_grey() -> None:
    decoder = make_decoder()
    assert (decoder.head.bias == 0.5).all()
    images = unpatchify(decoder(torch.randn(2, 16, 24), 4, 4).patches_BhwP)
    assert images.mean().item() == pytest.approx(0.5, abs=0.2)


def test_without_qk_norm_there_is_none() -> None:
    assert make_decoder().blocks[0].attention.q_norm.weight.shape == (8,)  # a head's width
    bare = make_decoder(use_qk_norm=False)
    assert not any("q_norm" in name or "k_norm" in name for name in bare.state_dict())


def test_the_native_grid_gets_the_position_embedding_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(F, "interpolate", None)
    position = PositionEmbedding(SIDE, 24)
    x_BND = torch.zeros(2, 16, 24)
    assert torch.equal(position(x_BND, 4, 4), position.weight.expand(2, -1, -1))


@pytest.mark.parametrize(("h", "w"), [(2, 8), (8, 2), (7, 5), (1, 1), (8, 8)])
def test_other_grids_interpolate_it(h: int, w: int) -> None:
    """Rows and columns keep their places: features that depend on one alone still do."""
    position = PositionEmbedding(SIDE, 2)
    with torch.no_grad():
        grid = torch.arange(16.0).view(4, 4)
        position.weight.copy_(torch.stack([grid // 4, grid % 4], -1).view(1, 16, 2))
    rows_hw, columns_hw = position(torch.zeros(1, h * w, 2), h, w).view(h, w, 2).unbind(-1)
    for found_hw, length in ((rows_hw, h), (columns_hw.T, w)):
        line = F.interpolate(
            torch.arange(4.0).view(1, 1, 4, 1), (length, 1), mode="bicubic", align_corners=False
        ).view(length, 1)
        torch.testing.assert_close(found_hw, line.expand_as(found_hw), rtol=0, atol=1e-5)


def test_bfloat16_positions_are_interpolated_in_fp32() -> None:
    position = PositionEmbedding(SIDE, 8).bfloat16()
    exact = PositionEmbedding(SIDE, 8)
    exact.load_state_dict(position.state_dict())
    x_BND = torch.zeros(1, 15, 8)
    found = position(x_BND.bfloat16(), 3, 5)
    assert torch.equal(found, exact(x_BND, 3, 5).bfloat16())


def test_gradients_reach_every_parameter() -> None:
    decoder = make_decoder()
    decoder(torch.randn(2, 6, 24), 2, 3).patches_BhwP.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())

"""Each family against the transformers library's own model, at several resolutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.encoder_families import (
    BLOCKS,
    FAMILIES,
    WIDTH,
    model_config,
    small_encoder,
)
from tests.tiny import random_images
from vqrae_ds import VQRAE
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.positions import resize_positions
from vqrae_ds.models.weights import SINGLE_FILE

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NUM_PREFIX_TOKENS = {"siglip": 0, "dinov2_with_registers": 1 + 4}
SIZES = [(224, 224), (448, 448), (224, 336)]  # multiples of 14 and of 16


def library_model(family: str) -> nn.Module:
    """The library's model as it is, without what our encoder changes, with the same weights."""
    import transformers

    config = dict(FAMILIES[family][1])
    name = {
        "internvl_vision": "InternVLVision",
        "siglip_vision_model": "SiglipVision",
        "dinov2": "Dinov2",
        "dinov2_with_registers": "Dinov2WithRegisters",
    }[config["model_type"]]
    built = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}Model")(built).eval()
    weights = small_encoder(family).model.state_dict()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("head." in name or "mask_token" in name for name in missing), missing
    return model


def hidden_states(family: str, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """The library's last output and, stacked (blocks + 1, B, N, D), its residual streams."""
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (HALF if family == "siglip" else IMAGENET))
    options = {"interpolate_pos_encoding": True} if family == "siglip" else {}
    output = library_model(family)((images_B3HW - mean) / std, output_hidden_states=True, **options)
    start = NUM_PREFIX_TOKENS.get(family, 1)
    return output.last_hidden_state[:, start:], torch.stack(output.hidden_states)[:, :, start:]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_the_library(family: str, height: int, width: int) -> None:
    images = random_images(height, width, batch=1)
    expected, _ = hidden_states(family, images)
    encoder = small_encoder(family)
    features = encoder(images)
    assert features.shape == (1, height * width // encoder.patch_size**2, WIDTH)
    assert encoder.hidden_size == WIDTH
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("feature_layer", [1, -1, -2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_chosen_layer_and_a_plain_norm(family: str, feature_layer: int) -> None:
    images = random_images(224, 224, batch=1)
    last, residuals = hidden_states(family, images)
    number = feature_layer if feature_layer > 0 else BLOCKS + 1 + feature_layer
    whole = small_encoder(family).model.state_dict()
    for plain_norm in (False, True):
        config = model_config(family, feature_layer=feature_layer, plain_norm=plain_norm)
        assert config.feature_layer == config.decoder.num_layers == number
        encoder = build_encoder(config).eval()
        kept = {name: value for name, value in whole.items() if not encoder.leaves_out(name)}
        encoder.model.load_state_dict(kept)  # strictly: what is left out is what is not built
        expected = last if number == BLOCKS else residuals[number]
        if plain_norm:
            expected = F.layer_norm(residuals[number], (WIDTH,), eps=1e-6)
            norm = getattr(encoder.model, encoder.norm_path)
            assert isinstance(norm, nn.LayerNorm) and not list(norm.parameters())
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_blocks_beyond_the_configuration_are_not_left_out_but_refused(tmp_path: Path) -> None:
    """The weights of a deeper version fit in every shape, and are another encoder."""
    weights = small_encoder("siglip").model.state_dict()
    extra = {n.replace("layers.2.", "layers.3."): w for n, w in weights.items() if "layers.2." in n}
    save_file({**weights, **{n: w.clone() for n, w in extra.items()}}, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["siglip"][1]))
    for feature_layer in (-1, 1):
        with pytest.raises(ValueError, match=r"unexpected encoder\.layers\.3\."):
            VQRAE("SigLIP", tmp_path, 64, embedding_dim=16, feature_layer=feature_layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_takes_part_and_can_be_drawn_anew(family: str) -> None:
    encoder = small_encoder(family)
    encoder(random_images(224, 224, batch=1)).square().sum().backward()
    unused = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert not unused
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(torch.nan)
    for _, reset in encoder.resets():
        reset()
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_positions_are_interpolated_in_fp32(family: str) -> None:
    """The bf16 model adds what fp32 interpolation gives, rounded once."""
    encoder = small_encoder(family).bfloat16()
    embeddings = encoder.model.embeddings
    for parameter in (
        embeddings.patch_embedding.parameters()
        if family == "siglip"
        else (
            *embeddings.patch_embeddings.parameters(),
            embeddings.cls_token,
        )
    ):
        parameter.zero_()  # what is left are the positions
    options = {"interpolate_pos_encoding": True} if family == "siglip" else {}
    height, width = 224, 336
    added = embeddings(torch.zeros(1, 3, height, width).bfloat16(), **options)
    if family == "siglip":
        table_1ND = embeddings.position_embedding.weight[None]
    else:
        table_1ND = embeddings.position_embeddings[:, 1:]
    side = round(table_1ND.shape[1] ** 0.5)
    h, w = height // encoder.patch_size, width // encoder.patch_size
    grid = table_1ND.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    antialias = family == "dinov2_with_registers"  # as its authors do
    expected = F.interpolate(grid, (h, w), mode="bicubic", antialias=antialias)
    expected = expected.flatten(2).transpose(1, 2).bfloat16()
    assert torch.equal(added[:, -h * w :], expected)


def test_positions_of_the_native_grid_stay_as_they_are() -> None:
    positions = torch.randn(1, 16, 3)
    assert resize_positions(positions, 4, 4) is positions
    wide = resize_positions(positions, 4, 6)
    assert wide.shape == (1, 24, 3)
    constant = resize_positions(torch.full((1, 16, 3), 7.0), 3, 9)
    torch.testing.assert_close(constant, torch.full((1, 27, 3), 7.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(225, 448, "224 or {} for 225"), (447, 223, "{} for 447 and {} for 223")],
)
def test_other_sizes_are_refused_with_the_nearest_valid_ones(
    family: str, height: int, width: int, nearest: str
) -> None:
    encoder = small_encoder(family)
    p = encoder.patch_size
    around = [f"{side // p * p} or {side // p * p + p}" for side in (height, width) if side % p]
    filled = nearest.format(224 + p) if height == 225 else nearest.format(*around)
    with pytest.raises(ValueError, match=f"multiples of {p}, the patch size; nearest: {filled}$"):
        encoder(random_images(height, width))


@pytest.mark.parametrize(
    ("encoder_cls", "model_type", "message"),
    [
        ("SigLIP2wNorm", "dinov2", '"SigLIP2wNorm" does not fit .*"dinov2".* that is DINOv2$'),
        ("DINOv2", "siglip_vision_model", "that is SigLIP or SigLIP2$"),
        ("InternViT", "intern_vit_6b", "tools/import_encoder.py SOURCE OUT"),
        ("SigLIP2wNorm", "siglip", "tools/import_encoder.py SOURCE OUT"),
    ],
)
def test_the_configuration_of_another_family_is_refused(
    encoder_cls: str, model_type: str, message: str
) -> None:
    from vqrae_ds.config import ModelConfig, resolve_model

    encoder = {**FAMILIES["internvit_6b"][1], "model_type": model_type}
    with pytest.raises(ValueError, match=message):
        resolve_model(ModelConfig(encoder_cls=encoder_cls, encoder_config=encoder))


@pytest.mark.parametrize("layer", [0, BLOCKS + 1, -BLOCKS - 1])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"feature_layer = {layer} is no block .* 1 to {BLOCKS}"):
        model_config("siglip", feature_layer=layer)

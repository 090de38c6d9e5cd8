"""Any size of whole patches through encode -> indices -> decode, and outputs larger than inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.encoder_families import FAMILIES, WIDTH, model_config
from tests.tiny import random_images
from vqrae_ds import VQRAE
from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.models.training_model import TrainingModel

SMALL_DECODER = {"num_layers": 1}


def build(family: str, **options: object) -> VQRAE:
    """A model whose codes differ from image to image."""
    torch.manual_seed(0)
    config = model_config(family, decoder=SMALL_DECODER, **options)
    model = VQRAE(config=config).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (448, 448), (224, 336)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_encode_to_indices_and_back(family: str, height: int, width: int) -> None:
    p = model_config(family).patch_size
    q = 16 if height % p else p  # 256 px are no multiple of 14: the output's patch is 16 then
    model, images = build(family, output_patch_size=q), random_images(height, width, batch=1)
    indices = model.encode_to_indices(images)
    h, w = height // q, width // q
    assert indices.shape == (1, h, w)
    assert len(indices.unique()) > 1
    images_hat = model.decode_from_indices(indices)
    assert images_hat.shape == (1, 3, height, width)
    output = model(images)
    assert torch.equal(output.indices_Bhw, indices)
    assert torch.equal(output.reconstruction, images_hat)
    assert model.encode(images).shape == (1, h * w, WIDTH)
    assert torch.equal(model.encode(images), output.features_BND)


@torch.no_grad()
def test_224_pixels_of_the_encoder_are_256_with_patches_of_16() -> None:
    model = build("internvit_6b", output_patch_size=16)
    assert model.config.image_size == 256  # the encoder's own 224 are 16 x 16 tokens
    images = random_images(256, 384)
    seen = model.resize_for_encoder(images)
    expected = F.interpolate(images, (224, 336), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(seen, expected)
    assert torch.equal(model.encode(images), model.encoder(seen))
    indices = model.encode_to_indices(images)
    assert indices.shape == (2, 16, 24)
    assert model.decode_from_indices(indices).shape == images.shape
    same = build("internvit_6b")
    assert same.resize_for_encoder(images) is images


@pytest.mark.parametrize("side", [224, 448])
@torch.no_grad()
def test_the_scale_is_never_guessed(side: int) -> None:
    """These are whole patches of 14 and of 16 pixels: an image is at the output's scale always."""
    vqrae = build("internvit_6b", output_patch_size=16, image_size=448)
    model, images = TrainingModel(vqrae, build("internvit_6b").encoder), random_images(side, side)
    output, grid = model(images), side // 16
    assert output.vqrae.indices_Bhw.shape == (2, grid, grid)
    assert output.vqrae.reconstruction.shape == images.shape
    assert torch.equal(vqrae.encode_to_indices(images), output.vqrae.indices_Bhw)
    seen = vqrae.resize_for_encoder(images)
    assert seen.shape == (2, 3, 14 * grid, 14 * grid)
    assert torch.equal(output.vqrae.features_BND, vqrae.encoder(seen))
    assert torch.equal(output.teacher_features_BND, model.teacher(seen))
    assert vqrae.decoder.position.weight.shape[1] == 28 * 28, "learned on the grid of training"


@pytest.mark.parametrize("method", ["forward", "encode", "encode_to_indices", "resize_for_encoder"])
def test_sizes_that_are_no_whole_tokens_are_refused(method: str) -> None:
    model = build("internvit_6b", output_patch_size=16)
    message = "252 x 256 pixels.* multiples of 16, the patch size; nearest: 240 or 256 for 252"
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(random_images(252, 256))


@pytest.mark.parametrize(
    ("options", "image_size", "grid"),
    [
        ({}, 224, 16),
        ({"output_patch_size": 16}, 256, 16),
        ({"output_patch_size": 16, "image_size": 512}, 512, 32),
        ({"image_size": 448}, 448, 32),
        ({"output_patch_size": 7}, 112, 16),
    ],
)
def test_the_grid_follows_from_the_output(options: dict, image_size: int, grid: int) -> None:
    config = model_config("internvit_6b", **options)
    assert (config.image_size, config.grid_side, config.patch_size) == (image_size, grid, 14)


def test_a_side_of_the_output_must_be_whole_tokens() -> None:
    with pytest.raises(
        ValueError, match="= 224 .* of 15, model.output_patch_size; nearest: 210 or 225"
    ):
        model_config("internvit_6b", output_patch_size=15, image_size=224)


class TestOptions:
    """What stands between encoder and quantiser."""

    def test_without_projections_the_widths_must_agree(self) -> None:
        with pytest.raises(ValueError, match="one width throughout: the encoder has 32"):
            model_config("siglip", use_projections=False)
        model = build("siglip", use_projections=False, embedding_dim=WIDTH)
        names = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert names == {"encoder", "quantizer", "decoder"}
        output = model(random_images(64, 64))
        torch.testing.assert_close(output.z_BNE, output.features_BND)

    @pytest.mark.parametrize("kind", ["calibrated", "layer_norm", "none"])
    def test_standardization(self, kind: str, tmp_path) -> None:
        model = build("siglip", standardization=kind, use_projections=False, embedding_dim=WIDTH)
        images = random_images(64, 64)
        output = model(images)
        features = output.features_BND
        expected = F.layer_norm(features, (WIDTH,)) if kind == "layer_norm" else features
        torch.testing.assert_close(output.z_BNE, expected)
        assert ("standardize.mean" in model.state_dict()) == (kind == "calibrated")
        model.save_pretrained(tmp_path)
        again = VQRAE.from_pretrained(tmp_path)
        assert torch.equal(again.encode_to_indices(images), model.encode_to_indices(images))

    @pytest.mark.parametrize("use_simvq", [True, False])
    def test_either_quantizer_survives_saving(self, use_simvq: bool, tmp_path) -> None:
        model = build("dinov2", use_simvq=use_simvq)
        assert type(model.quantizer).__name__ == ("SimVQ" if use_simvq else "EMACodebook")
        images = random_images(56, 84)
        model.train()(images)  # moving averages move
        model.eval()
        model.save_pretrained(tmp_path)
        again = VQRAE.from_pretrained(tmp_path)
        indices = model.encode_to_indices(images)
        assert torch.equal(again.encode_to_indices(images), indices)
        assert torch.equal(again.decode_from_indices(indices), model.decode_from_indices(indices))
        for name, buffer in model.named_buffers():
            if "code_counts" not in name:
                assert torch.equal(again.get_buffer(name), buffer), name
        assert again.get_codebook_usage() == len(indices.unique()) / 64
        rounded = {name: value.bfloat16() for name, value in model.named_parameters()}
        save_file({**model.state_dict(), **rounded}, tmp_path / "model.safetensors")
        half = VQRAE.from_pretrained(tmp_path)
        indices = half.encode_to_indices(images)
        assert half.decoder.head.weight.dtype == torch.bfloat16
        assert torch.equal(half.decode_from_indices(indices), half(images).reconstruction)

    def test_features_that_are_not_finite_are_refused(self) -> None:
        model = build("siglip")
        with torch.no_grad():
            model.encoder.model.post_layernorm.bias.fill_(torch.nan)
        with pytest.raises(ValueError, match="finite"):
            model.encode_to_indices(random_images(64, 64))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ema_decay": 0.9}, "ema_decay = 0.9 has no effect with model.use_simvq = true"),
            ({"use_simvq": False, "legacy": False}, "legacy = false has no effect"),
            (
                {"use_simvq": False, "codebook_projection_init": "identity"},
                "codebook_projection_init",
            ),
        ],
    )
    def test_an_option_without_effect_is_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            model_config("siglip", **options)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("init", ["linear", "identity", "orthogonal"])
    def test_options_reach_simvq(self, bias: bool, init: str) -> None:
        options = {"codebook_projection_bias": bias, "codebook_projection_init": init}
        projection = build("siglip", **options).quantizer.embedding_proj
        assert (projection.bias is not None) == bias
        eye = torch.eye(16)
        assert torch.equal(projection.weight, eye) == (init == "identity")
        product = projection.weight @ projection.weight.T
        assert torch.allclose(product, eye, atol=1e-5) == (init != "linear")


def test_a_configuration_resolves_to_itself() -> None:
    config = model_config("dinov2", feature_layer=-2, output_patch_size=16)
    assert resolve_model(config) == config
    assert resolve_model(ModelConfig.model_validate_json(config.model_dump_json())) == config

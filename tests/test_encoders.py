"""InternViT around the transformers library's model: what goes in, what comes out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.tiny import ENCODER, PATCH_SIZE, random_images
from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.models.encoders import Encoder, build_encoder

INTERNVIT_6B = {  # OpenGVLab/InternViT-6B-448px-V1-5 and -V2_5
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 448,
    "patch_size": 14,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "attention_bias": False,
}


def build(config: dict, attention: str = "sdpa") -> Encoder:
    """The encoder that a tokenizer with this config.json has."""
    return build_encoder(resolve_model(ModelConfig(encoder_config=config)), attention)


def make_encoder(**changes: object) -> Encoder:
    """Random everywhere, class token and position embeddings included."""
    torch.manual_seed(0)
    encoder = build({**ENCODER, **changes}).eval()
    with torch.no_grad():
        encoder.model.embeddings.cls_token.normal_()
        encoder.model.embeddings.position_embeddings.normal_()
    return encoder


def standardized(images_B3HW: Tensor) -> Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (images_B3HW - mean) / std


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 16), (16, 64), (24, 40), (8, 8)])
def test_features_are_the_last_hidden_state_without_the_class_token(
    height: int, width: int
) -> None:
    encoder, images = make_encoder(), random_images(height, width)
    expected = encoder.model(standardized(images)).last_hidden_state
    num_patches = height * width // PATCH_SIZE**2
    assert expected.shape == (2, 1 + num_patches, 48)
    torch.testing.assert_close(encoder(images), expected[:, 1:])


def test_patches_are_in_row_major_order() -> None:
    """Without attention's mixing a changed patch changes its own feature alone."""
    encoder = make_encoder(layer_scale_init_value=1e-30)
    images = random_images(16, 24)
    changed = images.clone()
    changed[:, :, 8:16, 0:8] += 0.5
    moved = (encoder(images) != encoder(changed)).any(-1)
    assert moved.tolist() == [[False, False, False, True, False, False]] * 2


def test_there_is_no_norm_at_the_end_unless_asked_for() -> None:
    assert "layernorm.weight" not in make_encoder().model.state_dict()
    assert "layernorm.weight" in make_encoder(use_mean_pooling=False).model.state_dict()


def test_casting_the_model_leaves_the_image_statistics_exact() -> None:
    encoder, images, seen = make_encoder().bfloat16(), random_images(), []
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = encoder(images)
    torch.testing.assert_close(seen[0], standardized(images), rtol=1e-6, atol=1e-6)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), make_encoder()(images), rtol=0.1, atol=0.1)
    assert not list(encoder.buffers())


def test_attention_is_that_asked_for() -> None:
    eager = build(ENCODER, attention="eager").eval()
    sdpa = build(ENCODER, attention="sdpa").eval()
    assert [e.model.config._attn_implementation for e in (eager, sdpa)] == ["eager", "sdpa"]
    eager.load_state_dict(sdpa.state_dict())
    torch.testing.assert_close(eager(random_images()), sdpa(random_images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 31)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height} x {width} pixels.* multiples of 8"):
        make_encoder()(random_images(height, width))


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32).byte()]
)
def test_what_is_no_batch_of_images_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"\({', '.join(map(str, images.shape))}\) and torch."):
        make_encoder()(images)


def test_the_configuration_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match='"intern_vit_6b"'):
        build({**ENCODER, "model_type": "intern_vit_6b"})


def test_the_configuration_given_is_left_as_it_was() -> None:
    config = copy.deepcopy(ENCODER)
    build(config)
    assert config == ENCODER


@pytest.mark.parametrize(
    ("use_mean_pooling", "size"),
    [
        (True, 5_536_496_000),  # as published: no norm at the end
        (False, 5_536_502_400),  # with the LayerNorm that transformers has there, 2 x 3200 more
    ],
)
def test_internvit_6b_has_its_size(use_mean_pooling: bool, size: int) -> None:
    with torch.device("meta"):
        encoder = build({**INTERNVIT_6B, "use_mean_pooling": use_mean_pooling})
    assert sum(parameter.numel() for parameter in encoder.parameters()) == size
    assert (encoder.hidden_size, encoder.patch_size) == (3200, 14)

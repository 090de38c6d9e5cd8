"""Imported encoders of every family and layout give the features of what they came from."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.conftest import run_python
from tests.reference_internvit import (
    LARGE,
    LAYOUTS,
    SMALL,
    ReferenceInternViT,
    randomize,
    write_chat,
    write_source,
)
from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.conversion.pretrained_encoders import import_encoder, verify_import
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.weights import WeightFolder, copy_weights

TOOL = "tools/import_encoder.py"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
INTERNVL = {**SIZE, "intermediate_size": 64, "image_size": [56, 56], "attention_bias": True}
SIGLIP = {**SIZE, "intermediate_size": 64, "image_size": 56}
DINOV2 = {**SIZE, "image_size": 56, "mlp_ratio": 2}


def images(*sides: int) -> Tensor:
    return torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(7)) * 2 - 1


def load_weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def load_internvit(folder: Path) -> InternVLVisionModel:
    model = InternVLVisionModel(
        InternVLVisionConfig(**json.loads((folder / "config.json").read_text()))
    )
    model.load_state_dict(load_weights(folder), strict=True)
    return model.eval()


@torch.no_grad()
def assert_same_features(imported: nn.Module, reference: nn.Module, **options: bool) -> None:
    """Natively, and at a resolution that is not square, for which positions are interpolated."""
    for pixels in (images(56, 56), images(28, 70)):
        found, expected = (
            getattr(output, "last_hidden_state", output)
            for output in (imported(pixels, **options), reference(pixels, **options))
        )
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.fixture(scope="module", params=[LARGE, SMALL], ids=["large", "small"])
def internvit(request: pytest.FixtureRequest) -> tuple[dict, nn.Module]:
    return request.param, randomize(ReferenceInternViT(request.param))


def test_the_tool_imports_internvit_with_the_same_features(internvit, tmp_path):
    config, reference = internvit
    source = write_source(tmp_path / "source", config, reference.state_dict(), "safetensors shards")
    done = run_python(TOOL, str(source), "--verify", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    count = sum(parameter.numel() for parameter in reference.parameters())
    said, _, *snippet = done.stdout.splitlines()
    assert said.endswith(f": InternViT, 3 blocks x 64, {count:,} parameters, float32, verified")
    recipe = yaml.safe_load(textwrap.dedent("\n".join(snippet)))
    assert resolve_model(ModelConfig(**recipe["model"])).decoder.num_layers == 3
    assert recipe["init"] == {"encoder_weights": str(tmp_path / "out")}
    assert_same_features(load_internvit(tmp_path / "out"), reference)


@pytest.mark.parametrize("write", [write_source, write_chat], ids=["alone", "in a chat model"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_internvit_gives_the_same_features(internvit, tmp_path, layout, write):
    config, reference = internvit
    source = write(tmp_path / "source", config, reference.state_dict(), layout)
    import_encoder(source, tmp_path / "out")
    verify_import(source, tmp_path / "out")
    assert_same_features(load_internvit(tmp_path / "out"), reference)


def test_the_norms_of_q_and_k_are_not_swapped(tmp_path):
    """The features do not tell: only the product of the two weights counts for them."""
    state = randomize(ReferenceInternViT(LARGE)).state_dict()
    import_encoder(write_source(tmp_path / "source", LARGE, state), tmp_path / "out")
    found = load_weights(tmp_path / "out")
    for norm in ("q_norm.weight", "k_norm.weight"):
        expected = state[f"encoder.layers.1.attn.{norm}"]
        assert torch.equal(found[f"encoder.layer.1.attention.{norm}"], expected)


def swap_q_and_k(state: dict[str, Tensor]) -> None:
    name = "encoder.layers.1.attn.qkv.weight"
    q, k, v = state[name].chunk(3)
    state[name] = torch.cat([k, q, v])


def swap_layer_scales(state: dict[str, Tensor]) -> None:
    first, second = "encoder.layers.0.ls1", "encoder.layers.0.ls2"
    state[first], state[second] = state[second], state[first]


def swap_class_token_and_a_position(state: dict[str, Tensor]) -> None:
    token, table = state["embeddings.class_embedding"], state["embeddings.position_embedding"]
    state["embeddings.class_embedding"] = table[:, 1:2].clone()
    state["embeddings.position_embedding"] = torch.cat([table[:, :1], token, table[:, 2:]], dim=1)


def put_the_class_position_last(state: dict[str, Tensor]) -> None:
    name = "embeddings.position_embedding"
    state[name] = state[name].roll(-1, dims=1)


@pytest.mark.parametrize(
    "mistake",
    [
        swap_q_and_k,
        swap_layer_scales,
        swap_class_token_and_a_position,
        put_the_class_position_last,
    ],
)
def test_the_comparison_of_features_sees_a_mistake(internvit, tmp_path, mistake):
    config, reference = internvit
    state = dict(reference.state_dict())
    mistake(state)
    import_encoder(write_source(tmp_path / "source", config, state), tmp_path / "out")
    with pytest.raises(AssertionError, match="not close"):
        assert_same_features(load_internvit(tmp_path / "out"), reference)


@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_internvit_in_the_transformers_layout(tmp_path, use_mean_pooling):
    config = InternVLVisionConfig(
        **INTERNVL, use_mask_token=True, use_mean_pooling=use_mean_pooling, layer_norm_eps=1e-5
    )
    reference = randomize(InternVLVisionModel(config))
    reference.save_pretrained(tmp_path / "source", max_shard_size=20_000)
    import_encoder(tmp_path / "source", tmp_path / "out")
    imported = load_internvit(tmp_path / "out")
    assert_same_features(imported, reference)
    assert imported.config.use_mean_pooling == use_mean_pooling
    assert ("layernorm.weight" in imported.state_dict()) == (not use_mean_pooling)


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_internvit_in_a_chat_model_of_transformers(tmp_path, prefix):
    text = {**SIZE, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 50}
    model = InternVLForConditionalGeneration(
        InternVLConfig(text_config=text | {"intermediate_size": 64}, vision_config=INTERNVL)
    )
    whole = randomize(model).state_dict()  # as it is in memory, and as it is published
    renamed = {n.removeprefix("model.") if prefix[0] == "v" else n: t for n, t in whole.items()}
    write_source(tmp_path / "source", model.config.to_dict(), renamed)
    import_encoder(tmp_path / "source", tmp_path / "out")
    assert_same_features(load_internvit(tmp_path / "out"), model.model.vision_tower)


def load_siglip(folder: Path) -> SiglipVisionModel:
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_use_head"] is False
    model = SiglipVisionModel(SiglipVisionConfig(**config))
    model.load_state_dict(load_weights(folder), strict=True)
    return model.eval()


def test_siglip_with_its_text_tower(tmp_path):
    text = {k: v for k, v in SIGLIP.items() if k not in ("image_size", "patch_size")}
    config = SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=SIGLIP)
    reference = randomize(SiglipModel(config))
    reference.save_pretrained(tmp_path / "source")
    assert any(name.startswith("text_model.") for name in load_weights(tmp_path / "source"))
    import_encoder(tmp_path / "source", tmp_path / "out")
    vision = reference.vision_model
    assert_same_features(load_siglip(tmp_path / "out"), vision, interpolate_pos_encoding=True)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_siglip_without_its_text_tower(tmp_path, prefix):
    reference = randomize(SiglipVisionModel(SiglipVisionConfig(**SIGLIP)))
    tensors = {prefix + name: tensor for name, tensor in reference.state_dict().items()}
    write_source(tmp_path / "source", reference.config.to_dict(), tensors)
    import_encoder(tmp_path / "source", tmp_path / "out")
    assert_same_features(load_siglip(tmp_path / "out"), reference, interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (Dinov2Config(**DINOV2), Dinov2Model),
        (Dinov2Config(**DINOV2, use_swiglu_ffn=True), Dinov2Model),
        (Dinov2Config(**DINOV2), Dinov2ForImageClassification),
        (Dinov2WithRegistersConfig(**DINOV2), Dinov2WithRegistersModel),
        (Dinov2WithRegistersConfig(**DINOV2), Dinov2WithRegistersForImageClassification),
    ],
    ids=["plain", "swiglu", "classifier", "registers", "registers and classifier"],
)
def test_dinov2(tmp_path, config, model):
    whole = randomize(model(config))
    whole.save_pretrained(tmp_path / "source")
    import_encoder(tmp_path / "source", tmp_path / "out")
    verify_import(tmp_path / "source", tmp_path / "out")
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    imported = type(whole.base_model)(type(config)(**ours)).eval()
    report = imported.load_state_dict(load_weights(tmp_path / "out"), strict=False)
    assert not report.unexpected_keys  # the network with registers always has a mask token
    assert set(report.missing_keys) <= {"embeddings.mask_token"}
    assert "embeddings.mask_token" not in load_weights(tmp_path / "out")
    assert_same_features(imported, whole.base_model)


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("InternViT", InternVLVisionModel(InternVLVisionConfig(**INTERNVL))),
        ("SigLIP", SiglipVisionModel(SiglipVisionConfig(**SIGLIP))),
        ("DINOv2", Dinov2Model(Dinov2Config(**DINOV2))),
        ("DINOv2", Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINOV2))),
    ],
)
def test_the_trainer_takes_what_was_imported(tmp_path, family, source):
    randomize(source).save_pretrained(tmp_path / "source")
    import_encoder(tmp_path / "source", tmp_path / "out")
    model = ModelConfig(encoder_cls=family, encoder_config_path=str(tmp_path / "out"))
    encoder = build_encoder(resolve_model(model))
    copy_weights(encoder.model, WeightFolder(tmp_path / "out"))  # strict

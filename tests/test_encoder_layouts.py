"""What a published configuration becomes, and which checkpoints are refused with what words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, run_python
from tests.reference_internvit import LARGE, ReferenceInternViT, randomize, write_chat, write_source
from vqrae_ds.conversion.encoder_layouts import Tower, build_tower, find_layout
from vqrae_ds.conversion.pretrained_encoders import import_encoder

WHERE = Path("config.json")


def tower(config: dict[str, Any]) -> Tower:
    return build_tower(config, find_layout(config, WHERE), WHERE)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_the_6b_encoder_is_the_one_that_is_trained() -> None:
    published = {
        "model_type": "intern_vit_6b",
        "image_size": 448,
        "num_hidden_layers": 45,
        "initializer_range": 1e-10,
        "drop_path_rate": 0.0,
    }
    found = tower(published)
    assert count(found.shapes) == 5_536_496_000
    ours = json.loads((ROOT / "ds_configs/internvit_6b/encoder/config.json").read_text())
    assert ours.items() <= found.config.items()


def test_the_publishers_defaults_are_48_blocks_at_224_pixels() -> None:
    """Sizes as published: 5903 M parameters, and 304 M for the small one."""
    assert count(tower({"model_type": "intern_vit_6b"}).shapes) == pytest.approx(
        5902.79e6, rel=1e-6
    )
    small = {
        "model_type": "intern_vit_6b",
        "image_size": 448,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "qk_normalization": False,
        "qkv_bias": True,
        "norm_type": "layer_norm",
        "initializer_factor": 1.0,
    }
    found = tower(small)
    assert count(found.shapes) == pytest.approx(304.01e6, rel=1e-4)
    assert found.config["layer_scale_init_value"] == 1.0
    assert (found.config["norm_type"], found.config["use_qk_norm"]) == ("layer_norm", False)


def test_a_sparse_configuration_of_siglip_is_filled_from_the_class() -> None:
    sparse = {"model_type": "siglip", "vision_config": {"hidden_size": 960, "image_size": 384}}
    config = tower(sparse).config
    assert config["model_type"] == "siglip_vision_model" and config["vision_use_head"] is False
    assert (config["hidden_size"], config["image_size"]) == (960, 384)
    assert (config["patch_size"], config["num_hidden_layers"]) == (16, 12)
    assert config["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip"}, 'model_type "clip" is not one of intern_vit_6b, .*, dinov2'),
        ({}, "model_type null is not one of"),
        ({"model_type": ["siglip"]}, "is not one of"),
        ({"model_type": "siglip2"}, "google/siglip2-large-patch16-256 .* have model_type .siglip"),
        ({"model_type": "siglip2_vision_model"}, "NaFlex"),
        ({**LARGE, "layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05 with qk_normalization"),
        ({**LARGE, "hidden_size": "64"}, "hidden_size.* expected int"),
        ({**LARGE, "num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({**LARGE, "num_attention_heads": 5}, "divisible by num_heads"),
        ({**LARGE, "hidden_act": "gulu"}, "gulu"),
        ({**LARGE, "norm_type": "batch_norm"}, "norm_type = .batch_norm"),
        ({**LARGE, "image_size": [56, 112]}, "not square"),
        ({"model_type": "siglip", "vision_config": [1]}, "must hold keys and values"),
        (
            {"model_type": "internvl", "vision_config": {"model_type": "intern_vit_6b"}},
            'vision_config.model_type is "intern_vit_6b".* it must be "internvl_vision"',
        ),
    ],
)
def test_other_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=rf"(?s)config\.json.*{message}"):
        tower(config)


def test_an_epsilon_of_its_own_is_no_matter_without_qk_norm() -> None:
    config = {**LARGE, "qk_normalization": False, "layer_norm_eps": 1e-5}
    assert tower(config).config["layer_norm_eps"] == 1e-5


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return randomize(ReferenceInternViT(LARGE)).state_dict()


@pytest.mark.parametrize("write", [write_source, write_chat], ids=["alone", "in a chat model"])
def test_every_tensor_of_the_encoder_must_be_there_and_no_other(tmp_path, state, write):
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    prefix = "vision_model." if write is write_chat else ""

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        write(source, LARGE, tensors, "safetensors")
        with pytest.raises(ValueError) as caught:
            import_encoder(source, out)
        assert not out.parent.exists()
        return str(caught.value)

    missing = {n: t for n, t in state.items() if n != "encoder.layers.1.attn.qkv.weight"}
    extra = {**missing, "encoder.layers.3.ls1": torch.ones(64), "head.weight": torch.ones(3)}
    message = refusal(extra)
    assert f"missing {prefix}encoder.layers.1.attn.qkv.weight (1)" in message
    assert f"unexpected {prefix}encoder.layers.3.ls1, {prefix}head.weight (2)" in message

    wrong = state["encoder.layers.1.attn.qkv.weight"][:128]  # q and k
    message = refusal({**state, "encoder.layers.1.attn.qkv.weight": wrong})
    assert f"{prefix}encoder.layers.1.attn.qkv.weight has shape (128, 64), not (192, 64)" in message
    message = refusal({**state, "encoder.layers.0.ls2": torch.ones(64, dtype=torch.int32)})
    assert f"{prefix}encoder.layers.0.ls2 is stored as torch.int32" in message
    message = refusal({n: t[:1] for n, t in state.items()})
    assert "has shape" in message and message.endswith("more")


def test_a_chat_model_has_only_known_neighbours(tmp_path, state):
    source = write_chat(tmp_path / "source", LARGE, state, "safetensors")
    stranger = {f"vision_model.{n}": t for n, t in state.items()} | {"qllama.norm": torch.ones(2)}
    write_source(source, json.loads((source / "config.json").read_text()), stranger)
    with pytest.raises(ValueError, match=r"unexpected qllama\.norm"):
        import_encoder(source, tmp_path / "out")


def test_what_is_no_checkpoint_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; --from-hub NAME"):
        import_encoder(Path("google/siglip-large-patch16-384"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        import_encoder(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    with pytest.raises(ValueError, match="holds no weights"):
        import_encoder(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        import_encoder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/there", "OUT"], "error: nowhere/there is not a folder; --from-hub"),
        (["--from-hub", "some/model", "OUT"], "error: some/model cannot be downloaded"),
        (["OUT"], "give SOURCE, or --from-hub NAME"),
        (["SOURCE", "OUT", "--from-hub", "some/model"], "give SOURCE, or --from-hub NAME"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    paths = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    done = run_python("tools/import_encoder.py", *paths)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 or done.stderr.startswith("usage: ")
    assert not (tmp_path / "out").exists()


def test_the_help_shows_examples() -> None:
    done = run_python("tools/import_encoder.py", "--help")
    assert done.returncode == 0
    assert "python tools/import_encoder.py --from-hub google/siglip2" in done.stdout

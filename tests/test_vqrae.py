"""The tokenizer as a whole: the ways through it, its constructor, its first weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from tests.tiny import ENCODER, IMAGE_SIZE, MODEL, NUM_CODES, PATCH_SIZE, build_model, random_images
from vqrae_ds import VQRAE
from vqrae_ds.config import ModelConfig
from vqrae_ds.models.training_model import TrainingModel


class TestWaysThrough:
    """Encode, quantise, decode."""

    @pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 16), (8, 40)])
    def test_indices_carry_all_that_the_reconstruction_needs(self, height: int, width: int) -> None:
        model, images = build_model().eval(), random_images(height, width)
        output = model(images)
        indices = model.encode_to_indices(images)
        assert indices.shape == (2, height // PATCH_SIZE, width // PATCH_SIZE)
        assert torch.equal(indices, output.indices_Bhw)
        assert output.reconstruction.shape == images.shape
        assert torch.equal(model.decode_from_indices(indices), output.reconstruction)
        entries = model.quantizer.get_codebook_entry(indices.flatten(1))
        assert torch.equal(entries, model.quantizer(output.z_BNE).z_q)
        assert len(indices.unique()) > 1, "one code for everything proves nothing"

    def test_features_are_those_before_the_quantiser(self) -> None:
        model, images = build_model().eval(), random_images()
        features = model.encode(images)
        assert torch.equal(features, model.encoder(images))
        assert torch.equal(features, model(images).features_BND)
        standard = (features - model.standardize.mean) / model.standardize.std
        torch.testing.assert_close(model(images).z_BNE, model.in_proj(standard))

    def test_a_constant_offset_is_taken_out_before_the_projection(self) -> None:
        model = build_model()
        with torch.no_grad():
            model.standardize.mean.fill_(7.0)
            model.standardize.std.fill_(3.0)
        assert not model.standardize(torch.full((1, 2, 48), 7.0)).any()
        assert (model.standardize(torch.full((1, 2, 48), 10.0)) == 1).all()

    def test_reconstructions_are_clamped(self) -> None:
        model = build_model()
        with torch.no_grad():
            model.decoder.head.bias[:96] = 9.0
            model.decoder.head.bias[96:] = -9.0
        output = model(random_images())
        assert output.patches_BhwP.max() > 1 and output.patches_BhwP.min() < 0
        assert output.reconstruction.min() == 0 and output.reconstruction.max() == 1

    def test_a_frozen_encoder_builds_no_graph_and_an_open_one_is_trained(self) -> None:
        images = random_images().requires_grad_()
        frozen = build_model(freeze_encoder=True)
        output = frozen(images)
        assert not output.features_BND.requires_grad
        output.patches_BhwP.sum().backward()
        assert images.grad is None
        assert all(p.grad is None and not p.requires_grad for p in frozen.encoder.parameters())
        assert not frozen.encode_to_indices(images).requires_grad

        trained = build_model(freeze_encoder=False)
        output = trained(random_images())
        (output.vq_loss + output.patches_BhwP.square().sum()).backward()
        without = {n for n, p in trained.named_parameters() if p.grad is None}
        assert without == {"quantizer.embedding.weight"}

    def test_the_teacher_is_frozen_and_sees_the_same_images(self) -> None:
        images = random_images().requires_grad_()
        teacher = build_model(seed=1, freeze_encoder=False).encoder
        model = TrainingModel(build_model(), teacher)
        output = model(images)
        assert torch.equal(output.teacher_features_BND, teacher(images))
        assert not output.teacher_features_BND.requires_grad
        assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
        assert TrainingModel(build_model())(images).teacher_features_BND is None

    def test_encoding_to_indices_keeps_nothing_for_backward(self) -> None:
        model = build_model(freeze_encoder=False)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("kept"), lambda t: t)
        with hooks:
            model.encode_to_indices(random_images())

    def test_usage_counts_codes_until_the_reset(self) -> None:
        model = build_model()
        assert model.get_codebook_usage() == 0
        found = model.encode_to_indices(random_images()).unique()
        assert model.get_codebook_usage() == len(found) / NUM_CODES
        model.quantizer.reset_codebook_usage()
        assert model.get_codebook_usage() == 0

    def test_bfloat16_parameters_beside_fp32_buffers_and_images(self) -> None:
        exact, model = build_model(), build_model()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        for images in (random_images(), random_images(16, 48)):
            output = model(images)
            assert output.patches_BhwP.dtype == torch.bfloat16
            assert output.vq_loss.dtype == output.reconstruction.dtype == torch.float32
            indices = model.encode_to_indices(images)
            assert torch.equal(model.decode_from_indices(indices), output.reconstruction)
            expected = exact.encode(images)
            torch.testing.assert_close(output.features_BND.float(), expected, rtol=0.1, atol=0.2)

    @pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # fp32 weights of norms
    def test_autocast_trains_every_parameter(self) -> None:
        model = build_model(freeze_encoder=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(random_images())
        (output.vq_loss + output.patches_BhwP.float().square().mean()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.isfinite().all() and parameter.grad.any(), name

    def test_a_replaced_search_is_used(self) -> None:
        model = build_model(search=lambda z_ND, *_: torch.full((len(z_ND),), 5))
        assert (model(random_images()).indices_Bhw == 5).all()

    @pytest.mark.parametrize("method", ["forward", "encode", "encode_to_indices"])
    def test_values_of_another_range_are_refused_but_in_training(self, method: str) -> None:
        model, images = build_model().eval(), random_images()
        getattr(model, method)(images * 1.5 - 0.25)
        for wrong in (images * 255, images * 2 - 1):
            with pytest.raises(ValueError, match="images have values from .* floats in .0, 1."):
                getattr(model, method)(wrong)
            getattr(model.train(), method)(wrong)
            model.eval()

    @pytest.mark.parametrize("method", ["forward", "encode", "encode_to_indices"])
    def test_sizes_that_are_no_multiple_of_the_patch_are_refused(self, method: str) -> None:
        with pytest.raises(ValueError, match="33 x 32 pixels"):
            getattr(build_model(), method)(random_images(33, 32))

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            (torch.full((1, 2, 2), NUM_CODES), f"index {NUM_CODES} "),
            (torch.full((1, 2, 2), -1), "index -1 "),
            (torch.zeros(2, 4, dtype=torch.int64), r"\(2, 4\), .* indices.view\(-1, h, w\)"),
        ],
    )
    def test_indices_that_mean_nothing_are_refused(self, indices: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_model().decode_from_indices(indices)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_decoder_that_gives_no_numbers_is_refused(self, value: float) -> None:
        model = build_model()
        with torch.no_grad():
            model.decoder.head.bias[0] = value
        indices = torch.zeros(1, 2, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match="4 of .* values of the decoder's output are not fin"):
            model.decode_from_indices(indices)


class TestConstruction:
    """The constructor with the encoder's folder."""

    @pytest.fixture
    def encoder_folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(ENCODER))
        return tmp_path

    def build(self, folder: Path) -> VQRAE:
        return VQRAE(
            encoder_cls="InternViT",
            encoder_config_path=folder,
            num_embeddings=NUM_CODES,
            use_simvq=True,
            freeze_encoder=False,
            embedding_dim=16,
        )

    def test_the_decoder_mirrors_the_encoder(self, encoder_folder: Path) -> None:
        model = self.build(encoder_folder)
        decoder, block = model.decoder, model.decoder.blocks[0]
        assert len(decoder.blocks) == ENCODER["num_hidden_layers"]
        assert block.norm1.weight.shape == (ENCODER["hidden_size"],)
        assert block.mlp.fc1.weight.shape == (ENCODER["intermediate_size"], ENCODER["hidden_size"])
        heads = ENCODER["hidden_size"] // block.attention.head_size
        assert heads == ENCODER["num_attention_heads"]
        assert isinstance(block.norm1, nn.RMSNorm)
        assert model(random_images()).reconstruction.shape == (2, 3, 32, 32)
        assert model.config.image_size == IMAGE_SIZE

    def test_safetensors_in_the_encoder_folder_are_loaded(self, encoder_folder: Path) -> None:
        torch.manual_seed(3)
        pretrained = InternVLVisionModel(InternVLVisionConfig(**ENCODER))
        with torch.no_grad():
            pretrained.embeddings.cls_token.normal_()
        pretrained.save_pretrained(encoder_folder)
        encoder = self.build(encoder_folder).encoder
        loaded = encoder.model.state_dict()
        assert loaded.keys() == pretrained.state_dict().keys()
        assert all(torch.equal(loaded[n], t) for n, t in pretrained.state_dict().items())

        tensors = load_file(encoder_folder / "model.safetensors")
        save_file({**tensors, "extra": torch.zeros(1)}, encoder_folder / "model.safetensors")
        with pytest.raises(ValueError, match="unexpected extra"):
            self.build(encoder_folder)

    def test_without_them_the_encoder_is_random(self, encoder_folder: Path) -> None:
        torch.manual_seed(0)
        first = self.build(encoder_folder).encoder.state_dict()
        second = self.build(encoder_folder).encoder.state_dict()
        name = "model.encoder.layer.0.mlp.fc1.weight"
        assert not torch.equal(first[name], second[name])

    def test_what_does_not_fit_is_refused(self, encoder_folder: Path) -> None:
        with pytest.raises(ValueError, match="absent"):
            VQRAE(encoder_config_path=encoder_folder / "absent")
        with pytest.raises(ValueError, match="embeding_dim"):
            VQRAE(encoder_config_path=encoder_folder, embeding_dim=16)
        with pytest.raises(ValueError, match="embedding_dim"):
            VQRAE(config=ModelConfig(encoder_config=ENCODER), embedding_dim=16)


def uniform_std(fan_in: int) -> float:
    """Of PyTorch's linear layers: U(-a, a) with a = 1 / sqrt(fan_in)."""
    return 1 / math.sqrt(3 * fan_in)


def documented_distribution(name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation that a first value should have."""
    if "lambda_" in name or ".scale" in name:
        return ENCODER["layer_scale_init_value"], 0.0
    if "norm" in name:
        return 1.0, 0.0
    if name.startswith("encoder."):
        matrix = parameter.ndim >= 2 and "embeddings.cls" not in name and "position" not in name
        return 0.0, ENCODER["initializer_range"] if matrix else 0.0
    if name == "decoder.head.bias":
        return 0.5, 0.0
    if name == "decoder.position.weight":
        return 0.0, 0.02
    if name == "quantizer.embedding.weight":
        return 0.0, MODEL["embedding_dim"] ** -0.5
    fan_in = {"in_proj": 48, "quantizer": 16, "out_proj": 16, "fc2": 96}
    return 0.0, uniform_std(next((n for part, n in fan_in.items() if part in name), 48))


def test_resets_draw_every_parameter_anew_from_its_distribution() -> None:
    model = build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    modules = []
    for module, reset in model.resets():
        modules.append(module)
        own = list(module.parameters(recurse=False))
        assert own and all(p.isnan().all() for p in own), "each parameter is drawn once"
        reset()
        assert not any(p.isnan().any() for p in own)
    assert len(modules) == len(set(modules))
    for name, parameter in model.named_parameters():
        mean, std = documented_distribution(name, parameter)
        assert parameter.std().item() == pytest.approx(std, rel=0.3, abs=1e-7), name
        noise = 5 * std / math.sqrt(parameter.numel())
        assert parameter.mean().item() == pytest.approx(mean, abs=noise + 1e-7), name


def test_resets_leave_the_codebook_frozen() -> None:
    model = build_model()
    for _, reset in model.resets():
        reset()
    assert not model.quantizer.embedding.weight.requires_grad

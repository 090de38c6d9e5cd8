"""The plan's activations against what small networks really keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchvision.models import convnext_small

from tests.conftest import ROOT
from tests.storages import Storages
from tests.test_planner import run_of
from vqrae_ds.config import AdversarialConfig, ModelConfig, resolve_model
from vqrae_ds.losses.perceptual import PerceptualLoss
from vqrae_ds.models.decoder import Decoder
from vqrae_ds.models.discriminator import build_discriminator
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.simvq import SimVQ
from vqrae_ds.ops.code_distances import search_in_float64
from vqrae_ds.ops.nearest_code import code_norms
from vqrae_ds.parallel.codebook import GroupSearch
from vqrae_ds.parallel.groups import Groups
from vqrae_ds.planning import plan
from vqrae_ds.planning.activations import (
    code_bytes,
    decoder_block,
    encoder_block,
    float64_bytes,
    group_bytes,
    head_bytes,
    screening_bytes,
    search_bytes,
)
from vqrae_ds.planning.blocks import backward_bytes, forward_bytes, kept_bytes
from vqrae_ds.planning.image_networks import (
    convnext_bytes,
    discriminator_bytes,
    lpips_bytes,
    lpips_kept_bytes,
)

IMAGES = 2
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
POLICIES = pytest.mark.parametrize("policy", ["none", "full", "selective"])


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def given(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *inputs]


def saved_bytes(function: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Unique storages that autograd saves, by its own hooks."""
    seen, outside = {}, {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = function()
    del alive
    return sum(seen.values())


def model_of(norm_type: str = "layer_norm", *, qk_norm: bool = False, **shape: Any) -> ModelConfig:
    encoder = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 256,
        "image_size": 48,
        "patch_size": 8,
        "norm_type": norm_type,
        "use_qk_norm": qk_norm,
    }
    family = shape.pop("encoder_cls", "InternViT")
    return resolve_model(ModelConfig(encoder_cls=family, encoder_config={**encoder, **shape}))


def free_gradients(module: nn.Module) -> None:
    """As ZeRO does, once they are in the bucket."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(free)


@DTYPES
@POLICIES
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_what_the_decoder_keeps(
    norm_type: str, qk_norm: bool, policy: str, dtype: torch.dtype
) -> None:
    """Attention takes PyTorch's flash kernel of CPUs, which keeps no matrix of tokens x tokens."""
    config = model_of(norm_type, qk_norm=qk_norm)
    decoder = Decoder(config.decoder, config.grid_side, config.patch_size, policy).to(dtype)
    free_gradients(decoder)
    x_BND = torch.randn(IMAGES, config.grid_side**2, 96, dtype=dtype, requires_grad=True)
    with Storages(given(decoder, x_BND)) as storages:
        output = decoder(x_BND, config.grid_side, config.grid_side)
        kept = storages.live
        storages.peak = 0
        output.patches_BhwP.backward(torch.ones_like(output.patches_BhwP))
    block = decoder_block(config, IMAGES, dtype.itemsize, on_gpu=False)
    head = head_bytes(config, IMAGES, dtype.itemsize, on_gpu=False)
    planned = config.decoder.num_layers * kept_bytes(block, policy) + head
    assert kept == pytest.approx(planned, rel=0.05)
    assert storages.peak == pytest.approx(planned + backward_bytes(block, policy), rel=0.2)


@DTYPES
@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_hooks_of_autograd_agree(policy: str, dtype: torch.dtype) -> None:
    config = model_of()
    decoder = Decoder(config.decoder, config.grid_side, config.patch_size, policy).to(dtype)
    x_BND = torch.randn(IMAGES, config.grid_side**2, 96, dtype=dtype, requires_grad=True)
    side = config.grid_side
    saved = saved_bytes(lambda: decoder(x_BND, side, side), given(decoder, x_BND))
    block = decoder_block(config, IMAGES, dtype.itemsize)
    patches = block.tokens * 3 * config.patch_size**2 * dtype.itemsize  # made, and not saved
    head = head_bytes(config, IMAGES, dtype.itemsize) - patches
    planned = config.decoder.num_layers * kept_bytes(block, policy) + head
    assert saved == pytest.approx(planned, rel=0.05)


@DTYPES
@POLICIES
@pytest.mark.parametrize(
    ("norm_type", "qk_norm", "shape"),
    [
        ("rms_norm", True, {}),
        ("layer_norm", False, {}),
        ("layer_norm", False, {"encoder_cls": "SigLIP", "model_type": "siglip_vision_model"}),
        ("layer_norm", False, {"encoder_cls": "DINOv2", "model_type": "dinov2", "mlp_ratio": 3}),
    ],
    ids=["internvit_6b", "internvit_300m", "siglip", "dinov2"],
)
def test_what_a_trained_encoder_keeps(
    norm_type: str, qk_norm: bool, shape: dict, policy: str, dtype: torch.dtype
) -> None:
    """A block's bytes: the difference of one block more."""
    kept = []
    for depth in (1, 3):
        config = model_of(norm_type, qk_norm=qk_norm, num_hidden_layers=depth, **shape)
        encoder = build_encoder(config).to(dtype)
        encoder.set_checkpointing(policy)
        images = torch.rand(IMAGES, 3, 48, 48)
        with Storages(given(encoder, images)) as storages:
            features = encoder(images)
            kept.append(storages.live)
        del features
    block = encoder_block(config, IMAGES, dtype.itemsize)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(kept_bytes(block, policy), rel=0.05)


@torch.no_grad()
def test_a_frozen_encoder_needs_one_block() -> None:
    config = model_of("rms_norm", qk_norm=True)
    encoder, images = build_encoder(config), torch.rand(IMAGES, 3, 48, 48)
    with Storages(given(encoder, images)) as storages:
        encoder(images)
    pixels = images.numel() * 4  # with the input statistics applied
    planned = forward_bytes(encoder_block(config, IMAGES, 4)) + pixels
    assert storages.peak == pytest.approx(planned, rel=0.05)


@DTYPES
@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("kind", ["patch", "blur_pool"])
def test_what_a_discriminator_keeps(kind: str, num_layers: int, dtype: torch.dtype) -> None:
    config = AdversarialConfig(discriminator=kind, channels=32, num_layers=num_layers)
    module = build_discriminator(config).to(dtype)
    images = torch.rand(IMAGES, 3, 64, 64, requires_grad=True)
    with Storages(given(module)) as storages:
        logits = module(images)
        kept = storages.live
    del logits
    assert kept == pytest.approx(discriminator_bytes(config, IMAGES, 64, dtype.itemsize), rel=0.1)


def test_what_lpips_keeps(lpips_weights: Path) -> None:
    lpips = PerceptualLoss(lpips_weights)
    fake, real = torch.rand(IMAGES, 3, 64, 64, requires_grad=True), torch.rand(IMAGES, 3, 64, 64)
    with Storages(given(lpips)) as storages:
        distance = lpips(fake, real)
        kept = storages.live
    assert kept == pytest.approx(lpips_kept_bytes(IMAGES, 64), rel=0.05)
    assert storages.peak == pytest.approx(lpips_bytes(IMAGES, 64), rel=0.05)
    del distance


def test_what_convnext_keeps() -> None:
    network = convnext_small().requires_grad_(False).eval()
    image = torch.rand(1, 3, 224, 224, requires_grad=True)
    with Storages(given(network)) as storages:
        logits = network(image)
        kept = storages.live
    del logits
    assert kept == pytest.approx(convnext_bytes(1), rel=0.05)
    planned = plan(run_of("internvit_300m/paper_stage1", deepspeed="paper_stage1_zero3"))
    (part,) = (part for part in planned.parts if part.name == "ConvNeXt-S")
    assert part.count == sum(parameter.numel() for parameter in network.parameters())


@DTYPES
def test_what_the_search_of_codes_needs(dtype: torch.dtype) -> None:
    config = model_of().model_copy(update={"num_embeddings": 8192, "embedding_dim": 96})
    quantizer = SimVQ(8192, 96).to(dtype)
    z_BND = torch.randn(IMAGES, config.grid_side**2, 96, dtype=dtype)
    with Storages(given(quantizer, z_BND)) as storages:
        quantizer.find_codes(z_BND)
    size, n = dtype.itemsize, IMAGES * config.grid_side**2
    planned = screening_bytes(n, 8192, 96, size)
    assert storages.peak == pytest.approx(code_bytes(config, size) + planned, rel=0.1)
    assert search_bytes(config, IMAGES, size) >= planned


@DTYPES
@pytest.mark.parametrize(("n", "K"), [(1000, 1024), (200, 5000)])
def test_what_is_searched_in_float64(n: int, K: int, dtype: torch.dtype) -> None:
    z_ND, codes_KD = torch.randn(n, 400).to(dtype), torch.randn(K, 400).to(dtype)
    with Storages([codes_KD]) as storages:
        search_in_float64(z_ND.clone(), codes_KD)
    assert storages.peak == pytest.approx(float64_bytes(n, K, 400, dtype.itemsize), rel=0.1)


@pytest.mark.parametrize("tensor_size", [2, 8])
@pytest.mark.parametrize(("tokens", "width"), [(3000, 256), (20000, 16)])
def test_what_a_group_needs_to_compare_winners(tokens: int, width: int, tensor_size: int) -> None:
    """With the process group that sends nothing: what is allocated does not depend on it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor_size)
    try:
        groups = Groups(dist.group.WORLD, dist.group.WORLD)
        z_ND, codes_KD = torch.randn(tokens, width), torch.randn(50, width)
        index_N, norms = torch.zeros(tokens, dtype=torch.int64), code_norms(codes_KD)
        search = GroupSearch(50 * tensor_size, groups, lambda *_: index_N)
        with Storages([z_ND, codes_KD, index_N]) as storages:
            search(z_ND, codes_KD, norms)
    finally:
        dist.destroy_process_group()
    planned = group_bytes(tokens, width, 4, tensor_size)
    assert storages.peak + index_N.nbytes == pytest.approx(planned, rel=0.1)


def test_kept_codes_are_divided_over_a_tensor_parallel_group() -> None:
    config = model_of().model_copy(update={"num_embeddings": 1000, "embedding_dim": 96})
    quantizer = SimVQ(1000, 96)
    quantizer.keep_codes()
    with Storages(given(quantizer)) as storages:
        quantizer.searched_codes()
        kept = storages.live
    assert kept == pytest.approx(code_bytes(config, 4), rel=0.01)
    assert code_bytes(config, 4, tensor_size=3) == 334 * (96 * 4 + 4)

"""Activation checkpointing changes what is kept and what is computed twice, and no number."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.encoder_families import FAMILIES, small_encoder
from tests.tiny import build_model, random_images
from vqrae_ds.models.vqrae import VQRAE

KINDS = ("none", "full", "selective")
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class CountedOperators(TorchDispatchMode):
    """How often each operator runs, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.name().split(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


def build_checkpointed(kind: str, **options) -> VQRAE:
    kinds = {"encoder_checkpointing": kind, "decoder_checkpointing": kind}
    return build_model(**({"freeze_encoder": False} | kinds | options)).train()


def loss_of(model: VQRAE) -> torch.Tensor:
    """A loss that every trainable parameter takes part in."""
    output = model(random_images())
    return output.patches_BhwP.square().mean() + output.vq_loss + output.features_BND.abs().mean()


def gradients_of(model: VQRAE) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def count_operators(model: VQRAE) -> Counter[str]:
    with CountedOperators() as counted:
        gradients_of(model)
    return counted.counts


def kept_bytes(model: VQRAE) -> int:
    """Memory that the forward pass has allocated and not freed."""
    loss_of(model)  # what is allocated once for all is there by now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = loss_of(model)
    assert kept.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_gradients_are_bit_for_bit_the_same(kind: str) -> None:
    expected = gradients_of(build_checkpointed("none"))
    found = gradients_of(build_checkpointed(kind))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_encoders_of_every_family(family: str, kind: str) -> None:
    encoder = small_encoder(family).train()
    images = random_images(*[encoder.patch_size * 4] * 2)
    results = []
    for checkpointing in ("none", kind):
        encoder.set_checkpointing(checkpointing)
        encoder.zero_grad()
        with CountedOperators() as counted:
            encoder(images).square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
        results.append((gradients, counted.counts[ATTENTION]))
    (expected, once), (found, count) = results
    assert once == encoder.num_blocks and count == once * (2 if kind == "full" else 1)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_less_is_kept() -> None:
    none, full, selective = (kept_bytes(build_checkpointed(kind)) for kind in KINDS)
    assert 0 < full < selective < none
    assert full < none / 3, "all that is inside a block is gone"


def test_selective_computes_no_product_twice() -> None:
    none, full, selective = (count_operators(build_checkpointed(kind)) for kind in KINDS)
    for name in (*MATRIX_PRODUCTS, ATTENTION):
        assert selective[name] == none[name], name
    blocks = 4  # of encoder and decoder
    assert full[ATTENTION] == none[ATTENTION] + blocks == 2 * blocks
    assert full["aten::addmm"] > none["aten::addmm"] > 0
    assert selective["aten::gelu"] == full["aten::gelu"] == none["aten::gelu"] + blocks


def test_a_frozen_encoder_has_no_checkpoints() -> None:
    options = {"freeze_encoder": True, "decoder_checkpointing": "none"}
    model = build_checkpointed("full", **options)
    assert count_operators(model) == count_operators(build_checkpointed("none", **options))


def test_evaluation_has_no_checkpoints() -> None:
    none, full = (count_operators(build_checkpointed(kind).eval()) for kind in KINDS[:2])
    assert none == full

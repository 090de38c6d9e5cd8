"""What only a GPU can show, on one of them: bf16 kernels, flash attention, pinned memory.

The ranks are those of the benchmarks, which take a device; the CPU in fp32 is the reference.
"""

from __future__ import annotations

import importlib.util
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import ENCODER, GAN, images_of, make_run, make_setup, save_initial
from vqrae_ds.benchmarks.counting import counted
from vqrae_ds.benchmarks.launch import Machine, run_ranks
from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.stopping import STOP, StopRequest, StopVote

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 3
LOSSES = {"perceptual": None, "adversarial": {"weight": 0.1, **GAN}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
VARIANTS = {
    "fp32": ("cpu", {}, "sharded"),
    "bf16": ("cuda", BF16, "sharded"),
    "bf16_resident": ("cuda", BF16, "resident"),
}


def take_steps(_: int, folder: Path, name: str) -> None:
    """The trainer's steps of one rank, and its vote to stop."""
    from vqrae_ds import engines
    from vqrae_ds.train import micro_step

    _, precision, where = VARIANTS[name]
    ranks = engines.start(timedelta(minutes=2))
    run = make_run(
        folder,
        1,
        losses=LOSSES,
        deepspeed={"train_batch_size": 2, **precision},
        world_size=1,
        memory={"frozen_encoder": where},
    )
    setup = make_setup(run)
    losses = []
    for step in range(STEPS):
        images = images_of(step, 0).to(ranks.device)
        losses.append(micro_step(setup, images, step).terms["loss/total"].item())
    encoder = setup.generator.module.vqrae.encoder
    found = {
        "losses": losses,
        "device": ranks.device.type,
        "encoder_on": {p.device.type for p in encoder.parameters()},
        "encoder_numel": sum(p.numel() for p in encoder.parameters()),  # 0 of what is partitioned
        "votes": vote(StopVote(StopRequest(folder), 0, ranks.device), folder, ranks.device),
    }
    torch.save(found, folder / f"{name}.pt")


def vote(votes: StopVote, folder: Path, device: torch.device) -> list[bool]:
    """Nobody wants to stop in two steps; then a file asks for it, which counts a step later."""
    outcome = [votes.count(), votes.count()]
    (folder / STOP).touch()
    outcome.append(votes.count())
    with counted(device.type) as calls:
        votes.mean_over_ranks(torch.ones(2, device=device))
        outcome.append(votes.count())
    assert calls.collectives.total() == 1
    assert not [call for call in calls.waits if call.operator != "synchronize"]
    (folder / STOP).unlink()
    return outcome


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gpu")
    save_initial(folder / "initial")
    for name, (device_type, *_) in VARIANTS.items():
        run_ranks(Machine(1, device_type), take_steps, folder, name)
    return {name: torch.load(folder / f"{name}.pt") for name in VARIANTS}


@pytest.mark.parametrize("name", ["bf16", "bf16_resident"])
def test_steps_in_bf16_on_a_gpu_follow_fp32_on_the_cpu(found, name):
    assert found[name]["device"] == "cuda"
    assert found[name]["losses"] == pytest.approx(found["fp32"]["losses"], rel=0.02)


def test_a_resident_encoder_is_whole_on_the_gpu(found):
    assert found["bf16_resident"]["encoder_on"] == {"cuda"}
    assert found["bf16_resident"]["encoder_numel"] > 0 == found["bf16"]["encoder_numel"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_wish_to_stop_counts_one_step_later(found, name):
    assert found[name]["votes"] == [False, False, False, True]


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"
)
def test_flash_attention_agrees_with_sdpa():
    config = resolve_model(ModelConfig(encoder_config=ENCODER))
    images = images_of(0, 0, batch=4).to("cuda", torch.bfloat16)
    features, gradients, state = {}, {}, None
    for attention in ("sdpa", "flash_attention_2"):
        encoder = build_encoder(config, attention)
        state = state or encoder.state_dict()
        encoder.load_state_dict(state)
        encoder.to("cuda", torch.bfloat16)
        features_BND = encoder(images)
        features_BND.float().square().mean().backward()
        features[attention] = features_BND.detach().float()
        gradients[attention] = encoder.model.encoder.layer[0].mlp.fc1.weight.grad.float()
    for found in (features, gradients):
        expected = found["sdpa"]
        error = (found["flash_attention_2"] - expected).norm() / expected.norm()
        assert error < 0.02  # bf16 has 8 bits

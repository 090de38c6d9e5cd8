"""What a rank holds of codebook and decoder with tp 1, 2 and 4, measured and as it is planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import run_ranks
from tests.tiny import MODEL, make_run, random_images
from vqrae_ds.config import Run
from vqrae_ds.planning import plan, state_bytes

pytestmark = pytest.mark.slow

RANKS, SIZES = 4, (1, 2, 4)
# Wide beside what is not divided: norms, biases behind a sum, positions, the head.
FIELDS = {
    "decoder": {"hidden_size": 128, "num_heads": 4, "intermediate_size": 1024, "num_layers": 4},
    "num_embeddings": 4096,
    "embedding_dim": 64,
}


def make(rank: int, folder: Path, tensor_size: int) -> Run:
    shared: list[Any] = [None]
    if rank == 0:
        deepspeed = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "tensor_parallel": {"autotp_size": tensor_size},
        }
        options = {"losses": {"adversarial": None, "perceptual": None}, "model": FIELDS}
        options["init"] = {"model": None, "allow_untrained_encoder": True}
        shared = [make_run(folder, 1, deepspeed=deepspeed, world_size=RANKS, **options)]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def measure(rank: int, folder: Path) -> None:
    from deepspeed.utils import groups

    from vqrae_ds import engines

    for tensor_size in SIZES:
        run = make(rank, folder, tensor_size)
        groups.mpu = None  # DeepSpeed keeps that of an engine before
        engine = engines.build_generator(run)
        vqrae = engine.module.vqrae
        found = {
            "codebook": bytes_of(vqrae.quantizer.embedding),
            "blocks": bytes_of(vqrae.decoder.blocks),
            "decoder": bytes_of(vqrae.decoder),
            "kept": bytes_kept(vqrae.decoder.blocks[0].mlp, torch.rand(1, 16, 128)),
            "planned": planned_parameters(run),
        }
        engine(random_images(batch=1))
        if rank == 0:
            (folder / f"tp{tensor_size}.json").write_text(json.dumps(found))


def bytes_of(module: nn.Module) -> int:
    """Of its parameters, as the engine has them on this rank."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def bytes_kept(module: nn.Module, x: torch.Tensor) -> int:
    """What its forward keeps for the backward pass, its weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x.requires_grad_())
    return sum(kept.values())


def planned_parameters(run: Run) -> dict[str, int]:
    return {part.name: part.held for part in plan(run).parts}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tensor_parallel_memory")
    run_ranks(RANKS, measure, folder)
    return {size: json.loads((folder / f"tp{size}.json").read_text()) for size in SIZES}


@pytest.mark.parametrize("size", [2, 4])
def test_memory_falls_with_the_number_of_tensor_ranks(measured, size):
    alone, divided = measured[1], measured[size]
    assert divided["codebook"] * size == alone["codebook"]
    assert divided["blocks"] / alone["blocks"] == pytest.approx(1 / size, rel=0.02)
    kept = divided["kept"] / alone["kept"]
    assert 1 / size < kept < 1 / size + 0.1, "hidden units are divided, the input is not"


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_is_what_a_rank_holds(measured, size):
    found = measured[size]
    assert found["planned"]["codebook"] * 4 == found["codebook"]
    assert found["planned"]["decoder"] * 4 == found["decoder"]


def test_states_of_a_plan_are_divided_over_the_data_ranks(tmp_path):
    sizes = {}
    for tensor_size in (1, 2):
        deepspeed = {
            "train_batch_size": 8,
            "tensor_parallel": {"autotp_size": tensor_size},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        init = {"model": None, "allow_untrained_encoder": True}
        model = MODEL | FIELDS
        run = make_run(tmp_path, 1, deepspeed=deepspeed, world_size=4, model=model, init=init)
        planned = plan(run)
        names = [part.name for part in planned.parts]
        sizes[tensor_size] = dict(zip(names, state_bytes(planned, 4), strict=True))
    assert sizes[2]["encoder"] == 2 * sizes[1]["encoder"], "ZeRO-3 over 2 groups and not 4 ranks"
    assert sizes[2]["codebook"] == sizes[1]["codebook"]
    assert sizes[2]["decoder"] == pytest.approx(sizes[1]["decoder"], rel=0.05)

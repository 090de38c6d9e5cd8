"""What a rank takes for codebook and decoder with tp 1, 2 and 4, measured and as it is planned.

What it holds between steps is the anonymous memory of its process, which no library can keep
secret. Within a step the allocator keeps some of what is freed, the more the smaller it is, so that
there the tensors are followed that come on top.
"""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import run_ranks
from tests.memory import read_memory
from tests.storages import Storages
from tests.tiny import MODEL, images_of, make_run, make_setup, random_images
from vqrae_ds.config import Run
from vqrae_ds.planning import plan, state_bytes
from vqrae_ds.preparation import Setup

pytestmark = pytest.mark.slow

RANKS, SIZES = 4, (1, 2, 4)
# Wide beside what is not divided: norms, biases behind a sum, positions, the head.
FIELDS = {
    "decoder": {"hidden_size": 128, "num_heads": 4, "intermediate_size": 1024, "num_layers": 4},
    "num_embeddings": 4096,
    "embedding_dim": 64,
}
# All that training has of them should stand out beside the encoder, the norms and the interpreter.
LARGE = {
    "decoder": {"hidden_size": 512, "num_heads": 8, "intermediate_size": 8192, "num_layers": 2},
    "num_embeddings": 65536,
    "embedding_dim": 256,
}
MB = 1 << 20


def make(
    rank: int,
    folder: Path,
    tensor_size: int,
    ranks: int = RANKS,
    fields: dict[str, Any] = FIELDS,
) -> Run:
    shared: list[Any] = [None]
    if rank == 0:
        deepspeed = {
            "train_batch_size": ranks // tensor_size,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
            "tensor_parallel": {"autotp_size": tensor_size},
        }
        options = {"losses": {"adversarial": None, "perceptual": None}, "model": fields}
        options["init"] = {"model": None, "allow_untrained_encoder": True}
        shared = [make_run(folder, 1, deepspeed=deepspeed, world_size=ranks, **options)]
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
            "planned": planned_parameters(run),
        }
        engine(random_images(batch=1))
        if rank == 0:
            (folder / f"tp{tensor_size}.json").write_text(json.dumps(found))


def bytes_of(module: nn.Module) -> int:
    """Of its parameters, as the engine has them on this rank."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def planned_parameters(run: Run) -> dict[str, int]:
    return {part.name: part.held for part in plan(run).parts}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tensor_parallel_memory")
    run_ranks(RANKS, measure, folder)
    return {size: json.loads((folder / f"tp{size}.json").read_text()) for size in SIZES}


def anonymous_memory() -> int:
    """Bytes of this process, without what the allocator could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return read_memory()["RssAnon"]


def take_steps(setup: Setup) -> None:
    from vqrae_ds.train import finish_step, micro_step

    for step in range(2):
        micro_step(setup, images_of(step, 0, 1), step)
        finish_step(setup, step)


def train(rank: int, folder: Path, tensor_size: int) -> None:
    """Of one data rank, so that ZeRO divides nothing; after a small model, which loads all else."""
    from deepspeed.utils import groups

    take_steps(make_setup(make(rank, folder, tensor_size, tensor_size, FIELDS)))
    groups.mpu = None  # DeepSpeed keeps that of an engine before
    run = make(rank, folder, tensor_size, tensor_size, LARGE)
    before = anonymous_memory()
    setup = make_setup(run)
    built = anonymous_memory() - before
    with Storages(t for t in gc.get_objects() if isinstance(t, torch.Tensor)) as storages:
        take_steps(setup)
    held = anonymous_memory() - before
    vqrae = setup.generator.module.vqrae
    found = {
        "built": built,
        "held": held,
        "peak": built + storages.peak,
        "codebook": bytes_of(vqrae.quantizer.embedding),
        "decoder": bytes_of(vqrae.decoder),
    }
    (folder / f"tp{tensor_size}_rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def taken(tmp_path_factory) -> dict[int, dict[str, int]]:
    """The most bytes of any rank, by the number of ranks that share a model."""
    folder, most = tmp_path_factory.mktemp("taken"), {}
    for size in SIZES:
        run_ranks(size, train, folder, size, timeout_seconds=400)
        ranks = [json.loads((folder / f"tp{size}_rank{r}.json").read_text()) for r in range(size)]
        most[size] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return most


def test_what_is_measured_is_codebook_and_decoder(taken):
    """The codebook once, the decoder with its masters and two moments, and little else."""
    alone = taken[1]
    assert alone["codebook"] == 64 * MB and alone["decoder"] > 64 * MB
    weights, states = alone["codebook"] + alone["decoder"], 3 * alone["decoder"]
    assert alone["built"] > weights
    assert weights + states < alone["held"] < 1.05 * (weights + states)
    assert alone["peak"] > alone["held"] + alone["codebook"], "and the projected codes"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("kind", "more"), [("codebook", 0.001), ("decoder", 0.01), ("held", 0.03), ("peak", 0.08)]
)
def test_memory_falls_with_the_number_of_tensor_ranks(taken, kind, more, size):
    """To 1 / size and a little, for what no group divides: 0.51 and 0.27 are held, of 364 MiB."""
    share = taken[size][kind] / taken[1][kind]
    assert 0.99 / size < share < 1 / size + more, f"{kind}: {share:.3f} of that of one rank"


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

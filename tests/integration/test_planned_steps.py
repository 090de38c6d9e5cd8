"""The plan against real engines on 2 and 4 ranks: bytes of model states, and of communication.

States are what lives between two steps; communication is what DeepSpeed's own logger counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed import run_ranks
from tests.held_tensors import settled_bytes, storages, tensors
from tests.tiny import ENCODER, GAN, IMAGE_SIZE, make_run, make_setup
from vqrae_ds.config import ModelConfig, Run
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.planning import plan, state_bytes, step_traffic

pytestmark = pytest.mark.slow

STEPS, MICRO_STEPS, NODE = 2, 2, 2
CODES = {"image_size": IMAGE_SIZE, "num_embeddings": 256, "embedding_dim": 64}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
# Buckets are no model states, and the weights are gathered whenever they are used.
ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 1e4,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}
CHECKPOINTED = {"encoder_checkpointing": "full", "decoder_checkpointing": "full"}


class Case(NamedTuple):
    """A size, a stage, and how it is divided."""

    width: int
    depth: int
    stage: int
    zero: dict[str, Any] = ZERO3
    memory: dict[str, Any] = {}  # noqa: RUF012
    gan: bool = False
    rtol_of_gathers: float = 0.01


SIZES = {
    "small": Case(96, 2, 1, gan=True),
    "middle": Case(192, 2, 2, memory=CHECKPOINTED),
    "large": Case(288, 3, 1, memory={"frozen_encoder": "resident"}),
}
DIVISIONS = {
    # The last 2 of 12 M elements stay, in whole layers.
    "reuse": Case(192, 4, 2, ZERO3 | {"stage3_max_reuse_distance": 2e6}, rtol_of_gathers=0.05),
    "reuse_of_all": Case(96, 2, 2, ZERO3 | {"stage3_max_reuse_distance": 1e9}),
    "persistent": Case(96, 2, 2, ZERO3 | {"stage3_param_persistence_threshold": 1e9}),
    "zero2": Case(96, 2, 1, {"stage": 2, "reduce_bucket_size": 1e4}),
    "zero1": Case(96, 2, 1, {"stage": 1, "reduce_bucket_size": 1e4}),
}
# hpZ makes groups of ranks for the rest of the process: it comes last.
IN_NODES = {"hpz": Case(96, 2, 2, ZERO3 | {"zero_hpz_partition_size": NODE})}


def read_case(folder: Path, case: Case, ranks: int) -> Run:
    """The run of a case, its files in `folder`."""
    shape = {"hidden_size": case.width, "num_hidden_layers": case.depth, "num_attention_heads": 6}
    encoder = {**ENCODER, **shape, "intermediate_size": 4 * case.width}
    for name in ("initial", "shape"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "shape" / "config.json").write_text(json.dumps(encoder))
    if not (folder / "initial" / "config.json").exists():
        VQRAE(config=ModelConfig(encoder_config=encoder, **CODES)).save_pretrained(
            folder / "initial"
        )
    losses = {"perceptual": None}
    if case.stage == 1:
        losses["adversarial"] = GAN if case.gan else None
    return make_run(
        folder,
        case.stage,
        losses=losses,
        world_size=ranks,
        deepspeed={
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": MICRO_STEPS * ranks,
            "optimizer": ADAMW,
            "zero_optimization": case.zero,
            **BF16,
        },
        model={**CODES, "encoder_config_path": str(folder / "shape")},
        memory=case.memory,
    )


def measure(rank: int, folder: Path, ranks: int, cases: dict[str, Case]) -> None:
    """Bytes of states, and of what the generator's engine and the other one move in a step."""
    from deepspeed.comm.comm import comms_logger

    from vqrae_ds.train import finish_step, micro_step

    found, earlier, setups = {}, [], []
    for number, (name, case) in enumerate([next(iter(cases.items())), *cases.items()]):
        run = read_case(folder / f"rank{rank}" / f"{number}", case, ranks)
        earlier += tensors()  # kept alive, so that no address is used twice
        before = storages(earlier)
        setup = make_setup(run)
        images = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        for step in range(STEPS):  # the first one also learns in which order weights are used
            comms_logger.enabled, comms_logger.prof_all = step == STEPS - 1, True
            comms_logger.comms_dict.clear()
            for _ in range(MICRO_STEPS):
                micro_step(setup, images, 0)
            finish_step(setup, 0)
        comms_logger.enabled = False
        moved = {
            operation: sum(size * counts[0] for size, counts in sizes.items())
            for operation, sizes in comms_logger.comms_dict.items()
        }
        found[name] = {"states": settled_bytes(before), **moved}
        setups.append(setup)
    (folder / f"found{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, SIZES | DIVISIONS), (4, SIZES | IN_NODES)], ids=["2", "4"]
)
def test_states_and_communication(tmp_path: Path, ranks: int, cases: dict[str, Case]) -> None:
    run_ranks(ranks, measure, tmp_path, ranks, cases)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"found{rank}.json").read_text())
        for name, case in cases.items():
            planned = plan(read_case(tmp_path / name, case, ranks))
            states = sum(state_bytes(planned, ranks))
            print(name, rank, f"planned {states:.0f}", found[name])
            if name in SIZES:
                assert found[name]["states"] == pytest.approx(states, rel=0.05), name
            check_traffic(planned, ranks, found[name], case.rtol_of_gathers)


def check_traffic(planned, ranks: int, found: dict[str, int], rtol: float) -> None:
    """The logger counts what a rank gives to a gather, and the whole of what is reduced."""
    traffic = step_traffic(planned, ranks)
    gathers = [t for t in traffic if "weights" in t.kind]
    given = sum(t.size / (t.over - 1) for t in gathers)
    sums = {t.kind: t.size * t.over / (t.over - 1) for t in traffic if t not in gathers}
    gan = sums.get("discriminator", 0) / 3  # summed up, which counts twice, and gathered
    assert found["all_gather_into_tensor"] == pytest.approx(given + gan / ranks, rel=rtol)
    scattered = sums.get("gradients, to their ranks", 0)
    assert found.get("reduce_scatter_tensor", 0) == pytest.approx(scattered, rel=0.01)
    reduced = sums.get("gradients, summed up", 0) / 2 + gan
    assert found["all_reduce"] == pytest.approx(reduced, rel=0.01, abs=1000)

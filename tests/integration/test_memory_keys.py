"""Keys of the DeepSpeed JSON about memory: each does what it says, and the steps stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import ENCODER, build_model, images_of, make_run, save_initial, setup_of
from vqrae_ds.config import Run
from vqrae_ds.sharding import parameter_groups

pytestmark = pytest.mark.slow

STEPS, SAVED_AFTER = 3, 2
LOSSES = {"perceptual": None, "adversarial": None}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 100}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
BF16 = {"bf16": {"enabled": True}, "optimizer": ADAMW}
BF16_STATES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
VARIANTS = {
    "plain": {"zero_optimization": ZERO3, "optimizer": ADAMW},
    "offload": {
        "zero_optimization": ZERO3 | OFFLOAD,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": ADAMW,
    },
    "bf16": {"zero_optimization": ZERO3, **BF16},
    "bf16_states": {"zero_optimization": ZERO3, **BF16, "bf16": {"enabled": True} | BF16_STATES},
    "bf16_states_zero2": {
        "zero_optimization": {"stage": 2},
        **BF16,
        "bf16": {"enabled": True} | BF16_STATES,
    },
}
HPZ_RANKS, NODE = 4, 2
HPZ = {"zero_optimization": {**ZERO3, "zero_hpz_partition_size": NODE}}


def shared_run(rank: int, folder: Path, deepspeed: dict, world_size: int = 2) -> Run:
    """The same run on all ranks; its files are in a folder that rank 0 writes."""
    shared = [None]
    if rank == 0:
        options = {"losses": LOSSES, "world_size": world_size}
        shared = [make_run(folder, 1, deepspeed=deepspeed, **options)]
    torch.distributed.broadcast_object_list(shared, 0)
    return shared[0]


def take_steps(engine, run: Run, rank: int, steps: range, batch: int = 2) -> list[float]:
    from vqrae_ds import engines
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.train import micro_step

    objective = Objective(run.config.losses, None, None, None, engines.mean_over_ranks)
    images = [images_of(step, rank, batch) for step in steps]
    setup = setup_of(engine, None, objective)
    taken = [micro_step(setup, x, s) for x, s in zip(images, steps, strict=True)]
    return [step.terms["loss/total"].item() for step in taken]


def run_variants(rank: int, folder: Path) -> None:
    from vqrae_ds import engines

    found = {}
    for name, deepspeed in VARIANTS.items():
        run = shared_run(rank, folder, deepspeed)
        engine = engines.build_generator(run)
        found[name] = take_steps(engine, run, rank, range(STEPS))
        optimizer = engine.optimizer
        state = optimizer.optimizer.state.values()
        moments = {s[key].dtype for s in state for key in ("exp_avg", "exp_avg_sq")}
        at_zero3 = deepspeed["zero_optimization"]["stage"] == 3
        flats = "fp32_partitioned_groups_flat" if at_zero3 else "single_partition_of_fp32_groups"
        masters = {flat.dtype for flat in getattr(optimizer, flats)}
        low = name.startswith("bf16_states")
        assert moments == masters == {torch.bfloat16 if low else torch.float32}, name
        if at_zero3:
            assert bool(optimizer.offload_optimizer) == (name == "offload")
        if name == "offload":
            assert set(optimizer.subgroup_to_device.values()) == {"cpu"}
        means = engine.module.vqrae.standardize.mean
        initial = build_model().standardize.mean
        assert torch.equal(means, initial), f"{name}: buffers are fp32, and not rounded"
    (folder / f"variants{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("variants")
    save_initial(folder / "initial")
    run_ranks(2, run_variants, folder)
    return json.loads((folder / "variants0.json").read_text())


def test_an_offloaded_optimizer_takes_the_same_steps(variants) -> None:
    assert variants["offload"] == pytest.approx(variants["plain"], rel=1e-6)


@pytest.mark.parametrize("name", ["bf16_states", "bf16_states_zero2"])
def test_bf16_states_follow_fp32_ones(variants, name: str) -> None:
    assert variants[name] == pytest.approx(variants["bf16"], rel=0.02)
    assert variants[name] != variants["bf16"]


def run_hpz(rank: int, folder: Path) -> None:
    """The plain engine first: hpZ makes groups of ranks for the rest of the process."""
    from vqrae_ds import checkpoint, engines

    batch = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": HPZ_RANKS}
    run = shared_run(rank, folder, {"zero_optimization": ZERO3, **batch}, HPZ_RANKS)
    plain = take_steps(engines.build_generator(run), run, rank, range(STEPS), 1)
    run = shared_run(rank, folder, HPZ | batch, HPZ_RANKS)
    engine = engines.build_generator(run)
    losses = take_steps(engine, run, rank, range(SAVED_AFTER), 1)
    weight = engine.module.vqrae.encoder.model.encoder.layer[0].mlp.fc1.weight
    size = ENCODER["hidden_size"] * ENCODER["intermediate_size"]
    assert weight.ds_tensor.numel() == size / HPZ_RANKS
    assert weight.ds_secondary_tensor.numel() == size / NODE
    checkpoint.save(run, checkpoint.Content(engine, None, checkpoint.TrainState(SAVED_AFTER)))
    losses += take_steps(engine, run, rank, range(SAVED_AFTER, STEPS), 1)
    assert losses == pytest.approx(plain, rel=1e-6)
    torch.save((run, losses), folder / f"hpz{rank}.pt")


def resume_hpz(rank: int, folder: Path) -> None:
    from vqrae_ds import checkpoint, engines

    run, losses = torch.load(folder / f"hpz{rank}.pt", weights_only=False)
    engine = engines.build_generator(run, fill=False)
    checkpoint.resume(checkpoint.find(run), engine, None)
    parameter_groups.set_learning_rate(engine, SAVED_AFTER)
    resumed = take_steps(engine, run, rank, range(SAVED_AFTER, STEPS), 1)
    assert resumed == losses[SAVED_AFTER:]


def test_hpz_gathers_within_a_node_and_resumes(tmp_path: Path) -> None:
    save_initial(tmp_path / "initial")
    run_ranks(HPZ_RANKS, run_hpz, tmp_path)
    run_ranks(HPZ_RANKS, resume_hpz, tmp_path)

"""tp 2 x dp 2 where a rank goes astray: a NaN on one of them, replicas that drifted apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.integration.test_faults import state_of as padded_state_of
from tests.integration.test_faults import take
from tests.integration.test_tensor_parallel_checkpoints import (
    FIELDS,
    assert_equal,
    make,
    weights_of,
)
from tests.tiny import images_of, make_setup, save_initial
from vqrae_ds.guard import Guard

pytestmark = pytest.mark.slow

RANKS = 4
KINDS = ("zero1", "zero1-bf16-sums", "zero2", "zero3", "zero3-offload", "zero3-bf16-sums")
DRIFT = 1e-3


def state_of(setup: Any) -> dict[str, torch.Tensor]:
    """As there; a NaN that was in DeepSpeed's padding from the start is none that a step made."""
    return {name: tensor.nan_to_num() for name, tensor in padded_state_of(setup).items()}


def assert_skipped(setup: Any, images: torch.Tensor, step: int) -> None:
    """A step of the trainer that is not taken, and leaves all as it was."""
    setup.objective.settle()
    before = state_of(setup)
    assert not take(setup, images, step)
    assert_equal(state_of(setup), before)


def moments_of(engine: Any) -> dict[str, torch.Tensor]:
    from vqrae_ds.sharding.partitions import optimizer_state

    states = enumerate(optimizer_state(engine))
    return {f"{i}.{k}": torch.as_tensor(v).clone() for i, state in states for k, v in state.items()}


def drift(engine: Any) -> None:
    """Move what this rank has whole, and leave its slices."""
    from vqrae_ds.sharding.partitions import optimizer_state, parameter_groups, stepped

    torch.manual_seed(dist.get_rank())
    groups, states = parameter_groups(engine), optimizer_state(engine)
    is_split = [bool(group.get("split")) for group in groups]
    assert True in is_split and False in is_split
    for vector, state, split in zip(stepped(engine), states, is_split, strict=True):
        if not split:
            for tensor in (vector, *state.values()):
                if isinstance(tensor, torch.Tensor) and tensor.shape == vector.shape:
                    tensor.detach().add_(DRIFT * torch.rand_like(tensor))


def go_astray(rank: int, folder: Path) -> None:
    from vqrae_ds.sharding.replicas import equalize

    for kind in KINDS:
        setup = make_setup(run := make(rank, folder, kind, 2))
        setup = setup._replace(guard=Guard(run.config.guard, tensor_size=2))
        engine, data_rank = setup.generator, rank // 2
        for step in range(2):
            assert take(setup, images_of(step, data_rank), step)
        assert equalize(engine) == 0, "equal steps on the CPU are equal to the last bit"

        broken = images_of(2, data_rank)
        if data_rank == 1:
            broken[0, 0, 0, 0] = math.nan
        assert_skipped(setup, broken, 2)
        culprits = [(c.rank, c.name) for c in setup.guard.culprits]
        assert {rank for rank, _ in culprits} == {2}, "the group is named once"
        assert len(set(culprits)) == len(culprits)

        weights, moments, states = weights_of(engine), moments_of(engine), state_of(setup)
        if rank % 2 == 1:
            drift(engine)
        assert DRIFT / 2 < equalize(engine) < 2 * DRIFT
        assert_equal(moments_of(engine), moments)
        assert_equal(state_of(setup), states)
        assert_equal(weights_of(engine), weights)
        assert take(setup, images_of(3, data_rank), 3)
        assert equalize(engine) == 0


def test_all_ranks_skip_together_and_replicas_are_brought_together(tmp_path):
    save_initial(tmp_path / "initial", FIELDS)
    run_ranks(RANKS, go_astray, tmp_path, timeout_seconds=400)


def nan_inside_one_group(rank: int, folder: Path) -> None:
    """Only one of the two ranks that should have seen the same image."""
    for kind in ("zero1", "zero3"):
        setup = make_setup(make(rank, folder, kind, 2))
        broken = images_of(0, rank // 2)
        if rank == 3:
            broken[0, 0, 0, 0] = math.nan
        assert_skipped(setup, broken, 0)
        assert take(setup, images_of(1, rank // 2), 1)


def test_a_nan_on_one_rank_of_a_group_is_skipped_by_all(tmp_path):
    save_initial(tmp_path / "initial", FIELDS)
    run_ranks(RANKS, nan_inside_one_group, tmp_path, timeout_seconds=400)

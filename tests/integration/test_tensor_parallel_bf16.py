"""tp 2 x dp 2 in bf16 against tp 1 x dp 2: the same masters at first, and nearly the same path.

Below ZeRO-3 DeepSpeed has other code for every way to sum in bf16, and each asks in its own way for
the groups; what is averaged over the wrong one is far off the path.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.integration.test_tensor_parallel_checkpoints import FIELDS, make, masters_of, train
from tests.integration.test_tensor_parallel_checkpoints import merged as merged_files
from tests.tiny import make_setup, save_initial

pytestmark = pytest.mark.slow

STEPS = 4
PATH_BOUND = 0.1  # of the way that a tensor goes: |tp 2 - tp 1| / |tp 1 - first|
SGD = {"type": "SGD", "params": {"lr": 0.05}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
KINDS = {
    "zero1-sums": {"zero_optimization": {"stage": 1}, **SUMS},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3-sums": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        **SUMS,
    },
}


def train_all(rank: int, folder: Path, tensor_size: int) -> None:
    for kind, deepspeed in KINDS.items():
        deepspeed = {"bf16": {"enabled": True}, "optimizer": SGD, **deepspeed}
        run = make(rank, folder, kind, tensor_size, 2 * tensor_size, deepspeed=deepspeed)
        setup = make_setup(run)
        first = masters_of(setup.generator)
        losses = train(run, setup, rank, 0, STEPS)
        found = {"first": first, "last": masters_of(setup.generator), "losses": losses}
        torch.save(found, folder / f"{kind}-{tensor_size}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel_bf16")
    save_initial(folder / "initial", FIELDS)
    for tensor_size in (1, 2):
        run_ranks(2 * tensor_size, train_all, folder, tensor_size, timeout_seconds=400)
    return folder


def merged(folder: Path, kind: str, tensor_size: int, key: str) -> dict[str, torch.Tensor]:
    files = [folder / f"{kind}-{tensor_size}-{rank}.pt" for rank in range(tensor_size)]
    return merged_files(files, key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_masters_begin_with_the_values_of_the_file(folder, kind):
    stored = load_file(folder / "initial" / "model.safetensors")
    masters = merged(folder, kind, 2, "first")
    for name, master in masters.items():
        assert torch.equal(master, stored[name.removeprefix("vqrae.")]), name
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values()), "unrounded"


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_stay_near_those_of_one_tensor_rank(folder, kind):
    first, alone = (merged(folder, kind, 1, key) for key in ("first", "last"))
    divided = merged(folder, kind, 2, "last")
    way = sum((alone[n] - first[n]).square().sum() for n in first).sqrt()
    for name, value in alone.items():
        distance = (divided[name] - value).norm() / torch.maximum(
            (value - first[name]).norm(), 0.03 * way
        )
        assert distance < PATH_BOUND, name
    for rank in (0, 1):
        mine = torch.load(folder / f"{kind}-2-{2 * rank}.pt")["losses"]
        other = torch.load(folder / f"{kind}-1-{rank}.pt")["losses"]
        for ours, theirs in zip(mine, other, strict=True):
            assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=0.01)

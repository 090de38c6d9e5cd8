"""The plan of tensor-parallel slices, against index arithmetic of its own and the real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import build_model, make_run, save_initial
from vqrae_ds.parallel.slices import (
    COLUMN,
    QKV,
    ROW,
    Place,
    bounds,
    merge,
    own_shape,
    own_slice,
    segments,
    split_of,
)
from vqrae_ds.planning import describe_plan, plan

CASES = [
    ((12, 5), COLUMN, 3),
    ((1000, 4), COLUMN, 3),
    ((10,), COLUMN, 4),
    ((18, 5), QKV, 3),
    ((24,), QKV, 2),
    ((5, 12), ROW, 4),
    ((3, 10), ROW, 3),
]


@pytest.mark.parametrize(("shape", "split", "size"), CASES)
def test_slices_divide_a_tensor_and_merge_again(shape, split, size):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    slices = [own_slice(whole, split, Place(rank, size)) for rank in range(size)]
    assert [s.shape for s in slices] == [
        own_shape(shape, split, Place(r, size)) for r in range(size)
    ]
    assert torch.equal(torch.cat([s.flatten() for s in slices]).sort().values, whole.flatten())
    assert torch.equal(merge(slices, split), whole)
    flats = [s.flatten() for s in slices]
    pieces = [flats[s.rank][s.start : s.start + s.numel] for s in segments(shape, split, size)]
    assert torch.equal(torch.cat(pieces), whole.flatten())


def test_the_first_ranks_hold_one_more():
    assert [bounds(1000, Place(rank, 3)) for rank in range(3)] == [(0, 334), (334, 333), (667, 333)]


def test_heads_stay_whole():
    """Rows of a fused qkv of 4 heads, as head numbers: a rank has its heads of q, of k and of v."""
    heads = torch.arange(4).repeat_interleave(2).repeat(3)
    assert own_slice(heads, QKV, Place(1, 2)).tolist() == [2, 2, 3, 3] * 3


def test_the_plan_names_tensors_of_the_model():
    names = build_model().state_dict().keys()
    divided = {name.removeprefix("decoder.blocks.0.") for name in names if split_of(name)}
    assert {name for name in divided if "blocks" not in name} == {
        "attention.qkv.weight",
        "attention.qkv.bias",
        "attention.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "quantizer.embedding.weight",
    }
    assert split_of("vqrae.decoder.blocks.1.attention.qkv.weight") == QKV
    assert split_of("teacher.model.encoder.layer.0.attention.q_proj.weight") is None


@pytest.mark.parametrize(
    ("size", "model", "ranks", "message"),
    [
        (2, {}, 4, r"does not divide the 3 heads of model.decoder.num_heads; these do: 1, 3$"),
        (3, {}, 4, r"does not divide the 4 ranks; these do: 1, 2, 4$"),
        (3, {"num_embeddings": 2}, 3, r"is above model.num_embeddings = 2: each rank holds a code"),
        (3, {"use_simvq": False}, 3, r"needs model.use_simvq = true"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    tmp_path: Path, size: int, model: dict, ranks: int, message: str
):
    save_initial(tmp_path / "initial")
    deepspeed = {"tensor_parallel": {"autotp_size": size}, "train_batch_size": 12}
    init = {"model": None, "allow_untrained_encoder": True}
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path, 1, deepspeed=deepspeed, world_size=ranks, model=model, init=init)


def test_batches_count_groups_and_not_ranks(tmp_path: Path):
    save_initial(tmp_path / "initial")
    deepspeed = {"tensor_parallel": {"autotp_size": 3}, "train_batch_size": 8}
    run = make_run(tmp_path, 1, deepspeed=deepspeed, world_size=6)
    batch = run.schedule.batch
    assert (batch.accumulation, batch.data_size, batch.tensor_size) == (2, 2, 3)
    assert batch.in_words() == "8 = 2 micro x 2 accumulated x 2 groups of 3 ranks"
    with pytest.raises(ValueError, match=r"groups of 3 ranks = 2 x 3; .* run on 1, 2, 4 groups"):
        make_run(tmp_path, 1, deepspeed=deepspeed, world_size=9)


@pytest.mark.parametrize(("stage", "more"), [(1, 0.0), (3, 4 * (1 / 2 - 1 / 4))])
def test_the_plan_says_what_repeating_the_encoder_costs(tmp_path: Path, stage: int, more: float):
    model = {"decoder": {"num_heads": 4}}
    save_initial(tmp_path / "initial", model)
    deepspeed = {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": stage}}
    whole = plan(make_run(tmp_path, 1, deepspeed=deepspeed, world_size=4, model=model))
    size = {"count": 10**9, "own": 10**9}
    parts = (p._replace(**size) if p.name == "encoder" else p for p in whole.parts)
    huge = whole._replace(parts=tuple(parts))
    assert f", and {more:.2f} GB a GPU more than without" in describe_plan(huge, 4, 80)

"""Moments out of the ranks' files: by name and range like the weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zero_files import BUFFERS, FROZEN, TRAINED, write_step
from vqrae_ds.conversion.optimizer_states import Counters, read_counters, read_optimizer_states
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

RANKS = 3
MOMENTS = {
    key: {name: torch.randn_like(tensor) for name, tensor in TRAINED.items()}
    for key in ("exp_avg", "exp_avg_sq")
}


def share(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    size = -(-tensor.numel() // RANKS)
    padded = torch.full((size * RANKS,), 7e9)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return padded[rank * size :][:size].clone()


def optimizer_file(folder: Path, rank: int) -> Path:
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The generator's folder of a checkpoint, each parameter in a group of its own."""
    folder = write_step(tmp_path / "step_00001000", TRAINED, FROZEN, BUFFERS) / "generator"
    for rank in range(RANKS):
        state = {
            i: {key: share(moments[name], rank) for key, moments in MOMENTS.items()}
            | {"step": torch.tensor(4.0)}
            for i, name in enumerate(TRAINED)
        }
        groups = [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}]
        rewrite(folder, rank, {"state": state, "param_groups": groups})
    return folder


def rewrite(folder: Path, rank: int, base: Any) -> None:
    whole = torch.load(optimizer_file(folder, rank))
    whole["optimizer_state_dict"]["optimizer_state_dict"] = base
    torch.save(whole, optimizer_file(folder, rank))


def base_of(folder: Path, rank: int) -> dict[str, Any]:
    return torch.load(optimizer_file(folder, rank))["optimizer_state_dict"]["optimizer_state_dict"]


def test_moments_are_read_like_the_weights(folder):
    checkpoint = ZeroCheckpoint(folder)
    states = read_optimizer_states(checkpoint)
    assert states.vectors.keys() == MOMENTS.keys()
    for key, moments in MOMENTS.items():
        reader = states.vectors[key]
        for name, tensor in moments.items():
            assert torch.equal(reader.read(name), tensor), (key, name)
            assert torch.equal(reader.read_range(name, 2, 6), tensor.reshape(-1)[2:8])
            assert torch.equal(checkpoint.read(name), TRAINED[name])
    assert states.scalars == dict.fromkeys(TRAINED, {"step": torch.tensor(4.0)})


def test_an_optimizer_that_keeps_nothing(folder):
    for rank in range(RANKS):
        rewrite(folder, rank, base_of(folder, rank) | {"state": {}})
    states = read_optimizer_states(ZeroCheckpoint(folder))
    assert states == ({}, dict.fromkeys(TRAINED, {}))


def change(base: dict[str, Any], how: str) -> Any:
    if how == "no optimizer":
        return None
    if how == "shorter":
        base["state"][0]["exp_avg"] = base["state"][0]["exp_avg"][:-1].clone()
    elif how == "longer":
        base["state"][0]["exp_avg"] = torch.zeros(100)
    elif how == "two-dimensional":
        base["state"][0]["exp_avg"] = torch.zeros(12, 1)
    elif how == "another key":
        base["state"][1]["momentum_buffer"] = base["state"][1].pop("exp_avg")
    elif how == "another step":
        base["state"][2]["step"] = torch.tensor(5.0)
    elif how == "fewer vectors":
        base["param_groups"].pop()
    return base


@pytest.mark.parametrize(
    "how",
    [
        *("no optimizer", "shorter", "longer", "two-dimensional"),
        *("another key", "another step", "fewer vectors"),
    ],
)
def test_a_rank_that_contradicts_its_weights_or_the_others_is_named(folder, how):
    rewrite(folder, 1, change(base_of(folder, 1), how))
    with pytest.raises(ValueError, match=optimizer_file(folder, 1).name) as caught:
        read_optimizer_states(ZeroCheckpoint(folder))
    assert "\n" not in str(caught.value)


def test_counters_are_those_of_the_engine(folder):
    with pytest.raises(ValueError, match="model_states.pt has no usable 'global_samples'"):
        read_counters(ZeroCheckpoint(folder))
    file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(torch.load(file) | {"skipped_steps": 2, "global_samples": 28}, file)
    assert read_counters(ZeroCheckpoint(folder)) == Counters(1000, 2, 28)

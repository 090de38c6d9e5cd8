"""The reader of ZeRO files: what it refuses, by name, and that it runs no code from a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import save_file

from tests.zero_files import (
    BUFFERS,
    FROZEN,
    TRAINED,
    seal,
    write_averages,
    write_split_step,
    write_step,
    write_zero3,
)
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.rank_files import load
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_step(tmp_path / "step_00001000", TRAINED, FROZEN, BUFFERS)


def test_reads_every_tensor_without_padding_into_its_own_memory(checkpoint):
    reader = ZeroCheckpoint(checkpoint / "generator")
    assert reader.tensors.keys() == (TRAINED | FROZEN | BUFFERS).keys()
    for kind, tensors in {"trainable": TRAINED, "frozen": FROZEN, "buffer": BUFFERS}.items():
        for name, tensor in tensors.items():
            assert reader.tensors[name] == (tensor.shape, tensor.dtype, kind)
            reader.read(name).zero_()  # would reach a mapped file that is shared
            assert torch.equal(reader.read(name), tensor)


def test_reads_ranges_of_elements_across_the_ranks(checkpoint):
    reader = ZeroCheckpoint(checkpoint / "generator")
    for name, tensor in (TRAINED | FROZEN | BUFFERS).items():
        flat = tensor.reshape(-1)
        for start in range(tensor.numel() + 2):
            for numel in (0, 1, 6, 40):
                assert torch.equal(reader.read_range(name, start, numel), flat[start:][:numel])


def test_averages_take_the_place_of_the_masters_alone(checkpoint):
    averages = {name: torch.randn_like(tensor) for name, tensor in TRAINED.items()}
    write_averages(checkpoint, averages)
    reader = ZeroCheckpoint(checkpoint / "generator", averages=True)
    for name, tensor in (averages | FROZEN | BUFFERS).items():
        assert torch.equal(reader.read(name), tensor), name
    masters = ZeroCheckpoint(checkpoint / "generator")
    assert masters.tensors == reader.tensors
    assert torch.equal(masters.read("vqrae.decoder.bias"), TRAINED["vqrae.decoder.bias"])


def break_averages(checkpoint: Path, how: str) -> None:
    path = checkpoint / "ema_rank_00001.pt"
    state = torch.load(path)
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "shorter":
        state["averages"][0] = state["averages"][0][:-1].clone()
    elif how == "fewer":
        state["averages"].pop()
    elif how == "half":
        state["averages"][0] = state["averages"][0].half()
    elif how == "no tensor":
        state["averages"][0] = 3
    elif how == "other key":
        state = {"flats": state["averages"]}
    elif how == "code":
        state["extra"] = Payload(os.mkdir, "trap")
    if how not in ("missing", "cut"):
        torch.save(state, path)


@pytest.mark.parametrize(
    "how", ["missing", "cut", "shorter", "fewer", "half", "no tensor", "other key", "code"]
)
def test_averages_that_do_not_fit_are_named(checkpoint, how):
    write_averages(checkpoint, TRAINED)
    break_averages(checkpoint, how)
    with pytest.raises(ValueError, match="ema_rank_00001.pt") as caught:
        ZeroCheckpoint(checkpoint / "generator", averages=True)
    assert "\n" not in str(caught.value)
    assert not Path("trap").exists()
    ZeroCheckpoint(checkpoint / "generator")  # which needs none of them


def test_averages_of_a_rank_too_many_are_named(checkpoint):
    write_averages(checkpoint, TRAINED, world_size=4)
    with pytest.raises(ValueError, match="ema_rank_00003.pt does not belong"):
        ZeroCheckpoint(checkpoint / "generator", averages=True)


def test_frozen_weights_in_files_of_their_own(tmp_path):
    folder = write_split_step(tmp_path / "run")
    reader = ZeroCheckpoint(folder / "generator")
    assert reader.tensors.keys() == (TRAINED | FROZEN | BUFFERS).keys()
    for kind, tensors in {"trainable": TRAINED, "frozen": FROZEN, "buffer": BUFFERS}.items():
        for name, tensor in tensors.items():
            assert reader.tensors[name] == (tensor.shape, tensor.dtype, kind)
            assert torch.equal(reader.read(name), tensor)
            assert torch.equal(reader.read_range(name, 3, 9), tensor.reshape(-1)[3:12])
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert ZeroCheckpoint(link / "generator").tensors == reader.tensors
    write_zero3(folder / "other", TRAINED, None, BUFFERS, world_size=3)
    assert ZeroCheckpoint(folder / "other").tensors.keys() == (TRAINED | BUFFERS).keys()


def test_frozen_files_that_do_not_fit_are_named(tmp_path):
    folder = write_split_step(tmp_path / "run")
    (shared,) = (tmp_path / "run" / "frozen").iterdir()
    own = folder / "generator" / "frozen.safetensors"
    intact = own.read_bytes()
    save_file({"vqrae.encoder.weight": torch.ones(11, 3)}, own)
    with pytest.raises(ValueError, match=f"{shared} holds vqrae.encoder.weight, and so do other"):
        ZeroCheckpoint(folder / "generator")
    save_file({"vqrae.decoder.bias": torch.ones(13)}, own)
    with pytest.raises(ValueError, match=f"{own} holds vqrae.decoder.bias, and so do other files"):
        ZeroCheckpoint(folder / "generator")
    for content in (intact[:-1], b"", b"\xff" * 100):
        own.write_bytes(content)
        with pytest.raises(ValueError, match=f"{own} cannot be read"):
            ZeroCheckpoint(folder / "generator")
    own.write_bytes(intact)
    shared.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{shared} is missing: the folder frozen/ of a run"):
        ZeroCheckpoint(folder / "generator")


def edit(path: Path, key: str, value: object) -> None:
    state = torch.load(path)
    (state["optimizer_state_dict"] if "optim" in path.name else state)[key] = value
    torch.save(state, path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("zero_pp_rank_2_mp_rank_00_optim_states.pt", "partition_count", 4),
        ("zero_pp_rank_2_mp_rank_00_optim_states.pt", "partition_count", [3, 2]),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "fp32_flat_groups", [torch.ones(12)]),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "fp32_flat_groups", None),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "fp32_flat_groups", [torch.ones(12)] * 3),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", "frozen_param_fragments", {}),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", "frozen_param_shapes", None),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", "frozen_param_shapes", [1]),
        ("zero_pp_rank_2_mp_rank_00_model_states.pt", "global_steps", 8),
        ("zero_pp_rank_2_mp_rank_00_model_states.pt", "param_shapes", []),
    ],
)
def test_ranks_that_contradict_each_other_are_named(checkpoint, file, key, value):
    edit(checkpoint / "generator" / file, key, value)
    with pytest.raises(ValueError, match=file):
        ZeroCheckpoint(checkpoint / "generator")


@pytest.mark.parametrize(
    "name",
    [
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_2_mp_rank_00_optim_states.pt",
    ],
)
def test_a_missing_rank_is_named(checkpoint, name):
    (checkpoint / "generator" / name).unlink()
    with pytest.raises(ValueError, match=f"{name} missing"):
        ZeroCheckpoint(checkpoint / "generator")


@pytest.mark.parametrize(
    "name",
    [
        "zero_pp_rank_3_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_01_model_states.pt",
        "mp_rank_00_model_states.pt",
    ],
)
def test_a_file_of_another_run_or_layout_is_named(checkpoint, name):
    folder = checkpoint / "generator"
    source = folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    (folder / name).write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="does not belong|missing"):
        ZeroCheckpoint(folder)


class Payload:
    """Unpickles by calling `function(*args)`."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("name", ["model_states", "optim_states"])
@pytest.mark.parametrize("function", [os.mkdir, eval])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "bare pickle"])
def test_code_in_a_file_is_refused_and_not_run(checkpoint, tmp_path, name, function, modern):
    path = checkpoint / "generator" / f"zero_pp_rank_1_mp_rank_00_{name}.pt"
    trap = tmp_path / "trap"
    argument = str(trap) if function is os.mkdir else f"__import__('os').mkdir({str(trap)!r})"
    state = torch.load(path) | {"extra": Payload(function, argument)}
    torch.save(state, path, _use_new_zipfile_serialization=modern)
    seal(checkpoint)
    wanted = rf"{path.name}.*{function.__name__}.*refused" if modern else path.name
    with pytest.raises(ValueError, match=wanted):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap must be armed for this test to say anything"


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by value"])
@pytest.mark.parametrize("stage", [ZeroStageEnum.gradients, ZeroStageEnum.weights])
def test_a_stage_is_read_however_a_python_pickles_it(tmp_path, stage, named):
    how = (
        Payload(getattr, ZeroStageEnum, stage.name) if named else Payload(ZeroStageEnum, int(stage))
    )
    torch.save({"zero_stage": how}, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=False) == {"zero_stage": stage}
    assert load(tmp_path / "state.pt") == {"zero_stage": int(stage)}


@pytest.mark.parametrize("name", ["__class__", "mro", "real", "no_such_stage"])
def test_no_other_attribute_is_read(tmp_path, name):
    torch.save({"zero_stage": Payload(getattr, ZeroStageEnum, name)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt wants to load getattr, which is not data"):
        load(tmp_path / "state.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_byte_may_be_another_one(tmp_path):
    """What is no file any more is a `ValueError` with its name, whatever PyTorch says of it."""
    path = tmp_path / "state.pt"
    torch.save({"global_steps": 7}, path)
    intact, refused = path.read_bytes(), 0
    for place in range(len(intact)):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 0xFF]) + intact[place + 1 :])
        try:
            load(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 100

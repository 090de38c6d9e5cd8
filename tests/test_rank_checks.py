"""What no checksum finds in the files of the ranks: overlaps, gaps, tensors that are not there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.zero_files import BUFFERS, FROZEN, TRAINED, seal, write_step
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.rank_checks import check_addresses, find_crc_damage
from vqrae_ds.conversion.rank_files import Address, Masters
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

FILES = [Path("rank0.pt"), Path("rank1.pt")]


def masters(*ranks: dict[str, tuple[int, int]]) -> list[Masters]:
    return [
        Masters([torch.zeros(10)], [{name: Address(*place) for name, place in rank.items()}])
        for rank in ranks
    ]


def test_parameters_that_follow_each_other_pass():
    whole = masters({"a": (0, 4), "b": (4, 6), "none": (4, 0)}, {"b": (0, 3), "c": (5, 5)})
    check_addresses(whole, FILES)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (({"a": (0, 5), "b": (4, 6)}, {}), "rank0.pt holds a and b at the same place"),
        (({"a": (0, 9), "b": (2, 1), "c": (8, 2)}, {}), "rank0.pt holds a and b"),
        (({"a": (0, 9), "n": (2, 0), "c": (8, 2)}, {}), "rank0.pt holds .* and c"),
        (({}, {"a": (0, 2), "b": (1, 1)}), "rank1.pt holds a and b"),
        (({"a": (0, 9)}, {"a": (0, 3)}), "rank0.pt has a gap between its part of a"),
        (({"a": (4, 6)}, {"a": (1, 3)}), "rank0.pt has a gap between its part of a"),
    ],
)
def test_overlaps_and_gaps_are_named(ranks, message):
    with pytest.raises(ValueError, match=message):
        check_addresses(masters(*ranks), FILES)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_step(tmp_path / "step_00001000", TRAINED, FROZEN, BUFFERS)


def replace_tensor(checkpoint: Path, where: str, tensor: object) -> None:
    name = "optim" if where == "masters" else "model"
    path = checkpoint / "generator" / f"zero_pp_rank_0_mp_rank_00_{name}_states.pt"
    state = torch.load(path)
    if where == "buffer":
        state["module"]["vqrae.mean"] = tensor
    elif where == "frozen":
        state["frozen_param_fragments"]["vqrae.encoder.weight"] = tensor
    else:
        state["optimizer_state_dict"]["fp32_flat_groups"][0] = tensor
    torch.save(state, path)
    seal(checkpoint)


@pytest.mark.parametrize(
    ("where", "tensor", "message"),
    [
        ("buffer", torch.zeros(1).expand(1 << 40), "claims .*, its file holds less: refused"),
        ("frozen", torch.zeros(1).bfloat16().expand(11), "claims .*, its file holds less"),
        ("masters", torch.zeros(1).expand(12), "claims .*, its file holds less: refused"),
        ("buffer", torch.empty(3, device="meta"), "is no plain tensor: refused"),
        ("frozen", torch.zeros(11).to_sparse(), "encoder.weight|no plain tensor"),
        ("buffer", "text", "no usable 'vqrae.mean'"),
        ("frozen", "text", "vqrae.encoder.weight"),
        ("masters", 3, "more than flat vectors"),
        ("masters", torch.zeros(3, 4), "more than flat vectors"),
    ],
)
def test_a_tensor_that_is_not_there_is_refused(checkpoint, tmp_path, where, tensor, message):
    replace_tensor(checkpoint, where, tensor)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    assert time.monotonic() - start < 5 and not (tmp_path / "out").exists()


def test_a_buffer_that_is_not_contiguous_is_read(checkpoint):
    buffer = torch.randn(4, 3).T
    replace_tensor(checkpoint, "buffer", buffer)
    assert torch.equal(ZeroCheckpoint(checkpoint / "generator").read("vqrae.mean"), buffer)


def test_crc_finds_a_flipped_bit_of_a_tensor(checkpoint):
    files = sorted((checkpoint / "generator").glob("*.pt"))
    assert find_crc_damage(files) == []
    content = files[1].read_bytes()
    place = content.index(TRAINED["vqrae.decoder.bias"][:5].numpy().tobytes())
    files[1].write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    files[2].write_bytes(files[2].read_bytes()[:-100])
    damage = find_crc_damage(files)
    assert len(damage) == 2 and "does not match its CRC-32" in damage[0]
    assert all(file.name in line for file, line in zip(files[1:3], damage, strict=True))


def test_a_key_that_may_be_none_has_to_be_there(checkpoint):
    path = checkpoint / "generator" / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    state = torch.load(path)
    del state["frozen_param_shapes"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"{path} has no usable 'frozen_param_shapes'"):
        ZeroCheckpoint(checkpoint / "generator")

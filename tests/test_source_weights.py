"""Weight files of others: all layouts are read, nothing in them is run, damage is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.conftest import run_python
from tests.reference_internvit import LARGE, LAYOUTS, write_source, write_weights
from vqrae_ds.conversion.source_weights import SourceWeights, download

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3).T,  # as a transposed matrix lies in a .bin file
    "a": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(3.0),
    "d": torch.zeros(0, 2),
}


class _Malicious:
    """Unpickles into a call of `os.mkdir(folder)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path, layout):
    write_weights(tmp_path, TENSORS, layout)
    weights = SourceWeights(tmp_path)
    assert weights.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        stored = weights.tensors[name]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(weights.read(name), tensor)
    assert [stored.file for stored in weights.tensors.values()] == sorted(
        stored.file for stored in weights.tensors.values()
    )


def test_parameters_can_be_read_too(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "pytorch_model.bin")
    assert not SourceWeights(tmp_path).read("a").requires_grad


def test_safetensors_are_preferred(tmp_path):
    write_weights(tmp_path, {"old": torch.ones(1)}, "bin")
    write_weights(tmp_path, {"new": torch.ones(1)}, "safetensors shards", shards=1)
    assert list(SourceWeights(tmp_path).tensors) == ["new"]
    write_weights(tmp_path, {"newer": torch.ones(1)}, "safetensors")
    with pytest.raises(ValueError, match="are both there"):
        SourceWeights(tmp_path)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, new_format):
    source, executed = tmp_path / "source", tmp_path / "executed"
    write_source(source, LARGE, {}, "bin")
    path = source / "pytorch_model.bin"
    attack = {"a": torch.ones(1), "b": _Malicious(executed)}
    torch.save(attack, path, _use_new_zipfile_serialization=new_format)
    done = run_python("tools/import_encoder.py", str(source), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path} ") and done.stderr.count("\n") == 1
    assert "nothing in it was run" in done.stderr and "weights_only" not in done.stderr
    assert not executed.exists() and not (tmp_path / "out").exists()

    torch.load(path, weights_only=False)  # the attack is real
    assert executed.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [-1, 100, 7, 0])
def test_a_cut_file_is_refused(tmp_path, layout, length):
    write_weights(tmp_path, {f"t{i}": torch.ones(100) for i in range(6)}, layout)
    path = sorted(p for p in tmp_path.iterdir() if p.suffix != ".json")[-1]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{path.name} (cannot be read|is damaged)"):
        SourceWeights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_pointer_of_git_lfs_is_refused(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match=name):
        SourceWeights(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"state_dict": {"a": torch.ones(1)}}, {1: torch.ones(1)}]
)
def test_only_tensors_by_their_names_are_read(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold tensors by their names"):
        SourceWeights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "model-00009-of-00009.safetensors"}}, "which is not there"),
        ({"weight_map": {"a": "../model.safetensors"}}, "only files beside it are read"),
        ({"weight_map": {"a": "/etc/passwd"}}, "only files beside it are read"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "only files beside it are read"),
        ({"weight_map": {"a": ".."}}, "which is not there"),
        ({"weight_map": {"a": 1}}, "which is not there"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "must hold keys and values"),
    ],
)
def test_an_index_names_files_beside_it(tmp_path, content, message):
    folder = tmp_path / "folder"
    write_weights(folder / "sub", TENSORS, "safetensors")
    write_weights(tmp_path, TENSORS, "safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SourceWeights(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_weights(tmp_path, TENSORS, "bin shards")
    torch.save({"a": torch.ones(4)}, tmp_path / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(
        ValueError, match="a is in pytorch_model-00002.* and in pytorch_model-00003"
    ):
        SourceWeights(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_anywhere_in_a_pickle_is_one_kind_of_error(tmp_path):
    """Torch itself raises ten kinds, `AssertionError` and `KeyError` among them."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    intact, refused = path.read_bytes(), 0
    for position in range(len(intact)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        try:
            SourceWeights(tmp_path)
        except ValueError as error:
            refused += 1
            assert path.name in str(error)
    assert refused > 100


def test_the_hub_is_asked_for_bin_files_only_where_there_is_no_safetensors(tmp_path, monkeypatch):
    asked = []

    def fake(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns[-1])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    (tmp_path / "pytorch_model-00001-of-00001.bin").touch()
    assert download("some/model") == tmp_path
    assert asked == ["model*.safetensors", "pytorch_model*.bin"]
    (tmp_path / "model.safetensors").touch()
    download("some/model")
    assert asked[2:] == ["model*.safetensors"]


def test_a_name_that_the_hub_does_not_take_is_one_error() -> None:
    with pytest.raises(ValueError, match="cannot be downloaded"):
        download("not a name")

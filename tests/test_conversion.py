"""Conversion of checkpoints: what is stored how, what is refused, what an interruption leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import start_python
from tests.tiny import random_images
from tests.zero_files import (
    BUFFERS,
    FROZEN,
    TRAINED,
    assert_identical,
    expected,
    seal,
    write_model_step,
    write_step,
)
from vqrae_ds.conversion import safetensors_stream
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.manifest import find_step_folder
from vqrae_ds.models.vqrae import VQRAE


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_step(tmp_path / "step_00001000", TRAINED, FROZEN, BUFFERS)


def assert_nothing_written(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["step_00001000"]


@pytest.mark.parametrize(
    ("to", "dtype", "cast"),
    [
        ("stage2", torch.float32, None),
        ("inference", torch.float32, torch.float32),
        ("inference", torch.bfloat16, torch.bfloat16),
    ],
)
def test_each_kind_of_tensor_is_stored_as_promised(checkpoint, tmp_path, to, dtype, cast):
    output = tmp_path / "new" / "out"
    consolidate(checkpoint, output, to=to, dtype=dtype)
    assert_identical(load_file(output / "model.safetensors"), expected(cast))
    verify(checkpoint, output)
    assert (output / "config.json").read_bytes() == (checkpoint / "model_config.json").read_bytes()
    record = json.loads((output / "conversion.json").read_text())
    assert (record["step"], record["stage"], record["kind"]) == (1000, 1, to)
    assert record["dtype"] == str(dtype).removeprefix("torch.")
    names = {path.name for path in output.iterdir()}
    assert names == {"model.safetensors", "config.json", "conversion.json"}


def test_every_tensor_is_aligned_for_readers_that_map_the_file(checkpoint, tmp_path):
    consolidate(checkpoint, tmp_path / "out", to="stage2")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, tensor in expected(None).items():
        assert (8 + size + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0, name


def test_shards_follow_the_hugging_face_layout(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream, "_CHUNK_ELEMENTS", 4)  # many chunks a tensor
    output = tmp_path / "out"
    consolidate(checkpoint, output, to="inference", max_shard_bytes=100)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    wanted, found = expected(torch.float32), {}
    paths = sorted(output.glob("*.safetensors"))
    assert len(paths) > 3
    for number, path in enumerate(paths, start=1):
        assert path.name == f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100
        assert {n for n, shard in index["weight_map"].items() if shard == path.name} == set(tensors)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= tensors
    assert_identical(found, wanted)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    verify(checkpoint, output)
    index["weight_map"]["mean"] = "model-00001-of-00001.safetensors"
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not say which file holds what"):
        verify(checkpoint, output)


def test_existing_output_and_wrong_requests_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="step_00001000 exists already"):
        consolidate(checkpoint, checkpoint, to="inference")
    with pytest.raises(ValueError, match="is for inference"):
        consolidate(checkpoint, tmp_path / "out", to="stage2", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float16"):
        consolidate(checkpoint, tmp_path / "out", to="inference", dtype=torch.float16)
    with pytest.raises(ValueError, match="stage3"):
        consolidate(checkpoint, tmp_path / "out", to="stage3")
    assert_nothing_written(tmp_path)


def test_damage_is_refused_and_named(checkpoint, tmp_path):
    path = checkpoint / "generator" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    intact = path.read_bytes()
    middle = intact.index(TRAINED["vqrae.decoder.bias"][5:10].numpy().tobytes())
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    with pytest.raises(ValueError, match=f"{path.name} does not match its checksum"):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    path.write_bytes(intact)
    stranger = path.with_name("zero_pp_rank_3_mp_rank_00_optim_states.pt")
    stranger.write_bytes(intact)
    with pytest.raises(ValueError, match=f"{stranger.name} is not in the manifest"):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    stranger.unlink()
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    assert_nothing_written(tmp_path)


def test_an_unknown_part_of_the_module_is_not_dropped_in_silence(tmp_path):
    trained = TRAINED | {"perceptual.weight": torch.randn(3)}
    checkpoint = write_step(tmp_path / "step_00001000", trained, FROZEN, BUFFERS)
    with pytest.raises(ValueError, match=r"perceptual\.weight"):
        consolidate(checkpoint, tmp_path / "out", to="inference")
    assert_nothing_written(tmp_path)


def test_verify_finds_every_difference(checkpoint, tmp_path):
    output = tmp_path / "out"
    consolidate(checkpoint, output, to="inference")
    path = output / "model.safetensors"
    intact = path.read_bytes()
    good = load_file(path)

    def differences() -> str:
        with pytest.raises(ValueError) as caught:
            verify(checkpoint, output)
        return str(caught.value)

    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert "used in model.safetensors differs" in differences()
    path.write_bytes(intact[:-1])
    assert "model.safetensors cannot be read" in differences()
    save_file({n: t for n, t in good.items() if n != "mean"}, path)
    assert "mean was not written" in differences()
    save_file(good | {"stray": torch.ones(1)}, path)
    assert "stray in model.safetensors is not in the checkpoint" in differences()
    save_file(good | {"mean": good["mean"].double()}, path)
    assert "mean in model.safetensors is torch.float64" in differences()
    path.write_bytes(intact)
    save_file({"mean": good["mean"]}, output / "model-2.safetensors")
    assert "mean is in" in differences() and "again" in differences()
    (output / "model-2.safetensors").unlink()
    (output / "config.json").write_text("{}")
    assert "config.json is not the checkpoint's" in differences()
    (output / "config.json").write_bytes((checkpoint / "model_config.json").read_bytes())
    path.write_bytes(intact.replace(b'"format":"pt"', b'"format":"np"'))
    assert "model.safetensors does not match its checksum" in differences()
    seal(checkpoint, world_size=4)
    assert "was not converted from" in differences()


def test_the_newest_complete_step_is_found(tmp_path):
    run, steps = tmp_path / "run", tmp_path / "run" / "checkpoints"
    for step in (900, 99999999, 100000000):
        (steps / f"step_{step:08d}").mkdir(parents=True)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_step_folder(run)
    for step in (900, 99999999):
        seal(steps / f"step_{step:08d}", step=step)
    (steps / "step_100000000" / "manifest.json").write_text("{")
    assert find_step_folder(run) == find_step_folder(steps) == steps / "step_99999999"
    assert find_step_folder(steps / "step_00000900") == steps / "step_00000900"
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        find_step_folder(tmp_path / "nowhere")


def test_the_command_line(tmp_path):
    """Converts and verifies without DeepSpeed; a mistake is one line and exit status 2."""
    model = write_model_step(tmp_path / "step_00001000")
    for path in (tmp_path / "step_00001000").glob("ema_rank_*"):
        path.unlink()
    seal(tmp_path / "step_00001000", world_size=2)
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('deepspeed was imported')")
    tool, out = "tools/convert_checkpoint.py", str(tmp_path / "out")
    processes = [
        start_python(tool, *args, path=tmp_path)
        for args in (
            (str(tmp_path), out, "--to", "inference", "--dtype", "bf16", "--verify"),
            (str(tmp_path), out + "2", "--to", "stage2", "--dtype", "bf16"),
            (str(tmp_path), out + "3", "--to", "stage2", "--ema"),
            ("--help",),
        )
    ]
    answers = [process.communicate() for process in processes]
    (done, _), (_, error), (_, no_ema), (usage, _) = answers
    assert [process.returncode for process in processes] == [0, 2, 2, 0]
    assert "every element once and equal, forward pass equal" in done
    assert error.startswith("error: stage2 keeps") and error.count("\n") == 1
    assert "holds no moving average" in no_ema and no_ema.count("\n") == 1
    assert "example" in usage
    images = random_images(batch=1)
    converted = VQRAE.from_pretrained(out).encode_to_indices(images)
    assert torch.equal(converted, model.bfloat16().encode_to_indices(images))


MEASURE = """
import sys, torch
from tests.memory import sampled_memory
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.manifest import find_step_folder

peaks = {}
with sampled_memory(peaks):
    consolidate(sys.argv[1], sys.argv[2], to="inference", dtype=getattr(torch, sys.argv[3]))
    verify(sys.argv[1], sys.argv[2])
print(peaks["RssAnon"] / 2**20)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_model(tmp_path, dtype):
    """RssAnon: memory of our own; mapped pages of the files are the kernel's to take back."""
    num_elements = 1 << 24  # 64 MB in fp32: holding one tensor whole would show
    trained = {f"vqrae.decoder{i}": torch.ones(num_elements) for i in range(3)}
    frozen = {f"vqrae.encoder{i}": torch.ones(num_elements).bfloat16() for i in range(3)}
    checkpoint = write_step(tmp_path / "step_00001000", trained, frozen, {}, world_size=8)
    output = tmp_path / "out"
    process = start_python("-c", MEASURE, str(checkpoint), str(output), dtype)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert (output / "model.safetensors").stat().st_size > 190 << 20
    assert float(stdout) < 48

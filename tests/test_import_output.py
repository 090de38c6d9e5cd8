"""The folder that an import writes: whole or absent, proven on request, in little memory."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run_python
from tests.reference_internvit import (
    LARGE,
    SMALL,
    ReferenceInternViT,
    randomize,
    write_source,
    write_weights,
)
from vqrae_ds.conversion import pretrained_encoders
from vqrae_ds.conversion.pretrained_encoders import import_encoder, verify_import


@pytest.fixture
def source(tmp_path: Path) -> Path:
    state = randomize(ReferenceInternViT(SMALL)).state_dict()
    return write_source(tmp_path / "source", SMALL, state, "bin shards")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_existing_folder_is_left_as_it_is(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    import_encoder(source, out)  # an empty folder is nothing to lose
    assert names(out) == ["config.json", "model.safetensors"]
    (out / "config.json").write_text("mine")
    for occupied in (out, out / "config.json", source):
        with pytest.raises(ValueError, match="exists already"):
            import_encoder(source, occupied)
    assert (out / "config.json").read_text() == "mine"
    assert names(tmp_path) == ["out", "source"]


def test_large_weights_are_written_in_shards(source, tmp_path):
    import_encoder(source, tmp_path / "whole")
    import_encoder(source, tmp_path / "out", max_shard_bytes=100_000)
    verify_import(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        assert {n for n, file in index["weight_map"].items() if file == path.name} == set(tensors)
        found |= tensors
    assert len(set(index["weight_map"].values())) > 3
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_values_keep_their_dtype_unless_another_is_asked_for(tmp_path):
    state = randomize(ReferenceInternViT(LARGE)).state_dict()
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in state.items()}
    source = write_source(tmp_path / "source", LARGE, mixed)
    assert import_encoder(source, tmp_path / "kept").dtype == "bfloat16 and float32"
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert kept["encoder.layer.0.layernorm_before.weight"].dtype == torch.float32
    assert torch.equal(kept["encoder.layer.0.lambda_1"], mixed["encoder.layers.0.ls1"])
    for dtype in (torch.bfloat16, torch.float32):
        out = tmp_path / str(dtype)
        assert f"torch.{import_encoder(source, out, dtype=dtype).dtype}" == str(dtype)
        cast = load_file(out / "model.safetensors")
        assert all(torch.equal(cast[name], kept[name].to(dtype)) for name in kept)
        verify_import(source, out, dtype=dtype)
    with pytest.raises(ValueError, match=r"is torch\.float32 .* says torch\.bfloat16"):
        verify_import(source, out)


def test_verify_finds_every_difference(source, tmp_path):
    out = tmp_path / "out"
    import_encoder(source, out)
    path = out / "model.safetensors"
    good = load_file(path)

    def differences() -> str:
        with pytest.raises(ValueError) as caught:
            verify_import(source, out)
        return str(caught.value)

    changed = good["encoder.layer.2.lambda_1"].clone()
    changed[5] += 1e-6
    save_file(good | {"encoder.layer.2.lambda_1": changed}, path)
    assert "encoder.layer.2.lambda_1 in model.safetensors differs" in differences()
    save_file({n: t for n, t in good.items() if n != "encoder.layer.2.lambda_1"}, path)
    assert "encoder.layer.2.lambda_1 was not written" in differences()
    save_file(good, path)
    verify_import(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"norm_type": "rms_norm"}))
    assert "config.json" in differences()


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def disk_full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pretrained_encoders, "write_json_atomically", disk_full)
    with pytest.raises(OSError, match="no space left"):
        import_encoder(source, tmp_path / "out")
    assert names(tmp_path) == ["source"]


KILLED = """
import os, signal, sys
from vqrae_ds.conversion import pretrained_encoders
pretrained_encoders.write_json_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
pretrained_encoders.import_encoder(*sys.argv[1:])
"""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = randomize(ReferenceInternViT(SMALL)).state_dict()
    name = "encoder.layers.1.attn.qkv.weight"
    state[name][-1, 0] = value
    source = write_source(tmp_path / "source", SMALL, state, "bin shards")
    with pytest.raises(ValueError, match=f"{name} in .*pytorch_model-0.* holds NaN or infinity"):
        import_encoder(source, tmp_path / "out")
    assert names(tmp_path) == ["source"]


def test_kill_9_leaves_no_output_and_does_not_block_the_next_attempt(source, tmp_path, caplog):
    done = run_python("-c", KILLED, str(source), str(tmp_path / "out"))
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.*.partial/model.safetensors"))) == 1
    assert not (tmp_path / "out").exists()
    import_encoder(source, tmp_path / "out")
    verify_import(source, tmp_path / "out")
    assert "left by an interrupted conversion" in caplog.text


MEASURE = """
import sys, torch, transformers
from tests.memory import sampled_memory
from vqrae_ds.conversion.pretrained_encoders import import_encoder, verify_import

torch.set_num_threads(1)
transformers.InternVLVisionModel  # the library itself, which is imported on first use
dtype = torch.bfloat16 if sys.argv[3] == "bf16" else None
peaks = {}
with sampled_memory(peaks):
    import_encoder(sys.argv[1], sys.argv[2], dtype=dtype, max_shard_bytes=80 << 20)
    verify_import(sys.argv[1], sys.argv[2], dtype=dtype)
print(peaks["RssAnon"] / 2**20)
"""


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("safetensors shards", "keep"),
        ("safetensors shards", "bf16"),
        ("bin shards", "keep"),
        ("legacy bin shards", "keep"),  # cannot be mapped: one at a time is read as a whole
    ],
)
def test_memory_is_that_of_one_file_at_most(tmp_path, layout, dtype):
    """RssAnon: memory of our own; mapped pages of the files are the kernel's to take back."""
    config = {**LARGE, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    source = tmp_path / "source"
    state = randomize(ReferenceInternViT(config)).state_dict()
    write_weights(source, state, layout, shards=6)
    (source / "config.json").write_text(json.dumps(config))
    shards_mb = [path.stat().st_size / 2**20 for path in source.glob("*-of-00006.*")]
    assert len(shards_mb) == 6 and 300 < sum(shards_mb) < 350
    done = run_python("-c", MEASURE, str(source), str(tmp_path / "out"), dtype)
    assert done.returncode == 0, done.stderr
    print(f"{layout}, {dtype}: {float(done.stdout):.0f} MB; a shard has {max(shards_mb):.0f}")
    assert float(done.stdout) < (2 * max(shards_mb) if "legacy" in layout else 40)

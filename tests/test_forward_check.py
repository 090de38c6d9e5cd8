"""The forward check of a conversion: it finds a folder that is another model, and says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.zero_files import write_model_step
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.forward_check import compare_forward

CODES, PIXELS = "quantizer.embedding_proj.weight", "decoder.head.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_model_step(tmp_path / "step_00001000")
    return tmp_path / "step_00001000"


@pytest.fixture
def output(checkpoint: Path, tmp_path: Path) -> Path:
    consolidate(checkpoint, tmp_path / "out", to="inference")
    return tmp_path / "out"


def negate(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = -tensors[name]
    save_file(tensors, path)


def test_the_conversion_gives_what_the_checkpoint_gives(checkpoint, output):
    assert compare_forward(checkpoint, output) is None


@pytest.mark.parametrize(("name", "differs"), [(CODES, r"\d+ other codes"), (PIXELS, "pixels")])
def test_another_weight_is_another_answer(checkpoint, output, name, differs):
    negate(output, name)
    with pytest.raises(ValueError, match=f"{output} gives .*{differs}"):
        compare_forward(checkpoint, output)


def test_a_model_beyond_the_memory_is_not_asked(checkpoint, output):
    path = output / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_embeddings": 10**13}))
    skipped = compare_forward(checkpoint, output)
    # Codes of 16 fp32 numbers, and 1 GiB to work in.
    assert skipped.startswith("it needs 640001.1 GB of memory, ")

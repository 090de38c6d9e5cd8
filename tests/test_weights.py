"""Folders of weights: what goes in comes out, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import run_python
from tests.tiny import build_model
from vqrae_ds import VQRAE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

FRESH_PROCESS = """
import sys
import torch
from vqrae_ds import VQRAE

model = VQRAE.from_pretrained(sys.argv[1])
images = torch.load(sys.argv[2])
output = model(images)
indices = model.encode_to_indices(images)
assert not model.training
assert torch.equal(model.decode_from_indices(indices), output.reconstruction)
entries = model.quantizer.get_codebook_entry(indices)
assert torch.equal(entries.flatten(1, 2), model.quantizer(output.z_BNE).z_q)
assert "deepspeed" not in sys.modules
torch.save(output.reconstruction, sys.argv[3])
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A consolidated folder."""
    build_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a folder by others; None removes one."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS)


def split(folder: Path) -> None:
    """Turn the one file into two shards and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        names = list(tensors)[part::2]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody fills holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def all_tensors(model: VQRAE) -> dict[str, Tensor]:
    """Parameters and buffers, those included that are not stored."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_a_fresh_process_reads_the_codes_back_without_deepspeed(
    saved: Path, tmp_path: Path
) -> None:
    images = torch.rand(2, 3, 32, 48)
    files = [str(tmp_path / name) for name in ("images.pt", "images_hat.pt")]
    torch.save(images, files[0])
    result = run_python("-c", FRESH_PROCESS, str(saved), *files)
    assert result.returncode == 0, result.stderr
    expected = build_model().eval()(images).reconstruction
    torch.testing.assert_close(torch.load(files[1]), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_changes_on_the_way_through_a_folder(
    saved: Path, sharded: bool, poisoned: None
) -> None:
    if sharded:
        split(saved)
    model, loaded = build_model(), VQRAE.from_pretrained(saved)
    expected, found = all_tensors(model), all_tensors(loaded)
    assert found.keys() == expected.keys() and "quantizer.code_counts" in found
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert loaded.config == model.config
    frozen = [n for n, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == ["quantizer.embedding.weight"]
    assert not loaded.training


def test_loading_draws_no_random_number(saved: Path) -> None:
    before = torch.get_rng_state()
    VQRAE.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_can_be_saved_over_its_own_folder(saved: Path) -> None:
    before = load_file(saved / WEIGHTS)
    VQRAE.from_pretrained(saved).save_pretrained(saved)
    assert all(torch.equal(t, before[n]) for n, t in load_file(saved / WEIGHTS).items())


def test_parameters_come_in_the_dtype_of_the_trained_ones(saved: Path) -> None:
    """Inference weights are all bf16; those for stage 2 have a frozen encoder in bf16."""
    statistics = ("standardize.mean", "standardize.std")
    tensors = load_file(saved / WEIGHTS)
    narrow = {n: t.bfloat16() for n, t in tensors.items() if n not in statistics}
    rewrite(saved, **{n: t for n, t in narrow.items() if n.startswith("encoder.")})
    mixed = VQRAE.from_pretrained(saved)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    rewrite(saved, **narrow)
    model = VQRAE.from_pretrained(saved)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.standardize.mean.dtype == torch.float32
    assert torch.equal(model.standardize.mean, tensors["standardize.mean"])
    assert model(torch.rand(2, 3, 32, 32)).reconstruction.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_proj.weight": None}, "missing in_proj.weight"),
        ({"out_proj.weight": None}, "out_proj.weight"),
        ({"quantizer.weight": torch.zeros(2)}, "unexpected quantizer.weight"),
        ({"in_proj.bias": torch.zeros(3)}, r"in_proj.bias .* \(3,\), the model \(16,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    saved: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        VQRAE.from_pretrained(saved)
    assert str(saved) in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", '{"encoder_config": {}}'),
        ("config.json", '{"colour": "blue"}'),
        (WEIGHTS, None),
        (WEIGHTS, "not safetensors"),
        (INDEX, "{}"),
    ],
)
def test_a_file_that_is_missing_damaged_or_too_many_is_named(
    saved: Path, file: str, content: str | None
) -> None:
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_text(content)
    with pytest.raises(ValueError) as refusal:
        VQRAE.from_pretrained(saved)
    assert str(saved) in str(refusal.value) and file in str(refusal.value)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(saved: Path, index: str) -> None:
    split(saved)
    (saved / INDEX).write_text(index)
    with pytest.raises(ValueError, match=INDEX):
        VQRAE.from_pretrained(saved)


def test_a_missing_shard_is_named(saved: Path) -> None:
    split(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        VQRAE.from_pretrained(saved)

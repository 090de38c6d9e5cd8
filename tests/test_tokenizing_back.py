"""The way back: files of codes -> images of a direct reconstruction, and sequences to train on."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tokenizing import BATCH, CPU, crops_of_photos, make_model, run, run_here, write_shards_of
from vqrae_ds.data.decode import load_image
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.tokenizing.dataset import CodeDataset, code_batches
from vqrae_ds.tokenizing.decoding import batches_of, decoded_batches, to_8_bits
from vqrae_ds.tokenizing.model import load_for_decoding

SIZES = [7, 0, 9, 3]
BAD = 5  # the number of an image that is none, in the midst of a batch


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Codes of images, one of which could not be used."""
    folder = tmp_path_factory.mktemp("back")
    images = crops_of_photos(sum(SIZES))
    images[BAD] = b"no image"
    make_model(folder / "model")
    write_shards_of(folder / "shards", images, SIZES)
    (folder / "files").mkdir()
    for number, data in enumerate(images):
        (folder / "files" / f"{number:05d}.jpg").write_bytes(data)
    run(folder, bad_samples="skip")
    return folder


@pytest.fixture(scope="module")
def direct(root) -> torch.Tensor:
    """What a script makes of the files, in the same batches: encoded and decoded at once."""
    model, side, first, made = VQRAE.from_pretrained(root / "model"), 32, 0, []
    for size in SIZES:
        for start in range(first, first + size, BATCH):
            numbers = [n for n in range(start, min(start + BATCH, first + size)) if n != BAD]
            files = [root / "files" / f"{number:05d}.jpg" for number in numbers]
            images = torch.stack([load_image(path, image_size=side) for path in files])
            with torch.no_grad():
                made.append(model.decode_from_indices(model.encode_to_indices(images)))
        first += size
    return torch.cat(made)


def keys() -> list[str]:
    return [f"class/{number:05d}" for number in range(sum(SIZES)) if number != BAD]


def test_decoded_images_are_those_of_a_direct_reconstruction_bit_for_bit(root, direct):
    decode = load_for_decoding(root / "model", CPU, "fp32")
    batches = list(decoded_batches(root / "codes", decode))
    assert torch.equal(torch.cat([batch.images_B3HW for batch in batches]), direct)
    assert [key for batch in batches for key in batch.keys] == keys()
    assert [len(batch.keys) for batch in batches] == [4, 2, 4, 4, 1, 3]
    some = list(decoded_batches(root / "codes", decode, first=7, end=11))
    assert [batch.first for batch in some] == [6, 10], "whole batches, whatever is asked for"


def test_batches_are_those_of_the_places():
    numbers = np.array([0, 1, 3, 8, 9, 10, 12], np.int32)
    found = [numbers[rows].tolist() for rows in batches_of(numbers, 4)]
    assert found == [[0, 1, 3], [8, 9, 10], [12]]
    assert list(batches_of(numbers[:0], 4)) == []


def test_pictures_are_called_by_number(root, direct, tmp_path, monkeypatch, capsys):
    folders = [str(root / "model"), str(root / "codes"), str(tmp_path / "pictures")]
    tool = "tools/decode_codes.py"
    assert run_here(monkeypatch, tool, *folders, "--first", "7", "--count", "4") == 0
    assert "4 images" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"{n:09d}.png" for n in range(7, 11)] + ["keys.json"]
    assert list(json.loads((tmp_path / "pictures/keys.json").read_text()).values()) == keys()[7:11]
    for number in range(7, 11):
        with Image.open(tmp_path / "pictures" / f"{number:09d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), to_8_bits(direct[number]))
            error = np.asarray(picture) / 255 - direct[number].permute(1, 2, 0).numpy()
        assert np.abs(error).max() <= 0.5 / 255 + 1e-6
    assert run_here(monkeypatch, tool, *folders) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([*folders[:2], str(tmp_path / "new"), "--count", "-1"], "--count -1"),
        ([*folders[:2], str(tmp_path / "new"), "--first", "18"], "codes has 18 images"),
        ([folders[0], str(tmp_path / "empty"), str(tmp_path / "new")], "has no job.json"),
        ([str(tmp_path / "empty"), *folders[1:]], "config.json does not exist"),
    ):
        assert run_here(monkeypatch, tool, *arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
    model = VQRAE.from_pretrained(root / "model")
    model.out_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert run_here(monkeypatch, tool, str(tmp_path / "other"), *folders[1:]) == 2
    assert "codes of another model" in capsys.readouterr().err


def test_items_are_sequences_row_by_row(root):
    codes = CodeDataset(root / "codes")
    assert (len(codes), codes.grid, codes.num_codes) == (sum(SIZES) - 1, (4, 4), 64)
    decode = load_for_decoding(root / "model", CPU, "fp32")
    images = torch.cat([batch.images_B3HW for batch in decoded_batches(root / "codes", decode)])
    for number in (0, 5, 6, 14, 17):
        item = codes[number]
        assert (item.dtype, item.shape) == (torch.int64, (16,))
        assert codes.key(number) == keys()[number]
        torch.testing.assert_close(decode(item.view(1, 4, 4))[0], images[number])
    with pytest.raises(IndexError):
        codes[len(codes)]
    assert torch.equal(pickle.loads(pickle.dumps(codes))[3], codes[3])


def test_batches_have_every_image_once_an_epoch_and_resume_anywhere(root):
    codes = CodeDataset(root / "codes")
    number_of = {codes[n].numpy().tobytes(): n for n in range(len(codes))}
    assert len(number_of) == len(codes), "no two are alike"

    def numbers(rank: int, world_size: int, start: int, batches: int, **options) -> list[list[int]]:
        how = {"batch_size": 3, "seed": 1, "start": start}
        stream = code_batches(codes, rank=rank, world_size=world_size, **how, **options)
        return [[number_of[row.numpy().tobytes()] for row in next(stream)] for _ in range(batches)]

    whole = [n for batch in numbers(0, 1, 0, 12) for n in batch]
    epochs = whole[:18], whole[18:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(18)) and epochs[0] != epochs[1]
    ranks = [numbers(rank, 2, 0, 6) for rank in range(2)]
    together = [n for pair in zip(*ranks, strict=True) for batch in pair for n in batch]
    assert together == whole
    assert [n for batch in numbers(0, 1, 7, 5) for n in batch] == whole[7:22]
    assert numbers(1, 2, 6, 3, num_workers=1) == ranks[1][1:4]


def test_a_file_that_changed_is_refused(root, tmp_path):
    folder = tmp_path / "codes"
    shutil.copytree(root / "codes", folder)
    file = folder / "codes-000002.safetensors"
    data = file.read_bytes()
    (folder / "codes-000003.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="codes-000003.safetensors is not the file that manifest"):
        CodeDataset(folder)[17]
    file.write_bytes(data[:-1] + b"?")
    decode = load_for_decoding(root / "model", CPU, "fp32")
    with pytest.raises(ValueError, match="codes-000002.safetensors was altered"):
        list(decoded_batches(folder, decode))


def test_an_unfinished_folder_is_refused(root, tmp_path):
    (tmp_path / "job.json").write_bytes((root / "codes/job.json").read_bytes())
    with pytest.raises(ValueError, match="has no manifest.json.*some are not there yet"):
        CodeDataset(tmp_path)

"""The command line of tokenizing: what it says, and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.tokenizing import crops_of_photos, make_model, run, run_here, task_of, write_shards_of
from vqrae_ds.config import DataConfig
from vqrae_ds.tokenizing.folder import code_path

SIZES = [6, 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, shards and their codes."""
    folder = tmp_path_factory.mktemp("tool")
    make_model(folder / "model")
    write_shards_of(folder / "shards", crops_of_photos(sum(SIZES)), SIZES)
    run(folder)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "shards", "out"], "nothing has no config.json"),
        (["model", "nothing", "out"], "nothing has no index.json"),
        (["model", "shards", "model/config.json"], "is no folder"),
        (["model", "shards", "out", "--batch-size", "0"], "--batch-size 0"),
        (["model", "shards", "out", "--num-workers", "-1"], "num_workers = -1"),
        (["model", "shards", "out", "--dtype", "fp8"], "fp8"),
        (["model", "shards"], "OUT"),
        (["model", "shards", "out", "--image-size", "33"], "33 pixels are no multiple of 8"),
        (["model", "shards", "model"], "model is not empty"),
        (["model", "shards", "codes", "--image-size", "64"], "image_size 32 there, 64 here"),
        (["model", "shards", "out", "--verify"], "out has no job.json"),
    ],
)
def test_a_mistake_is_one_line(made, tmp_path, monkeypatch, capsys, arguments, message):
    paths = [str((tmp_path if name == "out" else made) / name) for name in arguments[:3]]
    status = run_here(monkeypatch, "tools/tokenize_shards.py", *paths, *arguments[3:])
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert message in said.err


def spoil_a_sample(root: Path) -> Path:
    """The shard whose first sample is no image any more."""
    shard = root / "shards" / "00001.tar"
    first = int(task_of(root).index.samples_of(1).offsets[0])
    data = bytearray(shard.read_bytes())
    data[first : first + 200] = bytes(200)
    shard.write_bytes(data)
    return shard


def test_a_bad_sample_ends_the_tool_and_its_workers(root):
    shard = spoil_a_sample(root)
    folders = [str(root / name) for name in ("model", "shards", "new")]
    done = run_python("tools/tokenize_shards.py", *folders, "--num-workers", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {shard}, sample 'class/00006': cannot decode" in done.stderr.splitlines()[-1]


def test_images_with_codes_and_those_skipped_are_counted_apart(root, monkeypatch, capsys):
    spoil_a_sample(root)
    folders = [str(root / name) for name in ("model", "shards", "new")]
    options = ["--bad-samples", "skip", "--num-workers", "0"]
    assert run_here(monkeypatch, "tools/tokenize_shards.py", *folders, *options) == 0
    assert "rank 0: 2 shards, 8 images, 1 skipped; all is there: 8 im" in capsys.readouterr().out


def test_limits_of_a_folder_hold_when_it_is_verified(root, monkeypatch, capsys):
    tool = "tools/tokenize_shards.py"
    folders = [str(root / name) for name in ("model", "shards", "new")]
    limits = ["--max-image-pixels", "50000", "--max-image-bytes", "1000000"]
    assert run_here(monkeypatch, tool, *folders, *limits, "--num-workers", "0") == 0
    assert run_here(monkeypatch, tool, *folders, "--verify") == 0
    assert "intact: 9 images" in capsys.readouterr().out
    assert run_here(monkeypatch, tool, *folders, "--verify", "--max-image-pixels", "99") == 2
    assert "max_image_pixels 50000 there, 99 here" in capsys.readouterr().err


def test_help_shows_an_example():
    done = run_python("tools/tokenize_shards.py", "--help")
    assert done.returncode == 0
    assert "python tools/tokenize_shards.py runs/model data/train codes/train" in done.stdout
    for name in ("max_image_bytes", "max_image_pixels"):
        default = DataConfig.model_fields[name].default
        assert f"(default: {default}; with --verify that of OUT)" in " ".join(done.stdout.split())


def test_the_tool_tokenizes_and_says_what_is_there(root, monkeypatch, capsys):
    tool = "tools/tokenize_shards.py"
    shutil.rmtree(root / "codes")
    paths = [str(root / name) for name in ("model", "shards", "codes")]
    assert run_here(monkeypatch, tool, *paths, "--num-workers", "2", "--local_rank=0") == 0
    assert f"rank 0: 2 shards, {sum(SIZES)} images; all is there" in capsys.readouterr().out
    assert run_here(monkeypatch, tool, *paths, "--verify") == 0
    assert capsys.readouterr().out.startswith(f"intact: {sum(SIZES)} images, {sum(SIZES) * 16} c")
    code_path(root / "codes", 0).unlink()
    assert run_here(monkeypatch, tool, *paths, "--verify") == 1
    assert "codes-000000.safetensors" in capsys.readouterr().out
    manifest = root / "codes" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    assert run_here(monkeypatch, tool, *paths, "--verify") == 2
    assert "its seal is broken" in capsys.readouterr().err

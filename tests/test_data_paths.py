"""What names the data: patterns, lists, text files, and no folder twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.config_files import dry_run, refusal, write_files
from tests.test_data_indexing import make_shards
from tests.tiny import make_run, save_initial
from vqrae_ds.config import DataConfig, read_run
from vqrae_ds.config.data_paths import data_folders, expand_folders, expand_paths
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader, open_index


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folders of shards, 6, 3 and 1 samples."""
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 4), ("b", 3), ("c", 2)):
        index_shards(make_shards(tmp_path / name, number))
    return tmp_path


def test_a_dry_run_finds_that_a_folder_has_no_index(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    validation = f"data.validation={tmp_path / 'photos'}"
    write_files(tmp_path, validation)
    line = refusal(tmp_path)
    assert line.startswith(f"data.validation: {tmp_path / 'photos'} has no index.json")
    assert line.endswith("by `python tools/make_shards.py IMAGES OUT`")
    with pytest.raises(ValueError, match="no .tar file lies there; a folder of images becomes"):
        index_shards(tmp_path / "photos")
    streamed = "data.train=https://example.org/{0..3}.tar"
    write_files(tmp_path, "data.streaming={}", streamed)
    done = dry_run(tmp_path)
    assert done.status == 0, done.errors


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("a", ["a"]),
        ("{c,a}", ["c", "a"]),
        (["b", "{c,a}"], ["b", "c", "a"]),
        ("some.txt", ["b", "c", "a"]),
        (["c", "more.txt"], ["c", "b"]),
    ],
)
def test_all_that_is_named_is_one_data_set(
    folders: Path, named: str | list[str], expected: list[str]
) -> None:
    Path("some.txt").write_text("# a remark\nb\n\n  {c,a}\n")
    Path("more.txt").write_text("b")
    data = DataConfig(train=named)
    assert list(data_folders(data).values()) == expected
    index = open_index(data.train, data, Reader(0, 1))
    assert list(dict.fromkeys(shard.folder.name for shard in index.shards)) == expected
    assert index.num_samples == sum({"a": 6, "b": 3, "c": 1}[name] for name in expected)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("{a,a}", "data.train names a twice"),
        (["a", "b", "a"], "data.train names a twice"),
        (["a", "some.txt"], "data.train names a twice"),
        (["a", "./a"], "names one folder twice, a and ./a"),
        (["link", "a"], "names one folder twice, link and a"),
        ("gone.txt", 'data.train = "gone.txt" cannot be read .*a text file with a path a line'),
        ("empty.txt", "is a file without any path"),
        ("lists.txt", "a list of lists is not read"),
        ("latin.txt", 'data.train = "latin.txt" cannot be read'),
    ],
)
def test_what_is_named_twice_or_cannot_be_read_is_refused(
    folders: Path, named: str | list[str], message: str
) -> None:
    Path("link").symlink_to("a")
    Path("some.txt").write_text("b\na\n")
    Path("empty.txt").write_text("# nothing\n\n")
    Path("lists.txt").write_text("some.txt\n")
    Path("latin.txt").write_bytes(b"\xe9\n")
    data = DataConfig(train=named)
    for read in (lambda: data_folders(data), lambda: open_index(data.train, data, Reader(0, 1))):
        with pytest.raises(ValueError, match=message):
            read()


def test_streamed_shards_are_expanded_by_their_text_alone(folders: Path) -> None:
    Path("urls.txt").write_text("s3://bucket/{000..002}.tar\nhttps://host/0.tar\n")
    urls = [f"s3://bucket/00{n}.tar" for n in range(3)] + ["https://host/0.tar"]
    assert expand_paths("data.train", "urls.txt") == urls
    with pytest.raises(ValueError, match="data.train names s3://bucket/001.tar twice"):
        data_folders(DataConfig(train=["urls.txt", "s3://bucket/001.tar"], streaming={}))
    assert expand_folders("data.validation", "b") == ["b"]


def test_a_recipe_names_several_folders(folders: Path) -> None:
    save_initial(folders / "initial")
    run = make_run(folders, 1, data={"train": ["a", "b"], "validation": "c"})
    assert run.config.data.train == ["a", "b"]
    files = folders / "config.yaml", folders / "deepspeed.json"
    again = read_run(*files, overrides=["data.train=[c, b]"], world_size=2)
    assert again.config.data.train == ["c", "b"]
    for value, message in (
        ([], r"data.train = \[\] must be text, or a list of texts that are not empty"),
        (["a", ""], r'data.train = \["a", ""\] must be text, or a list of texts'),
        (["a", 3], r'data.train = \["a", 3\] must be text, or a list of texts'),
        (7, "data.train = 7 must be text, or a list of texts"),
        ("", 'data.train = "" must be text that is not empty'),
        (["a", "gone"], r'data.train \(2\) = "gone" does not exist'),
        (["a", "a"], "data.train names a twice"),
    ):
        raw = yaml.safe_load(files[0].read_text())
        raw["data"]["train"] = value
        (folders / "wrong.yaml").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=message):
            read_run(folders / "wrong.yaml", files[1], world_size=2)
